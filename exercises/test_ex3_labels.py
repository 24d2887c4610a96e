"""Exercise 3: answer labels, graded by the checks of tests/test_answers.py."""

import pytest
import test_answers
import torch
from checks import equal, expect

import pretrain
from data import ANSWER, PAD
from exercises.planting import planted

pytestmark = pytest.mark.ex3


def test_the_labels_decode_to_the_answers_and_their_end_token(student, shared):
    """Token by token on a dialogue of two turns and a shorter one, padded."""
    test_answers.check_labels(student.answer_labels, shared)


def test_the_labels_are_made_anew(student, shared):
    """The model still needs the ids: they stay as they were."""
    inputs = test_answers.worked(shared)
    ids = inputs["input_ids"].clone()
    labels = student.answer_labels(inputs["input_ids"], inputs["roles"])
    expect(isinstance(labels, torch.Tensor), labels, "labels", "return")
    equal(inputs["input_ids"], ids, "input_ids must not change")


def test_the_last_position_predicts_nothing(student):
    """Nothing comes after it, and a row's first token is not its next one."""
    ids = torch.tensor([[7, 8, 9], [4, 5, 6]])
    roles = torch.tensor([[ANSWER] * 3, [ANSWER, PAD, PAD]])
    labels = student.answer_labels(ids, roles).tolist()
    equal(labels, [[8, 9, -100], [-100] * 3], "rows that begin with an answer's token")


def test_the_loss_is_a_sum_in_nats(student):
    """n ln V for uniform predictions, and a loop over -ln p."""
    with planted(pretrain, "answer_loss", student.answer_loss):
        test_answers.test_the_loss_is_a_sum_in_nats()


def test_training_has_the_gradient_of_all_answers(student, shared):
    """Labels and loss in stage 1's own training step: the same gradient for any chunks."""
    with (
        planted(pretrain, "answer_labels", student.answer_labels),
        planted(pretrain, "answer_loss", student.answer_loss),
    ):
        test_answers.test_the_gradient_is_that_of_the_whole_batch_for_any_chunks(shared)
