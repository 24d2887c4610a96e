"""Stage 2, contrastive learning (VLM2Vec, arXiv 2410.05160, section 3; CoMa, section 3.2).

    torchrun contrastive.py                                        the toy world
        (two cores: 2.7 minutes, 81 % of the queries nearest to their own of 128 targets)
    python contrastive.py --explain                                one small batch, in numbers
    torchrun --nproc-per-node 2 contrastive.py --data MMEB-train   a folder in MMEB's layout
    torchrun --nproc-per-node 8 contrastive.py --model out/pretrain --batch 1024   see the README

A query and its target become unit vectors z; InfoNCE makes the target the nearest of all targets in
the batch. The more of them the better, so the batch is far larger than what fits through the model
at once. GradCache (Gao et al., arXiv 2101.06983) makes that exact: embed everything without a
graph, take the loss' gradient with respect to the *embeddings*, embed again, in chunks, with a
graph.

Reads pairs; writes OUT/ (a transformers folder), OUT/log.jsonl, OUT/checkpoints.
"""

import dataclasses
import importlib
import itertools
import math
import random
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import model
from data import InputError, read_pairs, ready
from model import flag

KEEP_GRAPHS = dict(cpu=24, cuda=1)


@dataclass
class Config(model.Config):
    """Flags of stage 2."""

    model: str = flag("", "toy, a folder, or a hub id; empty: out/pretrain, else toy")
    out: str = flag("out/contrastive", "folder for the model, log.jsonl and checkpoints")
    steps: int = flag(200, "optimiser steps")
    batch: int = flag(128, "pairs a step, over all ranks: the loss sees them all")
    block: int = flag(32, "consecutive pairs of the batch that come from one data set")
    subsets: str = flag("", "data sets and caps, ImageNet_1K:100000,CIRR, or mmeb20; empty: all")
    split: str = flag("original", "of MMEB-train", ["original", "diverse_instruction"])
    temperature: float = flag(0.03, "tau; cosines are divided by it")
    mask_false_negatives: bool = flag(True, "equal targets are no negatives of each other")
    keep_graphs: int | None = flag(None, f"chunks that run once; default: {KEEP_GRAPHS}")
    vision_cache: str = flag("device", "keeps a frozen tower's output", ["device", "host", "off"])
    merge: bool = flag(True, "fold stage 1's adapter into the weights first, as the paper does")
    fsdp: bool = flag(False, "shard weights, gradients and optimiser over the ranks (FSDP2)")
    explain: bool = flag(False, "walk through one small batch in numbers, and train nothing")


# ---------------------------------------------------------------------------------------- the idea


def info_nce_rows(q, t, labels, keys, temperature):
    """VLM2Vec's Eq. (1) for b queries: -log e^(q.t+ / tau) / (e^(q.t+ / tau) + sum over t-).

    q (b, D), t (M, D), labels (b, P) columns of the positives, -1 where a query has fewer than P,
    keys (M,): a column with the key of one of my positives is not my negative.
    -> (nats (b,), mean over positives; hit (b,), whether a positive beats all negatives)."""
    with torch.autocast(q.device.type, enabled=False):  # float32, or 64: bfloat16 has 3 digits
        scores = q @ t.T / temperature  # (b, M)
    valid = labels >= 0  # (b, P)
    mine = torch.zeros_like(scores, dtype=torch.bool)  # (b, M) no negatives of this query
    for p in range(labels.shape[1]):
        mine |= (keys[None] == keys[labels[:, p]][:, None]) & valid[:, p, None]
    positive = scores.gather(1, labels.clamp(min=0))  # (b, P)
    # The lowest number, not -inf: a query without negatives has loss 0 and gradient 0.
    others = scores.masked_fill(mine, torch.finfo(scores.dtype).min)
    negative = others.logsumexp(1, keepdim=True)  # (b, 1)
    nats = -F.logsigmoid(positive - negative) * valid  # -log(e^p / (e^p + e^n))
    best = positive.masked_fill(~valid, -math.inf).amax(1)
    return nats.sum(1) / valid.sum(1), (best > others.amax(1)).detach()


