"""InfoNCE, Eq. (1) of VLM2Vec, with several positives, hard negatives and masked duplicates."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from checks import close, equal, expect
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive import info_nce, paper_info_nce
from plumbing import blocks


def oracle(q, t, temperature, labels=None, keys=None):
    """Eq. (1), one score at a time, in float64. -> (mean nats, share of hits)."""
    labels = [[i] for i in range(len(q))] if labels is None else labels.tolist()
    labels = [x if isinstance(x, list) else [x] for x in labels]
    keys = [{j} for j in range(len(t))] if keys is None else keys.view(len(t), -1).tolist()
    keys = [set(x) for x in keys]
    scores = (q.double() @ t.double().T / temperature).tolist()
    nats, hits = 0.0, 0
    for i, mine in enumerate(labels):
        mine = [p for p in mine if p >= 0]
        own = set().union(*(keys[p] for p in mine))
        others = [scores[i][j] for j in range(len(t)) if not keys[j] & own]
        each = []
        for p in mine:
            top = max([scores[i][p], *others])
            total = sum(math.exp(s - top) for s in [scores[i][p], *others])
            each.append(math.log(total) + top - scores[i][p])
        nats += sum(each) / len(each)
        hits += max(scores[i][p] for p in mine) > max(others, default=-math.inf)
    return nats / len(q), hits / len(q)


def embeddings(n, m, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(k, 8, generator=g, dtype=dtype), dim=-1) for k in (n, m)]


def cases():
    """name -> (q, t, labels, keys)."""
    q, t = embeddings(6, 6)
    yield "one positive each", q, t, None, None
    yield "duplicates", q, t, None, torch.tensor([3, 1, 3, 2, 1, 9])
    q, t = embeddings(5, 13, seed=1)
    yield "hard negatives", q, t, torch.tensor([0, 2, 5, 7, 12]), None
    labels = torch.tensor([[0, 1, -1], [2, -1, -1], [3, 4, 5], [8, 9, -1], [12, -1, -1]])
    yield "several positives", q, t, labels, None
    keys = torch.tensor([7, 8, 9, 7, 5, 4, 3, 8, 9, 2, 2**60, 2**60 + 1, 2**60])
    yield "several positives, duplicates, hard negatives", q, t, labels, keys
    owners = torch.tensor([20, 20, 21, 20, 20, 20, 30, 31, 21, 21, 32, 33, 22])
    yield "equal queries, too", q, t, labels, torch.stack([keys, owners], 1)


def check_loop(loss_of):
    for name, q, t, labels, keys in cases():
        for temperature in (1.0, 0.05):
            loss, hits = loss_of(q, t, temperature, labels, keys)
            want = oracle(q, t, temperature, labels, keys)
            close(loss, want[0], f"{name}, temperature {temperature}: Eq. (1)", rel=1e-10)
            close(float(hits), want[1], f"{name}: share of hits", rel=1e-6)


def test_the_loss_equals_a_loop_over_scores():
    """info_nce equals Eq. (1) in float64: one and several positives (mean over a query's), hard
    negatives, columns with the key of a positive left out of the denominator."""
    check_loop(info_nce)


def forgets_the_mask(q, t, temperature, labels=None, keys=None):
    return info_nce(q, t, temperature, labels, None)


def forgets_the_temperature(q, t, temperature, labels=None, keys=None):
    return info_nce(q, t, 1.0, labels, keys)


def wrong_offset(q, t, temperature, labels=None, keys=None):
    """Each positive one column too far to the right."""
    labels = torch.arange(len(q)) if labels is None else labels
    shifted = ((labels + 1) % len(t)).where(labels >= 0, -1)
    return info_nce(q, t, temperature, shifted, keys)


def drops_hard_negatives(q, t, temperature, labels=None, keys=None):
    if labels is None:
        return info_nce(q, t, temperature, labels, keys)
    used = sorted({int(p) for p in labels.flatten() if p >= 0})
    place = torch.tensor([used.index(p) if p in used else -1 for p in range(len(t))])
    labels = torch.where(labels >= 0, place[labels.clamp(min=0)], -1)
    return info_nce(q, t[used], temperature, labels, None if keys is None else keys[used])


def positives_repel(q, t, temperature, labels=None, keys=None):
    """Each other positive of the query stands in the denominator."""
    labels = torch.arange(len(q)) if labels is None else labels
    labels = labels[:, None] if labels.ndim == 1 else labels
    keys = torch.arange(len(t)) if keys is None else keys
    total, hits = 0.0, 0.0
    for i, mine in enumerate(labels.tolist()):
        each = [info_nce(q[i : i + 1], t, temperature, torch.tensor([p]), keys)
                for p in mine if p >= 0]  # fmt: skip
        total = total + sum(x[0] for x in each) / len(each)
        hits = hits + float(sum(x[1] for x in each) > 0)
    return total / len(q), hits / len(q)


def sums_over_queries(q, t, temperature, labels=None, keys=None):
    loss, hits = info_nce(q, t, temperature, labels, keys)
    return loss * len(q), hits


@pytest.mark.parametrize(
    "wrong",
    [forgets_the_mask, forgets_the_temperature, wrong_offset, drops_hard_negatives]
    + [positives_repel, sums_over_queries],
)
def test_the_loop_check_fails_for_a_wrong_loss(wrong):
    """Negative control: six typical mistakes are found."""
    with pytest.raises(AssertionError):
        check_loop(wrong)


def test_equal_embeddings_give_the_log_of_the_number_of_columns():
    """No information: loss ln M, M the columns that the loss sees, and no hit, for a tie is
    none."""
    z = F.normalize(torch.ones(12, 4), dim=-1)
    loss, hits = info_nce(z[:8], z[:8], 0.02)
    close(loss, math.log(8), "ln N", rel=1e-6)
    close(info_nce(z[:8], z, 0.02)[0], math.log(12), "hard negatives count", rel=1e-6)
    equal(float(hits), 0.0, "a collapsed model has no hit")


def test_perfect_embeddings_give_zero():
    """Orthogonal targets, each query on its own: loss 0 and all hits at a low temperature."""
    z = torch.eye(6)
    loss, hits = info_nce(z, z, 0.02)
    expect(loss < 1e-6, loss, 0, "-ln(1 / (1 + 5 e^-50))")
    equal(float(hits), 1.0, "each positive beats all")


def run(q, t, *args, **kwargs):
    """-> (loss, hits, gradient of q and t)."""
    q, t = (x.clone().requires_grad_() for x in (q, t))
    loss, hits = info_nce(q, t, *args, **kwargs)
    loss.backward()
    return loss.detach(), float(hits), torch.cat([q.grad, t.grad])


def test_the_block_size_changes_neither_value_nor_gradient(monkeypatch):
    """Row blocks are a matter of memory only: 1, 2, 4 (uneven last) rows and all of them agree; one
    row is the least, also where it has more columns than a block may have scores."""
    for name, q, t, labels, keys in cases():
        monkeypatch.undo()
        want = run(q, t, 0.05, labels, keys)
        for block in (0, 1, 2, 4):
            monkeypatch.setattr(blocks, "SCORES", block * len(t))
            got = run(q, t, 0.05, labels, keys)
            for x, y, part in zip(got, want, ("loss", "hits", "gradient"), strict=True):
                close(x, y, f"{name}, block {block}: {part}", rel=1e-12)


def test_the_gradient_equals_that_of_the_plain_loss(monkeypatch):
    """Blocks of three rows give what autograd gives on the dense cross-entropy."""
    monkeypatch.setattr(blocks, "SCORES", 3 * 9)
    q, t = (x.requires_grad_() for x in embeddings(7, 9))
    F.cross_entropy(q @ t.T / 0.1, torch.arange(7)).backward()
    want = torch.cat([q.grad, t.grad])
    hint = "d loss / d (q, t); rows are of unit length, and not normalised once more"
    close(run(q.detach(), t.detach(), 0.1)[2], want, hint, rel=1e-10)


def check_paper(loss_of):
    """Value and gradient of `info_nce` where query i's own column is i, and it has no other."""
    for n, temperature in ((1, 0.05), (6, 1.0), (1000, 0.05)):  # of two row blocks, too
        general = embeddings(n, n, seed=n)
        papers = [x.clone().requires_grad_() for x in general]
        want, _, grad = run(*general, temperature)
        loss = loss_of(*papers, temperature)
        loss.backward()
        hint = f"N = {n}, temperature {temperature}: the general form, one column each"
        close(loss, want, f"{hint}, loss", rel=1e-10)
        close(torch.cat([x.grad for x in papers]), grad, f"{hint}, gradient", rel=1e-10)


def test_the_papers_three_lines_are_the_general_form_where_each_query_has_its_own_column():
    """paper_info_nce (Eq. 1 as it is written) and info_nce: the same loss, the same gradient."""
    check_paper(paper_info_nce)


def both_directions(q, t, temperature):
    """CLIP's loss: targets look for their queries, too."""
    return (paper_info_nce(q, t, temperature) + paper_info_nce(t, q, temperature)) / 2


def only_the_queries_learn(q, t, temperature):
    """The right loss; the targets get no gradient."""
    return paper_info_nce(q, t.detach() + 0 * t, temperature)


def test_the_check_against_the_general_form_fails_for_another_loss():
    """Negative control: another value, and the same value with another gradient."""
    for wrong, part in ((both_directions, ", loss"), (only_the_queries_learn, ", gradient")):
        with pytest.raises(AssertionError, match=part):
            check_paper(wrong)


def test_the_order_of_pairs_and_of_columns_does_not_matter():
    """Permuted queries with their labels, and permuted columns with their keys: the same loss, and
    the gradient permuted alike."""
    for name, q, t, labels, keys in cases():
        labels = torch.arange(len(q)) if labels is None else labels
        keys = torch.arange(len(t)) if keys is None else keys
        want = run(q, t, 0.05, labels, keys)
        rows, columns = torch.randperm(len(q)), torch.randperm(len(t))
        moved = torch.where(labels >= 0, columns.argsort()[labels.clamp(min=0)], -1)
        got = run(q[rows], t[columns], 0.05, moved[rows], keys[columns])
        close(got[0], want[0], name, rel=1e-12)
        equal(got[1], want[1], name)
        permuted = torch.cat([want[2][: len(q)][rows], want[2][len(q) :][columns]])
        close(got[2], permuted, name + ": gradient", rel=1e-10)


def test_a_low_temperature_does_not_overflow():
    """e^(1/0.01) is more than float32 holds; loss and gradient stay finite and right, in float32,
    for embeddings that are right and for such that are exactly wrong."""
    for sign in (1, -1):
        q, t = embeddings(6, 6, torch.float32)
        q = F.normalize(q + 5 * sign * t, dim=-1)
        loss, _, grad = run(q, t, 0.01)
        close(loss, oracle(q, t, 0.01)[0], "log-sum-exp, not exp and log", rel=1e-4)
        expect(
            torch.isfinite(grad).all(), "NaN or inf in the gradient", "finite", "temperature 0.01"
        )


def test_a_query_without_negatives_costs_nothing():
    """All columns have the key of the positive: loss 0, gradient 0, no NaN, in both dtypes; queries
    that have negatives are as they were."""
    for dtype in (torch.float32, torch.float64):
        q, t = embeddings(4, 4, dtype)
        loss, _, grad = run(q, t, 0.01, None, torch.zeros(4, dtype=torch.long))
        equal(loss.item(), 0.0, "nothing to tell apart")
        equal(grad.abs().max().item(), 0.0, "no NaN, no pull")
        loss, _, grad = run(q[:1], t[:1], 0.01)
        equal((loss.item(), grad.abs().max().item()), (0.0, 0.0), "a batch of one pair")
    q, t = embeddings(3, 3)
    labels, keys = torch.tensor([[0, 1], [2, -1], [0, -1]]), torch.tensor([5, 6, 5])
    close(info_nce(q, t, 0.05, labels, keys)[0], oracle(q, t, 0.05, labels, keys)[0], "mixed")


def test_a_hit_is_one_of_the_querys_own_columns():
    """A column of equal content is neither a negative nor a hit, though dropout has moved it; a
    place that is empty in the labels stands for no column; a tie is no hit."""
    q = torch.tensor([[1.0, 0.0]])
    keys, labels = torch.tensor([5, 5, 7]), torch.tensor([[1, -1]])
    for scores, hits in (((0.9, 0.5, 0.7), 0), ((0.9, 0.5, 0.4), 1), ((0.1, 0.5, 0.5), 0)):
        t = torch.tensor([[x, 0.0] for x in scores])
        equal(info_nce(q, t, 0.1, labels, keys)[1].item(), hits, f"cosines {scores}")
    labels = torch.tensor([[1, 2]])
    t = torch.tensor([[0.6, 0.0], [0.1, 0.0], [0.8, 0.0]])
    equal(info_nce(q, t, 0.1, labels)[1].item(), 1, "the better one of two counts")


class Peak(TorchDispatchMode):
    """The most numbers that live tensors made inside held at any time, and the largest of them."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.known:
                store = x.untyped_storage()
                size = store.nbytes() // 4
                self.known.add(store)
                weakref.finalize(store, self.freed, size)
                self.now += size
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        return out

    def freed(self, size):
        self.now -= size


N, ROWS = 1536, 64  # pairs, rows of a block


def check_memory(loss_of, N=N, block=ROWS):
    q, t = (x.requires_grad_() for x in embeddings(N, N, torch.float32))
    with Peak() as memory:
        loss_of(q, t, 0.05)[0].backward()
    held = (
        f"peak {memory.peak / N / block:.1f}, largest {memory.largest / N / block:.1f} x N x block"
    )
    expect(
        memory.largest <= 1.01 * N * block, held, "largest <= 1 x N x block", "a block of scores"
    )
    expect(memory.peak <= 12 * N * block, held, "peak <= 12 x N x block", "blocks free their graph")
    expect(memory.peak >= N * block, held, "at least one block", "is the meter broken?")


def test_memory_grows_with_n_times_block(monkeypatch):
    """No N x N scores, neither in the forward nor in the backward pass: the peak of live tensors is
    a few row blocks, here 1/2 of N x N at most."""
    monkeypatch.setattr(blocks, "SCORES", N * ROWS)
    check_memory(info_nce)


def test_without_a_block_size_memory_is_bounded_too():
    """As training calls it: 3 MiB of scores at a time, whatever the batch."""
    q, t = (x.requires_grad_() for x in embeddings(1000, 4000, torch.float32))
    with Peak() as memory:
        info_nce(q, t, 0.05)
    expect(memory.largest <= 800_000, f"{memory.largest:,}", "<= 800,000 numbers", "block = ...")


def test_the_memory_check_fails_for_dense_scores_and_for_kept_blocks():
    """Negative control: one N x N matrix; row blocks whose graph is kept for the backward pass."""

    def dense(q, t, temperature):
        return (F.cross_entropy(q @ t.T / temperature, torch.arange(len(q))),)

    def kept(q, t, temperature):
        labels = torch.arange(len(q)).split(ROWS)
        parts = [F.cross_entropy(x @ t.T / temperature, y, reduction="sum")
                 for x, y in zip(q.split(ROWS), labels, strict=True)]  # fmt: skip
        return (torch.stack(parts).sum() / len(q),)

    for wrong, hint in ((dense, "a block of scores"), (kept, "blocks free their graph")):
        with pytest.raises(AssertionError, match=hint):
            check_memory(wrong)
