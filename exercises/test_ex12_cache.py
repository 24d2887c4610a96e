"""Exercise 12: the mask as a cache, against the mask written as loops, and in the toy MLLM."""

import pytest
import test_cache
import test_mask
import torch
from checks import close, expect
from torch import nn

from data import ANSWER, COMPRESS, CONTENT, HEAD, QUESTION

pytestmark = pytest.mark.ex12

D = 8
ROWS = (  # the roles of a row: with and without a head, one token of code and three, no turn
    [HEAD] * 2 + [CONTENT] * 4 + [COMPRESS] * 3 + [QUESTION] * 2 + [ANSWER] * 2,
    [CONTENT] * 3 + [COMPRESS] + [QUESTION, ANSWER, ANSWER] * 2,
    [HEAD] + [CONTENT] * 2 + [COMPRESS] * 2,
)


class Tiny(nn.Module):
    """A transformer of two layers in float64, without norms: a row of tokens at a time."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def matrix(rows):
            weights = torch.randn(rows, D, generator=generator, dtype=torch.float64)
            return nn.Parameter(0.6 * weights)

        self.words, self.places = matrix(20), matrix(40)
        self.layers = nn.ParameterList([matrix(3 * D) for _ in range(2)])

    def forward(self, tokens, positions, cache=None, mask=None):
        """run of the exercise; mask (L, L): in the place of the causal one."""
        h, new = self.words[tokens] + self.places[positions], []
        for layer, weights in enumerate(self.layers):
            q, keys, values = (h @ weights.T).chunk(3, dim=-1)  # (n, D) each
            if cache is not None:
                keys = torch.cat([cache[layer][0], keys])
                values = torch.cat([cache[layer][1], values])
            new.append((keys, values))
            if mask is None:
                n, total = len(tokens), len(keys)
                allowed = torch.ones(n, total, dtype=torch.bool).tril(total - n)
            else:
                allowed = mask
            scores = (q @ keys.T / D**0.5).masked_fill(~allowed, -torch.inf)
            h = (h + scores.softmax(-1) @ values).tanh()
        return h, new


def both(student, roles):
    """-> (the student's hidden states, those under the mask), and the model of both."""
    tiny, roles = Tiny(), torch.tensor(roles)
    tokens = torch.arange(len(roles)) * 7 % 20
    positions = torch.arange(len(roles)) + 5
    got = student.hidden_through_cache(tiny, tokens, positions, roles)
    want, _ = tiny(tokens, positions, mask=test_mask.oracle(roles[None])[0, 0])
    return got, want, tiny


def gradient(tiny, h):
    """Of a loss that looks at every hidden state; all parameters in one vector."""
    weights = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)
    (h * weights).sum().backward()
    whole = torch.cat([p.grad.flatten() for p in tiny.parameters()])
    tiny.zero_grad()
    return whole


@pytest.mark.parametrize("roles", ROWS, ids=("two heads", "no head", "no turn"))
def test_hidden_states_are_those_under_the_mask(student, roles):
    """Of all tokens, in their order."""
    got, want, _ = both(student, roles)
    hint = "what stays in the cache? do positions go on from the whole row?"
    close(got, want, hint, 1e-10)


def test_the_gradient_is_that_under_the_mask(student):
    """What C learns from the answers comes back through its keys and values."""
    got, want, tiny = both(student, ROWS[0])
    got, want = gradient(tiny, got), gradient(tiny, want)
    close(got, want, "a cache that is cut from its graph teaches C nothing", 1e-10)


def test_every_token_runs_once_and_the_picture_is_gone(student):
    """Two calls; the second one's cache holds head and code, in every layer."""
    tiny, calls = Tiny(), []
    roles = torch.tensor(ROWS[0])

    def run(tokens, positions, cache):
        kept = [] if cache is None else [len(keys) for keys, _ in cache]
        calls.append((len(tokens), kept))
        return tiny(tokens, positions, cache)

    tokens = torch.arange(len(roles))
    student.hidden_through_cache(run, tokens, tokens, roles)
    want = [(9, []), (4, [5, 5])]
    expect(calls == want, calls, want, "(tokens of a call, keys of each layer before it)")


def test_in_the_toy_model(student, shared):
    """Hidden states and gradients of an MLLM's row with a picture and two turns, to 1e-5."""

    def way(embedder, inputs):
        return test_cache.by_cache(embedder, inputs, student.hidden_through_cache)

    test_cache.check_hidden(shared, way)
    test_cache.check_gradients(shared, way)
    shared.zero_grad(set_to_none=True)
