"""Around stage 2's loss: the keys that say which columns are no negatives of a query; and variants
of the loss from other papers, each a few lines and off unless its flag is given. These wrap around
InfoNCE as contrastive.py has it, and go through GradCache with it."""

from collections import defaultdict
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from plumbing import ranks
from plumbing.errors import InputError, brief


def asked_for(cfg, prefixes, loss_over_ranks, info_nce):
    """The loss that the flags ask for, made of contrastive.py's two functions: loss(z, batch,
    temperature) -> (this rank's share, (mean nats, top1, columns)). prefixes: see lengths_of."""
    reweigh = None
    if cfg.hardness or cfg.margin:
        reweigh = partial(weighed, hardness=cfg.hardness, margin=cfg.margin)
    loss = partial(loss_over_ranks, reweigh=reweigh)
    if cfg.symmetric:
        loss = partial(both_directions, loss, partial(info_nce, reweigh=reweigh))
    if prefixes:
        loss = partial(over_prefixes, loss, prefixes)
    return loss


# ---------------------------------------------------------------------------- what is no negative


def keys_that_differ(n, rank) -> torch.Tensor:
    """Two keys for each of a rank's n columns, (n, 2), that no other column has on any rank."""
    mine = torch.arange(n) + rank * 2**40
    return mine[:, None].repeat(1, 2)


def note_equals(keys, columns, queries, positives):
    """Writes keys in place: a column's first key is that of its content, a target's second that of
    its query, for what is right for an equal query is right for this one.

    keys (columns, 2); columns, queries: Items; positives: of each query the columns it has."""
    keys[:, 0] = torch.tensor([item.key for item in columns])
    for query, own in zip(queries, positives, strict=True):
        keys[own, 1] = query.key


# ------------------------------------------------------------------- which negatives, and how much


def weighed(negatives, best, temperature, hardness=0.0, margin=0.0):
    """A negative's term e^(s / tau) in Eq. (1)'s sum becomes w e^(s / tau), s its cosine:

    w = 0 where s > s+ + margin, for it is probably right, too (Qwen3-VL-Embedding), else
    w = e^(hardness x s), and w is no part of the gradient (LLaVE, arXiv 2503.04812).

    negatives (b, M): s / tau, the lowest number where a column is none; best (b, 1): s+ / tau of
    the nearest positive. -> (b, M): log w + s / tau."""
    if margin:
        lowest = torch.finfo(negatives.dtype).min  # as where a column is no negative
        negatives = negatives.masked_fill(negatives > best + margin / temperature, lowest)
    cosines = negatives.detach() * temperature  # (b, M)
    return negatives + hardness * cosines


# ------------------------------------------------------------------------------- both directions


def both_directions(loss, info_nce, z, batch, temperature):
    """The mean of the loss and of its mirror image (CLIP, arXiv 2103.00020, figure 3)."""
    share, (mean, top1, columns) = loss(z, batch, temperature)
    mirrored_share, mirrored_mean = targets_look_for_queries(info_nce, z, batch, temperature)
    return (share + mirrored_share) / 2, ((mean + mirrored_mean) / 2, top1, columns)


def targets_look_for_queries(info_nce, z, batch, temperature):
    """InfoNCE of this rank's targets against *all ranks'* queries. z (rows, D), see
    contrastive.Batch. Hard negatives look for nobody.

    -> (this rank's share of the mean over all targets; that mean)."""
    columns, labels, sizes = queries_of_targets(batch)
    B = len(batch.labels)
    q = ranks.gather_rows(z[:B], sizes)  # (N, D), with a gradient
    t = z[B:][columns]  # (targets, D)
    nats, _ = info_nce(t, q, temperature, labels.to(z.device))
    total = ranks.all_sum(len(columns))
    mean = ranks.all_sum(nats.item() * len(columns)) / total
    return nats * len(columns) / total, mean


def queries_of_targets(batch):
    """The positives of this rank's targets: all queries, of all ranks, that have the target among
    theirs, or one that shares a key with it.

    -> (columns (targets,) of the targets; labels (targets, P), see contrastive.info_nce; how many
    queries each rank has)."""
    own = [row[row >= 0] for row in batch.labels]  # of each query of this rank: its columns
    # Of each column its keys as (place, key). Trap: without the place a target that equals another
    # pair's query, as in lists of a -> b and b -> c, would share a key with that pair's target.
    keys = [set(enumerate(row)) for row in batch.keys.view(len(batch.keys), -1).tolist()]
    mine = []  # of each query of this rank: the keys of its columns
    for row in own:
        mine.append(set().union(*(keys[j] for j in row.tolist())))
    keys_of_ranks = ranks.gather_objects(mine)  # the same, of each rank
    queries_of_key = defaultdict(list)  # over all ranks: N queries
    for query, keys_of_query in enumerate(sum(keys_of_ranks, [])):
        for key in keys_of_query:
            queries_of_key[key].append(query)
    columns, positives = torch.cat(own), []
    for j in columns.tolist():
        queries = set().union(*(queries_of_key[key] for key in keys[j]))
        positives.append(torch.tensor(sorted(queries)))
    labels = pad_sequence(positives, batch_first=True, padding_value=-1)  # (targets, P)
    return columns, labels, [len(queries) for queries in keys_of_ranks]


# ----------------------------------------------------------------------------------- Matryoshka


def over_prefixes(loss, lengths, z, batch, temperature):
    """The mean loss of the embeddings and of their prefixes, each of unit length (Matryoshka
    representation learning, arXiv 2205.13147, Eq. 1, all weights equal). top1 is that of the whole
    embeddings."""
    share, (mean, top1, columns) = loss(z, batch, temperature)
    for length in lengths:
        prefix = F.normalize(z[:, :length], dim=-1)  # (rows, length)
        prefix_share, (prefix_mean, *_) = loss(prefix, batch, temperature)
        share, mean = share + prefix_share, mean + prefix_mean
    n = 1 + len(lengths)
    return share / n, (mean / n, top1, columns)


def lengths_of(text, width) -> tuple:
    """Of prefixes of embeddings of `width` numbers: "32,64" -> (32, 64). InputError otherwise."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    lengths = tuple(int(word) for word in words if word.isdecimal() and word.isascii())
    are_numbers = len(lengths) == len(words)
    are_rising = list(lengths) == sorted(set(lengths))
    are_shorter = all(0 < length < width for length in lengths)
    if not (are_numbers and are_rising and are_shorter):
        text = f"must be rising lengths below {width}, the embedding's own, as 32,64"
        raise InputError(f"--matryoshka {brief(','.join(words))}: {text}")
    return lengths
