"""Exercise 4: pooling, graded by the checks of tests/test_pooling.py."""

import pytest
import test_pooling

import model
from exercises.planting import planted

pytestmark = pytest.mark.ex4


def test_one_token_is_the_last_real_one(student):
    """K = 1, padding on the right, on the left, and none."""
    test_pooling.check_pool(student.compression_pool, 1)


def test_k_tokens_are_the_last_real_ones(student):
    """K = 2, 4 and all; rows of every length."""
    for K in (2, 4, 7):
        test_pooling.check_pool(student.compression_pool, K)


def test_the_gradient_goes_to_the_pooled_tokens_alone(student):
    """1 / K at the K tokens, else 0."""
    with planted(model, "compression_pool", student.compression_pool):
        test_pooling.test_the_gradient_goes_to_the_pooled_tokens_alone()


def test_in_a_model_the_pooled_tokens_are_the_code(student, shared):
    """C_1 ... C_K of a real batch."""
    with planted(model, "compression_pool", student.compression_pool):
        test_pooling.test_a_row_ends_with_its_compression_tokens(shared)
