"""Is my curve normal? Draws the loss of one run beside that of a reference, and says in one line
whether it is within the spread of the seeds, or from which step on it is not.

    python -m tools.compare_logs out/pretrain/log.jsonl docs/logs/pretrain.jsonl
    python -m tools.compare_logs out/contrastive/log.jsonl docs/logs/contrastive.jsonl

docs/logs/ holds the quick start's. Other seeds of a reference stand beside it: of pretrain.jsonl
they are pretrain-seed1.jsonl, ... They may be shorter: the line says for which steps the spread is
known. Losses are running means of 9 steps; the band reaches from the seeds' lowest to their
highest, and one and a half times as far again on either side; a run is outside of it after 10 steps
in a row. Needs matplotlib; writes a picture. Exit status 1: outside, or not comparable.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.combinations import option
from plumbing.config import CommandLine, flag, word
from plumbing.errors import InputError, brief, needs
from plumbing.files import open_file
from plumbing.log import versions
from plumbing.ranks import run_command
from plumbing.writing import refuse_unwritable, written
from tools.figure_numbers import smooth

IN_A_ROW = 10  # steps outside of the band, before a run is called outside
LEAST = 2  # runs of which a spread can be said
MOST_STEPS = 10**8  # of a run; beyond it a log is damaged, and would take the memory
# Flags that change no loss, or that are what is compared.
OTHERWISE = {
    *("out", "workers", "save_every", "keep", "resume", "fitting", "graph_memory", "image_root"),
    *("seed", "model", "model_digest", "data_digest", "command"),
}


class Run(NamedTuple):
    """A log.jsonl."""

    path: Path
    header: dict  # its first record: config, world, versions
    steps: np.ndarray  # (n,) numbers of the steps, rising
    loss: np.ndarray  # (n,) nats

    @property
    def config(self) -> dict:
        """The flags."""
        return self.header["config"]

    @property
    def stage(self) -> str:
        """Which file wrote it."""
        return "contrastive" if "temperature" in self.config else "pretrain"

    def until(self, last):
        """The run's smoothed losses up to a step."""
        return smooth(self.loss[self.steps <= last])


class Band(NamedTuple):
    """The seeds' spread: losses that are normal, a step each from 1 on."""

    low: np.ndarray
    high: np.ndarray
    seeds: int


def read_log(path) -> Run:
    """A log.jsonl; InputError with file and line where it is something else."""
    path = Path(path)
    try:
        with open_file(path, kind="log") as file:
            lines = file.read().decode().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{brief(path)}: {getattr(e, 'strerror', None) or 'no text'}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            raise InputError(f"{brief(path)}, line {number}: no JSON") from None
    try:
        header, *steps = records
        if not header["config"].keys() >= {"steps", "batch"}:
            raise KeyError
        numbers = np.array([[record["step"], record["loss"]] for record in steps], dtype=float)
        return Run(path, header, *of_every_step(*numbers.T, header["config"]["steps"]))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
        text = "not the log of a stage: its first record holds the flags, then come steps from 1 on"
        raise InputError(f"{brief(path)}: {text}") from None


def of_every_step(steps, loss, last) -> tuple:
    """A full disk costs a log some of its lines: there the loss is that of the step before. Raises
    ValueError where they do not rise from 1 on, to `last` at most. -> (1 to n, their losses)."""
    if steps[0] != 1 or np.diff(steps).min(initial=1) < 1 or steps[-1] > min(last, MOST_STEPS):
        raise ValueError
    every = np.arange(1, int(steps[-1]) + 1)
    return every, loss[steps.searchsorted(every, "right") - 1]


def seeds_beside(reference) -> list:
    """The reference and the other seeds beside it, as Runs."""
    name = f"{reference.path.stem}-seed*{reference.path.suffix}"
    return [reference, *map(read_log, sorted(reference.path.parent.glob(name)))]


def band_of(runs) -> Band:
    """What of a loss is normal, as far as all runs go."""
    known = min(run.steps[-1] for run in runs)
    losses = np.stack([run.until(known) for run in runs])  # (seeds, known)
    low, high = losses.min(0), losses.max(0)
    # The range of five values is 2.3 standard deviations, in the mean, but may be half of that by
    # chance: one and a half of it, and a sixth seed hardly leaves the band. By chance the five meet
    # at some steps, so the range is a running mean, too.
    width = 1.5 * smooth(high - low)
    return Band(low - width, high + width, len(runs))


