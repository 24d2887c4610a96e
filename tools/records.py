"""The runs that tests/bench/reproduce.py has kept, and means over their seeds: for its tables, for
the figures."""

import json
import math
import sys
from pathlib import Path

import numpy as np

from plumbing.errors import InputError

RECORDS = Path(__file__).parent.parent / "docs" / "reproduce.json"
NAMES = {  # of the arms
    "none": "contrastive only",
    "last": "contrastive only, last token (VLM2Vec)",
    "plain": "the same dialogues, no mask",
    "coma": "CoMa",
    "both": "CoMa, beyond the paper",
    "condense": "contrastive only, condense",
    "coma, condense": "CoMa, then condense",
    "both, no mask": "beyond the paper, no mask",
    "plain, slow": "the same dialogues, no mask; slow stage 1",
    "coma, slow": "CoMa; slow stage 1",
    "both, no mask, slow": "beyond the paper, no mask; slow stage 1",
    "both, slow": "CoMa, beyond the paper; slow stage 1",
    "condense 1": "contrastive only, condense at weight 1",
    "condense 0.2": "contrastive only, condense at weight 0.2",
    "question first": "CoMa, questions first",
    "texts too": "CoMa, texts too",
    "ce": "CoMa, cross-entropy",
    "kl": "CoMa, KL to the uncompressed model",
    "mean of C": "CoMa, mean of the K tokens",
    "last of C": "CoMa, last of the K tokens",
}
FIELDS = {"first", "second", "seed", "pairs", "K", "steps", "curve", "ind", "ood", "overall"}


def read_records(path) -> dict:
    """{study: {arm: [run, by seed]}}; a run: seed, pairs, K, steps, curve, ind, ood, overall, ...
    Of a study only the seeds that all of its arms have run, so that every comparison is between the
    same seeds; before there is one, the study is left out."""
    if not Path(path).exists():
        raise InputError(f"{path} is missing: `python tests/bench/reproduce.py` writes it")
    kept = json.loads(Path(path).read_text())
    for i, run in enumerate(kept["runs"]):
        if missing := sorted(FIELDS - set(run)):
            raise InputError(f"{path}: run {i} lacks {', '.join(missing)}")
    records = {}
    for study, arms in kept["studies"].items():
        runs_of = {arm: runs_with(kept["runs"], flags) for arm, flags in arms.items()}
        seeds = common_seeds(runs_of.values())
        if seeds:
            records[study] = {arm: in_order(runs, seeds) for arm, runs in runs_of.items()}
    return records


def runs_with(runs, flags) -> dict:
    """{seed: run} of an arm. It is known by the flags of its two stages: studies share runs."""
    return {run["seed"]: run for run in runs if [run["first"], run["second"]] == flags}


def common_seeds(arms) -> list:
    """The seeds that every arm has run, sorted."""
    seeds = [set(runs) for runs in arms]
    return sorted(set.intersection(*seeds)) if seeds else []


def in_order(runs, seeds) -> list:
    """An arm's runs, a seed after the other."""
    return [runs[seed] for seed in seeds]


def mean_error(scores) -> tuple:
    """Mean over seeds, and its standard error (NaN, which is not drawn, for a single seed)."""
    n = len(scores)
    error = np.std(scores, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return np.mean(scores), error


def percent(scores, sign=False) -> str:
    """Mean and standard error of shares, in percent, as tables say it: "70.4 ± 3.1", or with the
    sign of a difference, "+2.0 ± 1.1"."""
    mean, error = mean_error(scores)
    text = f"{100 * mean:+.1f}" if sign else f"{100 * mean:.1f}"
    return text if len(scores) == 1 else f"{text} ± {100 * error:.1f}"


def gains(rows, base) -> list:
    """By how much each run of an arm is ahead of the other arm's of the same seed, overall."""
    return [row["overall"] - other["overall"] for row, other in zip(rows, base, strict=True)]


if __name__ == "__main__":
    sys.exit("tools/records.py has no commands: tools/figures.py and tools/drawings.py import it")
