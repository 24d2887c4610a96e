"""Exercise 2: the compression mask, graded by the checks of tests/test_mask.py."""

import pytest
import test_mask
import torch
from checks import expect

import pretrain
from data import CONTENT
from exercises.planting import planted

pytestmark = pytest.mark.ex2


def test_the_mask_equals_a_loop(student):
    """Padding on both sides, parts in any order, nothing but padding."""
    test_mask.check_rule(student.compression_mask)


def test_in_a_model_the_picture_reaches_an_answer_through_the_code_alone(student, shared):
    """New pixels change the answers' hidden states, and no longer once the code is hidden too."""
    test_mask.check_flow(shared, student.compression_mask)


def test_in_a_model_a_row_does_not_depend_on_the_padding_beside_it(student, shared):
    """Each row of a batch has the hidden states that it has alone."""
    mask = student.compression_mask(torch.tensor([[CONTENT]]))
    expect(isinstance(mask, torch.Tensor), mask, "a mask", "None is causal attention: no mask")
    with planted(pretrain, "compression_mask", student.compression_mask):
        test_mask.test_a_row_does_not_depend_on_the_padding_beside_it(shared)
