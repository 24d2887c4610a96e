"""What a run says: one aligned line on the screen every few steps, every step in log.jsonl."""

import dataclasses
import json
import os
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from tqdm import tqdm

from plumbing.agreement import on_rank_0, together
from plumbing.errors import InputError
from plumbing.ranks import rank, say, world
from plumbing.writing import write_whole

FORMS = {"lr": ".1e", "cut": ",d", "skipped": ",d"}  # of numbers on the screen


def versions() -> dict:
    """Of the libraries that numbers depend on: {name: version}; of torchvision, with which pictures
    are resized otherwise, "none" where it is not there."""
    libraries = {m.__name__: m.__version__ for m in (torch, transformers, np, PIL)}
    libraries["torchvision"] = "none"
    with suppress(PackageNotFoundError):
        libraries["torchvision"] = version("torchvision")
    return libraries


class Log:
    """The log of one run, from step `start` on (0, or where --resume goes on)."""

    def __init__(self, cfg, start):
        self.cfg, self.start = cfg, start
        self.began, self.waited = time.monotonic(), 0.0  # seconds
        self.count = 0  # of what a step's speed is counted in, since `start`
        self.lacks_lines = False  # a full disk has cost some, which is said once
        self.every = max(1, min(20, cfg.steps // 10))  # steps between two lines on the screen
        self.file = on_rank_0(lambda: open_log(cfg, start))
        self.bar = tqdm(total=cfg.steps, initial=start, disable=rank() > 0 or None, leave=False)

    def waiting(self, batches):
        """The batches, and counts the time that the steps wait for them. Raises OfAllRanks where a
        rank's batch cannot be made."""
        for step in range(self.start, self.cfg.steps):
            asked = time.monotonic()
            batch = together(lambda: next(batches))
            if step > self.start:  # the first batch is not made ahead
                self.waited += time.monotonic() - asked
            yield batch

    def __call__(self, step, speed, numbers):
        """Notes a step. numbers: {name: value} over all ranks, which a repeated run has again: they
        also go into log.jsonl. speed: (count, unit) of what the step worked on."""
        # Worth a column only where something was cut or skipped.
        numbers = {k: x for k, x in numbers.items() if x or k not in ("cut", "skipped")}
        if rank() > 0:
            return
        count, unit = speed
        self.count += count
        self.write({"step": step + 1, **numbers})
        self.bar.update()
        if (step + 1) % self.every == 0 or step + 1 == self.cfg.steps:
            say(self.line(step, unit, numbers))
        if step + 1 == self.cfg.steps:
            self.bar.close()

    def write(self, record):
        """A line of log.jsonl, whole or not at all. What the disk says to that ends no run."""
        try:
            write_whole(self.file, (json.dumps(record) + "\n").encode())
        except OSError as e:
            if not self.lacks_lines:
                say(f"{self.file.name} lacks lines from here on: {e}. The run goes on")
            self.lacks_lines = True

    def line(self, step, unit, numbers) -> str:
        """The line on the screen; its speed is the mean since `start`."""
        passed = time.monotonic() - self.began
        seconds = passed / (step + 1 - self.start)  # a step
        words = [f"step {step + 1:>5}/{self.cfg.steps}"]
        for name, x in numbers.items():
            words.append(f"{name} {x:{FORMS.get(name, '.3f')}}")
        words.append(f"{self.count / passed:.0f} {unit}/s")
        words.append(f"waits {self.waited / passed:.0%}")
        if torch.cuda.is_available():
            words.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        words.append(f"eta {seconds * (self.cfg.steps - step - 1) / 60:.1f}m")
        return " | ".join(words)


def open_log(cfg, start):
    """OUT/log.jsonl, opened to append. Its first record holds the flags and the versions; of an
    earlier run the steps up to `start` stay."""
    path = Path(os.path.realpath(Path(cfg.out, "log.jsonl")))  # a link stays one
    header = {"config": dataclasses.asdict(cfg), "world": world(), **versions()}
    lines = [json.dumps(header) + "\n"]
    try:
        if start and path.is_file():  # a pipe would be waited for
            lines = earlier_lines(path, start) or lines
        # Written beside and renamed: a kill here must not cost the log of the steps before.
        part = Path(f"{path}.part")
        part.write_text("".join(lines))
        os.replace(part, path)
        return open(path, "ab", buffering=0)  # each step is in the file when it is over
    except OSError as e:
        raise InputError(f"{path} cannot be written: {e.strerror}") from None


def earlier_lines(path, start) -> list:
    """Of a log's lines the first, and those of steps up to `start`, by their numbers: a full disk
    may have cost some of them, a kill the end of one."""
    first, *rest = path.read_text(errors="replace").splitlines(True) or [""]
    kept = [first]
    for line in rest:
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= start:
                kept.append(line)
    return kept if first.endswith("\n") else []
