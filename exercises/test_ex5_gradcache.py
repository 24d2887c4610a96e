"""Exercise 5: GradCache's gradient is that of the whole batch, one chunk's graph at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from checks import close, equal, expect
from torch import nn

pytestmark = pytest.mark.ex5
ONE_EACH = "one forward of each chunk, in order, and no other: an extra one uses up random numbers"
CHUNKINGS = ([[i] for i in range(8)], [[3, 0, 6], [5], [1, 2, 7, 4]], [list(range(8))])
ROWS = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Model:
    """A small network that embeds rows by their numbers."""

    def __init__(self, dropout):
        torch.manual_seed(0)
        layers = (nn.Linear(5, 7), nn.Dropout(dropout), nn.Tanh(), nn.Linear(7, 3))
        self.net = nn.Sequential(*layers).double()

    def embed(self, chunk):
        return self.net(ROWS[chunk])  # (len(chunk), 3)

    def gradients(self):
        return [p.grad for p in self.net.parameters()]

    def gradient(self):
        return torch.cat([g.flatten() for g in self.gradients()])


def loss_of(z):
    """InfoNCE of 4 queries and 4 targets."""
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z[:4] @ z[4:].T / 0.2, torch.arange(4))


def one_graph(model, chunks):
    """The same chunks in the same order, so the same random numbers, but all in one graph.
    -> (loss, gradient), and the model's .grad is empty again."""
    parts = {}
    for chunk in chunks:
        parts.update(zip(chunk, model.embed(chunk), strict=True))
    loss = loss_of(torch.stack([parts[i] for i in range(8)]))
    loss.backward()
    gradient = model.gradient()
    model.net.zero_grad()
    return loss.item(), gradient


def run(two_passes, embed, chunks):
    """The student's loss, of a copy of the chunks: the tests after this one need them whole."""
    given = copy.deepcopy(chunks)
    loss = two_passes(embed, given, loss_of)
    equal(given, chunks, "the lists are not yours to empty or to sort")
    return loss


def check(two_passes, dropout):
    for chunks in CHUNKINGS:
        model, hint = Model(dropout), f"chunks {chunks}"
        if dropout:
            hint += f", dropout {dropout} ({ONE_EACH})"
        torch.manual_seed(5)
        want = one_graph(model, chunks)
        torch.manual_seed(5)
        loss = run(two_passes, model.embed, chunks)
        graph = getattr(loss, "requires_grad", False)
        expect(not graph, "a loss with a graph", "one without", "loss.detach() or loss.item()")
        close(float(loss), want[0], f"{hint}: the loss of all rows, in their order", 1e-12)
        complete = all(g is not None for g in model.gradients())
        expect(complete, "no .grad", "a gradient", hint)
        close(model.gradient(), want[1], f"{hint}: gradient", 1e-10)


def test_the_gradient_is_that_of_the_whole_batch(student):
    """For chunks of one row, of some rows in any order, of all rows; float64, to 1e-10."""
    check(student.two_passes, 0.0)


def test_dropout_falls_alike_in_both_passes(student):
    """With dropout 0.5: the second pass has the random numbers of the first."""
    check(student.two_passes, 0.5)


def test_one_graph_is_alive_at_a_time(student):
    """Otherwise the memory is that of the whole batch, and nothing is gained."""
    model, sizes, alive = Model(0.0), [], [0]
    with_graph, peak = [0], [0]

    def embed(chunk):
        z = model.embed(chunk)
        sizes.append(len(chunk))
        if z.requires_grad:
            with_graph[0] += len(chunk)
            alive[0] += 1
            peak[0] = max(peak[0], alive[0])
            z.register_hook(backward_begins)
        return z

    def backward_begins(_):
        alive[0] -= 1

    run(student.two_passes, embed, CHUNKINGS[1])
    expect(max(sizes) <= 4, sizes, "at most 4 rows at a time", "embed a chunk, not the batch")
    hint = "each row once: pass 1 under no_grad (detach comes after the graph), pass 2 with a graph"
    expect(with_graph[0] == 8, f"{with_graph[0]} rows with a graph", 8, hint)
    expect(peak[0] == 1, f"{peak[0]} graphs at once", 1, "backward before the next chunk")


def test_the_gradient_is_added_and_the_generator_goes_on(student):
    """As autograd does, to what stands in .grad; the next random number is the one after pass 1."""
    model, after = Model(0.5), []
    torch.manual_seed(5)
    want = one_graph(model, CHUNKINGS[1])[1]
    after.append(torch.rand(1).item())
    for _ in range(2):
        torch.manual_seed(5)
        run(student.two_passes, model.embed, CHUNKINGS[1])
        after.append(torch.rand(1).item())
    hint = f"two steps without zero_grad: the sum; {ONE_EACH}"
    close(model.gradient(), 2 * want, hint, 1e-10)
    expect(len(set(after)) == 1, after, "three times the same", "torch.random.fork_rng")
