"""Variants of the loss (plumbing/losses.py), each against a loop over single scores in float64,
over ranks, and through GradCache."""

import json
import math
from functools import partial

import pytest
import ranks as examples
import torch
import torch.nn.functional as F
from checks import close, equal, expect
from test_threads import shares
from threads import on_ranks

import contrastive
import model
import plumbing.card
import pretrain
from contrastive import Batch, info_nce, loss_over_ranks
from data import Item
from plumbing import losses
from plumbing.errors import InputError
from tools import search

TAU = 0.3
NONE = torch.finfo(torch.float64).min
LABELS = torch.tensor([[0, 1, -1], [2, -1, -1], [3, 5, -1], [6, -1, -1], [7, -1, -1]])
KEYS = torch.tensor([10, 11, 12, 13, 77, 11, 12, 14, 78])  # 1 and 5, 2 and 6 are alike; two hard
LOUD = dict(hardness=3.0, margin=0.05)


def embeddings(n, dim=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, dim, generator=g, dtype=torch.float64), dim=-1)


def batch_and_z():
    """Five queries, nine columns: several positives, equal targets, hard negatives."""
    rows = list(range(len(LABELS) + len(KEYS)))
    return Batch(rows, LABELS, KEYS), embeddings(len(rows))


def chosen(**flags):
    """The loss that these flags ask for."""
    cfg = contrastive.Config(**flags)
    prefixes = losses.lengths_of(cfg.matryoshka, 6)
    return losses.asked_for(cfg, prefixes, loss_over_ranks, info_nce)


def with_gradient(loss_of, z):
    """-> (loss, d loss / d z)."""
    z = z.clone().requires_grad_()
    loss = loss_of(z)
    loss.backward()
    return loss.detach(), z.grad


# ------------------------------------------------------------------------------------- the oracles


def nats_of(anchor, right, wrong, hardness, margin):
    """-log( e^(a.r / tau) / (e^(a.r / tau) + sum of w e^(a.n / tau)) ), the mean over all r, one
    score at a time; the weights w are numbers, and have no gradient."""
    best = max((anchor @ r).item() for r in right)
    negative = 0.0
    for n in wrong:
        cosine = (anchor @ n).item()
        if not (margin > 0 and cosine > best + margin):
            negative = negative + math.exp(hardness * cosine) * (anchor @ n / TAU).exp()
    total = 0.0
    for r in right:
        positive = (anchor @ r / TAU).exp()
        total = total - (positive / (positive + negative)).log()
    return total / len(right)


def looped(z, labels, keys, hardness=0.0, margin=0.0):
    """Each query against all columns: those with a key of its own targets are no negatives."""
    q, t = z[: len(labels)], z[len(labels) :]
    total = 0.0
    for i, row in enumerate(labels.tolist()):
        own = [p for p in row if p >= 0]
        own_keys = [int(keys[p]) for p in own]
        wrong = [t[j] for j in range(len(t)) if int(keys[j]) not in own_keys]
        total = total + nats_of(q[i], [t[p] for p in own], wrong, hardness, margin)
    return total / len(labels)


def looped_mirror(z, labels, keys, hardness=0.0, margin=0.0):
    """Each target against all queries: those that have its key among theirs are right."""
    q, t = z[: len(labels)], z[len(labels) :]
    targets = [p for row in labels.tolist() for p in row if p >= 0]
    total = 0.0
    for p in targets:
        right, wrong = [], []
        for i, row in enumerate(labels.tolist()):
            has_it = any(keys[j] == keys[p] for j in row if j >= 0)
            (right if has_it else wrong).append(q[i])
        total = total + nats_of(t[p], right, wrong, hardness, margin)
    return total / len(targets)


def looped_symmetric(z, labels, keys, **weights):
    return (looped(z, labels, keys, **weights) + looped_mirror(z, labels, keys, **weights)) / 2


def looped_matryoshka(z, labels, keys, loss=looped):
    """The mean loss of the whole vectors, and of their first 2 and 3 numbers."""
    parts = [z, *(F.normalize(z[:, :n], dim=-1) for n in (2, 3))]
    return sum(loss(part, labels, keys) for part in parts) / 3


