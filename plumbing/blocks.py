"""A sum over many rows, one block of them in memory at a time: each block's gradient is computed
together with its value, and handed out when the backward pass asks for it."""

import torch

SCORES = 800_000  # of a block of rows: 3 MiB


class KnownGradient(torch.autograd.Function):
    """A value whose gradients with respect to some tensors have been computed already."""

    @staticmethod
    def forward(ctx, value, gradients, *tensors):
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, None, *(grad * gradient for gradient in ctx.saved_tensors)


def sum_over_blocks(loss_of_rows, q, t):
    """Sums the two results of loss_of_rows(q[rows], t, rows) -> (nats (b,), hits (b,)) over all
    rows, a block at a time: never more than about SCORES of the (B, M) scores are in memory.
    q (B, D), t (M, D) -> (nats, with a gradient; hits)."""
    block = max(1, SCORES // len(t))
    grad_q, grad_t = torch.zeros_like(q), torch.zeros_like(t)
    nats, hits = 0.0, 0
    for rows in torch.arange(len(q), device=q.device).split(block):
        with torch.enable_grad():  # a graph of this block alone
            q_rows, columns = q.detach()[rows].requires_grad_(), t.detach().requires_grad_()
            row_nats, row_hits = loss_of_rows(q_rows, columns, rows)
            block_nats = row_nats.sum()
            grad_q[rows], grad = torch.autograd.grad(block_nats, (q_rows, columns))
        grad_t += grad
        nats = nats + block_nats.detach()
        hits = hits + row_hits.sum()
    return KnownGradient.apply(nats, (grad_q, grad_t), q, t), hits
