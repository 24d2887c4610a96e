"""Assertions whose messages say what came, what should have come, and where to look."""

import json

import torch


def expect(ok, got, want, hint):
    """Fails with got / want / hint unless `ok`."""
    assert ok, f"\n  got:  {got}\n  want: {want}\n  hint: {hint}"


def equal(got, want, hint):
    """Fails unless the two are equal."""
    same = torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want
    expect(same, got, want, hint)


def close(got, want, hint, rel=1e-5):
    """Fails unless the two differ by less than `rel` of what is wanted, in norm; NaN fails."""
    got, want = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (got, want))
    expect(got.shape == want.shape, f"shape {tuple(got.shape)}", tuple(want.shape), hint)
    gap = distance(got, want)
    brief = [f"{x.item():.8g}" if x.numel() == 1 else f"norm {x.norm():.8g}" for x in (got, want)]
    expect(gap <= rel, f"{brief[0]} (relative gap {gap:.2e})", f"{brief[1]} (<= {rel:.0e})", hint)


def distance(got, want):
    """Relative distance of two tensors; absolute where `want` is zero."""
    gap, size = (got - want).norm().item(), want.norm().item()
    return gap / size if size else gap


def change(file, **fields):
    """Sets fields of a JSON file; a field with dots is inside of others."""
    whole = json.loads(file.read_text()) if file.exists() else {}
    for key, value in fields.items():
        *above, last = key.split("__")
        inner = whole
        for part in above:
            inner = inner[part]
        inner[last] = value
    file.write_text(json.dumps(whole))


def shorten(embedder, layers=2, blocks=1):
    """The embedder with the first layers of its language model and of its vision tower alone: as
    deep as most tests need, and twice as fast. (An adapter of it would fit no saved model.)"""
    text = embedder.mllm.config.get_text_config()
    text.num_hidden_layers, text.layer_types = layers, text.layer_types[:layers]
    embedder.mllm.config.vision_config.depth = blocks
    del embedder.mllm.get_decoder().layers[layers:]
    del embedder.mllm.get_encoder(modality="image").blocks[blocks:]
    return embedder


def toy():
    """A new toy-random embedder, K = 4, with weights large enough that every token matters.

    The library's start (std 0.02) makes attention all but uniform, and mistakes small."""
    import families  # here: the checks alone should import fast, in fresh processes too

    import model

    embedder = model.load("toy-random", compress_tokens=4, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        families.redraw(embedder)
    return embedder.eval()
