"""What several ranks compute together is what one process computes, on ranks that are threads of
this one: collectives, both stages' losses and gradients, evaluation. (The same on processes, with
FSDP and out of memory: test_gradcache.py.)"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import ranks as examples
import torch
from checks import close, equal, expect, toy
from threads import on_ranks

import contrastive
import evaluate
import model
import pretrain
from data import ANSWER, COMPRESS, read_dialogues
from plumbing import ranks
from plumbing.errors import InputError

# --------------------------------------------------------------------------------- collectives


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_is_told_what_all_hold_in_their_order(monkeypatch, world):
    """Objects, sums of numbers and of tensors."""

    def work(rank):
        x = torch.full((2,), float(rank))
        sums = ranks.all_sum(rank + 1), ranks.all_sum(x).tolist()
        return ranks.rank(), ranks.world(), ranks.gather_objects(f"rank {rank}"), *sums

    got = on_ranks(monkeypatch, world, work)
    everyone = [f"rank {rank}" for rank in range(world)]
    numbers, whole = {2: (3, [1.0, 1.0]), 3: (6, [3.0, 3.0])}[world]
    for rank in range(world):
        equal(got[rank], (rank, world, everyone, numbers, whole), f"rank {rank}")


def test_rank_0_alone_speaks(monkeypatch, capsys):
    """Or each line would stand there as often as there are ranks."""
    on_ranks(monkeypatch, 2, lambda rank: ranks.say(f"rank {rank} says so"))
    equal(capsys.readouterr().out, "rank 0 says so\n", "ranks.say")


def test_rows_go_to_all_ranks_and_their_gradients_come_home(monkeypatch):
    """Of unequal numbers, one rank with none; what each rank's loss says to each row is summed."""
    counts = [2, 0, 3]
    rows = torch.randn(5, 4, dtype=torch.float64)
    weights = torch.randn(3, 5, 4, dtype=torch.float64)  # of each rank's loss

    def work(rank):
        mine = rows.split(counts)[rank].clone().requires_grad_()
        everyone = ranks.gather_rows(mine, counts)
        (everyone * weights[rank]).sum().backward()
        return everyone.detach(), mine.grad

    for rank, (everyone, grad) in enumerate(on_ranks(monkeypatch, 3, work)):
        equal(everyone, rows, f"rank {rank}: in the order of ranks")
        close(grad, weights.sum(0).split(counts)[rank], f"rank {rank}: home", 1e-12)


@pytest.mark.parametrize("bucket", [1, 5, 100])
def test_gradients_are_summed_and_one_that_a_rank_lacks_is_zero(monkeypatch, bucket):
    """Each number once, in the same buckets on all ranks; what is frozen has none."""

    def work(rank):
        parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 2, 4)]
        parameters[2].requires_grad = False
        for i, p in enumerate(parameters[:2]):
            if (rank, i) != (1, 0):
                p.grad = torch.full_like(p, 10.0**rank)
        ranks.sum_gradients(parameters, bucket)
        return [p.grad if p.grad is None else p.grad.tolist() for p in parameters]

    equal(on_ranks(monkeypatch, 2, work), [[[1.0] * 3, [11.0] * 2, None]] * 2, "both ranks")


# ------------------------------------------------------------------------------------- stage 2


def shares(batch, world) -> list:
    """A batch over ranks that get 1, 2, ... of its queries, the last one all others, and of its
    columns those of their queries."""
    B, parts, first = len(batch.labels), [], 0
    for rank in range(world):
        last = B if rank == world - 1 else first + rank + 1
        begin = int(batch.labels[first, 0])
        end = int(batch.labels[last, 0]) if last < B else len(batch.keys)
        labels = batch.labels[first:last]
        labels = (labels - begin).where(labels >= 0, -1)
        rows = batch.rows[first:last] + batch.rows[B + begin : B + end]
        parts.append(contrastive.Batch(rows, labels, batch.keys[begin:end]))
        first = last
    return parts


