"""The MLP of an MLLM's last layer, only for the tokens that are read.

An embedding is made of the last K tokens of a row, or of the last one. Of all others the last
layer's attention sees what comes into it, and nobody what comes out: its MLP, which looks at one
token at a time, leaves them out, forward and backward. Embeddings and gradients are the same, but
for rounding."""

from contextlib import nullcontext
from contextvars import ContextVar

# Of the forward pass that runs in this thread: the tokens that are read; None: all.
READ = ContextVar("READ", default=None)


def last_tokens(attention_mask, n):
    """Where the last n real tokens of each row are, with all rows end to end: (B, L), 1 where real,
    either padding -> (at most B * n,), rising."""
    from_here = attention_mask.flip(1).cumsum(1).flip(1)  # (B, L) real tokens from this one on
    return ((from_here <= n) & (attention_mask == 1)).flatten().nonzero()[:, 0]


class OnlyAt:
    """Around a forward pass: the tokens of which its hidden states are read, see `last_tokens`; of
    all others they are without the last MLP. None: all are read."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __enter__(self):
        self.before = READ.set(self.tokens)

    def __exit__(self, *error):
        READ.reset(self.before)


def first_and_second_run():
    """For activation checkpointing: what a layer runs in, and what it runs in again when the
    backward pass comes to it. Trap: the pass that said what is read is over then, and the thread
    may be another."""
    return nullcontext(), OnlyAt(READ.get())


class WhereRead:
    """The part of the MLP's class that is our own, in front of the library's."""

    def forward(self, h):
        """(B, L, D) -> (B, L, D), zero where it is not read."""
        tokens = READ.get()
        if tokens is None:
            return super().forward(h)
        z = super().forward(h.flatten(0, 1).index_select(0, tokens))  # (len(tokens), D)
        whole = z.new_zeros(h.shape).flatten(0, 1)  # (B * L, D)
        return whole.index_copy(0, tokens, z).view_as(h)
