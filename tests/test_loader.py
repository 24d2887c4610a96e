"""Batches made ahead: the same for any number of workers, few at a time, and nothing is left of
them. (What ends a worker, or its rank: test_ending.py.)"""

import errno
import gc
import os
import signal
import time
import weakref
from pathlib import Path

import families
import pytest
import torch
from checks import equal, expect
from PIL import Image

import model
from data import Item
from plumbing import loader
from plumbing.ending import StepLeft
from plumbing.errors import InputError
from plumbing.families import FIRST_GUESS


def batch(i):
    """Three rows of floats, two numbers, and what is no tensor."""
    rows = loader.each(lambda x: {"x": torch.full((2, 3), float(x)), "n": x}, range(i, i + 3))
    return {
        "rows": rows,
        "label": torch.tensor([i, 1]),
        "nothing": torch.empty(0, 4).int(),
        "id": f"{i}",
    }


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_batches_are_the_same_for_any_number_of_workers(workers):
    """In order, whole, each once; a tensor keeps its shape and type; and writable."""
    got = list(loader.prefetch(batch, range(4), workers))
    for i, made in enumerate(got):
        want = batch(i)
        equal(made["id"], want["id"], "order")
        for key in ("label", "nothing"):
            equal(made[key].tolist(), want[key].tolist(), key)
            equal((made[key].shape, made[key].dtype), (want[key].shape, want[key].dtype), key)
        for a, b in zip(made["rows"], want["rows"], strict=True):
            equal((a["n"], a["x"]), (b["n"], a["x"]), "rows")
            equal(a["x"], b["x"], "rows")
            a["x"] += 1


@pytest.mark.parametrize("workers", [1, 3])
def test_two_batches_are_ahead_whatever_the_number_of_workers(workers, tmp_path):
    """Two a worker were: 28 batches of a gigabyte."""

    def make(i):
        (tmp_path / f"{i}").touch()
        return i

    batches = loader.prefetch(make, range(20), workers)
    for i in range(4):
        equal(next(batches), i, "order")
        time.sleep(0.2)
        expect(len(list(tmp_path.iterdir())) <= i + 1 + 2, i, "two ahead", "loader.AHEAD")
    batches.close()


