"""Batches made ahead of time, in processes of their own."""

import os
import pickle
import signal
import threading
import time

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from plumbing.errors import InputError


class Made(Dataset):
    """Element i is `make(i)`, pickled: arrays in one message. As tensors they would each hold a
    file descriptor. An InputError travels as an element, too."""

    def __init__(self, make):
        self.make = make

    def __getitem__(self, i):
        try:
            return pickle.dumps(tree_map_only(torch.Tensor, torch.Tensor.numpy, self.make(i)), 5)
        except InputError as e:
            return e


def prefetch(make, indices, workers):
    """Yields make(i) for each i, in order, made ahead in `workers` processes (0: in this one). An
    InputError in a worker is raised here, as it was."""
    ahead = min(workers, len(indices))
    loader = DataLoader(
        Made(make),
        batch_size=None,
        sampler=indices,
        num_workers=ahead,
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if ahead else None,  # a closure cannot be spawned
    )
    for packed in loader:  # in the order of `indices`, whichever worker was first
        if isinstance(packed, InputError):
            raise packed
        yield tree_map_only(np.ndarray, torch.from_numpy, pickle.loads(packed))


def try_each(make, inputs, keep_errors) -> list:
    """[make(x) for x in inputs]; with keep_errors an InputError stands in the place of its result,
    and costs no other one."""
    results = []
    for x in inputs:
        try:
            results.append(make(x))
        except InputError as e:
            if not keep_errors:
                raise
            results.append(e)
    return results


def start_worker(number):
    """What a worker does first: it leaves signals to its rank, and ends when the rank does."""
    for s in (signal.SIGINT, signal.SIGTERM):  # they may reach all: the rank still needs its batch
        signal.signal(s, signal.SIG_IGN)
    # A signal would be no help: what kills a rank with -9 sends none.
    threading.Thread(target=outlive_nobody, args=(os.getppid(),), daemon=True).start()


def outlive_nobody(rank_process):
    """Trap: a rank that is killed leaves its workers; they hold its sockets open, and the other
    ranks would wait for it."""
    while os.getppid() == rank_process:
        time.sleep(1)
    os._exit(1)
