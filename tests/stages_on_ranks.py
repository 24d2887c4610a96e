"""All that several ranks are trained and evaluated for, one run after the other in one process
group; a script that test_torchrun.py starts:

    torchrun --nproc-per-node 2 tests/stages_on_ranks.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent)]

import contrastive  # noqa: E402
import evaluate  # noqa: E402
import pretrain  # noqa: E402
from plumbing import ranks  # noqa: E402

TOY = ["--model", "toy-random", "--steps", "2", "--batch", "8", "--muon-lr", "0", "--workers", "0"]
PAIRS = [*TOY, "--block", "4", "--chunk-tokens", "300"]
# What test_torchrun.py kills a rank of; each step leaves a checkpoint.
LONGER = "--model toy --steps 8 --batch 16 --block 8 --workers 1 --save-every 1 --resume".split()
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
    torch.set_num_threads(1)
    ranks.setup()
    for name, stage, flags in RUNS:
        run(stage, flags, Path(folder, name))
    score(Path(folder, "contrastive"), Path(folder, "scores.json"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    # Past the destructors of five runs, which no script has in one process: one of some forty such
    # ends was an abort, after everything was written.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
