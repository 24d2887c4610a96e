"""Gradients of several processes against that of one: what test_gradcache.py runs on its ranks.
They are given what one process computed on the whole batch, the plain way; rank 0 writes how far
each rank's gradient is from it in each setting."""

import copy
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from checks import distance, shorten, toy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

import contrastive
import evaluate
import model
import plumbing.ranks
import pretrain
from data import IMAGE, Item, Pair, read_dialogues
from plumbing import sharding
from plumbing.formats import Lazy
from plumbing.memory import Budget, token_chunks
from plumbing.ranks import gather_objects, rank, sum_gradients, world
from toy.world import COLORS, SHAPES, Scene

TEMPERATURE = 0.1
SOME = Budget(chunk_tokens=200)  # several rows a chunk, several chunks; one graph kept
MOST = 10**6  # a budget, and a number of graphs, that takes everything


# ------------------------------------------------------------------------------------------ a batch


def picture_pair(i):
    """A picture -> one or two captions, with 0-2 hard negatives, one of them a picture; 1 and 4
    have the same caption."""
    scene = read_dialogues(seed=1)[1 if i == 4 else i].item.images[0]
    targets = [Item(scene.describe()), Item("a picture of " + scene.describe())]
    crop = Scene(scene.objects[:1], view=scene.objects[0].place)
    negatives = [Item(f"a small {color} cross") for color in list(COLORS)[: i % 3]]
    negatives = [Item(IMAGE, (crop,))] if i == 5 else negatives
    query = Item(f"{IMAGE} which text?" if i % 2 else IMAGE, (scene,))
    return Pair(query, tuple(targets[: 1 + (i % 3 == 0)]), tuple(negatives))


def word_pair(i):
    """Text alone; three colours for six questions, so that targets repeat; 0 is its own answer."""
    color = list(COLORS)[i % 3]
    text = f"{'what color is ' * i}the {color} {SHAPES[i % 5]}?"
    return Pair(Item(text if i else color), (Item(color),))


PAIRS = {"pictures": Lazy(6, picture_pair), "words": Lazy(6, word_pair)}


@functools.cache
def batch_config():
    """16 pairs: two blocks of 4 with pictures, then two of text alone: the last rank sees no
    picture."""
    for seed in itertools.count():
        cfg = contrastive.Config(batch=16, block=4, seed=seed)
        names = [name for name, _ in contrastive.draw(PAIRS, cfg, 0)]
        if names == ["pictures"] * 8 + ["words"] * 8:
            return cfg


def batch_of(embedder, rank=0, world=1) -> contrastive.Batch:
    return contrastive.local_batch(PAIRS, embedder.collate, batch_config(), 0, rank, world)


# ------------------------------------------------------------------------------------ what is run


class Result(NamedTuple):
    """What a step computed."""

    loss: float
    top1: float
    grad: torch.Tensor  # all of it, flat
    columns: int = 0
    chunk_tokens: int = 0
    queries: int = 0  # of this rank
    sums: int = 0  # messages that sum gradients over ranks


FLAGS = {
    "all": {},
    "frozen": {"freeze_vision": True},
    "lora": {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0},
}


def build(trained="all", dtype=torch.float64, **more):
    """An embedder of which everything, all but the vision tower, or a LoRA adapter is trained."""
    flags = {**FLAGS[trained], **more}
    embedder = shorten(toy()).to(dtype)
    model.choose_trained(embedder, contrastive.Config(model="toy-random", **flags))
    torch.manual_seed(2)
    for name, p in embedder.named_parameters():
        if "lora_B" in name:  # zero at the start: then lora_A would have no gradient
            p.data.normal_(std=0.1)
    return embedder


def gradient(embedder):
    """All gradients in one vector; zeros where there is none."""
    parts = []
    for p in embedder.parameters():
        if p.requires_grad:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad  # sharded
            parts.append(grad.flatten())
    return torch.cat(parts)


def plain_loss(z, batch):
    """InfoNCE the dense way, from the embeddings of B queries and then all targets. -> (loss,
    top1)."""
    labels, keys = batch.labels, batch.keys
    B = len(labels)
    scores = z[:B] @ z[B:].T / TEMPERATURE
    nats, hits = [], 0
    for i in range(B):
        mine = labels[i][labels[i] >= 0]
        negative = scores[i][~torch.isin(keys, keys[mine]).any(1)]
        each = []
        for p in mine:
            all_of_it = torch.cat([scores[i, p : p + 1], negative])
            each.append(all_of_it.logsumexp(0) - scores[i, p])
        nats.append(torch.stack(each).mean())
        hits += int((scores[i, mine].max() > negative).all())
    return torch.stack(nats).mean(), hits / B


