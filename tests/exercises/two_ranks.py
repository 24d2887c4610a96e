"""One rank of exercise 6; test_ex6_ranks.py starts two of them:

    python two_ranks.py RANK FOLDER SUBJECT ...

SUBJECT: "reference", a student's file, or a planted mistake of `WRONG`. Writes what each check
says, "" or the error, to FOLDER/RANK.json. Every check has a process group of its own, and the
ranks wait for each other before and after it, by files: a check that only one of them leaves costs
the other WAIT seconds and harms no later one."""

import datetime
import functools
import json
import sys
import time
from pathlib import Path

import ladder
import torch
import torch.distributed as dist
import torch.nn.functional as F
from checks import close, equal, expect

COUNTS = [3, 5]  # rows of each rank
TEMPERATURE = 0.1
WAIT = 8  # seconds of a rank for the other one, inside of a collective


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_gather(subject, rank):
    """Everyone's rows, in the order of ranks, on each rank."""
    whole = random(sum(COUNTS), 4)
    mine = whole.split(COUNTS)[rank].clone()
    equal(subject.gather_rows(mine, COUNTS), whole, "all ranks' rows, without the padding")
    equal(mine, whole.split(COUNTS)[rank], "the rows that were given stay as they were")


def check_scatter(subject, rank):
    """This rank's rows of the sum."""
    every = [random(sum(COUNTS), 4, seed=1 + r) for r in range(2)]
    given = every[rank].clone()
    got = subject.scatter_sum(given, COUNTS)
    close(got, sum(every).split(COUNTS)[rank], "a sum over ranks, my rows of it", 1e-12)
    equal(given, every[rank], "the gradient that was given stays as it was")


def check_gradient(subject, rank):
    """InfoNCE of a linear model: the two ranks' gradients add up to that of one process."""
    x, start, N = random(2, sum(COUNTS), 6), random(6, 4, seed=3), sum(COUNTS)  # queries, targets
    B, first = COUNTS[rank], sum(COUNTS[:rank])
    w = start.clone().requires_grad_()
    q, t = (F.normalize(s @ w, dim=1) for s in x)  # one process, the whole batch
    F.cross_entropy(q @ t.T / TEMPERATURE, torch.arange(N)).backward()
    want, w = w.grad, start.clone().requires_grad_()
    q, t = (F.normalize(s[first : first + B] @ w, dim=1) for s in x)  # my share
    t_all = subject.gather_rows(t.detach(), COUNTS).requires_grad_()
    expect(len(t_all) == N, len(t_all), N, "targets of all ranks")
    loss = F.cross_entropy(q @ t_all.T / TEMPERATURE, torch.arange(first, first + B))
    (loss * B / N).backward(retain_graph=True)
    t.backward(subject.scatter_sum(t_all.grad, COUNTS))
    got = w.grad.clone()
    dist.all_reduce(got)
    close(got, want, "summed over ranks: the gradient of one process", 1e-10)


CHECKS = dict(gather=check_gather, scatter=check_scatter, gradient=check_gradient)


def stays_local(subject, grad, counts):
    """What the other rank's queries say of my targets never comes home."""
    return grad.split(counts)[dist.get_rank()]


def takes_the_mean(subject, grad, counts):
    return subject.scatter_sum(grad, counts) / len(counts)


def keeps_the_padding(subject, x, counts):
    most = [max(counts)] * len(counts)
    return subject.gather_rows(F.pad(x, (0, 0, 0, max(counts) - len(x))), most)


def comes_back_to_front(subject, x, counts):
    return torch.cat(subject.gather_rows(x, counts).split(counts)[::-1])


WRONG = dict(
    stays_local=("scatter_sum", stays_local), takes_the_mean=("scatter_sum", takes_the_mean),
    keeps_the_padding=("gather_rows", keeps_the_padding),
    comes_back_to_front=("gather_rows", comes_back_to_front),
)  # fmt: skip


def find(subject):
    if subject not in WRONG and subject != "reference":
        return ladder.load(subject)
    found = ladder.Reference()
    if subject in WRONG:
        name, function = WRONG[subject]
        setattr(found, name, functools.partial(function, ladder.Reference()))
    return found


def meet(folder, rank, where, seconds=30):
    """Both ranks are here, or the other one is gone."""
    Path(folder, f"{where}-{rank}").touch()
    end = time.monotonic() + seconds
    while not Path(folder, f"{where}-{1 - rank}").exists() and time.monotonic() < end:
        time.sleep(0.01)


def main(rank, folder, *subjects):
    torch.set_num_threads(1)
    rank, found = int(rank), {}
    group = dict(rank=rank, world_size=2, timeout=datetime.timedelta(seconds=WAIT))
    for i, name in enumerate(subjects):
        found[name] = {}
        for check, function in CHECKS.items():
            try:
                subject = find(name)
                meet(folder, rank, f"{i}-{check}-ready")
                dist.init_process_group("gloo", f"file://{folder}/{i}-{check}-store", **group)
                function(subject, rank)
                found[name][check] = ""
            except (Exception, SystemExit) as e:
                found[name][check] = f"rank {rank}: {type(e).__name__}: {e}"
            # Trap: to leave a group that the other rank is still joining would keep it waiting.
            meet(folder, rank, f"{i}-{check}-done", 2 * WAIT)
            if dist.is_initialized():
                dist.destroy_process_group()
            Path(folder, f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
