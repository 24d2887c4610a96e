"""Stage 2, contrastive learning (VLM2Vec, arXiv 2410.05160, section 3; CoMa, section 3.2).

    torchrun contrastive.py                                        the toy world
    torchrun --nproc-per-node 2 contrastive.py --data MMEB-train   a folder in MMEB's layout
    torchrun --nproc-per-node 8 contrastive.py --model out/pretrain --batch 1024 ...  (see README)

A query and its target become unit vectors z; InfoNCE makes the target the nearest of all the targets in
the batch. The more of them, the better, so the batch is far larger than what fits through the model at
once. GradCache (Gao et al., arXiv 2101.06983) makes that exact: embed everything without a graph, take
the loss' gradient with respect to the *embeddings*, then embed again, a chunk at a time, with a graph.

Reads pairs; writes OUT/ (a transformers folder), OUT/log.jsonl, OUT/checkpoints.
"""

import itertools
import math
import random
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import model
from data import InputError, read_pairs
from model import flag


@dataclass
class Config(model.Config):
    """Flags of stage 2."""

    model: str = flag("", "toy, toy-random, a folder, or a hub id; empty: out/pretrain, else toy")
    out: str = flag("out/contrastive", "folder for the model, log.jsonl and checkpoints")
    steps: int = flag(300, "optimiser steps")
    batch: int = flag(128, "pairs a step, over all ranks: the loss sees them all")
    block: int = flag(32, "consecutive pairs of the batch that come from one data set")
    subsets: str = flag("", "data sets and caps, ImageNet_1K:100000,CIRR; empty: all")
    temperature: float = flag(0.03, "tau; cosines are divided by it")
    mask_false_negatives: bool = flag(True, "equal targets are no negatives of each other")
    keep_graphs: int = flag(1, "chunks that are not run twice; each holds its graph for a while")
    vision_cache: str = flag(
        "device", "where a frozen vision tower's output waits", choices=["device", "host", "off"]
    )
    fsdp: bool = flag(False, "shard parameters, gradients and optimiser over ranks (FSDP2)")


# ---------------------------------------------------------------------------------------- the idea


def info_nce_rows(q, t, labels, keys, temperature):
    """Eq. (1) of VLM2Vec for some queries: -log e^(q.t+/tau) / (e^(q.t+/tau) + sum over negatives t-).

    q (b, D), t (M, D), labels (b, P) columns of each query's positives, -1 where it has fewer than P,
    keys (M,): a column whose key is that of one of my positives is not my negative.
    -> (nats (b,), mean over a query's positives; hit (b,), whether a positive beats all negatives)."""
    with torch.autocast(q.device.type, enabled=False):  # float32 (or 64): bfloat16 has 3 digits
        scores = q @ t.T / temperature  # (b, M)
    valid = labels >= 0  # (b, P)
    mine = torch.zeros_like(scores, dtype=torch.bool)
    for p in range(labels.shape[1]):
        mine |= (keys[None] == keys[labels[:, p]][:, None]) & valid[:, p, None]
    positive = scores.gather(1, labels.clamp(min=0))  # (b, P)
    # The finite minimum, not -inf: a query without negatives has loss 0 and no NaN gradient.
    negative = scores.masked_fill(mine, torch.finfo(scores.dtype).min).logsumexp(
        1, keepdim=True
    )  # (b, 1)
    nats = F.softplus(negative - positive) * valid  # -log(e^p / (e^p + e^n)) = log(1 + e^(n - p))
    best = positive.masked_fill(~valid, -math.inf).amax(1)
    hit = best > scores.masked_fill(mine, -math.inf).amax(1)
    return nats.sum(1) / valid.sum(1), hit.detach()


def info_nce(q, t, temperature, labels=None, keys=None, block=256):
    """InfoNCE, mean over queries, in nats: ln M when the M embeddings carry no information, 0 at best.

    q (B, D) local queries, t (M, D) *all* targets, labels (B,) or (B, P) columns of the positives
    (default: query i's is column i), keys (M,) integers: columns with equal keys are never negatives of
    each other (default: all differ). In row blocks whose scores are computed again in the backward pass:
    memory is O(M * block), never N x N. -> (loss, share of hits); both differentiable sums of blocks."""
    labels = torch.arange(len(q), device=q.device) if labels is None else labels
    labels = labels[:, None] if labels.ndim == 1 else labels
    keys = torch.arange(len(t), device=t.device) if keys is None else keys
    nats, hits = 0.0, 0
    for i in range(0, len(q), block):
        part = checkpoint(
            info_nce_rows,
            q[i : i + block],
            t,
            labels[i : i + block],
            keys,
            temperature,
            use_reentrant=False,
        )
        nats, hits = nats + part[0].sum(), hits + part[1].sum()
    return nats / len(q), hits / len(q)


