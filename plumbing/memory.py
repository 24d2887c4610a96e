"""What fits into memory: chunks of rows, out of memory, a step that is left for a signal, a frozen
tower's remembered output."""

import itertools
import traceback
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from plumbing import sharding
from plumbing.blocks import KnownGradient
from plumbing.config import CHUNK_TOKENS, by_device
from plumbing.ending import StepLeft, overdue
from plumbing.errors import InputError, OfAllRanks, brief
from plumbing.families import vision_tower, what_is_taken
from plumbing.ranks import gather_objects, say


class Budget(NamedTuple):
    """What a contrastive step may keep: chunk_tokens, padded tokens that go through the model at a
    time; keep_graphs, chunks whose graph of pass 1 is kept, so that they run once; vision_cache,
    where a frozen tower's output waits for pass 2: "device", "host" or "off"."""

    chunk_tokens: int
    keep_graphs: int = 1
    vision_cache: str = "off"

    @staticmethod
    def of(cfg, device, keep_graphs) -> "Budget":
        """chunk_tokens: what has fitted so far, or what the flags ask for, or where they say
        nothing this kind of device's default. keep_graphs: see plumbing/graphs.py."""
        chunk_tokens = cfg.fitting or by_device(cfg.chunk_tokens, CHUNK_TOKENS, device)
        return Budget(chunk_tokens, keep_graphs, cfg.vision_cache)


def token_chunks(lengths, chunk_tokens) -> list:
    """Indices of rows, from the shortest to the longest, in chunks of at most chunk_tokens padded
    tokens (a longer row stands alone); the last chunk is a full one. lengths: tokens of each."""
    chunks, longest = [], 0
    # From the longest: a chunk's first row is its longest, and says how wide the chunk is.
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if chunks and (len(chunks[-1]) + 1) * longest <= chunk_tokens:
            chunks[-1].append(i)
        else:
            chunks.append([i])
            longest = lengths[i]
    return chunks[::-1]


def to_device(inputs, device):
    """The tensors in `inputs`, which is one or a container of them. From the host to a GPU they go
    from pinned memory: only such a copy runs beside the GPU's work, and the host goes on. Always in
    a new container, for the Qwens overwrite fields of what their tower said."""

    def copied(x):
        if device.type == "cuda" and not x.is_cuda:
            x = x.pin_memory()
        return x.to(device, non_blocking=True)

    return tree_map_only(torch.Tensor, copied, inputs)


# ---------------------------------------------------------------------- a step that is not finished


class DoesNotFit(OfAllRanks):
    """Some rank ran out of memory, and all ranks know."""

    def __init__(self, where=""):
        # Where it has been halved until it cuts nothing any more, half of it would not help.
        way = "a smaller --graph-memory" if where else "a smaller --chunk-tokens"
        another = "or another run with less --max-pixels"  # --resume would refuse it
        super().__init__(f"out of memory{where}: try {way}, --checkpointing, {another}")


class Leaving(Exception):
    """This rank leaves the step for a signal; the others do not know yet."""


# What a rank says of its step where all ranks meet; the greatest word counts.
FITS, FITS_NOT, LEFT = range(3)


def meet(word=FITS):
    """Where all ranks learn whether one of them ran out of memory, or leaves the step for a signal:
    DoesNotFit or StepLeft on all alike. A rank that did comes here from wherever it was; the others
    at their next meeting."""
    # One collective, the same for who failed and who did not: nobody waits for ever.
    word = max(gather_objects(word))
    if word == LEFT:
        raise StepLeft
    if word == FITS_NOT:
        raise DoesNotFit


@contextmanager
def all_ranks_or_none():
    """Around a part of a step in which the ranks may not meet. Where one of them does not come to
    its end, for want of memory or for a signal, it is the end for all: DoesNotFit or StepLeft."""
    word = FITS
    try:
        yield
    except torch.OutOfMemoryError as e:
        word = FITS_NOT
        # Trap: until a `with` is left its error lives, and the graphs in its frames with it; where
        # the ranks meet, and where the steps before are saved, their memory is needed.
        traceback.clear_frames(e.__traceback__)
    except Leaving:
        word = LEFT
    meet(word)


