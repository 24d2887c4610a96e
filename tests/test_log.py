"""What a run says of its steps: on the screen, by a clock that the test turns, and in log.jsonl.
(A disk that refuses it: test_full_disk.py.)"""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy
import PIL
import pytest
import torch
import transformers
from checks import equal, expect
from threads import on_ranks

from plumbing import agreement, log, outfolder, ranks
from plumbing.config import TrainingFlags
from plumbing.errors import InputError, OfAllRanks


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: clock[0] is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def test_a_line_says_speed_waiting_and_what_is_left_of_the_run(tmp_path, clock, monkeypatch):
    """Resumed at step 10 of 40; 20 steps took 60 s, 15 of them were waited for batches."""
    logged = log.Log(TrainingFlags(steps=40, out=str(tmp_path)), 10)
    clock[0] += 60
    logged.waited, logged.count = 15.0, 120
    line = logged.line(29, "pairs", {"loss": 1.5, "lr": 0.002, "cut": 7})
    want = "step    30/40 | loss 1.500 | lr 2.0e-03 | cut 7 | 2 pairs/s | waits 25% | eta 0.5m"
    equal(line, want, "3 s a step, of which ten are left")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    line = logged.line(29, "pairs", {"loss": 1.5, "lr": 0.002, "cut": 7})
    equal(line, want.replace(" | eta", " | 3.0 GiB | eta"), "the most that a GPU has held")


def test_each_name_on_the_screen_is_in_the_readme(tmp_path, clock, monkeypatch):
    """Of a number its name, of speed and memory their unit."""
    logged = log.Log(TrainingFlags(steps=40, out=str(tmp_path)), 0)
    clock[0] += 60
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    line = logged.line(29, "pairs", {"loss": 1.5, "lr": 0.002, "cut": 7})
    page = Path(__file__).parent.parent / "README.md"
    explained = page.read_text().partition("## Logged quantities")[2].partition("\n## ")[0]
    for part in line.split(" | ")[1:]:  # a name and a number, or a number and its unit
        name = next(word for word in part.split() if not word[0].isdigit())
        expect(f"`{name}`" in explained, part, f"a row for `{name}`", "README: Logged quantities")


def test_the_time_that_steps_wait_is_that_of_their_batches_but_the_first(tmp_path, clock):
    """Three batches of 2 s each, steps of 5 s; the first batch is not made ahead."""

    def batches():
        for i in range(3):
            clock[0] += 2
            yield i

    logged = log.Log(TrainingFlags(steps=5, out=str(tmp_path)), 2)
    seen = []
    for batch in logged.waiting(batches()):
        seen.append(batch)
        clock[0] += 5
    equal(seen, [0, 1, 2], "a batch for each step, from where it begins to the last")
    equal(logged.waited, 4.0, "seconds")


def test_a_batch_that_a_rank_cannot_make_is_an_error_of_all(tmp_path, monkeypatch):
    """Each rank hears of it before the step, so that all can save what was trained before."""
    logged = log.Log(TrainingFlags(steps=5, out=str(tmp_path)), 0)
    other = ("node-b", "a broken picture", False)
    monkeypatch.setattr(agreement, "gather_objects", lambda x: [x, other])
    with pytest.raises(OfAllRanks, match="^rank 1 .node-b.: a broken picture$"):
        next(logged.waiting(iter("abcde")))


def run(out, steps, start=0, cut=0):
    """A log of a run of so many steps. -> its lines in log.jsonl."""
    logged = log.Log(TrainingFlags(steps=steps, out=str(out)), start)
    for step in range(start, steps):
        logged(step, (1, "pairs"), {"loss": 0.0, "lr": 1e-3, "cut": cut, "skipped": 0})
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("steps", "want"),
    [(5, [1, 2, 3, 4, 5]), (45, [*range(4, 45, 4), 45]), (610, [*range(20, 610, 20), 610])],
)
def test_ten_to_thirty_lines_of_a_run_are_shown_and_the_last_step_always(
    tmp_path, capsys, steps, want
):
    """Of short runs a line for each tenth, of long ones for every 20 steps."""
    run(tmp_path, steps)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]
    equal([int(x[5:].split("/")[0]) for x in lines], want, "steps that are shown")


def test_each_step_is_a_line_of_the_file_under_the_flags_and_the_versions(tmp_path):
    """Steps count from 1. A loss of zero is a number; `cut` stands there where something was cut.
    Another run from the start begins the file anew, one that goes on goes on with it."""
    header, *lines = run(tmp_path, 3)
    equal(header["config"]["steps"], 3, "the flags")
    equal(header["world"], 1, "ranks")
    found = {name: header.get(name) for name in ("torch", "transformers", "numpy", "PIL")}
    want = {m.__name__: m.__version__ for m in (torch, transformers, numpy, PIL)}
    equal(found, want, "what the numbers depend on")
    equal(lines, [{"step": i, "loss": 0.0, "lr": 1e-3} for i in (1, 2, 3)], "nothing was cut")
    equal([x["step"] for x in run(tmp_path, 4, start=2)[1:]], [1, 2, 3, 4], "from step 2 on")
    header, *lines = run(tmp_path, 2, cut=7)
    equal([x["cut"] for x in lines], [7, 7], "begun anew")
    equal(header["config"]["steps"], 2, "begun anew, with its own flags")


@pytest.mark.parametrize("version", ["0.29.1", None])
def test_of_the_libraries_torchvision_may_be_missing(monkeypatch, version):
    """With it pictures are resized otherwise."""

    def look_up(name):
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr(log, "version", look_up)
    equal(log.versions()["torchvision"], version or "none", "log.versions")