def gradcache_step(
    embedder,
    rows,
    labels,
    keys,
    temperature,
    chunk_tokens,
    keep=1,
    vision_cache="off",
    sharded=False,
):
    """Leaves in `.grad` the gradient of the InfoNCE loss of the whole batch of all ranks, exactly as if
    it had gone through the model at once (GradCache, arXiv 2101.06983).

    rows: this rank's B queries, then its targets and hard negatives; labels (B, P), -1 padded: where
    among the latter each query's positives stand; keys: one a target. Ranks may differ in all of it.
    -> dict(loss: mean nats over all queries, top1, columns: targets the loss saw)."""
    B, device = len(labels), embedder.device
    chunks = model.token_chunks([len(r["tokens"]["input_ids"]) for r in rows], chunk_tokens)
    # Sharded ranks meet inside every forward: who has fewer chunks repeats one, with gradient zero. In
    # front, so that the embeddings of the real pass are the ones that stay.
    idle = max(model.gather_objects(len(chunks))) - len(chunks) if sharded else 0
    chunks = chunks[:1] * idle + chunks
    tower = embedder.frozen_tower() if vision_cache != "off" else None
    cache, states, kept, z = {}, {}, {}, None

    def embed(i):
        inputs = embedder.collate.pad_rows([rows[j] for j in chunks[i]], device)
        with (
            once(tower, cache, i, vision_cache)
            if tower and i < len(chunks) - keep
            else nullcontext()
        ):
            return embedder(inputs)

    # Pass 1: every embedding, without a graph. The last chunks keep theirs: they need no second pass.
    for i, chunk in enumerate(chunks):
        states[i] = rng_state(device)
        with torch.set_grad_enabled(i >= len(chunks) - keep):
            part = embed(i)  # (chunk, D)
        if part.requires_grad:
            kept[i] = part
        z = (
            torch.empty(len(rows), part.shape[1], dtype=part.dtype, device=device)
            if z is None
            else z
        )
        z[chunk] = part.detach()

    # The loss of the local queries against all ranks' targets, and its gradient for each embedding.
    sizes = model.gather_objects((B, len(rows) - B, keys.tolist()))
    N, columns = sum(s[0] for s in sizes), [s[1] for s in sizes]
    all_keys = torch.tensor([k for s in sizes for k in s[2]], device=device)
    labels = torch.where(labels >= 0, labels + sum(columns[: model.rank()]), labels).to(device)
    q = z[:B].requires_grad_()  # (B, D)
    t = gather_rows(z[B:], columns).requires_grad_()  # (M, D)
    loss, top1 = info_nce(q, t, temperature, labels, all_keys)
    # Trap: a sum over ranks of (mean over local queries) would be `world` times too large. FSDP takes the
    # mean over ranks, where we take the sum.
    (loss * B / N * (model.world() if sharded else 1)).backward()
    dz = torch.cat([q.grad, scatter_sum(t.grad, columns)])  # (rows, D)

    # Pass 2: each chunk again, with a graph and the same dropout; d loss / d weights by the chain rule.
    for i in reversed(range(len(chunks))):
        if sharded:
            embedder.set_requires_gradient_sync(i == 0)
        if i in kept:
            part = kept.pop(i)
        else:
            with replay(states[i], device):
                part = embed(i)
        part.backward(dz[chunks[i]] if i >= idle else torch.zeros_like(part))
        del part
    if not sharded:
        model.sum_gradients(embedder.parameters())
    loss, top1 = (model.all_sum(float(x) * B) / N for x in (loss.detach(), top1))
    return dict(loss=loss, top1=top1, columns=sum(columns))


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
    return torch.get_rng_state(), torch.cuda.get_rng_state(
        device
    ) if device.type == "cuda" else None


