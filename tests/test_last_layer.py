"""The last layer's MLP, only for the tokens that are read (each family: test_families.py)."""

import threading
from types import SimpleNamespace

import pytest
import torch
from checks import close, equal, expect, toy
from test_pooling import padded
from torch import nn

import model
from data import Item
from plumbing import last_layer
from plumbing.families import checkpoint_activations
from plumbing.kernels import in_large_calls, last_mlp
from plumbing.last_layer import READ, OnlyAt, WhereRead, last_tokens

ITEMS = [Item("red"), Item("a large blue square"), Item("two green circles")]


@pytest.fixture
def everywhere(monkeypatch):
    """A function that has the MLP meet all tokens from now on."""
    return lambda: monkeypatch.setattr(last_layer, "OnlyAt", lambda tokens: OnlyAt(None))


@pytest.mark.parametrize("n", [1, 2, 4, 9])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_last_tokens_are_each_rows_own(side, n):
    """Against a loop; a row that has fewer gives all that it has, and none of its padding."""
    _, mask = padded([4, 7, 2], 7, side)
    want = []
    for b, row in enumerate(mask.tolist()):
        real = [7 * b + i for i, keep in enumerate(row) if keep]
        want += real[max(len(real) - n, 0) :]
    equal(last_tokens(mask, n).tolist(), want, f"{side} padding, the last {n}")


@pytest.mark.parametrize(("K", "pooling", "prompt"), [(4, "mean", "chat"), (0, "last", "vlm2vec")])
def test_an_embedding_is_what_it_was(K, pooling, prompt, everywhere):
    """K tokens and the last one, which VLM2Vec reads where there is no code; with gradients."""
    embedder = model.load("toy-random", K, pooling, prompt, "cpu").double()
    results = []
    for change in (None, everywhere):
        if change:
            change()
        z = embedder(embedder.collate(ITEMS))
        embedder.zero_grad()
        (z * torch.arange(z.numel()).view_as(z)).sum().backward()
        gradients = [p.grad.flatten() for p in embedder.parameters() if p.grad is not None]
        results.append((z, torch.cat(gradients)))
    close(results[0][0], results[1][0], "embeddings", 1e-12)
    close(results[0][1], results[1][1], "gradients", 1e-10)


def test_hidden_states_by_themselves_are_whole():
    """`hidden`, which stage 1 asks for its answers, gives each token what the library does."""
    embedder = model.load("toy-random", 4, "mean", "chat", "cpu").eval()
    inputs = embedder.collate(ITEMS)
    embedder(inputs)  # after which nothing is left out any more
    h = embedder.hidden(inputs)  # (B, L, D)
    read = last_tokens(inputs["attention_mask"], 4)
    with OnlyAt(read):
        less = embedder.hidden(inputs)
    close(less.flatten(0, 1)[read], h.flatten(0, 1)[read], "what is read")
    differs = (h - less).abs().amax(-1).flatten() > 1e-3  # (B * L,)
    equal(differs.sum().item(), differs.numel() - len(read), "negative control: all others")


def test_what_is_read_ends_with_its_pass_and_is_its_threads_own():
    """After an error, inside of another pass, beside another thread."""
    outer, inner = torch.tensor([1]), torch.tensor([2])
    seen = []
    with OnlyAt(outer):
        with pytest.raises(ValueError, match="^oops$"), OnlyAt(inner):
            seen.append(READ.get() is inner)
            raise ValueError("oops")
        seen.append(READ.get() is outer)
        thread = threading.Thread(target=lambda: seen.append(READ.get() is None))
        thread.start()
        thread.join()
    seen.append(READ.get() is None)
    equal(seen, [True] * 4, "inner, outer, another thread's, after it")


def test_a_checkpointed_layer_runs_again_as_it_ran():
    """Twice, where a graph is kept for a second backward pass; that the pass which read it is over
    changes nothing."""
    embedder = model.load("toy-random", 4, "mean", "chat", "cpu").double().train()
    checkpoint_activations(embedder.mllm)
    met = []
    down = last_mlp(embedder.mllm).down_proj
    down.register_forward_pre_hook(lambda _, args: met.append(len(args[0])))
    z = embedder(embedder.collate(ITEMS))
    gradients = []
    for _ in range(2):
        embedder.zero_grad()
        z[:, 0].sum().backward(retain_graph=True)
        gradients.append(down.weight.grad.clone())
    equal(met, [12, 12, 12], "tokens of three rows, K = 4: forward, and again for each gradient")
    equal(torch.equal(*gradients), True, "the same gradient")
    expect(gradients[0].abs().max() > 0, "0", "> 0", "a gradient")


def test_only_the_last_mlp_is_one_of_these_once():
    mllm = toy().mllm
    in_large_calls(in_large_calls(mllm))  # twice is once
    layers = mllm.get_decoder().layers
    ours = [isinstance(layer.mlp, WhereRead) for layer in layers]
    equal(ours, [False] * (len(layers) - 1) + [True], "the last one alone")
    equal(type(layers[-1].mlp).__mro__.count(WhereRead), 1, "once")


def test_a_last_layer_without_such_an_mlp_stays():
    """By another name, a mixture of experts, or layers by another name."""

    class Experts(nn.Module):
        def forward(self, h):
            return h

    decoder = SimpleNamespace()
    mllm = SimpleNamespace(get_decoder=lambda: decoder)
    equal(last_mlp(mllm), None, "no layers by this name")
    for decoder.layers in ([], [nn.Linear(2, 2)]):
        equal(last_mlp(mllm), None, "no MLP by this name")
    experts, mllm = Experts(), toy().mllm
    mllm.get_decoder().layers[-1].mlp = experts
    in_large_calls(mllm)
    equal(type(experts), Experts, "is no MLP with a gate")
