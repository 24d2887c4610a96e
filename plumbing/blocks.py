"""A sum over blocks of rows that fits into memory: each is computed once, its gradient with it."""

import torch


class SumOverBlocks(torch.autograd.Function):
    """sum_over_blocks, for autograd."""

    @staticmethod
    def forward(ctx, loss_of_rows, q, t, block):
        grad_q, grad_t = torch.zeros_like(q), torch.zeros_like(t)
        nats, hits = 0.0, 0
        for rows in torch.arange(len(q), device=q.device).split(block):
            with torch.enable_grad():  # a graph of this block alone
                q_rows, columns = q[rows].detach().requires_grad_(), t.detach().requires_grad_()
                row_nats, row_hits = loss_of_rows(q_rows, columns, rows)
                block_nats = row_nats.sum()
                grad_q[rows], grad = torch.autograd.grad(block_nats, (q_rows, columns))
            grad_t += grad
            nats = nats + block_nats.detach()
            hits = hits + row_hits.sum()
        ctx.save_for_backward(grad_q, grad_t)
        ctx.mark_non_differentiable(hits)
        return nats, hits

    @staticmethod
    def backward(ctx, grad, _):
        grad_q, grad_t = ctx.saved_tensors
        return None, grad * grad_q, grad * grad_t, None  # new ones: a graph may be walked twice


def sum_over_blocks(loss_of_rows, q, t, block):
    """The sums over all rows of what loss_of_rows(q[rows], t, rows) -> (nats (b,), hits (b,)) says
    of `block` of them at a time. q (B, D), t (M, D) -> (nats, with a gradient; hits). Memory is
    that of one block: (block, M), never (B, M)."""
    return SumOverBlocks.apply(loss_of_rows, q, t, block)