def unless_overdue(chunks):
    """Yields them, until a signal has waited too long."""
    for chunk in chunks:
        if overdue():
            raise Leaving
        yield chunk


def leavable(embed, embedder):
    """GradCache's `embed`, which leaves the step where a signal has waited too long."""
    is_sharded = sharding.sharded(embedder)

    def embed_or_leave(chunk):
        if is_sharded:  # no rank can leave the others' forward: all look in the same moment
            meet(LEFT if overdue() else FITS)
        elif overdue():
            raise Leaving
        return embed(chunk)

    return embed_or_leave


def fits_into_memory(attempt, chunk_tokens) -> bool:
    """Runs attempt(chunk_tokens). Its graphs are gone when this returns False."""
    try:
        with all_ranks_or_none():
            attempt(chunk_tokens)
    except DoesNotFit:
        return False
    return True


def until_it_fits(attempt, chunk_tokens, longest, start_over) -> int:
    """Runs attempt(chunk_tokens), with half of it each time that some rank runs out of memory;
    between two attempts start_over(). longest: tokens of this rank's longest row, which no budget
    can cut. -> the chunk_tokens that fitted."""
    while not fits_into_memory(attempt, chunk_tokens):
        # Then each rank's largest chunk is its longest row, and nothing cuts that.
        if chunk_tokens < min(gather_objects(longest)):
            raise DoesNotFit(f" at --chunk-tokens {chunk_tokens}, the longest row alone")
        start_over()  # gradients of a half-done pass 2 must not count twice
        say(f"out of memory: --chunk-tokens {chunk_tokens} is halved from here on")
        chunk_tokens //= 2
    return chunk_tokens


def meeting(loss_of):
    """GradCache's `loss_of`, where all ranks learn first whether pass 1 fitted on all of them. From
    there the ranks are in the loss together, its backward pass too, and there is no way back."""

    def loss_together(z):
        meet()
        try:  # the backward pass here, too: in `two_passes` nobody could tell it from pass 2
            loss = loss_of(z)
            (gradient,) = torch.autograd.grad(loss, z)
        except torch.OutOfMemoryError as e:
            text = f"out of memory in the loss, where smaller chunks do not help: {brief(e, 120)}"
            raise InputError(f"{text}; take a smaller --batch") from None
        return KnownGradient.apply(loss.detach(), (gradient,), z)

    return loss_together


# ---------------------------------------------------------------------------------- a frozen tower


def remember_tower(embed, mllm, where):
    """GradCache's `embed`, with a frozen vision tower that answers the second call for a chunk with
    what it said to the first. where: its output waits on the "device" or the "host"; "off", or a
    tower that is trained: `embed` as it is."""
    tower = vision_tower(mllm)
    if where == "off" or any(p.requires_grad for p in tower.parameters()):
        return embed
    outputs = {}  # (chunk's first row, number of the call in it) -> output

    def embed_once(chunk):
        with answering(tower, outputs, chunk[0], where):
            return embed(chunk)

    return embed_once


@contextmanager
def answering(tower, outputs, name, where):
    """Inside, the tower's output is remembered (pass 1, without a graph) or recalled (pass 2). To
    wrap the tower itself takes along all that a family makes of it, Qwen3-VL's deepstack too."""
    forward = tower.forward
    calls = itertools.count()  # a chunk may call the tower several times
    home = next(tower.parameters()).device
    away = torch.device("cpu") if where == "host" else home
    second_pass = torch.is_grad_enabled()

    def answer(*args, **kwargs):
        key = (name, next(calls))
        if not second_pass:
            output = forward(*args, **kwargs)
            outputs[key] = to_device(what_is_taken(tower, output), away)
            return output
        if key in outputs:
            return to_device(outputs.pop(key), home)
        return forward(*args, **kwargs)  # a chunk whose graph is kept comes only once

    tower.forward = answer
    try:
        yield
    finally:
        del tower.forward
