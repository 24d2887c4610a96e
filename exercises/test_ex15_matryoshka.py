"""Exercise 15: Matryoshka's mean over prefixes, against `losses.over_prefixes`: number, gradient,
and what the loss is shown."""

import pytest
import torch
import torch.nn.functional as F
from checks import close, equal, expect

from exercises import ladder

pytestmark = pytest.mark.ex15

B, M, D = 3, 5, 8
LENGTHS = [2, 5]


def embeddings():
    """-> q (B, D), t (M, D), unit length, with a gradient."""
    generator = torch.Generator().manual_seed(5)
    z = F.normalize(torch.randn(B + M, D, generator=generator, dtype=torch.float64), dim=1)
    return z[:B].clone().requires_grad_(), z[B:].clone().requires_grad_()


def nats(q, t):
    """InfoNCE, query i's target in column i."""
    return F.cross_entropy(q @ t.T / 0.1, torch.arange(len(q)))


def number_and_gradient(subject, lengths):
    """-> (the loss, its gradient by q, by t)."""
    q, t = embeddings()
    before = q.detach().clone(), t.detach().clone()
    loss = subject.matryoshka_loss(nats, q, t, lengths)
    scalar = isinstance(loss, torch.Tensor) and loss.ndim == 0
    expect(scalar, loss, "a scalar tensor", "no float: it has no gradient")
    expect(loss.requires_grad, "a loss without a graph", "one with it", "detach, item, no_grad?")
    gradients = torch.autograd.grad(loss, (q, t))
    same = torch.equal(q, before[0]) and torch.equal(t, before[1])
    expect(same, "other vectors", "those you were given", "in place?")
    return loss, *gradients


def check(student, lengths):
    wants = number_and_gradient(ladder.Reference(), lengths)
    gots = number_and_gradient(student, lengths)
    for got, want, name in zip(gots, wants, ("loss", "d loss / d q", "d loss / d t"), strict=True):
        hint = f"{name}, prefixes {lengths}: the *mean*, the whole too; prefixes of unit length;"
        hint += " the whole goes in as it is: normalising it again changes its gradient"
        close(got, want, hint, 1e-10)


def test_no_prefix_is_the_loss_itself(student):
    """Exercise 1's, for example."""
    check(student, [])


def test_one_prefix(student):
    """Half the mean is that of the whole vectors."""
    check(student, [4])


def test_several_prefixes(student):
    """All of them weigh alike; the shortest has one number: a sign."""
    check(student, LENGTHS)
    check(student, [1, 2, 4])


def test_what_the_loss_is_shown(student):
    """Whole vectors once, and of each length the *first* numbers of every row, of unit length."""
    shown = []

    def loss(q, t):
        shown.append((q.detach(), t.detach()))
        return nats(q, t)

    student.matryoshka_loss(loss, *embeddings(), LENGTHS)
    shown.sort(key=lambda pair: pair[0].shape[1])
    widths = [(tuple(q.shape), tuple(t.shape)) for q, t in shown]
    equal(widths, [((B, n), (M, n)) for n in (*LENGTHS, D)], "shapes of q and t, a call each")
    for part, whole in zip(shown, [embeddings()] * len(shown), strict=True):
        for got, rows, name in zip(part, whole, ("q", "t"), strict=True):
            n = got.shape[1]
            close(got.norm(dim=1), torch.ones(len(got)), f"each row's length, {name}, n {n}", 1e-10)
            lengths = rows[:, :n].norm(dim=1, keepdim=True)
            close(got * lengths, rows[:, :n], f"the first {n} numbers of {name}, not others", 1e-10)
