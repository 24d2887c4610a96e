"""Which dialogues a step of stage 1 takes: pure functions of (seed, step), so that resuming needs
no replay; and what a step of either stage skips or cuts. (Which pairs stage 2 takes is part of its
idea: contrastive.draw.)"""

import random
from dataclasses import replace
from functools import lru_cache

import numpy as np

from plumbing.ranks import all_sum


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


def tokens_cut(rows) -> int:
    """How many tokens --max-length cost the rows of a step, over all ranks."""
    return all_sum(sum(row.cut for row in rows))


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
