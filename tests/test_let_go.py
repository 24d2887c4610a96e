"""What is remembered to be quick is let go when it is no longer of use: one evaluation set's
content at a time is in memory, two epochs' orders, one chunk's output of a frozen tower."""

import gc
import weakref

import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
from checks import expect

from data import read_tasks
from plumbing import mmeb, sampling


def gone(refs, what):
    """Fails where one of the objects is still in memory."""
    gc.collect()
    left = [ref() for ref in refs if ref() is not None]
    expect(not left, f"{len(left)} of {len(refs)} left", "none", what)


@pytest.fixture
def two_sets(tmp_path):
    """A folder in MMEB-eval's layout, with sets A and B of two queries each."""
    for name in "AB":
        rows = {"qry_text": [f"{name}1", f"{name}2"], "qry_img_path": ["", ""]}
        rows.update(tgt_text=[["t", "u"]] * 2, tgt_img_path=[["", ""]] * 2)
        (tmp_path / name).mkdir()
        pq.write_table(pyarrow.table(rows), tmp_path / name / "test-0.parquet")
    return str(tmp_path)


def test_items_of_a_set_are_made_once_and_gone_with_it(two_sets):
    """Candidates repeat: one Item, whose key is computed once; a set later all of them are gone."""
    first, second = read_tasks(two_sets)
    items = [first.queries[0][0], *first.queries[0][1]]
    again = [first.queries[1][1][0], first.queries[0][0]]
    expect(again[0] is items[1] and again[1] is items[0], again, "the same objects", "one Item")
    refs = [weakref.ref(item) for item in items]
    del items, again
    second.queries[0]
    gone(refs, "Items of a set that was evaluated")


def test_rows_of_a_set_are_gone_with_it(two_sets):
    """The table as pyarrow has it, and the contents that were made of its columns."""
    first, second = mmeb.eval_sets(two_sets, None, "").values()
    contents = weakref.ref(mmeb.contents_of(first.source.images, "A"))
    table = mmeb.last_loaded(first.source.raw)
    expect(mmeb.last_loaded(first.source.raw) is table, "read again", "once", "mmeb.last_loaded")
    refs = [weakref.ref(table), contents]
    del table
    second[0]
    gone(refs, "a set that was evaluated")


def test_orders_of_past_epochs_are_gone():
    """A batch may lie across two epochs: their orders are kept, and no others (of 10 million
    examples each has 80 MB)."""
    orders = [sampling.shuffled(100, 0, epoch) for epoch in (0, 1)]
    expect(sampling.shuffled(100, 0, 0) is orders[0], "drawn again", "once", "two epochs a batch")
    refs = [weakref.ref(order) for order in orders]
    del orders
    for epoch in (2, 3):
        sampling.shuffled(100, 0, epoch)
    gone(refs, "orders of past epochs")