def from_embeddings(embedder, z, batch) -> Result:
    """One loss and one backward pass from z, which has the graph of all rows."""
    loss, top1 = plain_loss(z, batch)
    embedder.zero_grad(set_to_none=True)
    loss.backward()
    return Result(loss.item(), top1, gradient(embedder), columns=len(batch.keys))


def whole_batch(embedder) -> Result:
    """One forward pass of all rows, one loss, one backward pass."""
    batch = batch_of(embedder)
    return from_embeddings(embedder, embedder(embedder.collate.pad_rows(batch.rows)), batch)


def step(embedder, batch, budget=SOME) -> Result:
    """contrastive.gradcache_step on one rank's batch."""
    embedder.zero_grad(set_to_none=True)
    out = contrastive.gradcache_step(embedder, batch, TEMPERATURE, budget)
    grad, queries = gradient(embedder), len(batch.labels)
    return Result(out.loss, out.top1, grad, out.columns, out.chunk_tokens, queries)


def forwards(batch, budget) -> int:
    """How many chunks a batch has."""
    return len(token_chunks([row.length for row in batch.rows], budget.chunk_tokens))


def out_of_memory(embedder, number):
    """Inside, forward pass number `number` (from 0) finds no memory; the others do."""
    forward, counted = embedder.forward, itertools.count()

    def short_of_memory(inputs):
        if next(counted) == number:
            raise torch.OutOfMemoryError("no memory")
        return forward(inputs)

    return mock.patch.object(embedder, "forward", short_of_memory)


def answers(embedder, rank=0, world=1, sum_gradients=sum_gradients) -> Result:
    """pretrain.accumulate, as a training step does it, on eight dialogues of 1 to 5 questions."""
    embedder.zero_grad(set_to_none=True)
    examples = []
    for i in range(rank, 8, world):
        d = read_dialogues()[i]
        examples.append(pretrain.Example(embedder.collate.row(d.item, d.turns[: 1 + 2 * (i % 3)])))
    loss, right, _ = pretrain.accumulate(embedder, examples, 250)
    sum_gradients(embedder.parameters())
    return Result(loss, right, gradient(embedder))


def encodings(embedder) -> Result:
    """evaluate.encode_over_ranks of a few items, in the place of a gradient."""
    items = []
    for i in range(3):
        pair = picture_pair(i)
        items += [pair.query, *pair.targets]
    z = evaluate.encode_over_ranks(embedder, items, evaluate.Config(), "")
    return Result(0.0, 0.0, torch.from_numpy(z))


# ------------------------------------------------------------------------------------- the settings


def contrast(embedder, budget=SOME) -> Result:
    """A step on this rank's share."""
    return step(embedder, batch_of(embedder, rank(), world()), budget)


def unequal_share(embedder) -> contrastive.Batch:
    """The global batch over ranks that get 1, 2, ... queries, and the last one all others."""
    first = rank() * (rank() + 1) // 2
    last = 16 if rank() == world() - 1 else first + rank() + 1
    chosen = contrastive.draw(PAIRS, batch_config(), 0)[first:last]
    cfg = copy.copy(batch_config())
    cfg.batch = len(chosen)  # a share may be one pair, a batch may not
    with mock.patch.object(contrastive, "draw", lambda *_: chosen):
        return contrastive.local_batch(PAIRS, embedder.collate, cfg, 0, 0, 1)


def counted(run, module, name) -> Result:
    """What run() gives, and how often it called a function on the way."""
    with mock.patch.object(module, name, side_effect=getattr(module, name)) as calls:
        result = run()
    return result._replace(sums=calls.call_count)


def contrast_in_buckets(embedder) -> Result:
    """Gradients are summed in messages of about 50,000 numbers."""
    small = functools.partial(sum_gradients, bucket=50_000)
    with mock.patch.object(plumbing.ranks, "sum_gradients", small):
        return counted(lambda: contrast(embedder), torch.distributed, "all_reduce")


def contrast_sharded(embedder) -> Result:
    sharding.shard(embedder)
    return counted(lambda: contrast(embedder), _fsdp_param_group, "foreach_reduce")


def contrast_short_of_memory(embedder, in_pass) -> Result:
    """Rank 1 alone finds no memory for the second chunk of a pass; no rank keeps a graph."""
    budget = SOME._replace(keep_graphs=0)
    batch = batch_of(embedder, rank(), world())
    number = 1 if in_pass == 1 else forwards(batch, budget) + 1
    with out_of_memory(embedder, number if rank() == 1 else -1):
        return step(embedder, batch, budget)


def answers_of_rank(embedder, sum_gradients=sum_gradients) -> Result:
    return answers(embedder, rank(), world(), sum_gradients)


def wrong_mean(parameters):
    """The typical mistake: the mean over ranks of gradients that already are divided by N."""
    parameters = list(parameters)
    sum_gradients(parameters)
    for p in parameters:
        if p.requires_grad:
            p.grad /= world()


