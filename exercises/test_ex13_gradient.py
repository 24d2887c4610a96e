"""Exercise 13: InfoNCE's gradient by hand, against that which autograd finds of our loss."""

import pytest
import torch
from checks import close, expect

from exercises import ladder

pytestmark = pytest.mark.ex13

LABELS = torch.tensor([4, 0, 5, 2])  # query i's target is not column i
KEYS = torch.tensor([7, 8, 9, 8, 5, 9])  # columns 2 and 5 are the same, 1 and 3 too


def cosines(B, M, dtype=torch.float64):
    """Of unit vectors: between -1 and 1, all different."""
    generator = torch.Generator().manual_seed(3)
    return (2 * torch.rand(B, M, generator=generator, dtype=torch.float64) - 1).to(dtype)


def check(student, x, temperature, labels=None, keys=None, rel=1e-10, hint=""):
    """The student's under inference mode, where autograd has nothing to say."""
    want = ladder.Reference().info_nce_gradient(x, temperature, labels, keys)
    before = x.clone()
    with torch.inference_mode():
        got = student.info_nce_gradient(x, temperature, labels, keys)
    expect(torch.equal(x, before), "other cosines", "those you were given", "in place?")
    expect(bool(torch.isfinite(got).all()), "inf or NaN", "numbers", "which exp overflows?")
    close(got, want, f"tau {temperature}: d loss / d cosine, of the *mean* over queries{hint}", rel)


def test_each_target_in_its_own_column(student):
    """As many targets as queries, and more (hard negatives); two temperatures."""
    for temperature in (1.0, 0.1):
        check(student, cosines(4, 4), temperature)
        check(student, cosines(4, 6), temperature)


def test_targets_in_any_column(student):
    """labels say which."""
    check(student, cosines(4, 6), 0.2, LABELS)


def test_what_equals_the_target_is_not_pushed_away(student):
    """keys: its column has no gradient in that row."""
    hint = "; the target itself stays, its equals are left out"
    check(student, cosines(4, 6), 0.2, LABELS, KEYS, hint=hint)
    check(student, cosines(4, 6), 0.2, None, KEYS, hint=hint)


def test_a_low_temperature_does_not_overflow(student):
    """Temperature 0.005 in float32: e^200 is no number there."""
    check(student, cosines(4, 6, torch.float32), 0.005, LABELS, rel=1e-4)
