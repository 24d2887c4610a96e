"""Processes that train together. Every collective is a no-op in one process, so that there is one
code path for world 1 and N; `torchrun` says how many there are."""

import errno
import os
import re
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from plumbing.ending import leave, leave_by, stop_asked, unsaid
from plumbing.errors import InputError, brief

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk says that takes no more


def rank():
    """Which process this is, 0 ... world() - 1; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    """Prints, on rank 0 only, above a progress bar. A full disk under the output, or a terminal
    that is gone, costs lines and not the run; and so does any other failure once a signal is noted,
    which may also have ended the program that reads the output (`tee`)."""
    if rank() > 0:
        return
    try:
        tqdm.write(text)
    except OSError as e:
        if e.errno not in (*FULL, errno.EIO) and not stop_asked:
            raise
        unsaid.append(e.strerror)


# ------------------------------------------------------------------------------------ collectives


def gather_objects(x) -> list:
    """What every rank holds, in the order of ranks."""
    everyone = [x] * world()
    if world() > 1:
        dist.all_gather_object(everyone, x)
    return everyone


def all_sum(x):
    """Sum over ranks: a tensor, in place, or a number."""
    if not isinstance(x, torch.Tensor):
        return sum(gather_objects(x))
    if world() > 1:
        dist.all_reduce(x)
    return x


def gather_rows(x, counts):
    """Every rank's rows (n_r, D), in the order of ranks -> (sum of n_r, D). counts: the n_r.

    With a gradient, by `scatter_sum`: what all ranks' losses say to my rows, summed."""
    return GatherRows.apply(x, counts)


class GatherRows(torch.autograd.Function):
    """Rows go to all ranks, gradients come home."""

    @staticmethod
    def forward(ctx, x, counts):
        ctx.counts = counts
        if len(counts) == 1:
            return x.clone()
        everyone = x.new_empty(len(counts), max(counts), x.shape[1])
        # A collective takes equal shapes: padded to the longest.
        dist.all_gather(list(everyone), F.pad(x, (0, 0, 0, max(counts) - len(x))))
        return torch.cat([part[:n] for part, n in zip(everyone, counts, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        return scatter_sum(grad, ctx.counts), None


def scatter_sum(grad, counts):
    """Gradients come home: (sum of n_r, D) of every rank -> this rank's n_r rows of their sum."""
    if len(counts) == 1:
        return grad
    parts = [F.pad(g, (0, 0, 0, max(counts) - len(g))) for g in grad.split(counts)]
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter(mine, parts)
    return mine[: counts[rank()]]


def sum_gradients(parameters, bucket=25_000_000):
    """Gradients summed over ranks, in flat buckets of about `bucket` numbers: few, large messages.

    A parameter that this rank's batch did not touch counts as zero: ranks never differ in calls."""
    buckets, size = [[]], 0
    for p in parameters:
        if not p.requires_grad:
            continue
        # On every rank, so that all have the same buckets.
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        buckets[-1].append(p.grad)
        size += p.grad.numel()
        if size >= bucket:
            buckets.append([])
            size = 0
    if world() == 1:
        return
    for grads in buckets:
        if grads:
            flat = all_sum(torch.cat([g.flatten() for g in grads]))
            parts = flat.split([g.numel() for g in grads])
            for g, part in zip(grads, parts, strict=True):
                g.copy_(part.view_as(g))


# ---------------------------------------------------------------------------- beginning and ending


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MINUTE = 60  # seconds, until a line says what is waited for
PATIENCE = timedelta(minutes=30)  # of a rank for the others; one of them may fetch a model


def setup() -> torch.device:
    """Joins torchrun's process group, if there is one. -> this rank's device."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked
    cuda = torch.cuda.is_available()
    by_torchrun = "RANK" in os.environ
    if by_torchrun:
        check_environment(torch.cuda.device_count() if cuda else None)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if by_torchrun and not dist.is_initialized():
        try:  # torchrun's environment says the rest
            dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as e:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise InputError(f"cannot join the other ranks at {where}: {brief(e)}") from None
    return device


@contextmanager
def said_while_waiting():
    """One line a node where what is inside takes longer than a minute: another node's command,
    mistyped, ended before it could say so to this one."""
    node = os.environ.get("GROUP_RANK", "0")
    text = f"node {node} waits for the others: did their commands begin, did one end with an error?"
    timer = threading.Timer(MINUTE, print, [text], {"flush": True})
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_environment(devices):
    """Raises InputError where RANK is set, but not all that torchrun sets with it. devices: the
    number of this machine's GPUs, or None."""
    if missing := [name for name in TORCHRUN if not os.environ.get(name)]:
        way_out = "start it with torchrun, or unset RANK"
        raise InputError(f"RANK is set, but not {', '.join(missing)}: {way_out}")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        value = os.environ.get(name, "1")  # the last one may be missing
        if not (value.isascii() and value.isdecimal()):
            raise InputError(f"{name}={brief(value)}: not a number; torchrun sets it")
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        text = f"RANK={os.environ['RANK']} is not below WORLD_SIZE={os.environ['WORLD_SIZE']}"
        raise InputError(f"{text}: start it with torchrun, or unset RANK")
    if devices is not None and int(os.environ["LOCAL_RANK"]) >= devices:
        raise InputError(f"this machine has {devices} GPUs: torchrun --nproc-per-node {devices}")


def run(main, config):
    """main(config) of a script, and the end of the process, whatever ends it: one clear line where
    a user can put it right, else the traceback. torchrun then ends the ranks that are left."""

    def command(argv):
        main(config.parse(argv))
        if dist.is_initialized():
            dist.destroy_process_group()

    run_command(command)


def run_command(main):
    """main(argv) of a command that parses its own words; what main returns is the exit status."""
    try:
        leave(status=main(sys.argv[1:]) or 0)
    except BaseException as e:
        if reason := known_reason(e):
            leave(reason)
        leave_by(e)


def known_reason(error) -> str:
    """The clear line for a full disk and for two errors of torch, or ""."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{brief(text)}: of a file that it writes, or of what it prints"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{brief(text, 120)}: out of memory; halve --chunk-tokens, or take --checkpointing"
    # The backends have no exception of their own for a peer that is gone.
    is_of_ranks = isinstance(error, RuntimeError) and world() > 1
    if is_of_ranks and re.search("gloo|nccl|connection", text, re.IGNORECASE):
        cause = re.sub(r"^\[.*?\] ", "", text.splitlines()[0])
        lost = f"rank {rank()} lost the others ({brief(cause, 80)}): one of them ended first"
        return f"{lost}. A training run goes on with --resume, from its last checkpoint"
    return ""
