"""Stage 2, contrastive learning (VLM2Vec, arXiv 2410.05160, section 3; CoMa, section 3.2).

    torchrun contrastive.py                                        the toy world
        (two cores: 4.1 minutes, 92 % of the queries nearest to their own of 128 targets)
    torchrun --nproc-per-node 2 contrastive.py --data MMEB-train   a folder in MMEB's layout
    torchrun --nproc-per-node 8 contrastive.py --model out/pretrain --batch 1024   see the README
    python -m tools.explain contrastive                            one small batch, in numbers

A query and its target become unit vectors z; InfoNCE makes the target the nearest of all targets in
the batch, the more of them the better. One embedding's gradient needs all the others, but only one
chunk's graph fits into memory. GradCache (Gao et al., arXiv 2101.06983) is exact all the same:
embed everything without a graph, take the loss' gradient with respect to the *embeddings*, embed
again, a chunk at a time, with a graph.

Reads pairs; writes OUT/ (a transformers folder, or a LoRA adapter), OUT/merged (the adapter's base,
where stage 1 wrote an adapter, too), OUT/log.jsonl, and OUT/checkpoints until the run is over.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import math
import random
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import read_pairs
from model import choose_trained, load_for, merge, save
from plumbing import checkpoint, combinations, losses, optim, ranks, sampling, sharding
from plumbing.blocks import sum_over_blocks
from plumbing.config import LossFlags, flag
from plumbing.formats import Place, checked_digest
from plumbing.graphs import KeptGraphs
from plumbing.loader import each, prefetch
from plumbing.log import Log
from plumbing.memory import leavable, meeting, remember_tower, token_chunks, until_it_fits
from plumbing.precision import products
from plumbing.replay import replay, rng_state


@dataclass
class Config(LossFlags):
    """Flags of stage 2."""

    model: str = flag("", "toy, a folder, or a hub id; empty: out/pretrain, else toy")
    out: str = flag("out/contrastive", "folder for the model, log.jsonl and checkpoints")
    steps: int = flag(200, "optimiser steps; 0: the model as it is", least=0)
    batch: int = flag(128, "pairs a step of all ranks; 1 compares nothing", least=2, most=1_000_000)
    block: int = flag(32, "consecutive pairs of the batch that come from one data set", least=1)
    subsets: str = flag("", "data sets and caps, ImageNet_1K:100000,CIRR, or mmeb20; empty: all")
    split: str = flag("original", "which of MMEB-train", ["original", "diverse_instruction"])
    temperature: float = flag(0.03, "tau; cosines are divided by it", above=0)
    mask_false_negatives: bool = flag(True, "what is right for a query or its equal is no negative")
    graph_memory: str = flag("", "room for graphs kept from pass 1, as 4GiB; empty: automatic")
    vision_cache: str = flag("device", "keeps a frozen tower's output", ["device", "host", "off"])
    merge: bool = flag(True, "fold stage 1's adapter into the weights first")
    fsdp: bool = flag(False, "shard weights, gradients and optimiser over the ranks (FSDP2)")


# ------------------------------------------------------------------------------ the idea: InfoNCE


def paper_info_nce(q, t, temperature):
    """VLM2Vec's Eq. (1), as the paper writes it: query i's own target is column i, all others are
    negatives. q, t (N, D) -> mean nats, ln N where all cosines are equal. (Training runs the
    general form below; a test proves the two equal.)"""
    scores = q @ t.T / temperature  # (N, N) cosines over tau
    labels = torch.arange(len(q), device=q.device)
    return F.cross_entropy(scores, labels)


def info_nce(q, t, temperature, labels=None, keys=None, reweigh=None):
    """Eq. (1) for any columns: several positives a query, hard negatives, targets that are right
    for more than one query. All cosines equal: a loss of at most ln M (without `reweigh`).

    q (B, D) this rank's queries; t (M, D) *all ranks'* targets and hard negatives, the columns;
    labels (B,) or (B, P): each query's positives, by column (default: i for query i); keys (M,) or
    (M, k): a column whose j-th key is a positive's j-th, for any j, is not the query's negative
    (default: all differ); reweigh: see plumbing/losses.py. -> (mean nats, share of hits)."""
    if labels is None:
        labels = torch.arange(len(q), device=q.device)
    if keys is None:
        keys = torch.arange(len(t), device=t.device)
    labels = labels.view(len(q), -1)  # (B, P)
    keys = keys.view(len(t), -1)  # (M, k)

    def loss_of_rows(q_rows, columns, rows):  # of a block of queries, with a graph of its own
        return info_nce_rows(q_rows, columns, temperature, labels[rows], keys, reweigh)

    nats, hits = sum_over_blocks(loss_of_rows, q, t)
    return nats / len(q), hits / len(q)


def info_nce_rows(q, t, temperature, labels, keys, reweigh):
    """Eq. (1) for b queries: -log( e^(q.t+ / tau) / (e^(q.t+ / tau) + sum of e^(q.t- / tau)) ).

    q (b, D), t (M, D), labels (b, P) columns of the positives, -1 where a query has fewer than P,
    keys (M, k): where a j-th key is a positive's j-th, no negative; reweigh: see info_nce.
    -> (nats (b,), mean over positives; hit (b,), whether a positive beats all negatives)."""
    scores = products(q, t) / temperature  # (b, M); never bfloat16 or TF32: they have 3 digits
    valid = labels >= 0  # (b, P)
    own = labels.clamp(min=0)  # (b, P) -1, which gather refuses, becomes column 0
    left_out = torch.zeros_like(scores, dtype=torch.bool)  # (b, M)
    for key in keys.T:  # (M,)
        for p in range(labels.shape[1]):
            same = key[None] == key[own[:, p]][:, None]  # (b, M)
            left_out |= same & valid[:, p, None]
    positive = scores.gather(1, own)  # (b, P)
    # The lowest number, not -inf: a query without negatives has loss 0 and gradient 0.
    negatives = scores.masked_fill(left_out, torch.finfo(scores.dtype).min)
    best = positive.masked_fill(~valid, -math.inf).amax(1)
    hit = best > negatives.amax(1)  # (b,) equal is not higher
    if reweigh:
        negatives = reweigh(negatives, best[:, None], temperature)
    log_sum = negatives.logsumexp(1, keepdim=True)  # (b, 1) of Eq. (1)'s sum over t-
    nats = -F.logsigmoid(positive - log_sum) * valid  # (b, P) -log(e^p / (e^p + sum))
    return nats.sum(1) / valid.sum(1), hit


# ---------------------------------------------------------------------------- the idea: GradCache


def two_passes(embed, chunks, loss_of, keep=0):
    """GradCache (arXiv 2101.06983, section 3): the chain rule, cut in two at the embeddings z. Adds
    to `.grad` what `loss_of(embed(all rows)).backward()` would, one chunk's graph at a time.

    embed(chunk) -> (len(chunk), D); chunks: lists of row numbers, each row in one; loss_of(z (rows,
    D), in the order of rows) -> a scalar. keep: the last `keep` chunks keep their graph of pass 1,
    and run once. -> the loss, without a graph."""
    rng_states, parts = [], []
    for i, chunk in enumerate(chunks):  # pass 1: every embedding
        rng_states.append(rng_state())
        with torch.set_grad_enabled(i >= len(chunks) - keep):
            parts.append(embed(chunk))  # (len(chunk), D)

    # Between the passes: the loss, and in z.grad its gradient, the chain rule's first factor.
    order = torch.tensor([row for chunk in chunks for row in chunk])
    z = torch.cat([part.detach() for part in parts])  # (rows, D), in the chunks' order
    z = z[order.argsort()].requires_grad_()  # argsort undoes the order: row i is the batch's row i
    loss = loss_of(z)
    loss.backward()
    gradients = z.grad[order].split([len(chunk) for chunk in chunks])

    for i in reversed(range(len(chunks))):  # pass 2, kept graphs first: their memory is freed
        part = parts.pop()
        if not part.requires_grad:
            with replay(rng_states[i]):  # the same dropout as in pass 1
                part = embed(chunks[i])
        part.backward(gradients[i])  # the second factor, dz/dw: dL/dz dz/dw joins each .grad
    return loss.detach()


class Batch(NamedTuple):
    """One rank's share of a batch; the sizes may differ from rank to rank."""

    rows: list  # B queries, then the columns: all their targets and hard negatives
    labels: torch.Tensor  # (B, P) the columns of each query's targets, -1 padded
    keys: torch.Tensor  # (columns, 2): a key of its content, one of the query it is right for
    ids: list = ()  # names of the pairs


