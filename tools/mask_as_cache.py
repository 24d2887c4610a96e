"""CoMa's mask a second time, without a mask: as a cache from which the picture has been taken.

A row [head, picture, C] runs first and leaves its keys and values. Those of the picture are thrown
away, and questions and answers run behind what is left, with plain causal attention. They know the
picture through C alone, as `pretrain.compression_mask` has it: *the cache is the embedding*. No
line is shared with that function, so each is a proof of the other (tests/test_cache.py).
"""

import inspect

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
    decoder = embedder.mllm.model
    ours = ("input_ids", "attention_mask", "roles")

    def run(tokens, positions, past):
        extra, cache = {}, DynamicCache()
        for layer, (keys, values) in enumerate(past or []):
            cache.update(keys, values, layer)
        if past is None:
            for name, x in inputs.items():
                per_token = x.shape == inputs["input_ids"].shape
                if name not in ours:
                    extra[name] = x[:, : len(tokens)] if per_token else x
        with embedder.autocast():
            out = decoder(
                input_ids=tokens[None],
                position_ids=positions[..., None, :],
                use_cache=True,
                **{keyword(decoder): cache},
                **extra,
            )
        return out.last_hidden_state[0], [(x.keys, x.values) for x in cache.layers]

    return run


def keyword(decoder) -> str:
    """By which it takes its cache: `past_key_values` up to transformers 5.23, `cache` after."""
    accepts = inspect.signature(decoder.forward).parameters
    return "cache" if "cache" in accepts else "past_key_values"
