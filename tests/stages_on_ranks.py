"""All that several ranks are trained and evaluated for, one run after the other in one process
group: what test_torchrun.py runs on its ranks."""

from pathlib import Path
from unittest import mock

import torch

import contrastive
import evaluate
import pretrain
from plumbing import ranks, sharding

TOY = ["--model", "toy-random", "--steps", "2", "--batch", "8", "--muon-lr", "0", "--workers", "0"]
PAIRS = [*TOY, "--block", "4", "--chunk-tokens", "300"]
# What test_torchrun.py kills a rank of; each step leaves a checkpoint.
SIX_STEPS = "--steps 6 --workers 1 --save-every 1 --resume"
LONGER = [*PAIRS, *SIX_STEPS.split()]
RUNS = [  # (name, stage, flags): each writes FOLDER/name
    ("pretrain", pretrain, TOY),
    ("contrastive", contrastive, PAIRS),
    ("sharded", contrastive, [*PAIRS, "--fsdp"]),
    ("killed", contrastive, LONGER),  # goes on, if the folder is there
    ("whole", contrastive, LONGER),
]
EVALUATE = ["--limit", "2", "--workers", "0"]


def run(stage, flags, out):
    """A stage's main, with the flags parsed as from the command line."""
    stage.main(stage.Config.parse([*flags, "--out", str(out)]))


def score(model, file):
    """The evaluation's main."""
    evaluate.main(evaluate.Config.parse([*EVALUATE, "--model", str(model), "--json", str(file)]))


def main(folder):
    """On every rank."""
    ranks.setup()
    for name, stage, flags in RUNS:
        with mock.patch.object(sharding, "shard", side_effect=sharding.shard) as shard:
            run(stage, flags, Path(folder, name))
        ranks.say(f"{name}: sharded {shard.call_count} times")
    score(Path(folder, "contrastive"), Path(folder, "scores.json"))
    torch.distributed.barrier()