class Step(NamedTuple):
    """What a step saw, over all ranks."""

    loss: float  # mean nats
    top1: float  # share of queries that are nearest to a target of their own
    columns: int  # M, targets and hard negatives
    chunk_tokens: int  # what fitted into memory


def loss_over_ranks(z, batch, temperature, reweigh=None):
    """InfoNCE of this rank's B queries against *all ranks'* columns; z (rows, D), see Batch.

    -> (share, (mean, top1, M)): this rank's part of the mean over all N queries; what all saw."""
    B = len(batch.labels)
    N = ranks.all_sum(B)
    keys_of_ranks = ranks.gather_objects(batch.keys.tolist())
    counts = [len(keys) for keys in keys_of_ranks]  # columns of each rank
    keys = torch.tensor(sum(keys_of_ranks, []), device=z.device)  # (M, 2)
    # My columns come behind those of the ranks before me.
    labels = batch.labels + sum(counts[: ranks.rank()])
    labels = labels.where(batch.labels >= 0, -1).to(z.device)
    q = z[:B]  # (B, D)
    t = ranks.gather_rows(z[B:], counts)  # (M, D) with a gradient: that of all ranks' losses
    loss, hits = info_nce(q, t, temperature, labels, keys, reweigh)
    mean = ranks.all_sum(loss.item() * B) / N
    top1 = ranks.all_sum(hits.item() * B) / N
    # Trap: *summed* over ranks these shares are the mean over N queries; so are their gradients.
    return loss * B / N, (mean, top1, len(keys))


