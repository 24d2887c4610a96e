"""Planted mistakes, two to five for each exercise: test_grader.py shows that the grader finds each.
Many are those that the main tests' own negative controls use."""

import functools
import math

import ladder
import numpy as np
import test_answers
import test_evaluate
import test_mask
import test_pooling
import torch
import torch.nn.functional as F
from two_ranks import WRONG

import contrastive
import evaluate
import pretrain
from data import ANSWER

OURS = ladder.subject(None)


class Wrong:
    """The reference with one thing changed."""

    def __init__(self, **changed):
        vars(self).update(changed)

    def __getattr__(self, name):
        return getattr(OURS, name)


# --------------------------------------------------------------------------------------- exercise 1

info_nce = contrastive.info_nce  # under a mistake too: `planted` does not reach into this file


def overflows(q, t, temperature, labels=None, keys=None):
    """The formula as it is written: e^100 is too large for float32."""
    labels = torch.arange(len(q)) if labels is None else labels
    keys = torch.arange(len(t)) if keys is None else keys
    own = torch.arange(len(t))[None] == labels[:, None]
    kept = own | (keys[None] != keys[labels][:, None])
    e = (q @ t.T / temperature).exp() * kept
    loss = -(e[own] / e.sum(1)).log().mean()
    return loss, (e[own] > (e * ~own).amax(1)).double().mean()


def forgets_keys(q, t, temperature, labels=None, keys=None):
    return info_nce(q, t, temperature, labels)


def sums(q, t, temperature, labels=None, keys=None):
    loss, hits = info_nce(q, t, temperature, labels, keys)
    return loss * len(q), hits


def a_tie_is_a_hit(q, t, temperature, labels=None, keys=None):
    loss, _ = info_nce(q, t, temperature, labels, keys)
    labels = torch.arange(len(q)) if labels is None else labels
    return loss, ((q @ t.T).argmax(1) == labels).double().mean()


def keys_in_the_queries_order(q, t, temperature, labels=None, keys=None):
    """keys[:B] for keys[labels]: the same where query i's target is column i."""
    if keys is None:
        return info_nce(q, t, temperature, labels)
    labels = torch.arange(len(q)) if labels is None else labels
    own = torch.arange(len(t))[None] == labels[:, None]
    scores = q @ t.T / temperature
    scores = scores.masked_fill((keys[None] == keys[: len(q), None]) & ~own, -math.inf)
    hits = scores[own] > scores.masked_fill(own, -math.inf).amax(1)
    return F.cross_entropy(scores, labels), hits.double().mean()


# --------------------------------------------------------------------------------------- exercise 3


our_labels = pretrain.answer_labels


def labels_in_place(input_ids, roles):
    """Right labels, and the model's input is spoilt."""
    labels = our_labels(input_ids.clone(), roles)
    input_ids[roles != ANSWER] = -100
    return labels


def wraps_round(input_ids, roles):
    """The last position gets the label of the row's first token."""
    return test_answers.unshifted(input_ids, roles).roll(-1, 1)


# --------------------------------------------------------------------------------------- exercise 5


def one_graph(embed, rows, chunks, loss_of):
    """The right gradient from all graphs at once: nothing is saved."""
    parts = {}
    for chunk in chunks:
        parts |= dict(zip(chunk, embed(rows[chunk]), strict=True))
    loss = loss_of(torch.stack([parts[i] for i in range(len(rows))]))
    loss.backward()
    return loss.detach()


def no_replay(embed, rows, chunks, loss_of):
    """Ours, with a second pass whose dropout falls anew."""
    numbers = torch.Generator().manual_seed(7)

    def embed_anew(x):
        if torch.is_grad_enabled():
            torch.manual_seed(int(torch.randint(10**6, (1,), generator=numbers)))
        return embed(x)

    return ladder.our_gradcache(embed_anew, rows, chunks, loss_of)


def each_chunk_alone(embed, rows, chunks, loss_of):
    """The mean of the chunks' own losses: the small batch that GradCache is there to avoid."""
    total = 0.0
    for chunk in chunks:
        z = torch.zeros(len(rows), embed(rows[:1]).shape[1], dtype=rows.dtype)
        z[chunk] = embed(rows[chunk])
        loss = loss_of(z) / len(chunks)
        loss.backward()
        total += loss.item()
    return total


