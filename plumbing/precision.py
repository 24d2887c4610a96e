"""Products in full float32, where the loss needs their digits. Elsewhere on a GPU they are bfloat16
(autocast) or TF32 (`torch.set_float32_matmul_precision("high")`), which both keep three digits."""

from contextlib import contextmanager

import torch


def at_least_float32(x):
    """float32, or x as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def full_float32(device_type):
    """Inside, products of float32 numbers are products of float32 numbers."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class Products(torch.autograd.Function):
    """q @ t.T; a context around the forward pass alone would leave out the two products of the
    backward pass."""

    @staticmethod
    def forward(ctx, q, t):
        ctx.save_for_backward(q, t)
        with full_float32(q.device.type):
            return q @ t.T

    @staticmethod
    def backward(ctx, grad):
        q, t = ctx.saved_tensors
        with full_float32(q.device.type):
            return grad @ t, grad.T @ q


def products(q, t):
    """The inner products of all rows: (b, D), (M, D) -> (b, M)."""
    return Products.apply(at_least_float32(q), at_least_float32(t))
