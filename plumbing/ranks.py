"""Processes that train together. Every collective is a no-op in one process, so that there is one
code path for world 1 and N; `torchrun` says how many there are."""

import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from plumbing.errors import InputError


def rank():
    """Which process this is, 0 ... world() - 1; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    """Prints, on rank 0 only, above a progress bar."""
    if rank() == 0:
        tqdm.write(text)


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


def setup() -> torch.device:
    """Joins torchrun's process group, if there is one. -> this rank's device."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")  # torchrun's environment says the rest
    return device


def run(main, config):
    """main(config) of a script: an InputError becomes one clear line and exit status 1, and so does
    the loss of another rank. The ranks that are left are then ended by torchrun, and never wait."""
    try:
        main(config.parse())
    except InputError as e:
        leave(str(e))
    except torch.OutOfMemoryError as e:
        leave(f"{e!s:.120}: out of memory; halve --chunk-tokens, or take --checkpointing")
    except RuntimeError as e:
        # The backends have no exception of their own for a peer that is gone.
        if world() == 1 or not re.search("gloo|nccl|connection", str(e), re.IGNORECASE):
            raise
        cause = re.sub(r"^\[.*?\] ", "", str(e).splitlines()[0])
        lost = f"rank {rank()} lost the others ({cause:.80}): one of them ended first"
        leave(f"{lost}. --resume goes on from the last checkpoint")
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(message):
    """Ends this process with one line and exit status 1."""
    print(f"\n{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    os._exit(1)  # not through destructors: they may wait for the other ranks


def run_command(main):
    """main(argv) of a command that parses its own words: an InputError becomes one clear line and
    exit status 1; what main returns is the exit status."""
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as e:
        sys.exit(f"{Path(sys.argv[0]).stem}: {e}")
