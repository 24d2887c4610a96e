"""How many of GradCache's chunks may keep their graph of pass 1, so that they run once: as many as
fit into --graph-memory. What a graph takes is measured: the first step keeps none."""

import re
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from plumbing.combinations import bytes_of
from plumbing.config import by_device
from plumbing.memory import Budget
from plumbing.once import ranks_of_node
from plumbing.ranks import gather_objects, say

# Of the memory that is free after the first step. A CPU's may be others' in the next moment.
SHARE = {"cpu": 0.25, "cuda": 0.5}
UNKNOWN = 4 * 2**30  # bytes, where the system does not say what is free
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


class KeptGraphs:
    """What a run knows of its graphs' memory."""

    def __init__(self, cfg, embedder):
        self.cfg, self.embedder = cfg, embedder
        # Bytes; None: not known before the first step is over.
        self.room = bytes_of(cfg.graph_memory) if cfg.graph_memory else None
        self.largest = 0.0  # bytes of graph, of the largest chunk so far, were it a full one
        self.number = None  # of chunks that keep their graph, as it was printed last

    @contextmanager
    def budget(self):
        """Around a step of all ranks: the Budget that it may keep to. Inside, what graphs take is
        measured, so that a step with heavier rows is the last one to keep too many."""
        forward = self.embedder.forward
        budget = Budget.of(self.cfg, self.embedder.device, self.that_fit())

        def forward_measured(inputs):
            with graph_bytes() as sizes:
                z = forward(inputs)
            size, tokens = sum(sizes.values()), inputs["input_ids"].numel()
            self.largest = max(self.largest, as_if_full(size, tokens, budget.chunk_tokens))
            return z

        self.embedder.forward = forward_measured
        try:
            yield budget
        finally:
            del self.embedder.forward

    def that_fit(self) -> int:
        """How many chunks may keep their graph in the next step: one number for all ranks, because
        sharded ranks must make the same calls. It is not raised where running out of memory halves
        the chunks: `largest` still is a whole chunk's, so the kept graphs take half the memory."""
        self.largest = max(gather_objects(self.largest))
        if not self.largest:  # the first step
            return 0
        if self.room is None:
            device = self.embedder.device
            free = min(gather_objects(free_bytes(device)))
            self.room = int(by_device(None, SHARE, device) * free)
        number = self.room // int(self.largest)
        if number != self.number:
            size = f"{number * self.largest / 2**20:,.0f} MiB"
            say(f"up to {number} chunks keep their graph, and run once: {size} (--graph-memory)")
        self.number = number
        return number


def as_if_full(size, tokens, full) -> float:
    """Bytes of graph that a chunk of `full` padded tokens would take, by those of one of `tokens`.

    At most twice its own: only a step's first chunk, the rest, is less than half full, and what
    does not grow with the tokens (a GPU's bfloat16 copy of each weight) must not be multiplied."""
    return size * min(max(full / tokens, 1), 2)


@contextmanager
def graph_bytes():
    """Inside, {address: bytes} of all that graphs save for their backward pass, but weights: these
    are there anyway."""
    sizes = {}

    def note(x):
        whole = x if x._base is None else x._base  # x may be a view, as a weight's transpose is
        if not isinstance(whole, nn.Parameter):
            storage = x.untyped_storage()  # which several saved tensors may share
            sizes[storage.data_ptr()] = storage.nbytes()
        # Trap: x itself would hold the graph that holds it, and out of memory would free nothing.
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield sizes


def free_bytes(device) -> int:
    """What this rank may still take on its device: its share of what no program uses; on a GPU
    beside the most that the first step took, for PyTorch has not given that back."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(free_of_machine(), free_of_container()) // len(ranks_of_node())


def free_of_machine() -> int:
    """Bytes of main memory that no program uses."""
    try:
        text = Path(PROC, "meminfo").read_text()
    except OSError:  # not Linux
        text = ""
    match = re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else UNKNOWN


def free_of_container() -> float:
    """Bytes up to the limit of this container or job, or of what it is a part of (cgroup v2);
    infinity where there is none."""
    try:
        own = re.search(r"^0::/(.*)$", Path(PROC, "self/cgroup").read_text(), re.MULTILINE)
        folder = Path(CGROUP, own[1] if own else "")
    except OSError:
        return float("inf")
    return min(map(free_of_group, [folder, *folder.parents]))


def free_of_group(folder) -> float:
    """Bytes up to the limit of one group of processes; infinity where it has none."""
    try:
        limit = int(Path(folder, "memory.max").read_text())
        used = int(Path(folder, "memory.current").read_text())
        files = re.search(r"^inactive_file (\d+)$", Path(folder, "memory.stat").read_text(), re.M)
    except (OSError, ValueError):  # no such file, or "max"
        return float("inf")
    # Files that were read lie in memory until somebody needs it.
    return max(0, limit - used + int(files[1] if files else 0))