@contextmanager
def replay(state, device):
    """Runs a block with the random numbers of an earlier one. Without it dropout falls differently in the
    second pass, and the gradient is that of no loss at all."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield


@contextmanager
def once(tower, cache, key, where):
    """A frozen vision tower answers the second call for a chunk with what it said to the first. Wrapping
    the tower itself takes along all that a family makes of it (Qwen3-VL's deepstack features)."""
    forward, calls = tower.forward, itertools.count()

    def recall(*args, **kwargs):
        at = (key, next(calls))
        if at in cache:  # needed no more after this
            return tree_map(lambda x: _move(x, tower_device), cache.pop(at))
        out = forward(*args, **kwargs)
        # Trap: a copy, for the Qwens overwrite a field of what the tower returns.
        cache[at] = tree_map(lambda x: _move(x, "cpu" if where == "host" else x.device), out)
        return out

    tower_device = next(tower.parameters()).device
    tower.forward = recall
    try:
        yield
    finally:
        tower.forward = forward


def _move(x, device):
    return x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x


# ---------------------------------------------------------------------------------------- plumbing


def draw(pairs, cfg, step) -> list:
    """The global batch of a step: [(name, index)], N of them, the same on every rank and for any number
    of ranks; a pure function of (seed, step). Blocks of `cfg.block` come from one data set each, drawn
    in proportion to the sets' sizes."""
    rng = random.Random(f"{cfg.seed}/{step}")
    chosen = []
    for name in rng.choices(
        list(pairs), [len(p) for p in pairs.values()], k=cfg.batch // cfg.block
    ):
        n = len(pairs[name])
        where = rng.sample(range(n), min(n, cfg.block))
        chosen += [
            (name, where[i % n]) for i in range(cfg.block)
        ]  # a small set repeats; see `keys`
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
    keys = [x.key for x in columns]
    if not cfg.mask_false_negatives:
        keys = [rank * 2**40 + i for i in range(len(columns))]
    rows = [collate.row(x) for x in queries + columns]
    return dict(
        rows=rows, labels=labels, keys=torch.tensor(keys), ids=[f"{n}[{i}]" for n, i in chosen]
    )


def check_flags(cfg, world):
    """Impossible combinations, with the way out."""
    if cfg.batch % cfg.block:
        up = (cfg.batch // cfg.block + 1) * cfg.block
        raise InputError(f"--batch {cfg.batch} is not a multiple of --block {cfg.block}; try {up}")
    if cfg.batch % world:
        up = (cfg.batch // world + 1) * world
        raise InputError(f"--batch {cfg.batch} does not divide over {world} ranks; try {up}")
    if cfg.temperature <= 0:
        raise InputError(f"--temperature {cfg.temperature} must be positive; try 0.03")


def main(cfg):
    # 1. The model, and what of it is trained.
    device = model.setup()
    rank, world = model.rank(), model.world()
    check_flags(cfg, world)
    torch.manual_seed(cfg.seed)
    if not cfg.model:
        cfg.model = "out/pretrain" if Path("out/pretrain/config.json").exists() else "toy"
        note = (
            ""
            if cfg.model != "toy"
            else ": there is no out/pretrain yet (python pretrain.py makes it)"
        )
        model.say(f"starting from {cfg.model}{note}")
    embedder = model.load_for(cfg, device)
    model.choose_trained(embedder, cfg)
    optimizers = model.make_optimizers(embedder, cfg.lr, cfg.muon_lr, cfg.weight_decay)

    # 2. The data: pairs, made into model inputs in the loader's workers.
    pairs = read_pairs(cfg.data, cfg.image_root or None, cfg.subsets, cfg.seed)
    for name, rows in pairs.items():
        model.say(f"  {name:<20} {len(rows):>13,} pairs")

    def batch_of(step):
        return local_batch(pairs, embedder.collate, cfg, step, rank, world)

    # 3. Train.
    start = model.start_or_resume(embedder, optimizers, cfg)
    chance = math.log(cfg.batch)
    model.say(
        f"loss sees N = {world} x {cfg.batch // world} = {cfg.batch} pairs (chance loss {chance:.2f})"
    )
    log = model.Log(cfg, dict(stage="contrastive"), start)
    embedder.train()
    loader = model.prefetch(batch_of, range(start, cfg.steps), cfg.workers)
    for step, batch in enumerate(loader, start):
        t0 = time.time()
        # ------------------------------------------------------------------------------------------
        model.seed_step(cfg.seed, step)
        lr = model.set_lr(optimizers, step, cfg)
        out = gradcache_step(
            embedder, batch["rows"], batch["labels"], batch["keys"], cfg.temperature, cfg.chunk_tokens,
            cfg.keep_graphs, cfg.vision_cache, cfg.fsdp,
        )  # fmt: skip
        norm = model.clip_and_step(embedder, optimizers, cfg, step, lr, out["loss"], batch["ids"])
        # ------------------------------------------------------------------------------------------
        log(step, f"{cfg.batch / (time.time() - t0):.0f} pairs/s", loss=out["loss"],
            chance=math.log(out["columns"]), top1=out["top1"], norm=norm, lr=lr)  # fmt: skip
        model.maybe_checkpoint(embedder, optimizers, cfg, step)

    # 4. Save.
    model.finish(embedder, cfg)


if __name__ == "__main__":
    model.run(main, Config)
