"""What `tools.explain` measures: what autograd keeps for the backward pass, and gradients."""

import math

import torch


class Saved:
    """Counts what autograd keeps for the backward pass while it is open, each storage once."""

    def __init__(self):
        self.sizes = {}  # where a storage begins -> its bytes

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.note, lambda x: x)
        self.hooks.__enter__()
        return self

    def note(self, x):
        if not isinstance(x, torch.nn.Parameter):  # weights are there anyway
            self.sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def bytes(self) -> int:
        """All of it."""
        return sum(self.sizes.values())

    def __str__(self):
        return f"{self.bytes() / 2**20:.1f} MiB kept for the backward pass"


def gradients(embedder) -> list:
    """Of all that is trained."""
    return [p.grad for p in embedder.parameters() if p.grad is not None]


def norm(tensors) -> float:
    """Of all of them together."""
    return math.sqrt(sum(x.norm() ** 2 for x in tensors))


def gap(ours, want) -> float:
    """How far two gradients (lists of tensors) are apart, as a share of the second."""
    return norm([a - b for a, b in zip(ours, want, strict=True)]) / norm(want)
