"""Gradients of several processes against that of one; a script that test_gradcache.py starts:

    torchrun --nproc-per-node 2 tests/ranks.py REFERENCES.pt RESULT.json

REFERENCES.pt holds what one process computed on the whole batch, the plain way; rank 0 writes how
far each setting's gradient is from it, on the rank where it is farthest."""

import itertools
import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent)]

from checks import distance, toy  # noqa: E402

import contrastive  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402
from data import IMAGE, Item, Lazy, Pair  # noqa: E402
from shapes import COLORS, SHAPES, Scene, Shapes  # noqa: E402

TEMPERATURE = 0.1
LORA = dict(lora_rank=4, lora_alpha=8, lora_dropout=0.0)


# ------------------------------------------------------------------------------------------ a batch


def picture_pair(i):
    """A picture -> one or two captions, with 0-2 hard negatives, one of them a picture; 1 and 4
    have the same caption."""
    scene = Shapes(seed=1).dialogue(1 if i == 4 else i).item.images[0]
    targets = [Item(scene.describe()), Item("a picture of " + scene.describe())]
    crop = Scene(scene.objects[:1], view=scene.objects[0].place)
    negatives = [Item(f"a small {c} cross") for c in list(COLORS)[: i % 3]]
    negatives = [Item(IMAGE, (crop,))] if i == 5 else negatives
    query = Item(IMAGE + " which text?" * (i % 2), (scene,))
    return Pair(query, tuple(targets[: 1 + (i % 3 == 0)]), tuple(negatives))


def word_pair(i):
    """Text alone; three colours for six questions, so that targets repeat; 0 is its own answer."""
    color = list(COLORS)[i % 3]
    text = f"{'what color is ' * i}the {color} {SHAPES[i % 5]}?"
    return Pair(Item(text if i else color), (Item(color),))


PAIRS = {"pictures": Lazy(6, picture_pair), "words": Lazy(6, word_pair)}


def batch_config():
    """16 pairs: two blocks of 4 with pictures, then two of text alone: the last rank sees no
    picture."""
    for seed in itertools.count():
        cfg = contrastive.Config(batch=16, block=4, seed=seed)
        names = [name for name, _ in contrastive.draw(PAIRS, cfg, 0)]
        if names == ["pictures"] * 8 + ["words"] * 8:
            return cfg


def batch_of(embedder, rank=0, world=1):
    return contrastive.local_batch(PAIRS, embedder.collate, batch_config(), 0, rank, world)


# ------------------------------------------------------------------------------------- the settings


def build(trained="all", dtype=torch.float64, lora_dropout=0.0, **more):
    """An embedder of which everything, all but the vision tower, or a LoRA adapter is trained."""
    flags = {"all": {}, "frozen": dict(freeze_vision=True), "lora": LORA}[trained]
    flags = flags | dict(lora_dropout=lora_dropout) | more
    embedder = toy().to(dtype)
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
            parts.append((grad.full_tensor() if hasattr(grad, "full_tensor") else grad).flatten())
    return torch.cat(parts).clone()


def plain_loss(z, labels, keys, temperature=TEMPERATURE):
    """InfoNCE the dense way, from the embeddings of B queries and then all targets. -> (loss,
    top1)."""
    B = len(labels)
    scores = z[:B] @ z[B:].T / temperature
    nats, hits = [], 0
    for i in range(B):
        mine = labels[i][labels[i] >= 0]
        negative = scores[i][~torch.isin(keys, keys[mine])]
        each = [
            torch.cat([scores[i, p : p + 1], negative]).logsumexp(0) - scores[i, p] for p in mine
        ]
        nats.append(torch.stack(each).mean())
        hits += int((scores[i, mine].max() > negative).all())
    return torch.stack(nats).mean(), hits / B


def whole_batch(embedder):
    """One forward pass of all rows, one loss, one backward pass. -> dict(loss, top1, grad)."""
    batch = batch_of(embedder)
    z = embedder(embedder.collate.pad_rows(batch["rows"]))
    loss, top1 = plain_loss(z, batch["labels"], batch["keys"])
    embedder.zero_grad(set_to_none=True)
    loss.backward()
    return dict(loss=loss.item(), top1=top1, grad=gradient(embedder))


def step(embedder, batch, chunk_tokens=200, **how):
    """contrastive.gradcache_step on one rank's batch. -> dict(loss, top1, columns, grad)."""
    embedder.zero_grad(set_to_none=True)
    out = contrastive.gradcache_step(
        embedder, batch["rows"], batch["labels"], batch["keys"], TEMPERATURE, chunk_tokens, **how
    )
    return out | dict(grad=gradient(embedder))


def answer_rows(embedder):
    """Eight dialogues of 1 to 5 questions."""
    dialogues = [Shapes().dialogue(i) for i in range(8)]
    turns = [d.turns[: 1 + 2 * (i % 3)] for i, d in enumerate(dialogues)]
    return [
        dict(row=embedder.collate.row(d.item, t)) for d, t in zip(dialogues, turns, strict=True)
    ]