@pytest.mark.parametrize("world", [2, 3])
def test_the_loss_over_ranks_is_that_of_the_whole_batch(monkeypatch, shared, world):
    """Ranks with unequal numbers of queries and columns: their shares sum to the mean over all
    queries, and so do their gradients; hits and columns are of all."""
    whole = examples.batch_of(shared)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(len(whole.rows), 6, dtype=torch.float64, generator=generator)
    z = torch.nn.functional.normalize(z, dim=1).requires_grad_()
    want, (mean, top1, columns) = contrastive.loss_over_ranks(z, whole, 0.3)
    want.backward()
    parts = shares(whole, world)
    expect(len({len(x.keys) for x in parts}) == world, parts, "unequal columns", "too easy")
    place = {id(row): i for i, row in enumerate(whole.rows)}

    def work(rank):
        mine = [place[id(row)] for row in parts[rank].rows]
        own = z.detach()[mine].requires_grad_()
        share, seen = contrastive.loss_over_ranks(own, parts[rank], 0.3)
        share.backward()
        return share.item(), seen, mine, own.grad

    got = on_ranks(monkeypatch, world, work)
    close(sum(x[0] for x in got), want.item(), "the shares' sum", 1e-12)
    grad = torch.zeros_like(z)
    for _, (mean_seen, top1_seen, columns_seen), mine, own in got:
        close(mean_seen, mean, "the mean over all queries", 1e-12)
        close(top1_seen, top1, "share of hits", 1e-6)
        equal(columns_seen, columns, "targets and hard negatives of all ranks")
        grad[mine] += own
    expect(0 < top1 < 1, top1, "some hits", "too easy")
    close(grad, z.grad, "d loss / d z", 1e-12)


# ------------------------------------------------------------------------------------- stage 1


def dialogue(embedder, i, turns):
    d = read_dialogues()[i]
    return pretrain.Example(embedder.collate.row(d.item, d.turns[:turns]))


@pytest.fixture
def some_are_right(monkeypatch):
    """Rows whose answers have an odd number of tokens are right; the toy would have none right."""

    def exact(logits, labels, roles):
        tokens = (roles == ANSWER).sum(1)
        return int((tokens % 2).sum()), len(tokens)

    monkeypatch.setattr(pretrain, "exact_answers", exact)


@pytest.mark.parametrize("chunk_tokens", [1, 10**6])
def test_ranks_with_unequal_answers_have_one_mean(monkeypatch, some_are_right, chunk_tokens):
    """Over all ranks' and all chunks' answer tokens: loss, share of right answers, tokens, and the
    gradient once it is summed."""
    embedder = toy().double()
    whole = [dialogue(embedder, i, turns) for i, turns in enumerate((1, 4, 2))]
    answers = [int((x.row.tokens["roles"] == ANSWER).sum()) for x in whole]
    right = sum(n % 2 for n in answers) / 3
    expect(0 < right < 1, answers, "some odd, some even", "too easy")
    loss, exact, tokens = pretrain.accumulate(embedder, whole, 300)
    grad = examples.gradient(embedder)
    close(exact, right, "of three")
    equal(tokens, sum(answers), "answer tokens")
    copies = [copy.deepcopy(embedder) for _ in range(2)]
    parts = [whole[:1], whole[1:]]

    def work(rank):
        copies[rank].collate = embedder.collate
        copies[rank].zero_grad()
        seen = pretrain.accumulate(copies[rank], parts[rank], chunk_tokens)
        ranks.sum_gradients(copies[rank].parameters())
        return seen

    for rank, (mean, share, all_tokens) in enumerate(on_ranks(monkeypatch, 2, work)):
        close(mean, loss, f"rank {rank}: nats, a sum in float32", 1e-6)
        close(share, right, f"rank {rank}: share of right answers", 1e-10)
        equal(all_tokens, tokens, f"rank {rank}: answer tokens")
        close(examples.gradient(copies[rank]), grad, f"rank {rank}: gradient", 1e-6)