def wrong_local(grad, counts):
    """The typical mistake: the gradient that other ranks have for my targets never comes home."""
    return grad.split(counts)[rank()]


def with_mistake(embedder, name, wrong) -> Result:
    with mock.patch.object(plumbing.ranks, name, wrong):
        return contrast(embedder)


class Setting(NamedTuple):
    reference: str  # what one process must have got
    run: Callable  # embedder -> Result


SETTINGS = {
    "one chunk at a time": Setting("all", lambda e: contrast(e, Budget(1, 0))),
    "chunks, one graph kept": Setting("all", contrast),
    "unequal queries": Setting("all", lambda e: step(e, unequal_share(e))),
    "several buckets": Setting("all", contrast_in_buckets),
    "everything in one chunk": Setting("all", lambda e: contrast(e, Budget(MOST))),
    "float32": Setting("all, float32", contrast),
    "frozen vision, cached": Setting("frozen", lambda e: contrast(e, Budget(200, 1, "device"))),
    "LoRA": Setting("lora", lambda e: contrast(e, Budget(200, 0, "host"))),
    "out of memory in pass 1": Setting("all", lambda e: contrast_short_of_memory(e, 1)),
    "out of memory in pass 2": Setting("all", lambda e: contrast_short_of_memory(e, 2)),
    "stage 1": Setting("answers", answers_of_rank),
    "encode": Setting("encode", encodings),
    "wrong: mean over ranks": Setting(
        "all", lambda e: with_mistake(e, "sum_gradients", wrong_mean)
    ),
    "wrong: targets' gradient stays": Setting(
        "all", lambda e: with_mistake(e, "scatter_sum", wrong_local)
    ),
    "wrong: stage 1, mean over ranks": Setting("answers", lambda e: answers_of_rank(e, wrong_mean)),
    # Last: it changes the embedder, and where ranks differ in their calls it ends the run.
    "sharded": Setting("all", contrast_sharded),
}


POLICIES = {  # of FSDP on a GPU
    "bfloat16": sharding.PRECISION,
    "wrong: sums in bfloat16": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
}
build_once = functools.cache(build)


def built(reference):
    """The embedder that a setting runs on; a step leaves it as it was."""
    if reference in FLAGS:
        return build_once(reference)
    return build_once(dtype=torch.float32)


def references() -> dict:
    """What one process gets, the plain way: {a setting's `reference`: Result}."""
    results = {name: whole_batch(built(name)) for name in (*FLAGS, "all, float32")}
    results["answers"] = answers(built("answers"))
    results["encode"] = encodings(built("encode"))
    return results


# ------------------------------------------------------------------------------ what each rank does


def unlike_shares() -> dict:
    """In what ranks must differ, or the settings would be too easy."""
    batch = batch_of(built("all"), rank(), world())
    pictures = sum(bool(row.images) for row in batch.rows)
    return {"columns": len(batch.keys), "chunks": forwards(batch, SOME), "pictures": pictures}


def gaps(got, want) -> dict:
    """How far this rank's result is from that of one process."""
    return {
        "loss": abs(got.loss - want.loss),
        "top1": abs(got.top1 - want.top1),
        "gap": distance(got.grad, want.grad),
        "chunk_tokens": got.chunk_tokens,
        "queries": got.queries,
        "sums": got.sums,
    }


def error_of_sums(policy, chunks) -> float:
    """A sharded layer's gradient over so many chunks, in bfloat16, against sums in float64."""
    torch.manual_seed(0)
    inputs, grads = torch.randn(2, world(), chunks, 16, 32).bfloat16()  # of all ranks
    want = torch.einsum("rcno,rcni->oi", grads.double(), inputs.double()) / world()
    layer = torch.nn.Linear(32, 32, bias=False)
    mesh = init_device_mesh("cpu", (world(),))
    fully_shard(layer, mesh=mesh, mp_policy=policy)
    for i in range(chunks):
        out = layer(inputs[rank(), i])
        layer.set_requires_gradient_sync(i == chunks - 1)
        out.backward(grads[rank(), i])
    return distance(layer.weight.grad.full_tensor().double(), want)


def main(wanted, result_file):
    """On every rank. wanted: `references()` of one process."""
    plumbing.ranks.setup()
    result = {}  # name -> one dict for each rank

    def note(name, mine):
        result[name] = gather_objects(mine)
        if rank() == 0:  # at once: what is done stays where a later setting ends the run
            Path(result_file).write_text(json.dumps(result, indent=1))

    note("ranks", unlike_shares())
    for name, policy in POLICIES.items():
        note(name, {chunks: error_of_sums(policy, chunks) for chunks in (1, 96)})
    for name, setting in SETTINGS.items():
        got = setting.run(built(setting.reference))
        note(name, gaps(got, wanted[setting.reference]))
    torch.distributed.barrier()
