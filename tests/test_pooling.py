"""The embedding is the mean of the K compression tokens, or the last token (CoMa, section 3.2)."""

import pytest
import torch
from checks import close, equal, expect

from data import Item
from model import compression_pool, last_token_pool


def padded(lengths, L, side):
    """(h (B, L, 3), attention_mask (B, L)) with so many real tokens on the other side of the
    padding; the padding's hidden states are large, so that a mistake shows."""
    torch.manual_seed(0)
    h, mask = torch.randn(len(lengths), L, 3), torch.zeros(len(lengths), L, dtype=torch.long)
    for row, n in zip(mask, lengths, strict=True):
        row[:n] = 1
    mask = mask.flip(1) if side == "left" else mask
    return torch.where(mask[..., None] == 1, h, 1e6 + h), mask


def check_pool(pool, K):
    """Against a loop, for both sides, rows of every length from K to L, and no padding at all."""
    for side in ("right", "left"):
        for lengths in (range(K, 8), [7], [K, 7, K]):
            h, mask = padded(lengths, 7, side)
            want = []
            for row, m in zip(h, mask, strict=True):
                real = [x for x, keep in zip(row, m.tolist(), strict=True) if keep]
                want.append(sum(real[len(real) - K :]) / K)
            close(
                pool(h, mask, K), torch.stack(want), f"K = {K}, {side} padding: last K real tokens"
            )


@pytest.mark.parametrize("K", [1, 2, 4, 7])
def test_the_code_is_the_mean_of_the_last_k_real_tokens(K):
    """compression_pool equals a loop, padded on either side."""
    check_pool(compression_pool, K)


def test_the_last_token_is_the_last_real_one():
    """last_token_pool equals a loop, padded on either side, and is compression_pool with K = 1."""
    check_pool(lambda h, mask, K: last_token_pool(h, mask), 1)


def at_the_end(h, mask, K):
    return h[:, -K:].mean(1)


def by_length(h, mask, K):
    """Right for right padding only."""
    at = mask.sum(1)[:, None] - K + torch.arange(K)
    return h.gather(1, at[..., None].expand(-1, -1, h.shape[-1])).mean(1)


def one_early(h, mask, K):
    return compression_pool(h.roll(1, 1), mask, K)


def all_tokens(h, mask, K):
    return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("wrong", [at_the_end, by_length, one_early, all_tokens])
@pytest.mark.parametrize("K", [1, 3])
def test_the_pooling_check_fails_for_wrong_tokens(wrong, K):
    """Negative control: h[:, -K:] whatever is padding, an index that ignores the side, off by one,
    the mean of all tokens."""
    with pytest.raises(AssertionError):
        check_pool(wrong, K)


def test_the_gradient_goes_to_the_pooled_tokens_alone():
    """d pool / d h is 1 / K at the K tokens, else exactly 0."""
    h, mask = padded([4, 6], 6, "right")
    h = h.requires_grad_()
    compression_pool(h, mask, 2).sum().backward()
    got = (h.grad[..., 0] * 2).tolist()
    equal(got, [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]], "the last two of 4, of 6")


def test_a_row_ends_with_its_compression_tokens(shared):
    """What is pooled in a model are C_1 ... C_K: the last K real tokens of a row are these, and z
    has unit length."""
    inputs = shared.collate([Item("red"), Item("a much longer text about a square")])
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        equal(ids[mask == 1][-4:].tolist(), shared.collate.compress_ids, "C_1 ... C_K stand last")
    with torch.no_grad():
        z, h = shared(inputs), shared.hidden(inputs)
    close(z.norm(dim=1), torch.ones(2), "unit length", 1e-6)
    ends = inputs["attention_mask"].sum(1)
    want = torch.stack([row[n - 4 : n].mean(0) for row, n in zip(h, ends, strict=True)])
    close(z, want / want.norm(dim=1, keepdim=True), "the direction of the mean of C_1 ... C_K")
    expect((z[0] - z[1]).norm() > 0.01, z, "two directions", "does the text matter?")