def holdings() -> tuple:
    """How many descriptors this process has, and its children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(os.listdir("/proc/self/fd")), set(children)


def test_a_batch_has_no_name_and_leaves_nothing():
    """Nothing in /dev/shm, which may be small; no descriptor and no process when it is over."""
    names, there = set(os.listdir("/dev/shm")), holdings()
    batches = loader.prefetch(lambda i: torch.zeros(10**6), range(30), 2)
    held = next(batches)
    equal(set(os.listdir("/dev/shm")), names, "memfd_create")
    expect(holdings() != there, there, "pipes and workers", "negative control")
    for x in batches:
        assert not x.any()
    del held, x
    equal(holdings(), there, "Team.close")


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_first_error_counts(workers):
    """Of several bad rows of a batch the first is named, whichever worker met its own earlier."""

    def make(i):
        return loader.each(bad, range(8))

    def bad(x):
        if x >= 3:
            time.sleep(0.1 if x == 3 else 0)
            raise InputError(f"row {x}")

    with pytest.raises(InputError, match="row 3"):
        list(loader.prefetch(make, range(2), workers))
    tried = loader.prefetch(lambda i: loader.try_each(bad, range(5), True), range(1), workers)
    equal([str(x) for x in next(tried)], ["None"] * 3 + ["row 3", "row 4"], "try_each")


@pytest.mark.parametrize("workers", [1, 3])
def test_each_row_is_made_once(workers, tmp_path):
    """By the worker whose turn it is, one row after the other: the work is shared, not repeated."""

    def row(x):
        with open(tmp_path / f"{x}", "a") as file:
            file.write(f"{os.getpid()} ")
        return x

    batches = loader.prefetch(
        lambda i: loader.each(row, range(9 * i, 9 * i + 9)), range(2), workers
    )
    equal(list(batches), [list(range(9)), list(range(9, 18))], "order")
    makers = [(tmp_path / f"{x}").read_text().split() for x in range(18)]
    equal([len(pids) for pids in makers], [1] * 18, "Share.take")
    equal(len({pids[0] for pids in makers}), workers, "each worker has its share")
    equal(
        [makers[x] == makers[x + workers] for x in range(9 - workers)], [True] * (9 - workers), ""
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_not_kept_behind_its_users_back(workers):
    """What was yielded is freed as soon as its user lets it go: the next one needs the room."""
    batches = loader.prefetch(lambda i: torch.zeros(3), range(4), workers)
    for x in batches:
        there = weakref.ref(x)
        del x
        assert there() is None


def test_the_workers_hold_no_more_with_each_batch():
    """Descriptors of a worker and of its rank, which may have a thousand; and where there are fewer
    rows than workers."""

    def held(_):
        return loader.each(lambda x: (len(os.listdir("/proc/self/fd")), torch.zeros(9)), range(2))

    gc.collect()  # what earlier tests have left is not closed in the midst of this one
    theirs, ours = [], []
    for made in loader.prefetch(held, range(12), 3):
        theirs.append([count for count, _ in made])
        ours.append(holdings()[0])
    equal(theirs[-1], theirs[loader.AHEAD + 1], "answer: os.close")
    expect(ours[-1] <= ours[2], ours, "no more than at first", "Team.share_of: os.close")


def test_a_worker_gives_the_pages_back_and_not_its_rank():
    """It lets go of a block last: when its rank is done with that, and before it makes another."""

    def blocks(_):
        files = [os.path.realpath(f"/proc/self/fd/{i}") for i in os.listdir("/proc/self/fd")]
        return sum("memfd:batch" in file for file in files), torch.zeros(9)

    counts = [count for count, _ in loader.prefetch(blocks, range(7), 1)]
    equal(counts, [0, 1, 2, 3, 3, 3, 3], "of the two ahead, and of the one that the rank had")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_ends_no_worker(number):
    """A terminal and torchrun send it to all of a group: the rank alone decides what is done."""
    batches = loader.prefetch(lambda i: os.getpid(), range(9), 1)
    worker = next(batches)
    os.kill(worker, number)
    equal(list(batches), [worker] * 8, "be_a_child")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_takes_too_long_after_a_signal_is_not_waited_for(workers, monkeypatch):
    """Pictures on a slow disk take minutes, and torchrun kills after 30 seconds: the steps since
    the last checkpoint would be lost. Before that time it is waited for."""
    looks = iter([False, False, True])
    monkeypatch.setattr(loader, "overdue", lambda: next(looks))
    monkeypatch.setattr(loader, "GLANCE", 0.01)
    there = holdings()

    def make(i):  # in a worker one row takes all of the time, here the third one is too late
        return loader.each(lambda x: time.sleep(60 if workers else 0), range(9))

    with pytest.raises(StepLeft):
        next(loader.prefetch(make, range(9), workers))
    equal(next(looks, "none"), "none", "the third look found it")
    equal(holdings()[1], there[1], "Team.close")


def test_what_is_closed_has_no_worker_and_no_open_pipe():
    """At once, and not when somebody collects garbage: a run may have many loaders."""
    team = loader.Team(lambda i: [i], 2, False)
    pipes, processes = list(team.pipes), list(team.processes)
    team.close()
    equal([pipe.closed for pipe in pipes], [True, True], "Team.close")
    for process in processes:
        with pytest.raises(ChildProcessError):
            os.waitpid(process, 0)


def test_no_workers_are_left_where_one_cannot_be_forked(monkeypatch):
    """As where a limit on processes is met: those before it are ended."""
    there, calls, fork = holdings(), [], os.fork

    def limited():
        calls.append(1)
        if len(calls) > 2:
            raise BlockingIOError("no more processes")
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    with pytest.raises(InputError, match="no loader process 3: no more .*; fewer --workers"):
        next(loader.prefetch(batch, range(3), 4))
    equal(holdings()[1], there[1], "Team.close")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "too many"),
        OSError(errno.ENFILE, "too many of all processes"),
        RuntimeError("received 0 items of ancdata"),
    ],
)
def test_a_process_without_a_free_descriptor_waits_for_no_worker(error, monkeypatch):
    """Its worker is alive, and would never end."""

    def receive(pipe):
        raise error

    monkeypatch.setattr(loader.reduction, "recv_handle", receive)
    monkeypatch.setattr(loader.Team, "explain_end_of", lambda *_: pytest.fail("it would wait"))
    with pytest.raises(InputError, match="too many open files: raise `ulimit -n`, or .* --workers"):
        next(loader.prefetch(batch, range(3), 1))


def test_a_pipe_that_cannot_be_opened_is_one_clear_line(monkeypatch):
    """As a process that cannot be forked."""

    def refused():
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(loader, "Pipe", refused)
    with pytest.raises(InputError, match="no loader process 1: .*too many open files; fewer"):
        next(loader.prefetch(batch, range(3), 1))


@pytest.mark.parametrize(("what", "says"), [("make", "out of memory in a"), ("send", "no memory")])
def test_memory_that_is_short_in_a_worker_is_one_clear_line(what, says, monkeypatch):
    """While a batch is made, and while it is written for the rank."""

    def make(i):
        if what == "make":
            raise MemoryError
        return torch.zeros(3)

    if what == "send":
        monkeypatch.setattr(os, "memfd_create", lambda name: os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(InputError, match=f"{says}.*try fewer --workers"):
        list(loader.prefetch(make, range(2), 2))


def test_a_limit_on_a_files_size_is_no_lack_of_memory(monkeypatch):
    """A batch is written into one: fewer workers would write the same."""

    def too_large(*_, **__):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(loader, "open", too_large, raising=False)
    with pytest.raises(InputError, match="File too large.*a higher ulimit -f, or --workers 0"):
        loader.write_block([torch.zeros(3)])


def test_an_error_of_another_kind_in_a_worker_shows_where_it_was():
    """A mistake of ours, or a student's."""
    with pytest.raises(RuntimeError, match="(?s)in a loader process:.*ZeroDivisionError"):
        list(loader.prefetch(lambda i: 1 // 0, range(2), 1))


def test_pictures_travel_in_bfloat16_to_a_gpu_only():
    """Where the model would round them so, before all else; numbers of tokens stay as they are."""
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32), (None, torch.float32)):
        for workers in (0, 2):
            where = device and torch.device(device)
            made = next(loader.prefetch(batch, range(1), workers, where))
            equal((made["rows"][0]["x"].dtype, made["label"].dtype), (dtype, torch.int64), device)