def gradcache_step(embedder, batch, temperature, budget, loss_fn=loss_over_ranks) -> Step:
    """Leaves in `.grad` the gradient of *all ranks'* loss, exactly as if the batch had gone through
    the model at once. budget: plumbing.memory.Budget; loss_fn: as loss_over_ranks. Where memory is
    full, all ranks begin again with half the chunk_tokens (with --fsdp the run ends)."""
    lengths = [row.length for row in batch.rows]
    seen = []  # what loss_fn says beside the share: (mean, top1, M)

    def embed(chunk):
        inputs = embedder.collate.pad_rows([batch.rows[i] for i in chunk])
        return embedder(inputs)  # (len(chunk), D)

    def loss_of(z):
        share, numbers = loss_fn(z, batch, temperature)
        seen.append(numbers)
        return share

    def attempt(chunk_tokens):
        chunks = token_chunks(lengths, chunk_tokens)
        embed_chunk = leavable(embed, embedder)  # a signal may end the step between two chunks
        embed_chunk = remember_tower(embed_chunk, embedder.mllm, budget.vision_cache)  # if frozen
        embed_chunk, chunks = sharding.in_lockstep(embedder, embed_chunk, chunks)  # with FSDP only
        # In the loss the ranks meet: it begins once pass 1 has fit on each of them.
        two_passes(embed_chunk, chunks, meeting(loss_of), budget.keep_graphs)

    chunk_tokens = budget.chunk_tokens
    if sharding.sharded(embedder):  # FSDP reduces by itself; no rank can leave the others' forward
        attempt(chunk_tokens)
    else:
        chunk_tokens = until_it_fits(attempt, chunk_tokens, max(lengths), embedder.zero_grad)
        ranks.sum_gradients(embedder.parameters())  # each rank's came through its own rows only
    return Step(*seen[-1], chunk_tokens)


# ------------------------------------------------------------------------------------- the batches


