"""Runs that are ended on purpose: what test_ending.py does in processes of their own."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
from forked import as_script

import contrastive
import model
import pretrain
from plumbing import ending, loader, optim, ranks

SMALL = "--model toy-random --steps 4 --batch 4 --workers 2 --chunk-tokens 100 --muon-lr 0".split()
WAYS = {
    "pretrain": (pretrain, SMALL),
    "contrastive": (contrastive, [*SMALL, "--block", "2", "--graph-memory", "0"]),
    "sharded": (contrastive, [*SMALL, *"--block 2 --graph-memory 0 --fsdp".split()]),
}
end_step = optim.end_step
TOO_LONG = 0.0  # seconds: any step is, that meets a signal


def fail(embedder, optimizers, cfg, step, *rest):
    """`optim.end_step`, which fails as a broken GPU does."""
    if step == 2 and ranks.rank() == 0:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return end_step(embedder, optimizers, cfg, step, *rest)


def kill_worker(embedder, optimizers, cfg, step, *rest):
    """`optim.end_step`, after which a loader process is gone."""
    if step == 0:
        os.kill(teams[-1].processes[0], signal.SIGKILL)
    return end_step(embedder, optimizers, cfg, step, *rest)


class Team(loader.Team):
    """Loader processes that this script can find."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        teams.append(self)


teams = []


def leave_steps(out):
    """On every rank: each way to train, until a signal reaches the last one in the midst of its
    second step. Writes what the runs ended by."""
    ranks.setup()
    codes = {}
    for name, (stage, flags) in WAYS.items():
        codes[name] = left(stage, [*flags, "--workers", "0", "--out", f"{out}/{name}"])
    if ranks.rank() == 0:
        Path(out, "codes.json").write_text(json.dumps(codes))
    torch.distributed.barrier()


def left(stage, flags):
    """The exit status of a run in whose second step the last rank gets a signal."""
    outputs, begin_step = model.Embedder.outputs, optim.begin_step
    due = []  # the signal

    def begin(optimizers, step, cfg):
        if step == 1 and ranks.rank() == ranks.world() - 1:
            due.append(signal.SIGINT)
        return begin_step(optimizers, step, cfg)

    def interrupted(self, inputs, *rest, **more):
        if due:
            signal.raise_signal(due.pop())
        return outputs(self, inputs, *rest, **more)

    with (
        mock.patch.object(optim, "begin_step", begin),
        mock.patch.object(model.Embedder, "outputs", interrupted),
        mock.patch.object(ending, "LEAVE_STEP", TOO_LONG),
    ):
        try:
            return stage.main(stage.Config.parse(flags))
        except SystemExit as e:
            return e.code


def fail_in_a_step(out):
    """An exception that nobody expects, in rank 0's third step, with loader processes."""
    optim.end_step = fail
    as_script(contrastive, [*WAYS["contrastive"][1], "--out", out])


def lose_a_worker(out):
    """A loader process is killed, as the system does where memory is short."""
    optim.end_step = kill_worker
    loader.Team = Team
    as_script(contrastive, [*WAYS["contrastive"][1], "--out", out])


def be_deaf():
    """The main thread is inside one call of C, and a command has only a moment for its files."""
    sys.argv = ["ends.py"]
    ending.UNWIND = 0.2
    ending.watch_signals()
    print("deaf", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)


def use_a_pool():
    """It has processes of another kind."""
    ending.watch_signals()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(abs, range(4))