ORACLES = {
    "plain": ({}, looped),
    "hardness": (dict(hardness=3.0), partial(looped, hardness=3.0)),
    "margin": (dict(margin=0.05), partial(looped, margin=0.05)),
    "both weights": (LOUD, partial(looped, **LOUD)),
    "symmetric": (dict(symmetric=True), looped_symmetric),
    "symmetric, weighed": (dict(symmetric=True, **LOUD), partial(looped_symmetric, **LOUD)),
    "matryoshka": (dict(matryoshka="2,3"), looped_matryoshka),
    "symmetric, matryoshka": (
        dict(symmetric=True, matryoshka="2,3"),
        partial(looped_matryoshka, loss=looped_symmetric),
    ),
}


def check(flags, oracle, loss=None):
    batch, z = batch_and_z()
    loss = loss or chosen(**flags)
    want, want_grad = with_gradient(lambda z: oracle(z, LABELS, KEYS), z)
    got, grad = with_gradient(lambda z: loss(z, batch, TAU)[0], z)
    close(got, want, "loss", rel=1e-12)
    close(grad, want_grad, "gradient", rel=1e-10)
    close(loss(z, batch, TAU)[1][0], want.item(), "what the log says", rel=1e-12)


def test_no_two_columns_of_any_ranks_share_a_key():
    """Of unequal numbers of columns, as hard negatives make them; else they would be no negatives
    of each other, under --no-mask-false-negatives."""
    counts = [7, 2, 5, 1]
    keys = [losses.keys_that_differ(n, rank) for rank, n in enumerate(counts)]
    equal([tuple(x.shape) for x in keys], [(n, 2) for n in counts], "two keys a column")
    equal(len(torch.cat(keys)[:, 0].unique()), sum(counts), "keys_that_differ")


@pytest.mark.parametrize("name", list(ORACLES))
def test_each_variant_is_its_loop_over_single_scores(name):
    """Value, gradient, and the mean that the log shows: several positives, equal targets, hard
    negatives."""
    flags, oracle = ORACLES[name]
    check(flags, oracle)
    if flags:  # negative control: each differs from the plain loss
        with pytest.raises(AssertionError):
            check({}, oracle)


def weights_that_learn(negatives, best, temperature, hardness=0.0, margin=0.0):
    return negatives + hardness * negatives * temperature


def margin_of_scores(negatives, best, temperature, hardness=0.0, margin=0.0):
    """The margin is one of cosines, and not of cosines over tau."""
    return negatives.masked_fill(negatives > best + margin, NONE)


@pytest.mark.parametrize(
    ("wrong", "flags"),
    [(weights_that_learn, dict(hardness=3.0)), (margin_of_scores, dict(margin=0.05))],
)
def test_the_loops_find_wrong_weights(wrong, flags):
    """Negative control: a weight with a gradient; a margin in other units."""
    loss = partial(loss_over_ranks, reweigh=partial(wrong, **flags))
    with pytest.raises(AssertionError):
        check(flags, partial(looped, **flags), loss)


# --------------------------------------------------------------------------------------- the edges


def test_weights_leave_hits_and_a_query_without_negatives_as_they_are():
    """A hit is no matter of weights; where all negatives are left out, loss and gradient are 0, and
    no NaN, in float32, too."""
    batch, z = batch_and_z()
    _, (_, hits, columns) = chosen(**LOUD)(z, batch, TAU)
    _, (_, plain_hits, _) = loss_over_ranks(z, batch, TAU)
    equal((hits, columns), (plain_hits, len(KEYS)), "hits, columns")
    expect(0 < hits < 1, hits, "some", "too easy")
    q = torch.tensor([[1.0, 0.0]])
    t = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.9, 0.1]])  # both negatives are far nearer
    for dtype in (torch.float32, torch.float64):
        reweigh = partial(losses.weighed, hardness=9.0, margin=0.1)
        z = torch.cat([q, t]).to(dtype)
        loss, grad = with_gradient(lambda z: info_nce(z[:1], z[1:], 0.01, reweigh=reweigh)[0], z)
        equal((loss.item(), grad.abs().max().item()), (0.0, 0.0), f"{dtype}: no negative is left")
    loss, _ = info_nce(q, t, 0.01, keys=torch.zeros(3), reweigh=partial(losses.weighed, hardness=9))
    equal(loss.item(), 0.0, "all are alike: no negative, whatever it would weigh")


