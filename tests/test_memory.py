"""What fits into memory: chunks of rows within a token budget, and a budget that is halved. (The
gradient of a step that ran out of memory: test_gradcache.py.)"""

import pytest
import torch
from checks import equal, expect

from plumbing.errors import InputError
from plumbing.memory import answering, meeting, token_chunks, until_it_fits


def check_chunks(chunks_of):
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 40):
        for budget in (1, 50, 120, 10**6):
            lengths = torch.randint(1, 100, (n,), generator=generator).tolist()
            chunks = chunks_of(lengths, budget)
            covered = sorted(i for c in chunks for i in c)
            equal(covered, list(range(n)), f"n={n}, budget={budget}: each index once")
            for c in chunks:
                padded = len(c) * max(lengths[i] for i in c)
                expect(len(c) == 1 or padded <= budget, padded, f"<= {budget}", "padded tokens")
            flat = [[lengths[i] for i in c] for c in chunks]
            for a, b in zip(flat, flat[1:], strict=False):
                expect(max(a) <= min(b), (a, b), "shortest rows first", "sorted by length")
                fits = (len(b) + 1) * max(b) <= budget
                expect(not fits, (a, b), "full chunks", "one more row would fit")


def test_chunks_cover_every_row_once_within_the_budget():
    """token_chunks: each index once, at most `budget` padded tokens (or one longer row alone), from
    the shortest rows to the longest, and no chunk that its shorter neighbour's row would fit in."""
    check_chunks(token_chunks)
    equal(token_chunks([], 100), [], "no rows, no chunks")


def real_tokens(lengths, budget):
    chunks, size = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        size += lengths[i]
        if not chunks or size > budget:
            chunks, size = [*chunks, []], lengths[i]
        chunks[-1].append(i)
    return chunks


def as_they_come(lengths, budget):
    return [[i] for i in range(len(lengths))]


def loses_one(lengths, budget):
    return token_chunks(lengths[:-1], budget)


def singles(lengths, budget):
    return [[i] for i in sorted(range(len(lengths)), key=lambda i: lengths[i])]


@pytest.mark.parametrize("wrong", [real_tokens, as_they_come, loses_one, singles])
def test_the_chunk_check_fails_for_wrong_chunks(wrong):
    """Negative control: real instead of padded tokens, unsorted rows, a row lost, one row a
    chunk."""
    with pytest.raises(AssertionError):
        check_chunks(wrong)


def no_memory(*_):
    raise torch.OutOfMemoryError("planted")


def test_a_budget_that_does_not_fit_is_halved_until_it_does(capsys):
    """1600, 800, 400: each time what was begun is thrown away, and a line says so; below the
    longest row no budget helps, and the error says what does."""
    tried, starts = [], []

    def attempt(chunk_tokens):
        tried.append(chunk_tokens)
        if chunk_tokens > 500:
            no_memory()

    equal(until_it_fits(attempt, 1600, 100, lambda: starts.append(1)), 400, "what fitted")
    equal((tried, len(starts)), ([1600, 800, 400], 2), "(budgets, fresh starts)")
    said = capsys.readouterr().out
    for budget in (1600, 800):
        expect(f"--chunk-tokens {budget} is halved" in said, said, budget, "until_it_fits")
    with pytest.raises(InputError, match="out of memory at --chunk-tokens 50: try half of it"):
        until_it_fits(no_memory, 400, 60, starts.clear)


class NoBackward(torch.autograd.Function):
    """x as it is; its backward pass runs out of memory."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        no_memory()


@pytest.mark.parametrize("loss_of", [no_memory, lambda z: NoBackward.apply(z).sum()])
def test_a_loss_that_does_not_fit_is_an_error_at_once(loss_of):
    """Smaller chunks would not make it smaller, and the ranks are in it together: in the loss and
    in its backward pass."""
    z = torch.ones(2, requires_grad=True)
    with pytest.raises(InputError, match="in the loss, where smaller chunks do not help: planted"):
        meeting(loss_of)(z).backward()


def test_the_meeting_changes_neither_loss_nor_gradient():
    """Bit for bit; also where the loss is scaled, by a power of two."""
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = z.square().logsumexp((0, 1))
    (2 * loss).backward()
    want, z.grad = z.grad, None
    again = meeting(lambda z: z.square().logsumexp((0, 1)))(z)
    (2 * again).backward()
    equal(again.detach(), loss.detach(), "the loss")
    equal(z.grad, want, "its gradient")


@pytest.mark.parametrize("where", ["device", "host"])
def test_what_a_tower_said_is_given_back_once_and_then_forgotten(where):
    """Two pictures of one chunk, told apart; after the second pass nothing is kept, and the tower
    is itself again. A chunk that comes with a graph only is computed."""
    tower = torch.nn.Linear(2, 3)
    one, two = torch.randn(2, 1, 2)
    outputs = {}
    with torch.no_grad(), answering(tower, outputs, 0, where):
        want = [tower(one), tower(two)]
    expect(not torch.equal(*want), want, "two outputs", "the test would be too easy")
    with answering(tower, outputs, 0, where):
        got = [tower(one), tower(two)]
    for ours, theirs in zip(got, want, strict=True):
        equal(ours, theirs, "what it said in the first pass, in its order")
        expect(not ours.requires_grad, "a graph", "none", "recalled, and not computed")
    equal(outputs, {}, "nothing waits any longer")
    equal("forward" in vars(tower), False, "memory.answering: the tower's own forward")
    with answering(tower, outputs, 7, where):
        expect(tower(one).requires_grad, "no graph", "a graph", "a chunk that comes once")
