"""What the first look at a list finds, joined from its parts: lost pictures, and whether targets
differ. (Whole lists: test_lists.py; lists of bad examples: test_skip_bad.py.)"""

import itertools

import pytest
from checks import equal

from plumbing.first_pass import Lost, Tally, one_of, skip
from plumbing.formats import Lazy


def joined(parts) -> Tally:
    """Of parts whose targets are these."""
    found = Tally()
    for targets in parts:
        found = found.join(Tally(targets=frozenset(targets)))
    return found


def test_targets_that_differ_are_seen_wherever_they_stand():
    """In the same part, in different ones, beside one that was seen before; in any order."""
    for parts in ([[0], [0, 1]], [[0], [], [1]], [[0], [0], [0, 1, 2]], [[], [1, 0], [0]]):
        for order in itertools.permutations(parts):
            found = joined(order)
            equal(
                (one_of(found.targets), len(found.targets)), (None, 2), f"{order}: two are enough"
            )
    for parts in ([[7]], [[7], [7]], [[], [7], []], [[7], [], [7], [7]]):
        equal(one_of(joined(parts).targets), 7, f"{parts}: one")
    equal(one_of(Tally().targets), None, "none at all")


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
