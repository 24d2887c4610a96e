"""Which examples a step takes, which of them are asked first, and how many were skipped: pure
functions of (seed, step). (That each dialogue comes once an epoch: test_answers.py.)"""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from checks import equal, expect

import contrastive
import pretrain
from data import Dialogue, Item
from plumbing.formats import Lazy
from plumbing.sampling import ask_first, epoch_batch, shuffled, skipped_dialogues, skipped_pairs

DIALOGUES = [
    Dialogue(Item(f"text {i}"), ((f"question {i}?", "a"), ("b?", "c")), f"name {i}")
    for i in range(200)
]


def moved(share, seed=0, step=0, dialogues=DIALOGUES) -> list:
    """The numbers of the dialogues that are asked first."""
    cfg = pretrain.Config(question_first=share, seed=seed)
    return [i for i, d in enumerate(dialogues) if ask_first(d, cfg, step) != d]


@pytest.mark.parametrize(
    ("share", "least", "most"), [(0.0, 0, 0), (0.1, 8, 35), (0.8, 140, 180), (1.0, 200, 200)]
)
def test_so_many_are_asked_first_as_are_asked_for(share, least, most):
    """None and all of them, too; a small share is small."""
    expect(least <= len(moved(share)) <= most, len(moved(share)), (least, most), "question_first")


def test_who_is_asked_first_is_drawn_anew_by_seed_step_and_name():
    """Each of the three draws others; the same three the same."""
    first = moved(0.5)
    equal(moved(0.5), first, "no state")
    other_names = [d._replace(id=f"other {d.id}") for d in DIALOGUES]
    for what, other in (
        ("seed", moved(0.5, seed=1)),
        ("step", moved(0.5, step=1)),
        ("name", moved(0.5, dialogues=other_names)),
    ):
        expect(other != first, other, "others", what)
    expect(moved(0.5, seed=1) != moved(0.5, step=1), "the same", "others", "seed and step apart")
    elsewhere = [d._replace(id=f"a/folder/{d.id}") for d in DIALOGUES]
    equal(moved(0.5, dialogues=elsewhere), first, "a folder may be moved between runs")
    alike = [d._replace(id="one name") for d in DIALOGUES]
    expect(len(moved(0.5, dialogues=alike)) in (0, 200), "some", "all or none", "by name alone")


def test_a_question_that_is_asked_first_stands_behind_the_content():
    """Its answer is the first thing asked of the code; all else is as it was."""
    d = DIALOGUES[3]
    got = ask_first(d, pretrain.Config(question_first=1.0), 0)
    item = Item("text 3 question 3?")
    equal(got, Dialogue(item, (("", "a"), ("b?", "c")), "name 3"), "ask_first")


def test_an_order_is_of_its_seed_and_its_epoch():
    """Three small numbers that must not be mixed up: (0, 1), (1, 0), (1, 1), (0, 0)."""
    orders = {(s, e): tuple(shuffled(50, s, e)) for s in (0, 1) for e in (0, 1)}
    equal(len(set(orders.values())), 4, "four orders")
    for order in orders.values():
        equal(sorted(order), list(range(50)), "each once")
    equal(shuffled(10**8, 0, 3), range(10**8), "the toy world's")
    expect(tuple(shuffled(1000, 0, 0)) != tuple(range(1000)), "in order", "shuffled", "a file's")


def test_a_list_of_a_million_is_shuffled_as_a_short_one():
    """LLaVA's lists have more than half of one; each example still comes once."""
    n = 10**6
    expect(np.array_equal(np.sort(shuffled(n, 0, 0)), np.arange(n)), "others", "each once", "")
    first = epoch_batch(n, pretrain.Config(batch=8), 0, 0, 1)
    expect(first != sorted(first), first, "in no order", "shuffled")


def test_two_orders_are_in_memory_and_no_more():
    """A batch may lie across two epochs; of ten million examples each order has 80 MB."""
    orders = [shuffled(100, 9, epoch) for epoch in (0, 1)]
    expect(shuffled(100, 9, 0) is orders[0], "drawn again", "once", "shuffled's cache")
    left = [weakref.ref(order) for order in orders]
    del orders
    for epoch in (2, 3):
        shuffled(100, 9, epoch)
    equal([order() for order in left], [None, None], "orders of past epochs")