def answers(embedder, rank=0, world=1, sum_gradients=model.sum_gradients):
    """pretrain.accumulate, as a training step does it. -> dict(loss, top1, grad)."""
    embedder.zero_grad(set_to_none=True)
    rows = answer_rows(embedder)[rank::world]
    loss, right, _ = pretrain.accumulate(embedder, rows, pretrain.Config(chunk_tokens=250))
    sum_gradients(embedder.parameters())
    return dict(loss=loss, top1=right, grad=gradient(embedder))


def encodings(embedder):
    """evaluate.encode_sharded of a few items, as "grad"."""
    items = [x for i in range(3) for x in (picture_pair(i).query, *picture_pair(i).targets)]
    z = evaluate.encode_sharded(embedder, items, evaluate.Config(), "")
    return dict(loss=0.0, top1=0.0, grad=torch.from_numpy(z))


def references():
    """What one process gets, the plain way; for each setting of `SETTINGS` the one it must meet."""
    narrow, wide = build(dtype=torch.float32), build()
    return dict(
        all=whole_batch(wide), all32=whole_batch(narrow), frozen=whole_batch(build("frozen")),
        lora=whole_batch(build("lora")), answers=answers(narrow), encode=encodings(narrow),
    )  # fmt: skip


# ----------------------------------------------------------------------------- the script of a rank


def wrong_mean(parameters):
    """The typical mistake: the mean over ranks of gradients that already are divided by N."""
    parameters = list(parameters)
    sum_gradients(parameters)
    for p in parameters:
        if p.requires_grad:
            p.grad /= model.world()


def wrong_local(grad, counts):
    """The typical mistake: the gradient that other ranks have for my targets never comes home."""
    return grad.split(counts)[model.rank()]


def with_mistake(module, name, wrong, run, embedder):
    right = getattr(module, name)
    setattr(module, name, wrong)
    try:
        return run(embedder)
    finally:
        setattr(module, name, right)


def contrast(embedder, **how):
    return step(embedder, batch_of(embedder, model.rank(), model.world()), **how)


def sharded(embedder):
    model.shard(embedder)
    return contrast(embedder)


sum_gradients = model.sum_gradients
SETTINGS = {  # name -> (reference, what is built, what is run)
    "one chunk at a time": ("all", {}, partial(contrast, chunk_tokens=1, keep=0)),
    "chunks, one graph kept": ("all", {}, contrast),
    "everything in one chunk": ("all", {}, partial(contrast, chunk_tokens=10**6)),
    "float32": ("all32", dict(dtype=torch.float32), contrast),
    "frozen vision, cached": (
        "frozen",
        dict(trained="frozen"),
        partial(contrast, vision_cache="device"),
    ),
    "LoRA": ("lora", dict(trained="lora"), partial(contrast, vision_cache="host", keep=0)),
    "stage 1": (
        "answers",
        dict(dtype=torch.float32),
        lambda e: answers(e, model.rank(), model.world()),
    ),
    "encode": ("encode", dict(dtype=torch.float32), encodings),
    "wrong: mean over ranks": (
        "all", {}, partial(with_mistake, model, "sum_gradients", wrong_mean, contrast),
    ),
    "wrong: targets' gradient stays": (
        "all", {}, partial(with_mistake, contrastive, "scatter_sum", wrong_local, contrast),
    ),
    "wrong: stage 1, mean over ranks": (
        "answers", dict(dtype=torch.float32),
        lambda e: answers(e, model.rank(), model.world(), wrong_mean),
    ),
    "sharded": ("all", {}, sharded),  # last: where ranks differ in their calls it ends the run
}  # fmt: skip


def main(references_file, result_file):
    torch.set_num_threads(1)
    model.setup()
    model.say = lambda *text: None
    wanted, result = torch.load(references_file), {}

    def note(name, mine, merge):
        everyone = model.gather_objects(mine)
        result[name] = {k: merge([x[k] for x in everyone]) for k in mine}
        if model.rank() == 0:
            Path(result_file).write_text(json.dumps(result, indent=1))

    batch = batch_of(build(), model.rank(), model.world())
    chunks = model.token_chunks([len(r["tokens"]["input_ids"]) for r in batch["rows"]], 200)
    pictures = sum(bool(r["images"]) for r in batch["rows"])
    note("ranks", dict(columns=len(batch["keys"]), chunks=len(chunks), pictures=pictures), list)
    for name, (reference, what, run) in SETTINGS.items():
        got, want = run(build(**what)), wanted[reference]
        mine = {k: abs(got[k] - want[k]) for k in ("loss", "top1")}
        note(name, mine | dict(gap=distance(got["grad"], want["grad"])), max)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