def draw(pairs, cfg, step) -> list:
    """The global batch of a step, [(name, index)], N of them: a pure function of (seed, step), the
    same for any number of ranks. Blocks of `cfg.block` come from one data set each, which is drawn
    in proportion to its size; a set smaller than a block repeats itself in it."""
    rng = random.Random(f"{cfg.seed}/{step}")
    chosen = []
    sizes = [len(examples) for examples in pairs.values()]
    for name in rng.choices(list(pairs), sizes, k=cfg.batch // cfg.block):
        n = len(pairs[name])
        sample = rng.sample(range(n), min(n, cfg.block))
        chosen += [(name, sample[i % len(sample)]) for i in range(cfg.block)]
    return chosen


def local_batch(pairs, collate, cfg, step, rank, world) -> Batch:
    """One rank's share of the global batch, as model inputs."""
    share = cfg.batch // world
    chosen = draw(pairs, cfg, step)[rank * share : (rank + 1) * share]
    queries, columns, positives = [], [], []
    for name, i in chosen:
        pair = pairs[name][i]
        queries.append(pair.query)
        positives.append(torch.arange(len(pair.targets)) + len(columns))
        columns += [*pair.targets, *pair.negatives]
    labels = pad_sequence(positives, batch_first=True, padding_value=-1)  # (B, P)
    keys = losses.keys_that_differ(len(columns), rank)  # every other column is a negative
    if cfg.mask_false_negatives:
        losses.note_equals(keys, columns, queries, positives)
    rows = each(collate.row, queries + columns)
    ids = [f"{name}[{i}]" for name, i in chosen]
    return Batch(rows, labels, keys, ids)


def main(cfg, make_batch=local_batch, take_step=gradcache_step):
    """Stage 2, from flags to a saved folder. tools/condense.py brings its own batch and step."""
    # 1. The data first: a bad list is an error before a large model is loaded.
    device = checkpoint.begin(cfg)  # which also fills in an empty cfg.model
    rank, world = ranks.rank(), ranks.world()
    combinations.refuse_impossible(cfg, world)
    pairs = read_pairs(cfg.data, Place.of(cfg), cfg.subsets, cfg.seed, cfg.split)
    cfg.data_digest = checked_digest(pairs.values())  # refuses unfit data; --resume compares it
    for name, examples in pairs.items():
        ranks.say(f"  {name:<20} {len(examples):>13,} pairs")

    # 2. The model, and what of it is trained.
    torch.manual_seed(cfg.seed)
    embedder = load_for(cfg, device)
    if embedder.adapter and cfg.merge:
        checkpoint.keep_base(save, merge(embedder), cfg)
    choose_trained(embedder, cfg)
    embedder.prefixes = losses.lengths_of(cfg.matryoshka, embedder.dim)
    loss_fn = losses.asked_for(cfg, embedder.prefixes, loss_over_ranks, info_nce)
    if cfg.fsdp:
        sharding.shard(embedder)
    optimizers = optim.make_optimizers(embedder, cfg)

    # 3. Train. Pairs are made into model inputs in the loader's workers.
    batch_of = partial(make_batch, pairs, embedder.collate, cfg, rank=rank, world=world)
    start = checkpoint.start_or_resume(embedder, optimizers, cfg)
    ranks.say(f"loss sees N = {cfg.batch} pairs (ln N = {math.log(cfg.batch):.2f})")
    graphs = KeptGraphs(cfg, embedder)
    log = Log(cfg, start)
    embedder.train()
    batches = log.waiting(prefetch(batch_of, range(start, cfg.steps), cfg.workers, device))
    for step in range(start, cfg.steps):
        with checkpoint.saved_after(embedder, optimizers, cfg, step), graphs.budget() as budget:
            batch = next(batches)
            # --------------------------------------------------------------------------------------
            lr = optim.begin_step(optimizers, step, cfg)
            out = take_step(embedder, batch, cfg.temperature, budget, loss_fn)
            norm = optim.end_step(embedder, optimizers, cfg, step, out.loss, batch.ids)
            # --------------------------------------------------------------------------------------
            cfg.fitting = out.chunk_tokens  # kept by a checkpoint: what was halved stays so
            chance = math.log(out.columns)
            numbers = {"loss": out.loss, "chance": chance, "top1": out.top1, "norm": norm, "lr": lr}
            numbers["cut"] = sampling.tokens_cut(batch.rows)
            numbers["skipped"] = sampling.skipped_pairs(pairs, draw, cfg, step)
            log(step, (cfg.batch, "pairs"), numbers)

    # 4. Save.
    checkpoint.finish(save, embedder, cfg)


if __name__ == "__main__":
    ranks.run(main, Config)
