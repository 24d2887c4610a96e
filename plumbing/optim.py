"""AdamW and Muon, their learning rates, and the step itself."""

import math

import torch
from torch import nn

from plumbing.errors import InputError
from plumbing.ranks import rank


def make_optimizers(embedder, cfg) -> list:
    """AdamW on all that is trained; with --muon-lr, Muon on the matrices inside the layers."""
    adam, muon = [], []
    for name, p in embedder.named_parameters():
        if not p.requires_grad:
            continue
        # Muon is for matrices that map features to features; rows of an embedding are no such.
        inner = p.ndim == 2 and "embed" not in name and "lm_head" not in name
        if cfg.muon_lr and inner:
            muon.append(p)
        else:
            adam.append(p)
    optimizers = []
    if adam:
        decay = cfg.weight_decay
        optimizers.append(torch.optim.AdamW(adam, cfg.lr, (0.9, 0.98), weight_decay=decay))
    if muon:
        optimizers.append(torch.optim.Muon(muon, cfg.muon_lr, weight_decay=cfg.weight_decay))
    return optimizers


def rate_at(step, peak, cfg) -> float:
    """The learning rate of a step: it rises to `peak` over the warm-up, then falls to zero along
    half a cosine, or a line."""
    rise = max(1, round(cfg.warmup * cfg.steps))
    past = max(0, step - rise) / max(1, cfg.steps - rise)  # 0 ... 1
    fall = 1 - past if cfg.schedule == "linear" else (1 + math.cos(math.pi * past)) / 2
    return peak * min(1.0, (step + 1) / rise) * fall


def begin_step(optimizers, step, cfg) -> float:
    """Seeds dropout and sets the learning rates. Both are functions of (seed, step, rank): nothing
    of them must be saved. -> AdamW's rate."""
    # Primes keep the seeds of neighbouring (seed, step, rank) apart.
    torch.manual_seed((cfg.seed * 1_000_003 + step) * 4_093 + rank())
    for optimizer in optimizers:
        peak = cfg.muon_lr if isinstance(optimizer, torch.optim.Muon) else cfg.lr
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, peak, cfg)
    return optimizers[0].param_groups[0]["lr"]


def end_step(embedder, optimizers, cfg, step, loss, ids) -> float:
    """Clips the gradient and takes the step. -> the gradient's norm before clipping. Raises
    InputError on all ranks alike where the loss or the gradient is not finite."""
    parameters = [p for p in embedder.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
    # Sharded, each rank holds a part of it.
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(loss + norm):
        at = f"step {step + 1}, lr {optimizers[0].param_groups[0]['lr']:.2e}"
        raise InputError(
            f"{at}: loss {loss}, gradient norm {norm}; rank {rank()} had the examples {ids}. The "
            "last checkpoint is good: look at these examples, or start again with a lower --lr"
        )
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # frees the memory until the next backward pass
    return norm
