"""What the first look at a list finds, joined from its parts: lost pictures, and whether targets
and queries differ. (Whole lists: test_lists.py; lists of bad examples: test_skip_bad.py.)"""

import itertools

import pytest
from checks import equal

from plumbing.first_pass import Lost, Tally, all_the_same, skip
from plumbing.formats import Lazy


def joined(side, parts) -> frozenset:
    """What parts whose targets (or queries) are these have together."""
    found = Tally()
    for distinct in parts:
        found = found.join(Tally(**{side: frozenset(distinct)}))
    return getattr(found, side)


@pytest.mark.parametrize("side", ["targets", "queries"])
def test_what_differs_is_seen_wherever_it_stands(side):
    """In the same part, in different ones, beside one that was seen before; in any order."""
    for parts in ([[0], [0, 1]], [[0], [], [1]], [[0], [0], [0, 1, 2]], [[], [1, 0], [0]]):
        for order in itertools.permutations(parts):
            equal(len(joined(side, order)), 2, f"{order}: two are enough")
    for parts in ([[7]], [[7], [7]], [[], [7], []], [[7], [], [7], [7]]):
        equal(joined(side, parts), {7}, f"{parts}: one")


def test_pairs_have_no_negatives_where_one_side_of_them_is_always_the_same():
    """And the line says which, and what it is."""
    equal(all_the_same({"a", "b"}, {"q", "r"}), "", "both differ")
    equal(all_the_same({"a"}, {"q", "r"}), "every target of its list is the same, a", "")
    equal(all_the_same({"a", "b"}, {"q"}), "every query of its list is the same, q", "")
    equal(all_the_same((), ()), "", "a list that has no sides, dialogues")


def test_lost_pictures_are_counted_and_the_first_is_named():
    """Over all parts, in their order."""
    found = Tally()
    for count, first in ((0, ""), (2, "a.png"), (0, ""), (3, "b.png")):
        found = found.join(Tally(Lost(count, first)))
    equal(tuple(found.lost), (5, "a.png"), "Tally.join")


@pytest.mark.parametrize(
    ("bad", "want"),
    [
        ((), [0, 1, 2, 3]),
        ((1,), [0, 2, 2, 3]),
        ((1, 2), [0, 3, 3, 3]),
        ((3,), [0, 1, 2, 0]),
        ((2, 3, 0), [1, 1, 1, 1]),
        ((1, 9), [0, 2, 2, 3]),  # of a longer list that it is a part of
        ((1, 4), [0, 2, 2, 3]),  # the first one beyond it
    ],
)
def test_the_next_good_example_stands_in_the_place_of_a_bad_one(bad, want):
    """Around the end to the first one."""
    rows = Lazy(4, lambda i: i)
    rows = Lazy(4, lambda i: i, rows.source._replace(skipped=frozenset(bad)))
    equal(list(skip(rows)), want, f"without {bad}")
    equal(skip(rows).source.skipped, frozenset(bad) & frozenset(range(4)), "what is counted")
