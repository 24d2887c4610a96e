"""Batches made ahead of time, in processes of their own.

All workers make every batch together, each its share of the rows, so that no more than AHEAD
batches wait, however many workers there are. A worker's rows come in one block of shared memory
that has no name: nothing is copied on arrival, /dev/shm may be small, and nothing stays behind."""

import errno
import io
import itertools
import mmap
import os
import pickle
import signal
import tempfile
import traceback
from multiprocessing import Pipe, reduction
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from plumbing.ending import StepLeft, be_a_child, overdue
from plumbing.errors import InputError

GLANCE = 0.5  # seconds between two looks for a signal, while a batch is waited for
AHEAD = 2  # batches that are being made, or made and not yet asked for
ALIGNED = 64  # bytes, for a tensor's first number
# Of `encode`: what is made into rows at a time, and sorted by length.
WINDOW_ITEMS = 1024
WINDOW_BYTES = 256 * 2**20  # of pictures


def prefetch(make, indices, workers, device=None):
    """Yields make(i) for each i, in order, made ahead in `workers` processes (0: in this one). An
    InputError in a worker is raised here, as it was; a worker that dies is one, too.

    device: where the pictures go. On a GPU the first thing that the model does with them (under
    autocast) is to round them to bfloat16: they travel so, half the size and to the same bits."""
    halve = device is not None and device.type == "cuda"
    indices = iter(indices)
    team = Team(make, workers, halve) if workers else Alone(make, halve)
    waiting = 0
    try:
        for index in itertools.islice(indices, AHEAD):
            team.ask(index)
            waiting += 1
        while waiting:
            batches = [team.receive()]
            waiting -= 1
            for index in itertools.islice(indices, 1):  # the next one, before the rank is busy
                team.ask(index)
                waiting += 1
            yield batches.pop()  # popped: a variable here would keep it alive during its step
    finally:
        team.close()


def halved(made):
    """A row or a batch, its floats, which are pictures, in bfloat16."""
    return tree_map_only(torch.Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, made)


# ------------------------------------------------------------------------------------ shared work


class Slot:
    """Stands for a row that another worker may make, until the rank puts it in."""

    def __init__(self, number):
        self.number = number


class Share:
    """Which rows of a batch this process makes: row n is made by worker n modulo `workers`."""

    def __init__(self, number, workers, halve):
        self.number, self.workers, self.halve = number, workers, halve
        self.count, self.made = 0, {}  # rows so far; {number of a row: the row} of mine
        # Descriptors of the newest blocks. Whoever lets go of a block last gives its pages back to
        # the system, which takes a while: the worker does, for a step would wait for its rank.
        self.sent = []

    def take(self, make, x) -> Slot:
        """The next row: made, if it is mine."""
        number = self.count
        self.count += 1
        if number % self.workers == self.number:
            row = make(x)
            self.made[number] = halved(row) if self.halve else row
        return Slot(number)


making = []  # in a worker: its Share of the batch that it makes


def each(make, inputs) -> list:
    """[make(x) for x in inputs]: the long part of making a batch, shared among the workers.

    Trap: in a worker these are Slots. What calls this must pass them on as they are."""
    if making:
        return [making[-1].take(make, x) for x in inputs]
    results = []
    for x in inputs:
        leave_if_overdue()
        results.append(make(x))
    return results


def leave_if_overdue():
    """StepLeft where a signal has waited too long for a batch: a slow disk may take minutes, and
    the steps before are not saved yet."""
    if overdue():
        raise StepLeft


def try_each(make, inputs, keep_errors) -> list:
    """`each`; with keep_errors an InputError stands in the place of its result, and costs no other
    one."""

    def attempt(x):
        try:
            return make(x)
        except InputError as e:
            if not keep_errors:
                raise
            return e

    return each(attempt, inputs)


# ---------------------------------------------------------------------------------------- the rank


class Alone:
    """No workers: a batch is made when it is received."""

    def __init__(self, make, halve):
        self.make, self.halve, self.asked = make, halve, []

    def ask(self, index):
        self.asked.append(index)

    def receive(self):
        batch = self.make(self.asked.pop(0))
        return halved(batch) if self.halve else batch

    def close(self):
        pass