def info_nce(q, t, temperature, labels=None, keys=None, block=256):
    """InfoNCE in nats, mean over queries: ln M where the embeddings carry no information.

    q (B, D) local queries, t (M, D) *all* targets, labels (B,) or (B, P) columns of the positives
    (default: i for query i), keys (M,): columns of equal key are no negatives of each other
    (default: all differ). In row blocks, whose scores the backward pass computes again: memory is
    O(M * block), never B x M. -> (loss, share of hits)."""
    labels = torch.arange(len(q), device=q.device) if labels is None else labels
    labels = labels[:, None] if labels.ndim == 1 else labels
    keys = torch.arange(len(t), device=t.device) if keys is None else keys
    nats, hits = 0.0, 0
    for rows in torch.arange(len(q), device=q.device).split(block):
        given = (q[rows], t, labels[rows], keys, temperature)
        loss, hit = checkpoint(info_nce_rows, *given, use_reentrant=False)
        nats, hits = nats + loss.sum(), hits + hit.sum()
    return nats / len(q), hits / len(q)


def loss_and_gradient(z, labels, keys, temperature, sizes):
    """The loss of the local queries against all ranks' targets, and what it says to each embedding.

    z (rows, D): B queries, then targets and negatives; sizes: (B, how many targets, their keys, _)
    of every rank. -> (mean over all ranks' queries: nats, hits; d nats / d z (rows, D))."""
    B, N, columns = len(labels), sum(s[0] for s in sizes), [s[1] for s in sizes]
    keys = torch.tensor([k for s in sizes for k in s[2]], device=z.device)
    labels = torch.where(labels >= 0, labels + sum(columns[: model.rank()]), labels).to(z.device)
    q = z[:B].requires_grad_()  # (B, D)
    t = gather_rows(z[B:], columns).requires_grad_()  # (M, D)
    loss, hits = info_nce(q, t, temperature, labels, keys)
    # Trap: the mean over all queries is the *sum* over ranks of these, B / N each.
    (loss * B / N).backward()
    loss, hits = (model.all_sum(float(x.detach()) * B) / N for x in (loss, hits))
    return loss, hits, torch.cat([q.grad, scatter_sum(t.grad, columns)])


def gradcache_step(
    embedder, rows, labels, keys, temperature, chunk_tokens, keep=1, vision_cache="off"
):
    """Leaves in `.grad` the gradient of the InfoNCE loss of all ranks' batch, exactly as if it had
    gone through the model at once (GradCache, arXiv 2101.06983).

    rows: this rank's B queries, then its targets and hard negatives; labels (B, P), -1 padded:
    where among the latter each query's positives are; keys: of the latter. Ranks may differ in all
    of it. keep: so many chunks keep their graph and are run once. vision_cache: where a frozen
    tower's output waits for pass 2, "device", "host" or "off". A chunk that does not fit into
    memory makes all ranks begin again with half the chunk_tokens.
    -> dict(loss: mean nats over all queries, top1, columns: how many targets, chunk_tokens)."""
    device, fsdp = embedder.device, model.sharded(embedder)
    chunks = model.token_chunks(model.row_lengths(rows), chunk_tokens)
    # Sharded ranks meet inside every forward: who has fewer chunks repeats one, with gradient zero.
    # In front, so that the embeddings that stay are those of the real pass.
    idle = max(model.gather_objects(len(chunks))) - len(chunks) if fsdp else 0
    chunks = chunks[:1] * idle + chunks
    first_kept, failed = len(chunks) - keep, 0
    tower = embedder.frozen_tower() if vision_cache != "off" else None
    cache, states, kept, z = {}, {}, {}, None
    fits = () if fsdp else torch.OutOfMemoryError  # a sharded rank cannot leave the others' forward

    def embed(i):
        inputs = embedder.collate.pad_rows([rows[j] for j in chunks[i]], device)
        with once(tower, cache, i, vision_cache) if tower and i < first_kept else nullcontext():
            return embedder(inputs)  # (chunk, D)

    def again():
        if chunk_tokens < max(model.row_lengths(rows)):
            raise InputError(f"out of memory at --chunk-tokens {chunk_tokens}: try half of it, "
                             "--checkpointing, or less --max-pixels")  # fmt: skip
        kept.clear(), cache.clear(), embedder.zero_grad(set_to_none=True)
        model.say(f"out of memory: --chunk-tokens {chunk_tokens} is halved from here on")
        how = (temperature, chunk_tokens // 2, keep, vision_cache)
        return gradcache_step(embedder, rows, labels, keys, *how)

    # Pass 1: every embedding, without a graph; the last chunks keep theirs and need no pass 2.
    try:
        for i, chunk in enumerate(chunks):
            states[i] = rng_state(device)
            with torch.set_grad_enabled(i >= first_kept):
                part = embed(i)
            if i >= first_kept:
                kept[i] = part
            z = part.new_empty(len(rows), part.shape[1]) if z is None else z
            z[chunk] = part.detach()
    except fits:
        failed, part = 1, None  # Trap: `part` would keep its graph while the step begins again
    sizes = model.gather_objects((len(labels), len(keys), keys.tolist(), failed))
    if any(s[3] for s in sizes):
        return again()

    # Between the passes: the loss, and its gradient with respect to every embedding.
    loss, top1, dz = loss_and_gradient(z, labels, keys, temperature, sizes)
    dz *= model.world() if fsdp else 1  # FSDP will take the mean over ranks, where we sum

    # Pass 2: the chunks again, with a graph and the same dropout: the chain rule's other half.
    try:
        for i in reversed(range(len(chunks))):
            if fsdp:
                embedder.set_requires_gradient_sync(i == 0)
            with nullcontext() if i in kept else replay(states[i], device):
                part = kept.pop(i) if i in kept else embed(i)
            part.backward(dz[chunks[i]] if i >= idle else torch.zeros_like(part))
            part = None
    except fits:
        failed, part = 1, None
    if model.all_sum(failed):
        return again()
    if not fsdp:
        model.sum_gradients(embedder.parameters())
    return dict(loss=loss, top1=top1, columns=sum(s[1] for s in sizes), chunk_tokens=chunk_tokens)


def gather_rows(x, counts):
    """Every rank's rows (n_r, D), in the order of ranks -> (sum of n_r, D). counts: the n_r."""
    if len(counts) == 1:
        return x.clone()
    out = x.new_empty(len(counts), max(counts), x.shape[1])
    dist.all_gather(list(out), F.pad(x, (0, 0, 0, max(counts) - len(x))))
    return torch.cat([part[:n] for part, n in zip(out, counts, strict=True)])


def scatter_sum(grad, counts):
    """Gradients come home: (sum of n_r, D) of every rank -> this rank's n_r rows of their sum."""
    if len(counts) == 1:
        return grad
    parts = [F.pad(g, (0, 0, 0, max(counts) - len(g))) for g in grad.split(counts)]
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts)
    return out[: counts[model.rank()]]


