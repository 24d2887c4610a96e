"""The first pass over a list: each example is read once before training begins, so that what is bad
is known by its place, and pictures that are not there by their names.

`--skip-bad FILE` takes a list of bad examples as `python -m tools.check --list-bad FILE` writes it,
{"list": "talks.jsonl", "digest": 7, "example": 12, "error": ...} a line. In the place of such an
example the next good one of its list is taken; all others are drawn as they were, so that a run
goes on with a list that it did not begin with. What is on no list is never skipped."""

import json
import os
import zlib
from collections.abc import Callable
from functools import partial, reduce
from itertools import chain, islice
from typing import NamedTuple

from tqdm import tqdm

from plumbing.errors import InputError, brief
from plumbing.files import open_file
from plumbing.lines import Lazy, Lost, Source
from plumbing.loader import each, prefetch

WINDOW = 10_000  # examples that a worker tries at a time
FEW = 50_000  # examples that are not worth a worker


class Place(NamedTuple):
    """Where the pictures are (None or "": beside the list), and the list of bad examples ("": there
    is none)."""

    image_root: str | None = None
    skip_bad: str = ""

    @staticmethod
    def of(x) -> "Place":
        """From an image root, from a stage's flags, or as it is."""
        if hasattr(x, "image_root"):
            return Place(x.image_root, x.skip_bad)
        return Place(x)


# --------------------------------------------------------------------------------- what is skipped


class Listed(NamedTuple):
    """One line of a list of bad examples: a list's name, its digest, the example's number in it,
    from 1 on, and what is wrong with it."""

    list: str
    digest: int
    example: int
    error: str = ""


def read_listed(path) -> tuple:
    """The lines of a list of bad examples."""
    listed = []
    with open_file(path, f"--skip-bad {brief(path)}", "list") as file:
        for number, line in enumerate(file, 1):
            try:
                bad = Listed(**json.loads(line))
                if (type(bad.list), type(bad.digest), type(bad.example)) != (str, int, int):
                    raise TypeError
            except (TypeError, ValueError, RecursionError):
                form = '{"list": ..., "digest": ..., "example": ..., "error": ...}'
                hint = f"needs {form}, as `python -m tools.check DATA --list-bad` writes it"
                raise InputError(f"--skip-bad {path}, line {number}: {hint}") from None
            listed.append(bad)
    return tuple(listed)


def digest_of_listed(path) -> str:
    """A few words that change with the examples that a list of bad ones names; "" for no list."""
    if not path:
        return ""
    examples = sorted({bad[:3] for bad in read_listed(path)})
    return f"{len(examples):,} examples, {zlib.crc32(repr(examples).encode()):08x}"


class Known(NamedTuple):
    """A list as its file stands now: a number that changes with it, and its number of examples."""

    digest: int
    examples: int


def skipped_in(place, known, others=()) -> dict:
    """{name: indices of the examples that are skipped}. known: {name: Known} of the lists that are
    read; others: names of lists that are there and are not read. InputError for any other."""
    skipped = {name: set() for name in known}
    if not place.skip_bad:
        return skipped
    for bad in read_listed(place.skip_bad):
        where = f"--skip-bad {place.skip_bad}: example {bad.example} of {brief(bad.list)}"
        if bad.list not in known:
            if bad.list in others:
                continue
            raise InputError(f"{where} is of other data; these are {brief(', '.join(known))}")
        now = known[bad.list]
        if bad.digest != now.digest or not 1 <= bad.example <= now.examples:
            raise InputError(f"{where}: the list has changed since. Check it again")
        skipped[bad.list].add(bad.example - 1)
    return skipped


def skip(rows) -> Lazy:
    """`rows` with the next good example in the place of each that its source says is skipped."""
    bad = frozenset(i for i in rows.source.skipped if i < len(rows))
    if bad and len(bad) == len(rows):
        raise InputError(f"{rows.source.where(0)}: all examples of its list are in --skip-bad")

    def get(i):
        while i in bad:
            i = (i + 1) % len(rows)
        return rows.get(i)

    return Lazy(len(rows), get, rows.source._replace(skipped=bad))


# ---------------------------------------------------------------------------------- the first pass


class Tally(NamedTuple):
    """What the first pass has seen in a list, or in a part of it: its lost pictures, and its
    distinct targets and queries, two at most of each: it only matters whether there are more than
    one."""

    lost: Lost = Lost()
    targets: frozenset = frozenset()
    queries: frozenset = frozenset()

    def join(self, other) -> "Tally":
        """The Tally of both parts; the other one comes behind this one in the list."""
        lost = Lost(self.lost.count + other.lost.count, self.lost.first or other.lost.first)
        targets = frozenset(islice(self.targets | other.targets, 2))
        return Tally(lost, targets, frozenset(islice(self.queries | other.queries, 2)))


def all_the_same(targets, queries) -> str:
    """Why a list's pairs have no negatives among each other: all of its targets are one, or all of
    its queries, for which all targets are right. "" where both differ."""
    for side, distinct in (("target", targets), ("query", queries)):
        if len(distinct) == 1:
            (only,) = distinct
            return f"every {side} of its list is the same, {brief(only)}"
    return ""


class Tries(NamedTuple):
    """How the examples of a list are tried. source: the list's; bad: indices that are skipped;
    sides: function(example) -> (its targets, its queries), each a tuple. Hard negatives stand in
    both, so that a list that has some is never called one without anything to tell apart."""

    source: Source
    bad: frozenset
    sides: Callable


def try_window(tries, indices) -> Tally:
    """Reads a part of the examples; raises the first InputError."""
    tally, lost = Tally(), tries.source.images.lost
    lost.clear()
    for i, example in zip(indices, tries.source.read(indices), strict=True):
        if i not in tries.bad:
            if isinstance(example, InputError):
                raise example
            if lost:
                tally = tally.join(Tally(Lost(len(lost), f"{tries.source.where(i)}: {lost[0]}")))
            if len(tally.targets) < 2 or len(tally.queries) < 2:
                targets, queries = tries.sides(example)
                tally = tally.join(Tally(Lost(), frozenset(targets), frozenset(queries)))
        lost.clear()
    return tally


def first_pass(name, length, tries) -> Tally:
    """Tries all examples of a list, a long one in worker processes. The first bad one is raised."""
    windows = [range(i, min(i + WINDOW, length)) for i in range(0, length, WINDOW)]
    workers = min(8, os.cpu_count()) if length > FEW else 0
    share = workers or 1
    batches = [windows[i : i + share] for i in range(0, len(windows), share)]

    def tried(k):
        # Trap: only `each` divides the work; whatever else stands here, every worker does.
        return each(partial(try_window, tries), batches[k])

    parts = chain.from_iterable(prefetch(tried, range(len(batches)), workers))
    bar = tqdm(parts, f"reading {name}", len(windows), leave=False, disable=not workers or None)
    return reduce(Tally.join, bar, Tally())