def wrong_order(embed, rows, chunks, loss_of):
    """The loss sees the rows in the order of the chunks."""
    order = [i for chunk in chunks for i in chunk]
    starts = [sum(map(len, chunks[:k])) for k in range(len(chunks))]
    straight = [list(range(s, s + len(chunk))) for s, chunk in zip(starts, chunks, strict=True)]
    return ladder.our_gradcache(embed, rows[order], straight, loss_of)


def loss_with_a_graph(embed, rows, chunks, loss_of):
    return torch.tensor(ladder.our_gradcache(embed, rows, chunks, loss_of), requires_grad=True)


# --------------------------------------------------------------------------------------- exercise 7

precision_at_1 = evaluate.precision_at_1


def zero_for_nan(q, c, candidates, tie=1e-6):
    """No hit beside a rival; without one a hit."""
    return precision_at_1(np.nan_to_num(q), c, candidates, tie)


# --------------------------------------------------------------------------------------- exercise 8

VALUES = {
    "loss of a collapsed model": (math.log2(64), 0.0, math.log(64) / 0.03),
    "loss with hard negatives": (math.log(64), math.log(65)),
    "loss with equal targets": (math.log(4), math.log(2)),
    "argmax of a collapsed model": (10.0, 0.0),
    "precision of a collapsed model": (100.0, 10.0),
    "keys of a question token": (11, 4, 6),
    "labels of a row": (3, 1, 14),
    "forward passes": (16, 8, 11),
    "factor of a mean over ranks": (1.0, 4.0),
    "mean of means": (1.0, 0.7),
}


def predictions(name, value):
    return Wrong(PREDICTIONS=OURS.PREDICTIONS | {name: value})


# -------------------------------------------------------------------------------------- exercise 10


def table(**changed):
    return Wrong(ABLATION=OURS.ABLATION | changed)


def two_seeds():
    arms = OURS.ABLATION["arms"]
    short = {k: a | dict(scores={s: a["scores"][s] for s in (0, 1)}) for k, a in arms.items()}
    return table(arms=short)


def deviation_for_error():
    arms = OURS.ABLATION["arms"]
    return table(arms={k: a | dict(se=a["se"] * 3**0.5) for k, a in arms.items()})


def rank(name):
    """Exercise 6 runs in processes of its own: there the mistake is a name in a file."""
    return Wrong(SUBJECT=name)


def bug(name, test):
    """Exercise 9: one wrong test's name."""
    return Wrong(BUGS=OURS.BUGS | {name: test})


def mistakes():
    """exercise -> {name: what is graded in the student's place}."""
    losses = (overflows, forgets_keys, sums, a_tie_is_a_hit, keys_in_the_queries_order)
    masks = (test_mask.boundary_off_by_one, test_mask.sees_the_next_token)
    masks += (test_mask.questions_only, test_mask.padding_sees_nothing)
    labels = (test_answers.unshifted, test_answers.with_questions, labels_in_place, wraps_round)
    pools = (test_pooling.at_the_end, test_pooling.by_length, test_pooling.all_tokens)
    caches = (one_graph, no_replay, each_chunk_alone, wrong_order, loss_with_a_graph)
    metrics = (test_evaluate.argmax, test_evaluate.all_rows, zero_for_nan)
    no_margin = functools.partial(precision_at_1, tie=0)
    return dict(
        ex1={f.__name__: Wrong(info_nce=f) for f in losses},
        ex2={f.__name__: Wrong(compression_mask=f) for f in masks},
        ex3={f.__name__: Wrong(answer_labels=f) for f in labels}
        | dict(mean=Wrong(answer_loss=F.cross_entropy)),
        ex4={f.__name__: Wrong(compression_pool=f) for f in pools},
        ex5={f.__name__: Wrong(gradcache=f) for f in caches},
        ex6={n: rank(n) for n in WRONG},
        ex7={f.__name__: Wrong(precision_at_1=f) for f in metrics}
        | dict(no_margin=Wrong(precision_at_1=no_margin)),
        ex8={f"{k} {v:.4g}": predictions(k, v) for k, values in VALUES.items() for v in values},
        ex9=dict(
            another_bugs_test=bug("b1", OURS.BUGS["b5"]),
            no_such_test=bug("b3", "test_answers.py::test_nothing_at_all"),
            not_named=bug("b5", ""),
        ),
        ex10=dict(
            two_seeds=two_seeds(), deviation_for_error=deviation_for_error(),
            wrong_sign=table(difference=-9.0), too_bold=table(conclusion="lower"),
        ),
    )  # fmt: skip
