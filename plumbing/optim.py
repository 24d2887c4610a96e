"""AdamW and Muon, their learning rates, and the step itself."""

import math

import torch
from torch import nn

from plumbing.combinations import given, spelled
from plumbing.errors import InputError, OfAllRanks
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
    if muon and not adam and "lr" in given(cfg):
        text = "Muon trains all that is trained of this model, at the rate --muon-lr; leave it out"
        raise InputError(f"{spelled(cfg, 'lr')}: {text}")
    optimizers = []
    if adam:
        decay = cfg.weight_decay
        optimizers.append(torch.optim.AdamW(adam, cfg.lr, (0.9, 0.98), weight_decay=decay))
    if muon:
        optimizers.append(Muon(muon, cfg.muon_lr, weight_decay=cfg.weight_decay))
    return optimizers


class Muon(torch.optim.Muon):
    """PyTorch's, whose products are bfloat16: on a CPU without instructions for it (before AVX-512
    BF16) they take 15 times as long as float32's, and 1.7 times as long as all else in the toy's
    step. Here they are float32 on a CPU; the rest is the same, and so is the state."""

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every matrix that has a gradient; closure must be None."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])  # Nesterov's
                rows, columns = p.shape
                lr = group["lr"] * math.sqrt(max(1, rows / columns))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonal(update, group["ns_coefficients"]), alpha=-lr)


def orthogonal(g, coefficients):
    """About U V^T of g = U S V^T: five rounds of the polynomial that pulls all singular values to
    1 (Newton-Schulz; Jordan, "Muon", 2024). (m, n) -> (m, n)."""
    a, b, c = coefficients
    x = g if g.device.type == "cpu" else g.bfloat16()
    if len(x) > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(g) > g.shape[1] else x


def rate_at(step, peak, cfg) -> float:
    """The learning rate of a step: it rises to `peak` over the warm-up, then falls to zero along
    half a cosine, or a line."""
    rise = max(1, round(cfg.warmup * cfg.steps))
    past = max(0, step - rise) / max(1, cfg.steps - rise)  # 0 ... 1
    fall = 1 - past if cfg.schedule == "linear" else (1 + math.cos(math.pi * past)) / 2
    return peak * min(1.0, (step + 1) / rise) * fall


def begin_step(optimizers, step, cfg) -> float:
    """Seeds dropout and sets the learning rates. Both are functions of (seed, step, rank), so no
    checkpoint needs to hold them. -> AdamW's rate; Muon's where it trains everything."""
    # Primes keep the seeds of neighbouring (seed, step, rank) apart.
    torch.manual_seed((cfg.seed * 1_000_003 + step) * 4_093 + rank())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, optimizer.defaults["lr"], cfg)
    return optimizers[0].param_groups[0]["lr"]


def leave_untouched(parameters, optimizers):
    """Gradients that are zeros alone become None, so that momentum and decay do not move weights
    which no row of any rank went through: a vision tower's, in a step without pictures."""
    # Trap: a weight without a state could not be resumed, so in the first step all get one. A
    # sharded weight is left out: each rank has a part of it, whose gradient may be zero alone.
    known = set().union(*(optimizer.state for optimizer in optimizers))
    whole = [p for p in parameters if p in known and not hasattr(p.grad, "full_tensor")]
    with_gradient = [p for p in whole if p.grad is not None]
    if with_gradient:
        touched = torch.stack([p.grad.any() for p in with_gradient]).tolist()
        for p, is_touched in zip(with_gradient, touched, strict=True):
            p.grad = p.grad if is_touched else None


def end_step(embedder, optimizers, cfg, step, loss, ids) -> float:
    """Clips the gradient and takes the step. -> the gradient's norm before clipping. Raises
    OfAllRanks, and the weights are as they were, where the loss or the gradient is not finite."""
    parameters = [p for p in embedder.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
    # Sharded, each rank holds a part of it.
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(loss + norm):
        at = f"step {step + 1}, lr {optimizers[0].param_groups[0]['lr']:.2e}"
        raise OfAllRanks(
            f"{at}: loss {loss}, gradient norm {norm}; rank {rank()} had the examples {ids}. Look "
            "at these examples, or begin another run with a lower --lr; at step 1 a flag of the "
            "loss is too large or too small"
        )
    leave_untouched(parameters, optimizers)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # frees the memory until the next backward pass
    return norm
