"""How many of GradCache's chunks may keep their graph of pass 1, so that they run once: as many as
fit into --graph-memory. What a graph takes is measured in a run's first step, which keeps none."""

import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from plumbing.combinations import bytes_of
from plumbing.config import CHUNK_TOKENS, by_device
from plumbing.once import ranks_of_node
from plumbing.ranks import gather_objects, say

# Of the memory that is free after the first step. A CPU's may be others' in the next moment.
SHARE = {"cpu": 0.25, "cuda": 0.5}
PROC, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class KeptGraphs:
    """What a run knows of its graphs' memory."""

    def __init__(self, cfg, embedder):
        self.embedder = embedder
        # Bytes; None: a share of what is free.
        self.asked = bytes_of(cfg.graph_memory) if cfg.graph_memory else None
        self.chunk_tokens = by_device(cfg.chunk_tokens, CHUNK_TOKENS, embedder.device)
        self.most = None  # bytes of graph a padded token; None: not measured yet
        self.number = 0

    def of_this_step(self) -> int:
        """How many chunks may keep their graph; asked once a step, by all ranks. The number is of
        chunks as the flags have them: where out of memory halves the chunks, it halves the memory
        of the kept graphs, too."""
        if self.asked == 0:
            return 0
        if self.most is None:  # the first step
            self.most = 0.0
            self.embedder.forward = self.measured(self.embedder.forward)
        elif "forward" in vars(self.embedder):  # the second
            del self.embedder.forward
            self.number = self.that_fit()
        return self.number

    def measured(self, forward):
        """The embedder's forward pass, which notes what its graph takes (in pass 2)."""

        def forward_measured(inputs):
            with graph_bytes() as sizes:
                z = forward(inputs)
            if z.requires_grad:
                self.most = max(self.most, sum(sizes.values()) / inputs["input_ids"].numel())
            return z

        return forward_measured

    def that_fit(self) -> int:
        """The same number on all ranks: sharded, their calls must be the same."""
        room = self.asked
        if room is None:
            device = self.embedder.device
            room = by_device(None, SHARE, device) * free_bytes(device)
        chunk = max(1, *gather_objects(self.most)) * self.chunk_tokens
        number = int(min(gather_objects(room)) / chunk)
        size = f"{number * chunk / 2**30:.2f} GiB at most"
        say(f"as many as {number} chunks keep their graph, and run once ({size}; --graph-memory)")
        return number


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
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield sizes


def free_bytes(device) -> int:
    """What this rank may still take on its device: its share of what no program uses."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    return min(free_of_machine(), free_of_container()) // len(ranks_of_node())


def free_of_machine() -> int:
    """Bytes of main memory that no program uses; where the system does not say, half of all."""
    try:
        return int(re.search(r"MemAvailable:\s+(\d+) kB", PROC.read_text())[1]) * 1024
    except (OSError, TypeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def free_of_container() -> float:
    """Bytes up to the limit of this container (cgroup v2); infinity where it has none."""
    try:
        limit = int(Path(CGROUP, "memory.max").read_text())
        return max(0, limit - int(Path(CGROUP, "memory.current").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return float("inf")
