"""A training run that is ended on purpose; a script that test_ending.py starts:

    python tests/ends.py HOW OUT          or under torchrun

HOW: `error`, an exception that nobody expects, in rank 0's third step; `worker`, a loader process
is killed, as the system does where memory is short; `deaf`, the main thread is inside one call of
C; `pool`, it has processes of another kind; `leave`, the last rank alone gets a signal in a step
that takes too long, each way to train."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent.parent)]

import torch  # noqa: E402

import contrastive  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402
from plumbing import ending, loader, optim, ranks  # noqa: E402

SMALL = "--model toy-random --steps 4 --batch 4 --workers 2 --chunk-tokens 100".split()
WAYS = {
    "pretrain": (pretrain, SMALL),
    "contrastive": (contrastive, [*SMALL, "--block", "2", "--keep-graphs", "0"]),
    "sharded": (contrastive, [*SMALL, *"--block 2 --muon-lr 0 --keep-graphs 0 --fsdp".split()]),
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
    """Each way to train, until a signal reaches the last rank in the midst of its second step.
    Writes what the runs ended by."""
    ranks.setup()
    codes = {}
    for name, (stage, flags) in WAYS.items():
        codes[name] = left(stage, [*flags, "--workers", "0", "--out", f"{out}/{name}"])
    if ranks.rank() == 0:
        Path(out, "codes.json").write_text(json.dumps(codes))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


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


def main(how, out):
    torch.set_num_threads(1)
    if how == "leave":
        return leave_steps(out)
    ending.watch_signals()
    if how == "pool":
        with multiprocessing.get_context("fork").Pool(2) as pool:
            pool.map(abs, range(4))
        return None
    if how == "deaf":
        print("deaf", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
    optim.end_step = fail if how == "error" else kill_worker
    loader.Team = Team
    sys.argv[1:] = [*WAYS["contrastive"][1], "--out", out]
    ranks.run(contrastive.main, contrastive.Config)


if __name__ == "__main__":
    main(*sys.argv[1:])
