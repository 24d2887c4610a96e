"""Vision towers that take all pictures of a batch end to end (the Qwen family's), in few large
calls in the place of many small ones, between which a GPU is idle. The weights stay as they are.

Patches: a convolution over inputs of one patch each is a matrix product. As a convolution in
bfloat16 it may take a kernel that goes from patch to patch (pytorch issue 166643).
Attention: each piece, which is a picture or a window of one, sees only itself, and transformers
calls the kernel once for each. Of Qwen2.5-VL's windows a batch has thousands in every layer. Here
all pieces of one length are one call: the same numbers, and no padding."""

import copy
import inspect
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from plumbing.families import vision_tower

# Trap: only a kernel with "flash" in its name is given the pieces together.
NAME = "flash_by_length"


def in_large_calls(mllm):
    """The MLLM, its vision tower so, where it takes pictures end to end. Attention by another
    kernel than PyTorch's (sdpa) is left as it is."""
    AttentionInterface.register(NAME, attention)
    for module in vision_tower(mllm).modules():
        if type(module) is nn.Conv3d and module.stride == module.kernel_size:
            module.__class__ = PatchProjection
        if takes_pieces(module) and module.config._attn_implementation == "sdpa":
            module.config = copy.copy(module.config)  # its own: models are made of the tower's
            module.config._attn_implementation = NAME
    return mllm


def takes_pieces(module) -> bool:
    """Whether it is an attention over pictures end to end."""
    return hasattr(module, "qkv") and "cu_seqlens" in inspect.signature(module.forward).parameters


class PatchProjection(nn.Conv3d):
    """The convolution of inputs that are as large as its kernel."""

    def forward(self, patches):
        """(n, channels, frames, height, width) -> (n, D)."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def attention(module, query, key, value, cu_seq_lens_q, scaling, **others):
    """As transformers calls it: query, key, value (1, heads, S, d), cu_seq_lens_q (pieces + 1,)
    where each piece begins. -> ((1, S, heads, d), None)."""
    numbers, order, back = pieces_of(cu_seq_lens_q)
    q, k, v = (x[0].index_select(1, order).transpose(0, 1) for x in (query, key, value))
    parts, start = [], 0
    for length, n in numbers.items():
        end = start + n * length
        together = [x[start:end].unflatten(0, (n, length)).transpose(1, 2) for x in (q, k, v)]
        z = F.scaled_dot_product_attention(*together, scale=scaling)  # (n, heads, length, d)
        parts.append(z.transpose(1, 2).flatten(0, 1))  # (n * length, heads, d)
        start = end
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
