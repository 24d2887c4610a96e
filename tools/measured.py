"""What `tools.explain` measures, on the screen and for the page: what autograd keeps for the
backward pass, attention, gradients, a batch of pairs through the model."""

import math
import sys
from contextlib import contextmanager

import contrastive


def kept(sizes) -> str:
    """What graphs keep, in words. sizes: as plumbing.graphs.graph_bytes counts them."""
    return f"{sum(sizes.values()) / 2**20:.1f} MiB kept for the backward pass"


@contextmanager
def eager(mllm):
    """Inside, attention by the only kernel that gives its weights out."""
    kernel = mllm.config._attn_implementation
    mllm.set_attn_implementation("eager")
    try:
        yield
    finally:
        mllm.set_attn_implementation(kernel)


def gradients(embedder) -> list:
    """The .grad of each weight that has one."""
    return [p.grad for p in embedder.parameters() if p.grad is not None]


def norm(tensors) -> float:
    """The norm of all their numbers together."""
    return math.sqrt(sum(x.norm() ** 2 for x in tensors))


def gap(ours, want) -> float:
    """How far two gradients (lists of tensors) are apart, as a share of the second; of none at all
    (a batch without negatives) by itself."""
    apart, size = norm([a - b for a, b in zip(ours, want, strict=True)]), norm(want)
    return apart / size if size else apart


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


if __name__ == "__main__":
    sys.exit("tools/measured.py has no commands: tools/explain.py imports it")
