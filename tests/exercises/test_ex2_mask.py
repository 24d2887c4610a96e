"""Exercise 2: the compression mask, graded by the checks of tests/test_mask.py."""

import pytest
import test_mask
import torch
from checks import equal, expect
from planting import planted

import pretrain

pytestmark = pytest.mark.ex2
ROLES = ("PAD", "HEAD", "CONTENT", "COMPRESS", "QUESTION", "ANSWER")


def test_the_mask_equals_a_loop(student):
    """Padding on both sides, parts in any order, nothing but padding."""
    for name, roles in test_mask.layouts():
        got, want = student.compression_mask(roles), test_mask.oracle(roles)
        expect(got.dtype == torch.bool, got.dtype, torch.bool, "True = may attend")
        equal(tuple(got.shape), tuple(want.shape), "one mask a row, for all heads: (B, 1, L, L)")
        wrong = (got != want).nonzero().tolist()
        where = [
            f"{ROLES[roles[b, i]]} {i} -> {ROLES[roles[b, j]]} {j}: got {not want[b, 0, i, j]}, "
            f"want {bool(want[b, 0, i, j])}"
            for b, _, i, j in wrong[:3]
        ]
        expect(not wrong, f"{name}, {len(wrong)} wrong; {'; '.join(where)}", "the loop of the stub",
               "token i -> token j: may i attend to j?")  # fmt: skip


def test_in_a_model_the_picture_reaches_an_answer_through_the_code_alone(student, shared):
    """New pixels change the answers' hidden states, and no longer once the code is hidden too."""
    test_mask.check_flow(shared, student.compression_mask)


def test_in_a_model_a_row_does_not_depend_on_the_padding_beside_it(student, shared):
    """Each row of a batch has the hidden states that it has alone."""
    with planted(pretrain, "compression_mask", student.compression_mask):
        test_mask.test_a_row_does_not_depend_on_the_padding_beside_it(shared)
