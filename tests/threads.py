"""Ranks that are threads of one process, with what plumbing/ranks.py calls of torch.distributed."""

import threading

import torch

from plumbing import ranks


class Threads:
    """In the place of torch.distributed, for so many threads that call `as_rank` first."""

    def __init__(self, world):
        self.size, self.here = world, threading.local()
        self.barrier = threading.Barrier(world, timeout=60)
        self.sent = [None] * world

    def is_initialized(self):
        return hasattr(self.here, "rank")  # another thread is one process alone

    def get_rank(self):
        return self.here.rank

    def get_world_size(self):
        return self.size

    def exchange(self, x) -> list:
        """What all ranks bring to this call, in the order of ranks."""
        self.sent[self.here.rank] = x
        self.barrier.wait()
        everyone = list(self.sent)
        self.barrier.wait()  # nobody overwrites what is not read yet
        return everyone

    def all_gather_object(self, everyone, x):
        everyone[:] = self.exchange(x)

    def all_reduce(self, x):
        x.copy_(sum(self.exchange(x.clone())))

    def all_gather(self, parts, x):
        for part, theirs in zip(parts, self.exchange(x), strict=True):
            part.copy_(theirs)

    def reduce_scatter(self, mine, parts):
        mine.copy_(sum(theirs[self.here.rank] for theirs in self.exchange(parts)))


def on_ranks(monkeypatch, world, work) -> list:
    """work(rank) on so many ranks side by side -> what each returned; the first error of one."""
    dist, results, errors = Threads(world), [None] * world, []
    monkeypatch.setattr(ranks, "dist", dist)

    def life(rank):
        dist.here.rank = rank
        try:
            results[rank] = work(rank)
        except BaseException as e:
            errors.append(e)
            dist.barrier.abort()  # the others wait no longer

    with torch.random.fork_rng(devices=[]):
        threads = [threading.Thread(target=life, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return results
