"""Exercise 1: InfoNCE, graded by the checks of tests/test_infonce.py."""

import pytest
import test_infonce
import torch
from checks import close, equal, expect

import contrastive
from exercises.planting import planted

pytestmark = pytest.mark.ex1


def function_of(student):
    """The student's function in the form of `contrastive.info_nce`, whose weights it need not
    have."""
    function = student.info_nce  # now: the reference would look for what is planted later

    def info_nce(q, t, temperature, labels=None, keys=None, reweigh=None):
        result = function(q, t, temperature, labels, keys)
        pair = isinstance(result, tuple | list) and len(result) == 2
        expect(pair, type(result), "(loss, hits)", "two things are asked for; hits, too")
        return result

    return info_nce


def in_place(student):
    return planted(contrastive, "info_nce", function_of(student))


def cases(keys_too):
    """Those of test_infonce with one positive a query; targets in any order, repeated."""
    for name, q, t, labels, keys in test_infonce.cases():
        if (labels is None or labels.ndim == 1) and (keys is None or keys_too):
            yield name, q, t, labels, keys
    if keys_too:  # query i's key is that of its target, which is not column i
        labels, keys = torch.tensor([5, 0, 6, 3]), torch.tensor([1, 2, 3, 1, 2, 3, 3])
        yield "targets in another order, duplicates", *test_infonce.embeddings(4, 7), labels, keys


def check(student, keys_too):
    """The suite's own loop over scores, on these cases."""
    chosen = list(cases(keys_too))
    with planted(test_infonce, "cases", lambda: chosen):
        test_infonce.check_loop(function_of(student))


def test_the_loss_equals_a_loop(student):
    """One target each; columns that are nobody's target (hard negatives)."""
    check(student, keys_too=False)


def test_equal_targets_are_no_negatives(student):
    """With keys: the other columns of my target's key leave the denominator and the hits."""
    check(student, keys_too=True)
    q, t = test_infonce.embeddings(4, 4)
    loss, _ = function_of(student)(q, t, 0.01, None, keys=0 * torch.arange(4))
    close(loss, 0.0, "no negatives at all: nothing to tell apart", 1e-12)
    cosines = torch.tensor([0.5, 0.9, 0.4])  # with the target, its duplicate, another one
    t = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    q, labels, keys = torch.eye(2)[[0, 0]], torch.tensor([0, 0]), torch.tensor([5, 5, 7])
    _, hits = function_of(student)(q, t, 0.1, labels, keys)
    equal(float(hits), 1.0, "a nearer column with my target's key is no rival")


def test_known_values(student):
    """ln M and no hit for a collapsed model, 0 and all hits for a perfect one."""
    with in_place(student):
        test_infonce.test_equal_embeddings_give_the_log_of_the_number_of_columns()
        test_infonce.test_perfect_embeddings_give_zero()


def test_the_gradient_equals_that_of_cross_entropy(student, monkeypatch):
    """Nothing is detached, nothing rounded."""
    with in_place(student):
        test_infonce.test_the_gradient_equals_that_of_the_plain_loss(monkeypatch)


def test_a_low_temperature_does_not_overflow(student):
    """Temperature 0.01 in float32, for right and for wrong embeddings."""
    with in_place(student):
        test_infonce.test_a_low_temperature_does_not_overflow()