def test_the_teacher_has_no_code(embedder):
    """Its rows are plain instruction tuning's, of the same style; nothing is masked or dropped."""
    embedder.style = "coma"  # not the one that is taken where nothing is said
    collate, reference = pretrain.teacher(embedder.train())
    d = read_dialogues()[0]
    roles = collate.row(d.item, d.turns).tokens["roles"]
    equal(int((roles == COMPRESS).sum()), 0, "Settings(0, ...)")
    equal(collate.style, embedder.style, "Settings(..., style)")
    expect(int((embedder.collate.row(d.item).tokens["roles"] == COMPRESS).sum()) == 4, "", "", "K")
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(
            model.Embedder,
            "hidden",
            lambda e, x, mask: seen.append((mask, e.mllm.training)) or 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            reference([pretrain.Example(None, collate.row(d.item, d.turns))])
    equal(seen, [(None, False)], "the picture is in view, and no dropout")


def test_the_flags_of_a_step_reach_the_model(monkeypatch, embedder):
    """--no-compress, and --chunk-tokens: as many chunks as it asks for."""
    seen = []
    answer_logits = pretrain.answer_logits

    def watched(embedder, inputs, compress=True):
        seen.append((len(inputs["input_ids"]), compress))
        return answer_logits(embedder, inputs, compress)

    monkeypatch.setattr(pretrain, "answer_logits", watched)
    batch = [dialogue(embedder, i, 1) for i in range(2)]
    for chunk_tokens, compress, want in (
        (1, True, [(1, True)] * 2), (10**6, False, [(2, False)]), (None, True, [(2, True)])
    ):  # fmt: skip
        seen.clear()
        pretrain.accumulate(embedder, batch, chunk_tokens, compress)
        equal(seen, want, f"--chunk-tokens {chunk_tokens}")


def test_the_mask_is_on_where_there_is_a_code_and_it_is_asked_for(monkeypatch):
    """Without a code nothing would be left of the content."""
    masks = []
    for K in (4, 0):
        embedder = model.load("toy-random", compress_tokens=K, device="cpu")
        inputs = embedder.collate([read_dialogues()[0].item], [read_dialogues()[0].turns])
        hidden = embedder.hidden
        monkeypatch.setattr(
            embedder, "hidden", lambda x, mask, h=hidden: masks.append(mask is not None) or h(x)
        )
        for compress in (True, False):
            with torch.no_grad():
                pretrain.answer_logits(embedder, inputs, compress)
        with torch.no_grad():
            pretrain.answer_logits(embedder, inputs)
    equal(masks, [True, False, True, False, False, False], "K = 4, then K = 0")


# ---------------------------------------------------------------------------------- evaluation


class Numbers:
    """An embedder of numbers: item i becomes (i, i); some cannot be read."""

    def __init__(self):
        self.asked = []

    def encode(self, items, chunk_tokens, workers, progress, bad):
        self.asked.append((chunk_tokens, workers, progress, bad is None))
        z = np.array([[i, i] for i in items], np.float32)
        for row, i in enumerate(items):
            if i in (3, 4):
                if bad is None:
                    raise InputError(f"item {i}")
                bad.append(f"item {i}")
                z[row] = np.nan
        return z


@pytest.mark.parametrize("world", [1, 2, 3])
def test_items_that_ranks_share_are_put_back_in_their_order(monkeypatch, world):
    """Seven of them, which no two or three ranks share evenly; each rank gets all, and all errors;
    rank 0 alone shows the progress."""
    cfg = SimpleNamespace(chunk_tokens=5, workers=2)

    def work(rank):
        numbers, bad = Numbers(), []
        z = evaluate.encode_over_ranks(numbers, list(range(7)), cfg, "set", bad)
        return z.tolist(), sorted(bad), numbers.asked

    want = [[i, i] for i in range(7)]
    for rank, (z, bad, asked) in enumerate(on_ranks(monkeypatch, world, work)):
        equal(bad, ["item 3", "item 4"], f"rank {rank}: errors of all")
        equal([z[i] for i in (0, 1, 2, 5, 6)], [want[i] for i in (0, 1, 2, 5, 6)], "in order")
        equal(np.isnan(z[3]).all() and np.isnan(z[4]).all(), True, "what cannot be read")
        equal(asked, [(5, 2, "set" if rank == 0 else "", False)], f"rank {rank}")
    with pytest.raises(InputError, match="item 3|item 4"):
        on_ranks(
            monkeypatch, world,
            lambda rank: evaluate.encode_over_ranks(Numbers(), list(range(7)), cfg, "set"),
        )  # fmt: skip


def test_what_one_rank_cannot_read_is_said_by_all(monkeypatch):
    """`torchrun evaluate.py`: a picture of rank 1's part was gone, and rank 0 said only that it had
    lost the others."""
    cfg = SimpleNamespace(chunk_tokens=5, workers=2)

    def work(rank):
        with pytest.raises(InputError) as caught:
            evaluate.encode_over_ranks(Numbers(), [0, 3, 1, 2], cfg, "set")
        return str(caught.value)

    for said in on_ranks(monkeypatch, 2, work):
        is_rank_1s = said.startswith("rank 1 (") and said.endswith("item 3")
        expect(is_rank_1s, said, "rank 1 (host): item 3", "agreement.together")
