"""What a run says: one aligned line on the screen every few steps, every step in log.jsonl."""

import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

from plumbing.ranks import rank, say, world


def versions() -> dict:
    """Of the libraries that numbers depend on: {name: version}."""
    return {m.__name__: m.__version__ for m in (torch, transformers, np)}


class Log:
    """The log of one run, from step `start` on (0, or where --resume goes on)."""

    def __init__(self, cfg, start):
        self.cfg, self.start = cfg, start
        self.began, self.waited = time.time(), 0.0  # seconds
        self.every = max(1, min(20, cfg.steps // 10))  # steps between two lines on the screen
        if rank() == 0:
            self.file = open_log(cfg, start)
        self.bar = tqdm(total=cfg.steps, initial=start, disable=rank() > 0 or None, leave=False)

    def steps(self, batches):
        """Yields (step, batch), and counts the time that a step waits for its batch."""
        for step in range(self.start, self.cfg.steps):
            asked = time.time()
            batch = next(batches)
            if step > self.start:  # the first batch is not made ahead
                self.waited += time.time() - asked
            yield step, batch

    def __call__(self, step, speed, numbers):
        """numbers: reproducible, so also into log.jsonl; speed: (how many, of what) a step."""
        # `cut` is worth a column only where something was cut.
        numbers = {name: x for name, x in numbers.items() if x or name != "cut"}
        if rank() > 0:
            return
        self.file.write(json.dumps({"step": step + 1, **numbers}) + "\n")
        self.bar.update()
        last = step + 1 == self.cfg.steps
        if (step + 1) % self.every == 0 or last:
            say(self.line(step, speed, numbers))
        if last:
            self.bar.close()

    def line(self, step, speed, numbers) -> str:
        """The line on the screen."""
        passed = time.time() - self.began
        seconds = passed / (step + 1 - self.start)  # a step
        words = [f"step {step + 1:>5}/{self.cfg.steps}"]
        for name, x in numbers.items():
            words.append(f"{name} {x:.1e}" if name == "lr" else f"{name} {x:.3f}")
        count, unit = speed
        words.append(f"{count / seconds:.0f} {unit}/s")
        words.append(f"waits {self.waited / passed:.0%}")
        if torch.cuda.is_available():
            words.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        words.append(f"eta {seconds * (self.cfg.steps - step - 1) / 60:.1f}m")
        return " | ".join(words)


def open_log(cfg, start):
    """OUT/log.jsonl, opened to append. Its first record holds the flags and the versions; of an
    earlier run the steps before `start` stay."""
    path = Path(cfg.out, "log.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"config": dataclasses.asdict(cfg), "world": world(), **versions()}
    lines = [json.dumps(header) + "\n"]
    if start and path.exists():
        lines = path.read_text().splitlines(True)[: start + 1]
    # Written beside and renamed: a kill here must not cost the log of the steps before.
    part = Path(f"{path}.part")
    part.write_text("".join(lines))
    os.replace(part, path)
    return open(path, "a", buffering=1)  # each step is in the file when it is over