class Failure(NamedTuple):
    """An error in a worker."""

    row: int  # how many rows of the batch were begun
    error: Exception


class Block(NamedTuple):
    """A worker's share of a batch: pickles, whose tensors lie in shared memory."""

    mapped: mmap.mmap | None  # None: no tensors
    rows: bytes  # {number: row}
    frame: bytes  # the batch, with Slots for its rows

    def load(self, packed, rows):
        """The object of one of the pickles; rows: what its Slots stand for."""
        return Unpacker(packed, self.mapped, rows).load()


class Team:
    """The workers, as the rank sees them. They are forked: a closure cannot be sent."""

    def __init__(self, make, workers, halve):
        self.processes, self.pipes = [], []
        for number in range(workers):
            try:
                mine, its = Pipe()
                self.pipes.append(mine)
                process = os.fork()
            except OSError as e:
                self.close()
                raise InputError(f"no loader process {number + 1}: {e}; fewer --workers") from None
            if process == 0:
                work(make, Share(number, workers, halve), its, self.pipes)
            its.close()
            self.processes.append(process)

    def ask(self, index):
        """All begin with batch `index`, when they are done with those before."""
        for number, pipe in enumerate(self.pipes):
            try:
                pipe.send(index)
            except OSError:
                self.explain_end_of(number)

    def receive(self):
        """The oldest batch that was asked for."""
        shares = [self.share_of(number) for number in range(len(self.pipes))]
        failures = [share for share in shares if isinstance(share, Failure)]
        if failures:
            raise min(failures, key=lambda f: f.row).error  # as one process would have met it
        rows = {}
        for share in shares:
            rows.update(share.load(share.rows, {}))
        return shares[0].load(shares[0].frame, rows)

    def share_of(self, number):
        """What one worker has made of the batch: a Block, or a Failure."""
        while not self.pipes[number].poll(GLANCE):
            leave_if_overdue()
        try:
            share = self.pipes[number].recv()
            if isinstance(share, Failure):
                return share
            file = reduction.recv_handle(self.pipes[number])
        except (EOFError, OSError, RuntimeError) as e:
            # Trap: where no descriptor is free, a block's is an OSError, or does not come with it.
            is_full = getattr(e, "errno", None) in (errno.EMFILE, errno.ENFILE)
            if is_full or isinstance(e, RuntimeError):
                text = "too many open files: raise `ulimit -n`, or try fewer --workers"
                raise InputError(text) from None
            self.explain_end_of(number)
        size = os.fstat(file).st_size
        mapped = mmap.mmap(file, size) if size else None  # freed with the last of its tensors
        os.close(file)
        return Block(mapped, *share)

    def explain_end_of(self, number):
        """Raises the InputError of a worker that is gone."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.processes.pop(number), 0)[1])
        cause = f"signal {-code}" if code < 0 else f"status {code}"
        if code == -signal.SIGKILL:
            cause += ", as the system sends where memory is short"
        raise InputError(f"a loader process has ended ({cause}): try fewer --workers")

    def close(self):
        """No worker is left. They hold nothing that must be put in order."""
        for process in self.processes:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        for pipe in self.pipes:
            pipe.close()


# -------------------------------------------------------------------------------------- the worker


def work(make, share, pipe, pipes_of_rank):
    """A worker's life: batch after batch, until its rank is gone. Never returns."""
    try:
        be_a_child(deaf=True)
        for other in pipes_of_rank:
            other.close()
        torch.set_num_threads(1)  # the rank's other threads are not here
        while True:
            answer(make, share, pipe)
    except (EOFError, OSError):
        os._exit(0)
    finally:
        os._exit(1)


