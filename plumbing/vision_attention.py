"""Attention of the vision towers that take all pictures of a batch end to end (the Qwen family's):
each piece, which is a picture or a window of one, sees only itself.

transformers calls the kernel once for each piece. Of Qwen2.5-VL's windows a batch has thousands in
every layer, each too small for a GPU to be busy with. Here all pieces of one length are one call:
the same numbers, and no padding."""

import inspect
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from plumbing.families import vision_tower

# Trap: only a kernel with "flash" in its name is given the pieces together.
NAME = "flash_by_length"


def attend_by_length(mllm):
    """The MLLM, its vision tower with this attention, where it takes pictures end to end and its
    kernel is PyTorch's (sdpa)."""
    tower = vision_tower(mllm)
    asked = [inspect.signature(module.forward).parameters for module in tower.modules()]
    is_packed = any("cu_seqlens" in parameters for parameters in asked)
    if is_packed and tower.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention)
        tower.config._attn_implementation = NAME
    return mllm


def attention(module, query, key, value, attention_mask, cu_seq_lens_q, scaling, **others):
    """As transformers calls it: query, key, value (1, heads, S, d), cu_seq_lens_q (pieces + 1,)
    where each piece begins. -> ((1, S, heads, d), None)."""
    numbers, order, back = pieces_of(cu_seq_lens_q)
    q, k, v = (x[0].index_select(1, order).transpose(0, 1) for x in (query, key, value))
    sizes = [length * n for length, n in numbers.items()]
    parts = []
    for (length, n), *qkv in zip(
        numbers.items(), *(x.split(sizes) for x in (q, k, v)), strict=True
    ):
        qkv = [x.unflatten(0, (n, length)).transpose(1, 2) for x in qkv]  # (n, heads, length, d)
        z = F.scaled_dot_product_attention(*qkv, scale=scaling)
        parts.append(z.transpose(1, 2).flatten(0, 1))  # (n * length, heads, d)
    return torch.cat(parts).index_select(0, back)[None], None


@lru_cache(maxsize=2)  # by identity: all layers get the same one, or the same two
def pieces_of(begins) -> tuple:
    """begins: see `attention`. -> ({length: number of pieces}, order (S,) of the places, with the
    pieces of one length side by side, back (S,), which undoes it)."""
    starts_of = {}
    for start, end in pairwise(begins.tolist()):
        starts_of.setdefault(end - start, []).append(start)
    places = []
    for length, starts in starts_of.items():
        places.append((torch.tensor(starts)[:, None] + torch.arange(length)).flatten())
    order = torch.cat(places).to(begins.device)  # (S,)
    numbers = {length: len(starts) for length, starts in starts_of.items()}
    return numbers, order, order.argsort()
