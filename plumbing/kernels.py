"""Layers of transformers that make many small calls, changed so that they make few large ones:
between small ones a GPU is idle. No weight changes, and no result by more than its rounding.

In vision towers that take all pictures of a batch end to end (the Qwen family's):

Patches: a convolution over inputs of one patch each is a matrix product. As a convolution in
bfloat16 it may take a kernel that goes from patch to patch (pytorch issue 166643).
Attention: each piece, which is a picture or a window of one, sees only itself, and transformers
calls the kernel once for each. Of Qwen2.5-VL's windows a batch has thousands in every layer. Here
all pieces of one length are one call, without padding.
Widths: Qwen2.5-VL has one of 3,420. For what is no multiple of 8 a GPU has only slow kernels.

In the language model the last layer's MLP is only for the tokens that are read
(plumbing/last_layer.py).

Everywhere, on a GPU: an RMS norm is six kernels, which write and read float32; here it is one. An
MLP with a gate keeps three tensors of its full width for its backward pass; here it keeps two."""

import copy
import inspect
from functools import cache, lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from plumbing.families import vision_tower
from plumbing.last_layer import WhereRead

# Trap: only a kernel with "flash" in its name is given the pieces together.
NAME = "flash_by_length"
# What `down_proj(act_fn(gate_proj(h)) * up_proj(h))` names, in this order. An MLP with a gate is
# told by its forward pass, for one that looks like it may do more there, as Gemma 3n's.
WITH_A_GATE = ("down_proj", "act_fn", "gate_proj", "up_proj")


def in_large_calls(mllm):
    """The MLLM itself, its layers changed in place as the lines above say; attention only where it
    runs by PyTorch's own kernel (sdpa)."""
    AttentionInterface.register(NAME, attention)
    for module in vision_tower(mllm).modules():
        if type(module) is nn.Conv3d and module.stride == module.kernel_size:
            module.__class__ = PatchProjection
        if type(module) is nn.Linear and (module.in_features % 8 or module.out_features % 8):
            module.__class__ = EvenLinear
        if takes_pieces(module) and module.config._attn_implementation == "sdpa":
            module.config = copy.copy(module.config)  # its own: models are made of the tower's
            module.config._attn_implementation = NAME
    last = last_mlp(mllm)
    for module in mllm.modules():
        # Gemma's norms, which multiply by 1 + weight, have another name for their epsilon.
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.__class__ = ours_before(type(module), OneKernel)
        if named_in_forward(module) == WITH_A_GATE:
            module.__class__ = ours_before(type(module), LeanMLP)
            if module is last:
                module.__class__ = ours_before(type(module), WhereRead)
    return mllm


def named_in_forward(module) -> tuple:
    """What its forward pass names; of one that is not written in Python nothing is known."""
    return getattr(getattr(type(module).forward, "__code__", None), "co_names", ())


def last_mlp(mllm):
    """The MLP of the language model's last layer; None: it has none by this name."""
    layers = getattr(mllm.get_decoder(), "layers", None)
    return getattr(layers[-1], "mlp", None) if layers else None


def takes_pieces(module) -> bool:
    """Whether it is an attention over pictures end to end."""
    return hasattr(module, "qkv") and "cu_seqlens" in inspect.signature(module.forward).parameters


class PatchProjection(nn.Conv3d):
    """The convolution of inputs that are as large as its kernel."""

    def forward(self, patches):
        """(n, channels, frames, height, width) -> (n, D)."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class EvenLinear(nn.Linear):
    """A layer as if its widths were multiples of 8. Zeros add nothing."""

    def forward(self, h):
        """(..., D) -> (..., D')."""
        columns, rows = -self.in_features % 8, -self.out_features % 8
        weight = F.pad(self.weight, (0, columns, 0, rows))
        bias = None if self.bias is None else F.pad(self.bias, (0, rows))
        return F.linear(F.pad(h, (0, columns)), weight, bias)[..., : self.out_features]


@cache  # one class for all modules of a kind
def ours_before(theirs, ours) -> type:
    """A class of modules with a forward pass of our own. It has the library's name, by which
    transformers knows its norms."""
    return theirs if issubclass(theirs, ours) else type(theirs.__name__, (ours, theirs), {})


class OursOnGpu:
    """The part of such a class that is our own: on a CPU the library's forward pass is faster."""

    def forward(self, h):
        return self.ours(h) if h.is_cuda else super().forward(h)


class OneKernel(OursOnGpu):
    """RMS norms. On a CPU one kernel gives the same bits, but its backward pass takes longer."""

    def ours(self, h):
        """(..., D) -> (..., D). Its sums are float32. Trap: autocast would make float32 of what
        goes in and out."""
        with torch.autocast(h.device.type, enabled=False):
            weight = self.weight.to(h.dtype)
            return F.rms_norm(h, weight.shape, weight, self.variance_epsilon)


class LeanMLP(OursOnGpu):
    """MLPs with a gate, whose graph is smaller: a step of Qwen2.5-VL-3B takes a fifth less memory.
    On a CPU a step would take 2 to 5 % longer."""

    def ours(self, h):
        """(..., D) -> (..., D)."""
        return self.down_proj(Gate.apply(self.act_fn, self.gate_proj(h), self.up_proj(h)))


class Gate(torch.autograd.Function):
    """act(gate) * up. Autograd would keep act(gate) beside the two for its backward pass; it is
    computed again there: the same bits."""

    @staticmethod
    def forward(ctx, act, gate, up):
        """gate, up: (..., width). -> (..., width)."""
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        gate, up = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            z = ctx.act(gate) * up
        return None, *torch.autograd.grad(z, (gate, up), gradient)


def attention(module, query, key, value, cu_seq_lens_q, scaling, **others):
    """As transformers calls it: query, key, value (1, heads, S, d), cu_seq_lens_q (pieces + 1,)
    where each piece begins. -> ((1, S, heads, d), None)."""
    counts, order, back = pieces_of(cu_seq_lens_q)
    q, k, v = (x[0].index_select(1, order).transpose(0, 1) for x in (query, key, value))
    parts, start = [], 0
    for length, n in counts.items():
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
    counts = {length: len(starts) for length, starts in starts_of.items()}
    return counts, order, order.argsort()