def test_the_symmetric_loss_is_clips_where_each_query_has_its_own_target():
    """CLIP, figure 3: cross-entropy along both axes of one matrix."""
    z, n = embeddings(12), 6
    batch = Batch(list(range(12)), torch.arange(n)[:, None], torch.arange(n))
    scores = z[:n] @ z[n:].T / TAU
    own = torch.arange(n)
    want = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    close(chosen(symmetric=True)(z, batch, TAU)[0], want, "CLIP", rel=1e-12)


def test_false_negatives_that_stay_are_negatives_in_both_directions():
    """--no-mask-false-negatives gives all columns other keys: a target has its own query alone."""
    z = embeddings(len(LABELS) + len(KEYS))
    keys = torch.arange(len(KEYS))
    batch = Batch(list(range(len(z))), LABELS, keys)
    want = looped_symmetric(z, LABELS, keys)
    close(chosen(symmetric=True)(z, batch, TAU)[0], want, "all differ", rel=1e-12)


def test_in_the_mirror_equal_queries_are_right_for_each_others_targets():
    """They share the second key: neither is a negative of the other's target."""
    z = embeddings(6)
    z[0] = z[1] = z[3] = z[4]  # two equal queries, and their two targets
    keys = torch.tensor([[1, 7], [2, 7], [3, 8]])
    batch = Batch(list(range(6)), torch.arange(3)[:, None], keys)
    share, mean = losses.targets_look_for_queries(info_nce, z, batch, TAU)
    third = -F.log_softmax(z[5] @ z[:3].T / TAU, 0)[2]
    first = -(F.logsigmoid((z[3] @ z[0] - z[3] @ z[2]) / TAU))
    close(share, (2 * first + third) / 3, "loops", rel=1e-6)


def test_in_the_mirror_a_target_that_equals_a_query_is_no_other_targets_kin():
    """Of a -> b and b -> c: query a has nothing to do with c, in either direction."""
    a, b, c = Item("a"), Item("b"), Item("c")
    keys = losses.keys_that_differ(2, 0)
    losses.note_equals(keys, [b, c], [a, b], [torch.tensor([0]), torch.tensor([1])])
    batch = Batch([], torch.tensor([[0], [1]]), keys)
    _, labels, _ = losses.queries_of_targets(batch)
    equal(labels.tolist(), [[0], [1]], "each target's queries: its own")
    z = embeddings(4)
    want = F.cross_entropy((z[:2] @ z[2:].T / TAU).T, torch.arange(2))
    share, _ = losses.targets_look_for_queries(info_nce, z, batch, TAU)
    close(share, want, "the other query is a negative", rel=1e-12)


EVERYTHING = dict(symmetric=True, matryoshka="3", **LOUD)


@pytest.mark.parametrize("flags", [dict(symmetric=True), dict(matryoshka="2,3"), EVERYTHING])
def test_top1_and_columns_in_the_log_are_those_of_whole_queries(flags):
    """`top1` and `chance` can be compared between runs: no prefix's, and no mirror image's."""
    batch, z = batch_and_z()
    _, (_, want, columns) = loss_over_ranks(z, batch, TAU)
    _, (_, short, _) = loss_over_ranks(F.normalize(z[:, :3], dim=-1), batch, TAU)
    expect(short != want, short, f"not {want}", "too easy: a prefix hits as often")
    _, (_, top1, seen) = chosen(**flags)(z, batch, TAU)
    equal((top1, seen), (want, columns), "losses.over_prefixes, losses.both_directions")