def answer(make, share, pipe):
    """Makes this worker's share of one batch, and sends it."""
    index = pipe.recv()
    share.count, share.made = 0, {}
    making.append(share)
    try:
        frame = make(index)
        tensors = []
        rows = pack(share.made, tensors)
        frame = frame if share.number == 0 else None  # the rank needs one worker's
        packed = (rows, pack(frame, tensors))
        share.made = {}
        if len(share.sent) > AHEAD:  # the rank is done with the oldest
            os.close(share.sent.pop(0))
        share.sent.append(write_block(tensors))
    except InputError as e:
        pipe.send(Failure(share.count, e))
    except MemoryError:
        error = InputError("out of memory in a loader process: try fewer --workers")
        pipe.send(Failure(share.count, error))
    except Exception:
        error = RuntimeError(f"in a loader process:\n{traceback.format_exc()}")
        pipe.send(Failure(share.count, error))
    else:
        pipe.send(packed)
        reduction.send_handle(pipe, share.sent[-1], None)
    finally:
        making.pop()


def write_block(tensors) -> int:
    """Tensors, one behind the other, in memory that other processes can map. -> its descriptor."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("batch")  # no part of /dev/shm
    else:
        with tempfile.TemporaryFile() as unnamed:
            file = os.dup(unnamed.fileno())
    try:
        # Written, not mapped: a full disk is then an error, and no signal.
        with open(file, "wb", closefd=False) as block:
            for x in tensors:
                block.write(x.contiguous().reshape(-1).view(torch.uint8).numpy())
                block.write(bytes(-x.nbytes % ALIGNED))
    except OSError as e:
        os.close(file)
        way = "fewer --workers"
        if e.errno == errno.EFBIG:
            way = "a higher ulimit -f, or --workers 0"
        raise InputError(f"no memory for a batch ({e}): try {way}") from None
    return file


# ------------------------------------------------------------------------------------------ pickles


def pack(x, tensors) -> bytes:
    """A pickle of x. Its tensors are added to the list, and not in it."""
    file = io.BytesIO()
    Packer(file, tensors).dump(x)
    return file.getvalue()


class Packer(pickle.Pickler):
    """Writes (first byte, count, shape, type) for a tensor, a row's number for a Slot."""

    def __init__(self, file, tensors):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors, self.end = tensors, sum(padded(x) for x in tensors)

    def persistent_id(self, x):
        if isinstance(x, Slot):
            return x.number
        if not isinstance(x, torch.Tensor):
            return None
        self.tensors.append(x)
        self.end += padded(x)
        return self.end - padded(x), x.numel(), tuple(x.shape), x.dtype


class Unpacker(pickle.Unpickler):
    """Reads what a Packer wrote. mapped: the tensors' memory; rows: {number of a Slot: its row}."""

    def __init__(self, packed, mapped, rows):
        super().__init__(io.BytesIO(packed))
        self.mapped, self.rows = mapped, rows

    def persistent_load(self, written):
        if isinstance(written, int):  # a Slot's
            return self.rows[written]
        first, count, shape, dtype = written
        if not count:
            return torch.empty(shape, dtype=dtype)
        x = torch.frombuffer(self.mapped, dtype=dtype, count=count, offset=first)
        return x.view(shape)


def padded(x) -> int:
    """Bytes of a tensor in a block."""
    return x.nbytes + -x.nbytes % ALIGNED


# ----------------------------------------------------------------------------------------- windows


class Windows:
    """What `encode` makes into rows at a time: ranges of items, WINDOW_ITEMS or fewer, and no more
    than about WINDOW_BYTES of pictures, by the largest one that was seen so far.

    items: Items; guess: bytes of a picture, until one was seen. The windows do not depend on the
    number of workers."""

    def __init__(self, items, guess):
        self.pictures = [len(item.images) for item in items]
        self.guess, self.largest = guess, 0

    def __iter__(self):
        first = 0
        while first < len(self.pictures):
            end, room = first, WINDOW_BYTES
            for count in self.pictures[first : first + WINDOW_ITEMS]:
                room -= count * (self.largest or self.guess)
                if room < 0 and end > first:
                    break
                end += 1
            yield range(first, end)
            first = end

    def saw(self, rows):
        """Learns from what came: {number of an item: its row, or an error}."""
        for i, row in rows.items():
            if self.pictures[i] and not isinstance(row, InputError):
                size = sum(x.nbytes for x in row.images.values())
                self.largest = max(self.largest, size // self.pictures[i])
