"""CoMa's mask a second time, without a mask: as a cache from which the picture has been taken.

A row [head, picture, C] runs first and leaves its keys and values. Those of the picture are thrown
away, and questions and answers run behind what is left, with plain causal attention. They know the
picture through C alone, as `pretrain.compression_mask` has it: *the cache is the embedding*. No
line is shared with that function, so each is a proof of the other (tests/test_cache.py).
"""

import inspect
import sys

import torch
from transformers import DynamicCache

from data import COMPRESS, CONTENT


def hidden_through_cache(run, tokens, positions, roles):
    """The hidden states of one row (L, D), those after C from a cache without the content.

    run(tokens (n,), positions (..., n), cache or None) -> (hidden states (n, D), the cache with
    these n tokens behind it); a cache: [(keys (..., n, d), values (..., n, d)) of each layer].
    tokens (L,), positions (..., L), roles (L,): of the whole row, not padded."""
    n = int((roles <= COMPRESS).sum())  # head, content, C: they come first
    before, cache = run(tokens[:n], positions[..., :n], None)  # (n, D)
    # Trap: the positions go on from the whole row, not from what is left of it.
    after, _ = run(tokens[n:], positions[..., n:], without_content(cache, roles[:n]))
    return torch.cat([before, after])  # (L, D)


def without_content(cache, roles):
    """A cache of tokens with these roles (n,), head and C alone left in it."""
    keep = roles != CONTENT
    return [(keys[..., keep, :], values[..., keep, :]) for keys, values in cache]


def runner(embedder, inputs):
    """The function `run` of a real model, for the one row of `inputs`, whose pictures it sees in
    the call that has no cache yet."""

    def run(tokens, positions, past):
        seen = seen_first(inputs, len(tokens)) if past is None else {}
        h, cache = call(embedder, tokens[None], positions[..., None, :], past or [], seen)
        return h[0], cache

    return run


def seen_first(inputs, n) -> dict:
    """What a first call of n tokens of each row is given beside their ids: pictures, say."""
    ids, seen = inputs["input_ids"], {}
    for name, x in inputs.items():
        if name not in ("input_ids", "attention_mask", "roles"):
            per_token = x.shape == ids.shape
            seen[name] = x[:, :n] if per_token else x
    return seen


def call(embedder, ids, positions, past, seen) -> tuple:
    """Rows of one length, ids (B, n) and positions (..., B, n), behind a cache `past` that stays
    what it is. -> (hidden states (B, n, D), the cache with these tokens behind it)."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    decoder = embedder.mllm.model
    # The keyword has changed: `past_key_values` up to transformers 5.23, `cache` from then on.
    accepts = inspect.signature(decoder.forward).parameters
    keyword = "cache" if "cache" in accepts else "past_key_values"
    with embedder.autocast():
        out = decoder(
            input_ids=ids, position_ids=positions, use_cache=True, **{keyword: cache}, **seen
        )
    return out.last_hidden_state, [(x.keys, x.values) for x in cache.layers]


if __name__ == "__main__":
    sys.exit("tools/mask_as_cache.py has no commands: tools/explain_numbers.py imports it")
