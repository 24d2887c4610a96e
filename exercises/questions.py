"""The truth of exercise 8, computed by running our code: no answer is written down anywhere.
The questions' text stands in stub.py."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import contrastive
import evaluate
import pretrain
from data import ANSWER, COMPRESS, CONTENT, HEAD, QUESTION


class Question(NamedTuple):
    compute: object  # () -> the truth
    hint: str  # what to think of, and what to run


# The one row that two of the questions are about.
ROLES = [HEAD] + [CONTENT] * 6 + [COMPRESS] * 2 + [QUESTION] * 3 + [ANSWER] * 2


def same(n):
    """n equal unit vectors."""
    return F.normalize(torch.ones(n, 8, dtype=torch.float64), dim=1)


def hard_negatives():
    return float(contrastive.info_nce(same(64), same(128), 0.02, torch.arange(64) * 2)[0])


def equal_targets():
    return float(contrastive.info_nce(same(4), same(4), 0.03, keys=torch.tensor([0, 0, 1, 1]))[0])


def argmax():
    z = same(10).numpy()
    return 100.0 * float(np.argmax(z @ z[0]) == 0)


def collapsed_precision():
    z = same(10).numpy()
    return 100 * evaluate.precision_at_1(z[:1], z, [list(range(10))])


def keys_of_a_question():
    return int(pretrain.compression_mask(torch.tensor([ROLES]))[0, 0, 10].sum())


def labels_of_a_row():
    roles = torch.tensor([ROLES])
    return int((pretrain.answer_labels(roles, roles) != -100).sum())


def forward_passes(chunks=8, keep=3):
    """Counted in `contrastive.two_passes`."""
    calls, net, x = [], torch.nn.Linear(3, 2), torch.randn(2 * chunks, 3)

    def embed(chunk):
        calls.append(chunk)
        return net(x[chunk])

    rows = [[2 * i, 2 * i + 1] for i in range(chunks)]
    contrastive.two_passes(embed, rows, lambda z: (z * z).sum(), keep)
    return len(calls)


def mean_over_ranks(world=4, n=3):
    """The loss' gradient if each rank lets the other ranks' embeddings be constants, and the ranks'
    gradients are then averaged; divided by the true one."""
    g = torch.Generator().manual_seed(0)
    queries, targets = torch.randn(2, world * n, 5, generator=g, dtype=torch.float64)

    def gradient(own):
        """own (rows, 1): 1 where a row's embedding has a graph."""
        w = torch.eye(5, dtype=torch.float64).requires_grad_()
        q, t = F.normalize(queries @ w, dim=1), F.normalize(targets @ w, dim=1)
        q, t = own * q + (1 - own) * q.detach(), own * t + (1 - own) * t.detach()
        contrastive.info_nce(q, t, 0.1)[0].backward()
        return w.grad

    whole = gradient(torch.ones(world * n, 1, dtype=torch.float64))
    parts = []
    for rank in range(world):  # in turn, in one process
        own = torch.zeros(world * n, 1, dtype=torch.float64)
        own[rank * n : (rank + 1) * n] = 1
        parts.append(gradient(own))
    mean = torch.stack(parts).mean(0)
    return float((mean * whole).sum() / (whole * whole).sum())


def mean_of_means():
    def logits(n, nats):
        """Two words; the right one, word 0, has probability e^-nats."""
        p = torch.full((n,), -nats).double().exp()
        return torch.stack([p, 1 - p], dim=1).log()

    chunks = [(logits(2, 3.0), torch.zeros(2).long()), (logits(8, 1.0), torch.zeros(8).long())]
    sums = [float(pretrain.answer_loss(*c)) for c in chunks]
    return (sums[0] / 2 + sums[1] / 8) / 2 / (sum(sums) / 10)


QUESTIONS = {
    "loss of a collapsed model": Question(
        lambda: float(contrastive.info_nce(same(64), same(64), 0.03)[0]),
        "all scores are equal: what is a softmax over 64 equal scores? Run contrastive.info_nce",
    ),
    "loss with hard negatives": Question(
        hard_negatives, "how many columns does each query see? Run contrastive.info_nce"
    ),
    "loss with equal targets": Question(
        equal_targets, "which columns stay in query 0's denominator? Run it with keys"
    ),
    "argmax of a collapsed model": Question(argmax, "which index wins a tie? Run np.argmax"),
    "precision of a collapsed model": Question(
        collapsed_precision, "is any query a hit? Run evaluate.precision_at_1"
    ),
    "keys of a question token": Question(
        keys_of_a_question, "head, code, questions so far. Print pretrain.compression_mask"
    ),
    "labels of a row": Question(
        labels_of_a_row, "who predicts an answer's first token? Print pretrain.answer_labels"
    ),
    "forward passes": Question(
        forward_passes, "who needs no second pass? Read contrastive.two_passes"
    ),
    "factor of a mean over ranks": Question(
        mean_over_ranks, "the ranks' parts *add up* to the gradient; then the mean is taken"
    ),
    "mean of means": Question(mean_of_means, "(3 + 1) / 2 is one of the two"),
}