def test_a_step_takes_up_where_the_one_before_ended():
    """Batches of 4 of 10 dialogues: over the end of an epoch, too; two ranks take turns."""
    cfg = pretrain.Config(batch=4, seed=5)
    orders = [*shuffled(10, 5, 0), *shuffled(10, 5, 1)]
    for step in range(5):
        mine = [int(i) for i in orders[4 * step : 4 * step + 4]]
        equal(epoch_batch(10, cfg, step, 0, 1), mine, f"step {step}")
        equal(epoch_batch(10, cfg, step, 1, 2), mine[1::2], f"step {step}, rank 1 of 2")


class Source(list):
    """Examples of which some are skipped."""

    def __init__(self, n, skipped):
        super().__init__(range(n))
        self.source = SimpleNamespace(skipped=frozenset(skipped))


def test_skipped_dialogues_are_counted_in_each_step_over_all_ranks():
    """Those of the step's own batch; a dialogue twice in a batch counts twice."""
    cfg = pretrain.Config(batch=4, seed=2)
    dialogues = Source(10, {3, 7})
    want = [sum(i in (3, 7) for i in epoch_batch(10, cfg, step, 0, 1)) for step in range(5)]
    expect(len(set(want)) > 1, want, "unequal steps", "too easy")
    got = [skipped_dialogues(dialogues, cfg, step) for step in range(5)]
    equal(got, want, "skipped_dialogues")
    equal(sum(want), 4, "two epochs, two of them in each")
    equal(skipped_dialogues(Source(1, {0}), cfg, 0), 4, "one dialogue, four times")
    equal(skipped_dialogues(Source(10, ()), cfg, 0), 0, "none is skipped")


def test_skipped_pairs_are_counted_by_their_set_and_as_often_as_they_are_drawn():
    """Number 3 of one set is not number 3 of another."""
    pairs = {"a": Source(5, {3}), "b": Source(5, ())}

    def draw(pairs, cfg, step):
        equal(list(pairs), ["a", "b"], "all sets")
        return [("a", 3), ("b", 3), ("a", 3), ("a", 4), ("b", 4)][step:]

    equal([skipped_pairs(pairs, draw, None, step) for step in range(4)], [2, 1, 1, 0], "steps")
    pairs["a"].source.skipped = frozenset()

    def no_draw(*_):
        pytest.fail("a second draw for nothing")

    equal(skipped_pairs(pairs, no_draw, None, 0), 0, "none is skipped")


# ------------------------------------------------------------------------------ stage 2's batches


def test_sets_are_drawn_in_proportion_to_their_size_and_a_block_is_of_one():
    """Of 1,000 and of 10 pairs; each pair of a block once, and a small set over again."""
    sets = {"large": Lazy(1000, None), "small": Lazy(3, None)}
    cfg = contrastive.Config(batch=64, block=8)
    blocks = []
    for step in range(20):
        drawn = contrastive.draw(sets, cfg, step)
        equal(len(drawn), 64, "the global batch")
        blocks += [drawn[i : i + 8] for i in range(0, 64, 8)]
    small = 0
    for block in blocks:
        (name,) = {name for name, _ in block}
        numbers = [i for _, i in block]
        small += name == "small"
        if name == "large":
            equal(len(set(numbers)), 8, "without repeating one")
        else:
            equal(numbers, [numbers[i % 3] for i in range(8)], "it repeats itself")
            equal(sorted(set(numbers)), [0, 1, 2], "all of it")
    expect(small < 8, small, "about 3 in 1000 of 160 blocks", "by size")
    even = {name: Lazy(50, None) for name in "ab"}
    names = [contrastive.draw(even, cfg, step)[0][0] for step in range(30)]
    expect(5 < names.count("a") < 25, names, "both", "as many of each")


def test_a_batch_is_a_function_of_seed_and_step():
    """Each draws another one; step 1 of seed 0 is not step 0 of seed 1, or runs of several seeds
    would see the same batches."""
    sets, batches = {"a": Lazy(1000, None)}, {}
    for seed in range(3):
        cfg = contrastive.Config(batch=8, block=4, seed=seed)
        for step in range(3):
            batches[seed, step] = contrastive.draw(sets, cfg, step)
            equal(contrastive.draw(sets, cfg, step), batches[seed, step], "no state")
    equal(len({str(batch) for batch in batches.values()}), 9, "nine batches")


def test_a_set_smaller_than_a_block_repeats_itself_in_turn():
    """Beside large ones it is hardly ever drawn."""
    cfg = contrastive.Config(batch=16, block=8)
    for step in range(4):
        drawn = contrastive.draw({"small": Lazy(3, None)}, cfg, step)
        for first in (0, 8):
            numbers = [i for _, i in drawn[first : first + 8]]
            equal(sorted(numbers[:3]), [0, 1, 2], "all of it")
            equal(numbers, [numbers[i % 3] for i in range(8)], "over again")