def first_outside(loss, band):
    """The step (from 1) from which on a run is outside for IN_A_ROW steps; None: it never is."""
    n = min(len(loss), len(band.low))
    outside = (loss[:n] < band.low[:n]) | (loss[:n] > band.high[:n]) | ~np.isfinite(loss[:n])
    in_a_row = 0
    for i, is_outside in enumerate(outside):
        in_a_row = in_a_row + 1 if is_outside else 0
        # NaN is never chance.
        if in_a_row == IN_A_ROW or not np.isfinite(loss[i]):
            return i - in_a_row + 2
    return None


def verdict(mine, reference, band) -> tuple:
    """-> (whether mine is normal, the line that says so)."""
    known = min(len(band.low), mine.steps[-1])
    loss = mine.until(known)
    total = reference.config["steps"]
    spread = f"the spread of {band.seeds} seeds"
    step = first_outside(loss, band)
    if step is None:
        rest = "" if known >= total else f" of {total}; beyond that step it is not known"
        return True, f"within {spread}: steps 1 to {known}{rest}"
    low, high = band.low[step - 1], band.high[step - 1]
    text = f"outside {spread} from step {step} on: loss {loss[step - 1]:.3f} there"
    return False, f"{text}, normal is {max(low, 0):.3f} to {high:.3f}"


def differences(mine, reference) -> str:
    """Flags and libraries that are not the same, in a line; empty where all are."""
    words = []
    for name in sorted({*mine.config, *reference.config} - OTHERWISE):
        ours, theirs = mine.config.get(name), reference.config.get(name)
        if ours != theirs:
            words.append(f"{option(name)} {ours} ({theirs})")
    for name in versions():
        ours, theirs = mine.header.get(name), reference.header.get(name)
        if ours != theirs and None not in (ours, theirs):  # an older log names fewer libraries
            words.append(f"{name} {ours} ({theirs})")
    return ", ".join(words)


def draw(runs, band, title):
    """Mine, the reference, and the band. -> a matplotlib Figure."""
    with needs("matplotlib", "tools.compare_logs"):
        from matplotlib.figure import Figure

        from tools.drawings import BLUE, GREY, RED, WIDTH
    mine, reference = runs
    fig = Figure((WIDTH, 4), dpi=110, layout="constrained")
    ax = fig.subplots()
    steps = np.arange(1, len(band.low) + 1)
    label = f"spread of {band.seeds} seeds"
    ax.fill_between(
        steps, np.maximum(band.low, 1e-4), band.high, color=GREY, alpha=0.25, label=label
    )
    ax.plot(reference.steps, smooth(reference.loss), color=BLUE, label=f"{reference.path}")
    ax.plot(mine.steps, smooth(mine.loss), color=RED, label=f"{mine.path}")
    ax.set(yscale="log", xlabel="step", ylabel="loss, nats (mean of 9 steps)")
    ax.set_title(title, fontsize=10)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return fig


@dataclass
class Config(CommandLine):
    """Flags of the comparison."""

    mine: str = word("the log.jsonl of a run", "MINE")
    reference: str = word("another one, as docs/logs/pretrain.jsonl", "REFERENCE")
    out: str = flag("out/compare_logs.png", "the picture of both curves")


def main(argv):
    """The command line. -> 0: within the spread."""
    cfg = Config.parse(argv)
    mine, reference = read_log(cfg.mine), read_log(cfg.reference)
    if mine.stage != reference.stage:
        raise InputError(f"MINE is a log of {mine.stage}, REFERENCE one of {reference.stage}")
    runs = seeds_beside(reference)
    if len(runs) < LEAST:
        place = f"{reference.path.stem}-seed1{reference.path.suffix}"
        raise InputError(f"{brief(reference.path)}: no other seed beside it, as {place}: no spread")
    refuse_unwritable(cfg.out, "--out", [cfg.mine, *(run.path for run in runs)])
    if Path(cfg.out).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--out {brief(cfg.out)}: no kind of picture; end it with .png")
    band = band_of(runs)
    is_normal, line = verdict(mine, reference, band)
    figure = draw((mine, reference), band, line)
    with written(Path(cfg.out), "--out") as part:
        figure.savefig(part)
    print(f"{mine.path}: {line}")
    if text := differences(mine, reference):
        print(f"not as in the reference (in brackets): {text}")
    print(f"wrote {cfg.out}")
    return 0 if is_normal else 1


if __name__ == "__main__":
    run_command(main)
