"""Exercise 7: Precision@1, graded by tests/test_evaluate.py."""

import numpy as np
import pytest
import test_evaluate
from checks import equal

import evaluate
from exercises.planting import planted

pytestmark = pytest.mark.ex7


def in_place(student):
    return planted(evaluate, "precision_at_1", student.precision_at_1)


def test_it_equals_a_loop_and_a_collapsed_model_scores_nothing(student):
    """Loop over cosines; all embeddings equal: 0; queries beside their targets: 1."""
    test_evaluate.check_precision(student.precision_at_1)


def test_rounding_decides_nothing(student):
    """Scores within 1e-6 are a tie."""
    q, c, candidates = test_evaluate.collapsed()
    noise = np.random.default_rng(1).standard_normal(c.shape)
    got = student.precision_at_1(q, (c + 1e-7 * noise).astype("float32"), candidates)
    equal(got, 0.0, "a tie up to rounding is a tie")
    q, c = np.eye(2, dtype="float32")[:1], np.array([[1, 0], [0.95, 0.3122]], "float32")
    for tie, want in ((0.01, 1.0), (0.1, 0.0)):
        equal(student.precision_at_1(q, c, [[0, 1]], tie=tie), want, f"cosines 1 and 0.95, {tie=}")


def test_nan_is_never_a_hit(student):
    """In the query, in the right candidate, in any other one; in a query without a rival."""
    with in_place(student):
        test_evaluate.test_nan_is_never_a_hit()


def test_the_right_row_twice_counts_once(student):
    """The same row is no rival; an equal one of another row is."""
    with in_place(student):
        test_evaluate.test_the_right_row_twice_counts_once()


def test_chance_and_order(student):
    """Random embeddings hit one of ten; the order of the others has no meaning."""
    with in_place(student):
        test_evaluate.test_without_information_the_score_is_chance()
        test_evaluate.test_the_order_of_the_other_candidates_does_not_matter()