# -------------------------------------------------------------------------- ranks, chunks, dropout


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_unequal_shares_have_the_whole_batchs_loss(monkeypatch, shared, world):
    """All variants at once: shares sum to the loss of the whole batch, gradients too; equal targets
    lie on different ranks."""
    whole = examples.batch_of(shared)
    z, loss = embeddings(len(whole.rows)), chosen(**EVERYTHING)
    want, want_grad = with_gradient(lambda z: loss(z, whole, TAU)[0], z)
    parts = shares(whole, world)
    keys = [set(part.keys[:, 0].tolist()) for part in parts]
    expect(bool(keys[0] & keys[-1]), keys, "a key on two ranks", "too easy")
    place = {id(row): i for i, row in enumerate(whole.rows)}

    def work(rank):
        mine = [place[id(row)] for row in parts[rank].rows]
        own = z[mine].requires_grad_()
        share, (mean, *_) = loss(own, parts[rank], TAU)
        share.backward()
        return share.item(), mean, mine, own.grad

    grad, total = torch.zeros_like(z), 0.0
    for share, mean, mine, own in on_ranks(monkeypatch, world, work):
        total += share
        grad[mine] += own
        close(mean, want.item(), "what each rank's log says", 1e-12)
    close(total, want.item(), "the shares' sum", 1e-12)
    close(grad, want_grad, "d loss / d z", 1e-12)


def test_gradcache_has_the_gradient_of_the_whole_batch():
    """All variants at once, through the model, with chunks of a few rows, in float64."""
    embedder = examples.build("lora")
    batch = examples.batch_of(embedder)
    cfg = contrastive.Config(symmetric=True, matryoshka="64", **LOUD)
    loss = losses.asked_for(cfg, (64,), loss_over_ranks, info_nce)
    z = embedder(embedder.collate.pad_rows(batch.rows))
    embedder.zero_grad(set_to_none=True)
    want = loss(z, batch, examples.TEMPERATURE)[0]
    want.backward()
    gradient = examples.gradient(embedder)
    embedder.zero_grad(set_to_none=True)
    out = contrastive.gradcache_step(embedder, batch, examples.TEMPERATURE, examples.SOME, loss)
    close(out.loss, want.item(), "loss", 1e-10)
    close(examples.gradient(embedder), gradient, "gradient", 1e-10)


# --------------------------------------------------------------------------------- prefixes in use


