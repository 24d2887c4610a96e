"""One rank of exercise 6; test_ex6_ranks.py starts two of them:

    python -m exercises.two_ranks RANK FOLDER SUBJECT ...

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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from checks import close, equal, expect

from exercises import ladder

COUNTS = ([3, 5], [5, 3])  # rows of each rank: either may have more
TEMPERATURE = 0.1
WAIT = 8  # seconds of a rank for the other one, inside of a collective


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_gather(subject, rank, counts):
    """Everyone's rows, in the order of ranks, on each rank."""
    whole = random(sum(counts), 4)
    mine = whole.split(counts)[rank].clone()
    got = subject.gather_rows(mine, list(counts))
    equal(got, whole, f"all ranks' rows, without the padding; counts {counts}")
    equal(mine, whole.split(counts)[rank], "the rows stay as they were")


def check_scatter(subject, rank, counts):
    """This rank's rows of the sum."""
    every = [random(sum(counts), 4, seed=1 + r) for r in range(2)]
    mine = every[rank].clone()
    got = subject.scatter_sum(mine, list(counts))
    hint = f"a sum over ranks, my rows of it; counts {counts}"
    close(got, sum(every).split(counts)[rank], hint, 1e-12)
    equal(mine, every[rank], "the gradient stays as it was")


def check_gradient(subject, rank, counts):
    """InfoNCE of a linear model: the two ranks' gradients add up to that of one process."""
    N, B, first = sum(counts), counts[rank], sum(counts[:rank])
    x, start = random(2, N, 6), random(6, 4, seed=3)  # queries and targets; weights
    w = start.clone().requires_grad_()
    q, t = (F.normalize(s @ w, dim=1) for s in x)  # one process, the whole batch
    F.cross_entropy(q @ t.T / TEMPERATURE, torch.arange(N)).backward()
    want, w = w.grad, start.clone().requires_grad_()
    q, t = (F.normalize(s[first : first + B] @ w, dim=1) for s in x)  # my share
    t_all = subject.gather_rows(t.detach(), list(counts)).requires_grad_()
    expect(len(t_all) == N, len(t_all), N, "targets of all ranks")
    loss = F.cross_entropy(q @ t_all.T / TEMPERATURE, torch.arange(first, first + B))
    (loss * B / N).backward(retain_graph=True)
    t.backward(subject.scatter_sum(t_all.grad, list(counts)))
    got = w.grad.clone()
    dist.all_reduce(got)
    close(got, want, "summed over ranks: the gradient of one process", 1e-10)


CHECKS = {"gather": check_gather, "scatter": check_scatter, "gradient": check_gradient}


def stays_local(subject, grad, counts):
    """What the other rank's queries say of my targets never comes home."""
    return grad.split(counts)[dist.get_rank()]


def takes_the_mean(subject, grad, counts):
    return subject.scatter_sum(grad, counts) / len(counts)


def keeps_the_padding(subject, x, counts):
    most = [max(counts)] * len(counts)
    return subject.gather_rows(F.pad(x, (0, 0, 0, max(counts) - len(x))), most)


def pads_to_the_last(subject, x, counts):
    """As many rows as the last rank has: enough where none has more."""
    x = F.pad(x, (0, 0, 0, counts[-1] - len(x)))
    parts = [torch.empty_like(x) for _ in counts]
    dist.all_gather(parts, x)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def comes_back_to_front(subject, x, counts):
    return torch.cat(subject.gather_rows(x, counts).split(counts)[::-1])


WRONG = {  # planted mistakes: the function that is replaced, and by which
    "stays_local": ("scatter_sum", stays_local),
    "takes_the_mean": ("scatter_sum", takes_the_mean),
    "keeps_the_padding": ("gather_rows", keeps_the_padding),
    "pads_to_the_last": ("gather_rows", pads_to_the_last),
    "comes_back_to_front": ("gather_rows", comes_back_to_front),
}


def find(subject):
    """What is checked: a student's file, the reference, or the reference with a mistake."""
    if subject not in WRONG and subject != "reference":
        return ladder.load(subject)
    functions = ladder.Reference()
    if subject in WRONG:
        name, wrong = WRONG[subject]
        setattr(functions, name, functools.partial(wrong, ladder.Reference()))
    return functions


def meet(folder, rank, where, seconds=30):
    """Both ranks are here, or the other one is gone."""
    Path(folder, f"{where}-{rank}").touch()
    end = time.monotonic() + seconds
    while not Path(folder, f"{where}-{1 - rank}").exists() and time.monotonic() < end:
        time.sleep(0.01)


def run_check(folder, rank, subject, check, place):
    """One check of one subject, in a process group of its own. place: a name for its files.
    -> "" or the error."""
    timeout = datetime.timedelta(seconds=WAIT)
    store = f"file://{folder}/{place}-store"
    error = ""
    try:
        functions = find(subject)
        meet(folder, rank, f"{place}-ready")
        dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timeout)
        for counts in COUNTS:
            CHECKS[check](functions, rank, counts)
    except (Exception, SystemExit) as e:
        error = f"rank {rank}: {type(e).__name__}: {e}"
    # Trap: to leave a group that the other rank is still joining would keep it waiting.
    meet(folder, rank, f"{place}-done", 2 * WAIT)
    if dist.is_initialized():
        dist.destroy_process_group()
    return error


def main(rank, folder, *subjects):
    torch.set_num_threads(1)
    errors = {}
    for i, subject in enumerate(subjects):
        errors[subject] = {}
        for check in CHECKS:
            place = f"{i}-{check}"
            errors[subject][check] = run_check(folder, int(rank), subject, check, place)
            # After each check: what is done stays when the process is killed later.
            Path(folder, f"{rank}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
