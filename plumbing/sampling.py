"""Which dialogues a step of stage 1 takes: pure functions of (seed, step), so that resuming needs
no replay. (Stage 2's batch is part of its idea: contrastive.py.) And by which keys the columns of
that one know what is no negative."""

import random
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch


@lru_cache(2)
def shuffled(n, seed, epoch):
    """An order of n examples; the toy world's are as good as shuffled."""
    if n >= 10**8:
        return range(n)
    return np.random.default_rng((seed, epoch)).permutation(n)


def epoch_batch(n, cfg, step, rank, world) -> list:
    """Indices of this rank's share of the batch. Each epoch takes all n examples once, in an order
    of its own."""
    # Position j of an endless row of epochs; the ranks take turns.
    mine = range(step * cfg.batch + rank, (step + 1) * cfg.batch, world)
    return [int(shuffled(n, cfg.seed, j // n)[j % n]) for j in mine]


def skipped_dialogues(dialogues, cfg, step) -> int:
    """How many dialogues of a step, over all ranks, stand in the place of those in --skip-bad."""
    skipped = dialogues.source.skipped
    if not skipped:
        return 0
    return sum(i in skipped for i in epoch_batch(len(dialogues), cfg, step, 0, 1))


def skipped_pairs(pairs, draw, cfg, step) -> int:
    """How many pairs of a step, over all ranks, stand in the place of those in --skip-bad. draw:
    contrastive.draw."""
    if not any(examples.source.skipped for examples in pairs.values()):
        return 0
    return sum(i in pairs[name].source.skipped for name, i in draw(pairs, cfg, step))


def ask_first(dialogue, cfg, step):
    """An idea beyond the paper: in a share of the dialogues (--question-first) the first question
    stands before the code, as an instruction does in stage 2, and its answer is the first thing
    asked of the code."""
    name = dialogue.id.rpartition("/")[2]  # a run that goes on may find its data in another folder
    if random.Random(f"{cfg.seed}/{step}/{name}").random() >= cfg.question_first:
        return dialogue
    (question, answer), *others = dialogue.turns  # the question goes in front of the code
    item = replace(dialogue.item, text=f"{dialogue.item.text} {question}")
    return dialogue._replace(item=item, turns=(("", answer), *others))


# ---------------------------------------------------------------------------- what is no negative


def keys_that_differ(n, rank) -> torch.Tensor:
    """Two keys for each of a rank's n columns, (n, 2), that no other column has on any rank."""
    mine = torch.arange(n) + rank * 2**40
    return mine[:, None].repeat(1, 2)


def note_equals(keys, columns, queries, positives):
    """Keys for what is no negative, in place: the first of a column is its content's; the second,
    where it is a target, its query's: what is right for an equal query is right for this one.

    keys (columns, 2); columns, queries: Items; positives: of each query the columns it has."""
    keys[:, 0] = torch.tensor([item.key for item in columns])
    for query, own in zip(queries, positives, strict=True):
        keys[own, 1] = query.key
