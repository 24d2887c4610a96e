"""Exercise 0: one wrong bit in the mask, and the suite's own check of the mask (tests/test_mask.py)
fails."""

import pytest
import test_mask
import torch
from checks import equal, expect

import pretrain
from data import ANSWER, CONTENT, Dialogue
from exercises.planting import planted
from toy.world import Shapes

pytestmark = pytest.mark.ex0


def roles_of_explain(embedder):
    """The roles (1, L) of the dialogue that `python -m tools.explain pretrain` walks through: the
    toy world's first one, two turns of it."""
    dialogue = Dialogue.of(Shapes().dialogue(0))
    row = embedder.collate.row(dialogue.item, dialogue.turns[:2])
    return row.tokens["roles"][None]


def position(student):
    """FLIP, if it is two numbers."""
    flip = student.FLIP
    pair = isinstance(flip, tuple | list) and len(flip) == 2
    ok = pair and all(isinstance(x, int) and x >= 0 for x in flip)
    expect(ok, f"FLIP = {flip!r}", "(row, column)", "two positions of explain's part 2")
    return flip


def test_one_bit_is_turned_round_in_a_new_mask(student):
    """That bit, whatever it was, and no other; the given mask stays."""
    mask = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    before = mask.clone()
    for row, column in ((0, 0), (4, 1), (1, 4), (5, 3)):
        flipped = student.flip_one_bit(mask, row, column)
        expect(isinstance(flipped, torch.Tensor), type(flipped), "a tensor", "is a return missing?")
        equal(mask, before, "the given mask must stay as it is: clone it")
        wrong = (flipped != mask).nonzero().tolist()
        equal(wrong, [[0, 0, row, column]], "the bits that differ: this one alone")


def test_it_lets_an_answer_see_the_picture(student, shared):
    """FLIP: the row of an answer's token, the column of the picture's."""
    roles = roles_of_explain(shared)[0].tolist()
    row, column = position(student)
    expect(max(row, column) < len(roles), (row, column), f"below {len(roles)}", "explain's part 2")
    name = test_mask.ROLES
    equal(name[roles[row]], name[ANSWER], f"the row, {row}: letter A in explain's part 2")
    equal(name[roles[column]], name[CONTENT], f"the column, {column}: letter x in explain's part 2")


def test_the_suites_check_of_the_mask_fails(student, shared):
    """It passes with the right mask of this dialogue; with the wrong bit it fails, and names it."""
    roles = roles_of_explain(shared)
    row, column = position(student)

    def with_a_wrong_bit(roles):
        return student.flip_one_bit(pretrain.compression_mask(roles), row, column)

    with planted(test_mask, "layouts", lambda: [("explain's dialogue", roles)]):
        test_mask.check_rule(pretrain.compression_mask)
        with pytest.raises(AssertionError) as caught:
            test_mask.check_rule(with_a_wrong_bit)
    print(f"test_mask.check_rule says:{caught.value}")
    named = f"1 wrong; ANSWER {row} -> CONTENT {column}: got True, want False"
    expect(named in str(caught.value), caught.value, named, "an answer that sees the picture")
