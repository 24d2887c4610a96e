"""Exercise 14: the gradient under hardness weights, by hand, against that which autograd finds of
our loss."""

import pytest
import torch
from checks import close, equal, expect

from exercises import ladder
from exercises.test_ex13_gradient import LABELS, cosines

pytestmark = pytest.mark.ex14

ALPHA = 4.0


def check(student, x, temperature, alpha=ALPHA, labels=None, rel=1e-10):
    """The student's under inference mode, where autograd has nothing to say."""
    want = ladder.Reference().hardness_gradient(x, temperature, alpha, labels)
    got = gradient_of(student, x, temperature, alpha, labels)
    expect(bool(torch.isfinite(got).all()), "inf or NaN", "numbers", "which exp overflows?")
    hint = f"tau {temperature}, alpha {alpha}: d loss / d cosine, of the *mean* over queries"
    if alpha:
        hint += "; w = e^(alpha c), of negatives alone: no tau in it, no gradient through it"
    close(got, want, hint, rel)


def gradient_of(student, x, temperature, alpha, labels=None):
    before = x.clone()
    with torch.inference_mode():
        got = student.hardness_gradient(x, temperature, alpha, labels)
    expect(torch.equal(x, before), "other cosines", "those you were given", "in place?")
    equal(got.shape, x.shape, "a number for each cosine")
    return got


def test_alpha_0_is_exercise_13(student):
    """Then every weight is one."""
    for labels in (None, LABELS):
        check(student, cosines(4, 6), 0.2, 0.0, labels)


def test_each_target_in_its_own_column(student):
    """As many targets as queries, and more (hard negatives); mild weights, and loud ones."""
    for alpha in (1.0, 9.0):
        check(student, cosines(4, 4), 0.2, alpha)
        check(student, cosines(4, 6), 1.0, alpha)


def test_targets_in_any_column(student):
    """labels say which; the target itself has no weight."""
    check(student, cosines(4, 6), 0.2, ALPHA, LABELS)


def test_a_query_is_pushed_as_much_as_it_is_pulled(student):
    """A row's numbers add up to 0, as in exercise 13, for the weights are constants."""
    got = gradient_of(student, cosines(4, 6), 0.2, ALPHA)
    own = got.diagonal()
    expect(bool((own < 0).all()), own.tolist(), "below 0", "the target is pulled, the rest pushed")
    gap = (got.sum(1) / own).abs().max().item()
    hint = "no derivative of the weight itself; and the weight stands inside of the softmax"
    expect(gap < 1e-10, f"{gap:.2e} of the pull is left over", "0", hint)


def test_a_low_temperature_does_not_overflow(student):
    """Temperature 0.005 in float32: e^200 is no number there, with or without a weight."""
    check(student, cosines(4, 6, torch.float32), 0.005, ALPHA, LABELS, rel=1e-4)
