"""Exercise 5: GradCache's gradient is that of the whole batch, one chunk's graph at a time."""

import pytest
import torch
import torch.nn.functional as F
from checks import close, expect
from torch import nn

pytestmark = pytest.mark.ex5
ONE_EACH = "one forward of each chunk, in order, and no other: an extra one uses up random numbers"
CHUNKINGS = ([[i] for i in range(8)], [[3, 0, 6], [5], [1, 2, 7, 4]], [list(range(8))])


def small_model(dropout):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Dropout(dropout), nn.Tanh(), nn.Linear(7, 3)).double()


def rows():
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(z):
    """InfoNCE of 4 queries and 4 targets."""
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z[:4] @ z[4:].T / 0.2, torch.arange(4))


def whole(net, chunks):
    """The same chunks in the same order, so the same random numbers, but all in one graph."""
    parts = {}
    for chunk in chunks:
        parts |= dict(zip(chunk, net(rows()[chunk]), strict=True))
    loss = loss_of(torch.stack([parts[i] for i in range(8)]))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in net.parameters()])


def check(gradcache, dropout):
    for chunks in CHUNKINGS:
        net, hint = small_model(dropout), f"chunks {chunks}"
        hint += f", dropout {dropout} ({ONE_EACH})" * (dropout > 0)
        torch.manual_seed(5)
        want = whole(net, chunks)
        net.zero_grad()
        torch.manual_seed(5)
        loss = gradcache(net, rows(), chunks, loss_of)
        graph = getattr(loss, "requires_grad", False)
        expect(not graph, "a loss with a graph", "one without", "loss.detach() or loss.item()")
        close(float(loss), want[0], f"{hint}: the loss of all rows, in their order", 1e-12)
        got = [p.grad for p in net.parameters()]
        expect(all(g is not None for g in got), "no .grad", "a gradient", hint)
        close(torch.cat([g.flatten() for g in got]), want[1], f"{hint}: gradient", 1e-10)


def test_the_gradient_is_that_of_the_whole_batch(student):
    """For chunks of one row, of some rows in any order, of all rows; float64, to 1e-10."""
    check(student.gradcache, 0.0)


def test_dropout_falls_alike_in_both_passes(student):
    """With dropout 0.5: the second pass has the random numbers of the first."""
    check(student.gradcache, 0.5)


def test_one_graph_is_alive_at_a_time(student):
    """Otherwise the memory is that of the whole batch, and nothing is gained."""
    net, alive, peak, sizes, passes = small_model(0.0), [0], [0], [], []

    def embed(x):
        z = net(x)
        sizes.append(len(x))
        passes.append(z.requires_grad)
        if z.requires_grad:
            alive[0] += 1
            peak[0] = max(peak[0], alive[0])

            def done(_):
                alive[0] -= 1

            z.register_hook(done)
        return z

    student.gradcache(embed, rows(), CHUNKINGS[1], loss_of)
    expect(max(sizes) <= 4, sizes, "at most 4 rows at a time", "embed a chunk, not the batch")
    expect(peak[0] == 1, f"{peak[0]} graphs at once", 1, "backward before the next chunk")
    with_graph = sum(n for n, graph in zip(sizes, passes, strict=True) if graph)
    expect(with_graph == 8, f"{with_graph} rows with a graph", 8, "each row once")


def test_the_gradient_is_added_and_the_generator_goes_on(student):
    """As autograd does, to what stands in .grad; the next random number is the one after pass 1."""
    net, after = small_model(0.5), []
    torch.manual_seed(5)
    want = whole(net, CHUNKINGS[1])[1]
    after.append(torch.rand(1).item())
    net.zero_grad()
    for _ in range(2):
        torch.manual_seed(5)
        student.gradcache(net, rows(), CHUNKINGS[1], loss_of)
        after.append(torch.rand(1).item())
    got = torch.cat([p.grad.flatten() for p in net.parameters()])
    close(got, 2 * want, f"two steps without zero_grad: the sum; {ONE_EACH}", 1e-10)
    expect(len(set(after)) == 1, after, "three times the same", "torch.random.fork_rng")