def windows_of(counts, guess=100):
    """The windows of items with so many pictures each."""
    return loader.Windows([Item("", ("a picture",) * count) for count in counts], guess)


def test_windows_of_encode_are_cut_by_bytes(monkeypatch):
    """1,024 texts a window; of pictures what fits into WINDOW_BYTES, by the largest one so far."""
    monkeypatch.setattr(loader, "WINDOW_BYTES", 1000)

    class Row:
        images = {"pixel_values": torch.zeros(50, dtype=torch.uint8)}

    class Small:
        images = {"pixel_values": torch.zeros(10, dtype=torch.uint8)}

    windows = windows_of([0] * 1068 + [1] * 40 + [30])
    sizes = []
    for window in windows:
        sizes.append(len(window))
        if any(windows.pictures[i] for i in window):
            windows.saw(dict.fromkeys(window, Row()))
    equal(sizes, [1024, 54, 20, 10, 1], "texts, then 10 pictures by the guess, then 20, one of 30")
    windows = windows_of([2] * 25)
    for window in windows:
        sizes.append(len(window))
        windows.saw({**dict.fromkeys(window, Row()), window[0]: InputError("a bad row")})
    equal(sizes[5:], [5, 20], "five rows of two by the guess; then of two in 50 bytes")
    equal(list(map(len, windows_of([30, 30, 1]))), [1, 1, 1], "each is too much by itself")
    windows = windows_of([1] * 50)
    for window in windows:
        sizes.append(len(window))
        windows.saw({i: Small() if i else Row() for i in window})
    equal(sizes[7:], [10, 20, 20], "the largest so far counts, and not the last one")


def test_the_first_window_holds_no_more_large_pictures_than_a_machine_bears():
    """Of none was the size seen: 32 of them, 256 MiB if each were of 8 MiB, and not 256."""
    equal(next(iter(windows_of([1] * 300, FIRST_GUESS))), range(32), "families.FIRST_GUESS")


def test_a_worker_computes_in_one_thread():
    """The rank's other ones are not there after a fork, and would be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        equal(list(loader.prefetch(lambda i: torch.get_num_threads(), [0], 1)), [1], "loader.work")
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.parametrize("family", families.BUILDERS)
def test_bfloat16_pictures_give_the_same_bits_under_autocast(family, tmp_path, monkeypatch):
    """As on a GPU: what the model does first with the pixels is to round them. Both towers: one
    that is trained (float32), and a frozen one (bfloat16)."""
    embedder = model.load(families.build(family, tmp_path), 4, device="cpu").eval()
    picture = Image.frombytes("RGB", (60, 60), os.urandom(60 * 60 * 3))
    inputs = embedder.collate([model.Item.of(picture)])
    small = {key: loader.halved(x) for key, x in inputs.items()}
    expect(small["pixel_values"].dtype == torch.bfloat16, small, "bfloat16", "loader.halved")
    exact = embedder(small)
    assert not torch.equal(embedder(inputs), exact), "negative control: in float32 they differ"
    autocast = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(model.Embedder, "autocast", lambda embedder: autocast)
    for tower in (torch.float32, torch.bfloat16):
        embedder.mllm.model.to(tower)
        a, b = (embedder(x).float() for x in (inputs, small))
        equal(a, b, f"{family}: the pixels are used in float32 somewhere")
