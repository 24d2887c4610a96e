"""What `tools.explain` measures, on the screen and for the page: what autograd keeps for the
backward pass, gradients, a batch of pairs through the model."""

import math

import torch

import contrastive


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for the backward pass while it is open, each storage once."""

    def __init__(self):
        super().__init__(self.note, lambda x: x)
        self.sizes = {}  # where a storage begins -> its bytes

    def __enter__(self):
        super().__enter__()
        return self

    def note(self, x):
        if not isinstance(x, torch.nn.Parameter):  # weights are there anyway
            self.sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

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


class InBatch:
    """A batch of pairs (contrastive.Batch): its embeddings, and their loss."""

    def __init__(self, embedder, batch, temperature):
        self.embedder, self.batch, self.temperature = embedder, batch, temperature

    def forward(self, chunk):
        """The embeddings of some rows: (chunk, D)."""
        rows = [self.batch.rows[i] for i in chunk]
        return self.embedder(self.embedder.collate.pad_rows(rows))

    def info_nce(self, z):
        """The loss of all embeddings: queries first, then targets. -> (loss, hits)."""
        B, device = len(self.batch.labels), z.device
        labels, keys = self.batch.labels.to(device), self.batch.keys.to(device)
        return contrastive.info_nce(z[:B], z[B:], self.temperature, labels, keys)