def test_lengths_are_rising_and_below_the_embeddings_own():
    """Everything else is refused, with what would be right."""
    equal([losses.lengths_of(text, 128) for text in ("", " ")], [(), ()], "none")
    equal(losses.lengths_of(" 32, 64", 128), (32, 64), "two")
    for text in ("128", "64,32", "32,32", "0,4", "32;64", "x", "32,", "3.5", "-1", "1_6", "\u0663"):
        with pytest.raises(InputError, match="--matryoshka .*rising lengths below 128"):
            losses.lengths_of(text, 128)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A step of stage 2 with prefixes, its folder."""
    out = tmp_path_factory.mktemp("matryoshka") / "out"
    flags = dict(model="toy-random", steps=1, batch=4, block=2, muon_lr=0.0, workers=0)
    contrastive.main(contrastive.Config(out=str(out), matryoshka="32,64", **flags))
    return out


def test_a_prefix_is_shorter_than_the_embeddings_of_the_model_that_is_trained(tmp_path):
    """One that is as long would be the whole embedding twice."""
    flags = dict(model="toy-random", steps=0, batch=2, block=2, out=str(tmp_path / "out"))
    with pytest.raises(InputError, match="rising lengths below 128"):
        contrastive.main(contrastive.Config(matryoshka="64,128", **flags))


def test_stage_1_trains_no_prefixes(trained, tmp_path):
    """What it makes of a model that had some has none: --dim is warned of again."""
    flags = dict(steps=1, batch=2, turns=1, muon_lr=0.0, workers=0, out=str(tmp_path))
    pretrain.main(pretrain.Config(model=str(trained), **flags))
    equal(model.load(tmp_path, device="cpu").prefixes, (), "nanocoma.json")


def test_stage_2_trains_the_prefixes_of_its_flag_and_not_those_of_its_model(trained, tmp_path):
    """Without --matryoshka the lengths of a model that is trained on are as little trained as all
    others: it says none."""
    flags = dict(steps=0, batch=2, block=2, workers=0, out=str(tmp_path))
    contrastive.main(contrastive.Config(model=str(trained), **flags))
    equal(model.load(tmp_path, device="cpu").prefixes, (), "nanocoma.json")


def test_a_folder_knows_its_prefixes_and_dim_takes_one(trained):
    """nanocoma.json has them; `dim` numbers of the whole embedding, of unit length; saved again it
    is the same; what was trained without has none."""
    whole, short = (model.load(trained, device="cpu", dim=n) for n in (0, 32))
    equal((whole.prefixes, short.prefixes), ((32, 64), (32, 64)), "nanocoma.json")
    z, prefix = whole.encode(["a red circle", "b"]), short.encode(["a red circle", "b"])
    equal((z.shape, prefix.shape), ((2, 128), (2, 32)), "lengths")
    want = F.normalize(torch.from_numpy(z[:, :32]), dim=-1)
    close(torch.from_numpy(prefix), want, "the first 32 of 128", 1e-6)
    model.save(short, trained.parent / "again")
    again = model.load(trained.parent / "again", device="cpu")
    equal((again.prefixes, again.dim), ((32, 64), 128), "a shorter use loses nothing")
    equal(model.load("toy", device="cpu").prefixes, (), "none")


def test_a_prefix_that_was_not_trained_is_told_of(trained, capsys):
    """It is no error: one wants to compare."""
    model.load(trained, device="cpu", dim=32)
    equal(capsys.readouterr().out, "", "trained")
    model.load(trained, device="cpu", dim=48)
    model.load("toy", device="cpu", dim=16)
    said = capsys.readouterr().out
    expect(
        "--dim 48: not among the prefixes that the model was trained for (32, 64)" in said,
        said,
        "48",
        "",
    )
    expect(
        "--dim 16: not among the prefixes that the model was trained for (none)" in said,
        said,
        "16",
        "",
    )


def test_the_card_names_prefixes_and_what_was_scored(trained):
    """README.md of the folder."""
    card = (trained / "README.md").read_text()
    expect("| prefixes trained, too | 32, 64 |" in card, card, "32, 64", "facts")
    scores = dict(overall=0.5, sets={}, meta_tasks={}, config=dict(dim=32))
    scores["model_digest"] = plumbing.folders.digest_of_weights(trained)
    (trained / "scores.json").write_text(json.dumps(scores))
    said = plumbing.card.scores(trained)
    (trained / "scores.json").unlink()
    expect(", with --dim 32\n" in said, said, "32", "title")


def test_an_index_of_another_length_is_another_one(trained):
    """`tools.search --dim` never compares a prefix with whole embeddings."""
    keys = [search.fingerprint(model.load(trained, device="cpu", dim=n), "x") for n in (0, 32, 64)]
    equal(len(set(keys)), 3, "a key for each")


def test_a_dim_beyond_the_embedding_or_a_damaged_list_is_an_error(trained):
    """With what would be right."""
    with pytest.raises(InputError, match="--dim 129: its embeddings have 128 numbers"):
        model.load(trained, device="cpu", dim=129)
    with pytest.raises(InputError, match="dim"):
        model.load(trained, device="cpu", dim=-1)
    stored = (trained / "nanocoma.json").read_text()
    for damaged in ('"32"', "[32, 0]", "[true]", "7"):
        text = stored.replace('"matryoshka": [\n  32,\n  64\n ]', f'"matryoshka": {damaged}')
        expect(text != stored, text, "another list", "too easy")
        (trained / "nanocoma.json").write_text(text)
        with pytest.raises(InputError, match="nanocoma.json: .matryoshka. is"):
            model.load(trained, device="cpu")
    (trained / "nanocoma.json").write_text(stored)