def rng_state(device):
    """The state of every random number generator that dropout may draw from."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


@contextmanager
def replay(state, device):
    """Runs a block with the random numbers of an earlier one. Without it dropout falls differently
    in the second pass, and the gradient is that of no loss at all."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield


@contextmanager
def once(tower, cache, key, where):
    """A frozen vision tower answers the second call for a chunk with what it said to the first. To
    wrap the tower itself takes along all that a family makes of it, Qwen3-VL's deepstack too."""
    forward, calls, home = tower.forward, itertools.count(), next(tower.parameters()).device

    def move(out, device):  # Trap: makes a new container, for the Qwens overwrite fields of theirs
        return tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), out)

    def recall(*args, **kwargs):
        at = (key, next(calls))
        if at in cache:
            return move(cache.pop(at), home)
        out = forward(*args, **kwargs)
        cache[at] = move(out, "cpu" if where == "host" else home)
        return out

    tower.forward = recall
    try:
        yield
    finally:
        del tower.forward


# ---------------------------------------------------------------------------------------- plumbing


def draw(pairs, cfg, step) -> list:
    """The global batch of a step, [(name, index)], N of them: a pure function of (seed, step), the
    same for any number of ranks. Blocks of `cfg.block` come from one data set each, which is drawn
    in proportion to its size; a set smaller than a block repeats itself in it."""
    rng = random.Random(f"{cfg.seed}/{step}")
    chosen = []
    sizes = [len(p) for p in pairs.values()]
    for name in rng.choices(list(pairs), sizes, k=cfg.batch // cfg.block):
        n = len(pairs[name])
        where = rng.sample(range(n), min(n, cfg.block))
        chosen += [(name, where[i % len(where)]) for i in range(cfg.block)]
    return chosen


def local_batch(pairs, collate, cfg, step, rank, world):
    """What `gradcache_step` takes, for one rank: its share of the batch as model inputs."""
    share = cfg.batch // world
    chosen = draw(pairs, cfg, step)[rank * share : (rank + 1) * share]
    queries, columns, labels = [], [], []
    for name, i in chosen:
        pair = pairs[name][i]
        queries.append(pair.query)
        labels.append([len(columns) + p for p in range(len(pair.targets))])
        columns += [*pair.targets, *pair.negatives]
    most = max(map(len, labels))
    labels = torch.tensor([x + [-1] * (most - len(x)) for x in labels])
    keys = [x.key if cfg.mask_false_negatives else rank * 2**40 + i for i, x in enumerate(columns)]
    rows = [collate.row(x) for x in queries + columns]
    ids = [f"{name}[{i}]" for name, i in chosen]
    return dict(rows=rows, labels=labels, keys=torch.tensor(keys), ids=ids)


def check_flags(cfg, world):
    """Impossible combinations, with the way out."""
    for name, unit in (("--block", cfg.block), ("the number of ranks,", world)):
        if unit < 1 or cfg.batch % unit:
            up = (cfg.batch // max(unit, 1) + 1) * max(unit, 1)
            raise InputError(f"--batch {cfg.batch} is not a multiple of {name} {unit}; try {up}")
    if cfg.temperature <= 0:
        raise InputError(f"--temperature {cfg.temperature} must be positive; try 0.03")
    if cfg.fsdp and (cfg.lora_rank or cfg.muon_lr or world == 1):
        raise InputError("--fsdp is for full fine-tuning on several ranks, with --muon-lr 0")


def main(cfg):
    """Stage 2, from flags to a saved folder."""
    # 1. The model, and what of it is trained.
    device = model.setup()
    rank, world = model.rank(), model.world()
    check_flags(cfg, world)
    torch.manual_seed(cfg.seed)
    if not cfg.model:
        cfg.model = "out/pretrain" if Path("out/pretrain/config.json").exists() else "toy"
        missing = ": there is no out/pretrain; python pretrain.py makes it" * (cfg.model == "toy")
        model.say(f"starting from {cfg.model}{missing}")
    embedder = model.load_for(cfg, device)
    if embedder.peft[0] and cfg.merge:
        cfg.model = f"{cfg.out}/merged"  # what a new adapter will be an adapter of
        model.save(model.merge(embedder), cfg.model)
    model.choose_trained(embedder, cfg)
    if cfg.fsdp:
        model.shard(embedder)
    optimizers = model.make_optimizers(embedder, cfg)

    # 2. The data: pairs, made into model inputs in the loader's workers.
    pairs = read_pairs(cfg.data, cfg.image_root or None, cfg.subsets, cfg.seed, cfg.split)
    cfg.data_digest = ready(pairs.values())
    for name, examples in pairs.items():
        model.say(f"  {name:<20} {len(examples):>13,} pairs")

    if cfg.explain:
        small = dataclasses.replace(cfg, batch=6, block=3)
        batch = local_batch(pairs, embedder.collate, small, 0, 0, 1)
        return importlib.import_module("explain").stage2(embedder, batch, cfg.temperature)

    # 3. Train.
    start, N = model.start_or_resume(embedder, optimizers, cfg), cfg.batch
    budget = model.by_device(cfg.chunk_tokens, model.CHUNK_TOKENS, device)
    keep = model.by_device(cfg.keep_graphs, KEEP_GRAPHS, device)
    chance = f"(chance loss ln N = {math.log(N):.2f})"
    model.say(f"loss sees N = {world} x {N // world} = {N} pairs {chance}")
    log = model.Log(cfg, start)
    embedder.train()
    batch_of = partial(local_batch, pairs, embedder.collate, cfg, rank=rank, world=world)
    batches = model.prefetch(batch_of, range(start, cfg.steps), cfg.workers)
    for step, batch in log.steps(batches):
        rows, labels, keys, ids = batch.values()
        # ------------------------------------------------------------------------------------------
        lr = model.begin_step(optimizers, step, cfg)
        how = (cfg.temperature, budget, keep, cfg.vision_cache)
        out = gradcache_step(embedder, rows, labels, keys, *how)
        norm = model.end_step(embedder, optimizers, cfg, step, out["loss"], ids)
        # ------------------------------------------------------------------------------------------
        budget = out["chunk_tokens"]
        numbers = dict(loss=out["loss"], chance=math.log(out["columns"]), top1=out["top1"])
        log(step, (N, "pairs"), **numbers, norm=norm, lr=lr, cut=sum(r["cut"] for r in rows))
        model.maybe_checkpoint(embedder, optimizers, cfg, step)

    # 4. Save.
    model.finish(embedder, cfg)


if __name__ == "__main__":
    model.run(main, Config)