def test_the_file_says_how_many_ranks_there_were(tmp_path, monkeypatch):
    """Who compares two curves needs it: sums over other ranks have other last bits."""
    monkeypatch.setattr(log, "world", lambda: 8)
    equal(run(tmp_path, 1)[0]["world"], 8, "log.open_log")


@pytest.mark.parametrize("torn", ["", "{", '{"config": {"st'])
def test_a_log_whose_first_line_is_lost_has_one_again(tmp_path, torn):
    """A kill, or a full disk, may have cost it; the run goes on."""
    (tmp_path / "log.jsonl").write_text(torn)
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    outfolder.take(TrainingFlags(out=str(tmp_path), resume=True))
    header, *lines = run(tmp_path, 3, start=2)
    equal((header["config"]["steps"], [x["step"] for x in lines]), (3, [3]), "earlier_lines")


def test_the_speed_is_that_of_all_steps_so_far(tmp_path, clock, capsys):
    """Stage 1's steps differ in their answer tokens: 100, 100 and 1,000 in three seconds."""
    logged = log.Log(TrainingFlags(steps=3, out=str(tmp_path)), 0)
    for step, tokens in enumerate((100, 100, 1000)):
        clock[0] += 1
        logged(step, (tokens, "answer tokens"), {"loss": 1.0, "cut": 0})
    speeds = [line.split(" | ")[2] for line in capsys.readouterr().out.splitlines()]
    equal(speeds, [f"{n} answer tokens/s" for n in (100, 100, 400)], "a mean")


class Nearly:
    """A file on a disk that is nearly full: it takes some bytes more, then all again."""

    def __init__(self, file, room):
        self.file, self.room, self.name = file, room, file.name

    def write(self, line):
        taken, self.room = line[: self.room], 10**6
        return self.file.write(taken)

    def seek(self, *where):
        return self.file.seek(*where)

    def truncate(self, size):
        return self.file.truncate(size)


def test_a_line_that_is_half_written_is_taken_back(tmp_path, capsys):
    """The file has whole lines; that one is missing is said once."""
    logged = log.Log(TrainingFlags(steps=3, out=str(tmp_path)), 0)
    logged.file = Nearly(logged.file, 9)
    for step in range(3):
        logged.write({"step": step + 1})
        if step == 1:
            logged.file.room = 4  # full again
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    equal([json.loads(line).get("step") for line in lines], [None, 2], "whole lines")
    equal(capsys.readouterr().out.count("lacks lines from here on"), 1, "said once")


def test_a_log_that_rank_0_cannot_open_ends_all_ranks(tmp_path, monkeypatch):
    """They would wait for it in the first step."""

    def refused(cfg, start):
        equal(ranks.rank(), 0, "who writes")
        raise InputError("log.jsonl cannot be written")

    monkeypatch.setattr(log, "open_log", refused)

    def work(rank):
        with pytest.raises(InputError, match="log.jsonl cannot be written"):
            log.Log(TrainingFlags(steps=4, out=str(tmp_path)), 0)

    on_ranks(monkeypatch, 2, work)


def test_the_bar_goes_from_where_the_run_goes_on(tmp_path, monkeypatch):
    """On a terminal, of rank 0, and in the end it goes; the bar itself is tqdm's."""
    made = []
    monkeypatch.setattr(log, "tqdm", lambda **settings: made.append(settings))
    log.Log(TrainingFlags(steps=40, out=str(tmp_path)), 10)
    monkeypatch.setattr(log, "rank", lambda: 1)
    log.Log(TrainingFlags(steps=40, out=str(tmp_path)), 10)
    want = dict(total=40, initial=10, leave=False)
    equal(made, [want | {"disable": None}, want | {"disable": True}], "None: not in a file")


def test_a_log_is_whole_until_the_next_one_is(tmp_path, monkeypatch):
    """A run that goes on writes its log anew, beside the old one: a kill in between costs nothing,
    and a disk that refuses is one line."""
    run(tmp_path, 4)
    before = Path(tmp_path, "log.jsonl").read_text()

    def refused(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log.os, "replace", refused)
    with pytest.raises(InputError, match="log.jsonl cannot be written: No space left on device"):
        log.Log(TrainingFlags(steps=4, out=str(tmp_path)), 2)
    equal(Path(tmp_path, "log.jsonl").read_text(), before, "log.open_log")


def test_a_log_that_is_a_link_stays_one(tmp_path):
    """To a file on another disk, which somebody may be reading."""
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "log.jsonl", tmp_path / "log.jsonl"
    link.symlink_to(real)
    run(tmp_path, 2)
    assert link.is_symlink() and len(real.read_text().splitlines()) == 3


def test_what_is_counted_is_a_whole_number_on_the_screen(tmp_path):
    """Tokens that are cut, examples that are skipped."""
    logged = log.Log(TrainingFlags(steps=40, out=str(tmp_path)), 0)
    line = logged.line(0, "pairs", {"cut": 1200, "skipped": 3000})
    expect("| cut 1,200 | skipped 3,000 |" in line, line, "thousands", "log.FORMS")


def test_the_bar_goes_one_step_a_step(tmp_path, monkeypatch):
    """From whatever step, and after the last one it is closed."""
    logged = log.Log(TrainingFlags(steps=13, out=str(tmp_path)), 10)
    seen = []
    monkeypatch.setattr(logged.bar, "update", lambda n=1: seen.append(n))
    monkeypatch.setattr(logged.bar, "close", lambda: seen.append("closed"))
    for step in range(10, 13):
        logged(step, (1, "pairs"), {"loss": 0.0})
    equal(seen, [1, 1, 1, "closed"], "log.Log")
