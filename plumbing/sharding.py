"""Beyond one GPU's memory: PyTorch's FSDP2, parameters, gradients and optimiser states divided over
the ranks."""

import torch
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from plumbing.families import vision_tower
from plumbing.ranks import gather_objects, world

# Trap: without reduce_dtype the gradients of all chunks are summed in bfloat16 until they are
# reduced, and the error grows with their number: 0.2 % of the gradient at 1, 1 % at 96, 2 % at 384.
PRECISION = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(embedder):
    """Each decoder layer is a unit of its own; all else is one more, gathered by every forward, so
    that a rank whose chunk holds no picture calls for the same weights as the others."""
    units = [*embedder.mllm.get_decoder().layers, embedder]
    for unit in units:
        if embedder.device.type == "cuda":
            fully_shard(unit, mp_policy=PRECISION)
        else:
            fully_shard(unit, mesh=init_device_mesh("cpu", (world(),)))


def sharded(embedder) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(embedder, FSDPModule)


def touch_tower(embedder, z, inputs):
    """z, unchanged. Trap: FSDP reduces what has a gradient; ranks whose chunk has no picture would
    send less than the others, so they give the tower a gradient of zero."""
    if not sharded(embedder) or "pixel_values" in inputs:
        return z
    return z + 0 * sum(p.flatten()[0] for p in vision_tower(embedder.mllm).parameters())


def whole_weights(embedder):
    """The MLLM's weights {name: tensor}, gathered from all ranks; None where they are not sharded.
    Every rank must call it; rank 0 holds the result."""
    if not sharded(embedder):
        return None
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(embedder.mllm, options=options)
    names = [name for name, _ in embedder.mllm.named_parameters()]  # a tied weight once
    return {name: weights[name] for name in names if name in weights}


def in_lockstep(embedder, embed, chunks) -> tuple:
    """GradCache's `embed` and `chunks`, for a model that may be sharded. -> (embed, chunks).

    Sharded ranks meet inside every forward pass, so all need the same number of chunks: a rank with
    fewer begins with empty ones. An empty chunk runs the first real one and keeps none of its rows,
    so its gradient is zero. Gradients are reduced over ranks once, in a step's last backward pass:
    that of chunks[0], for pass 2 goes backwards."""
    if not sharded(embedder):
        return embed, chunks
    idle = max(gather_objects(len(chunks))) - len(chunks)
    chunks = [[] for _ in range(idle)] + chunks
    real = chunks[idle]  # the first one that is not empty

    def embed_together(chunk):
        part = embed(chunk or real)[: len(chunk)]  # (len(chunk), D)
        is_last = chunk is chunks[0]

        def before_backward(grad):
            embedder.set_requires_gradient_sync(is_last)
            return grad * world()  # FSDP takes the mean over ranks, where we sum

        if part.requires_grad:
            part.register_hook(before_backward)
        return part

    return embed_together, chunks
