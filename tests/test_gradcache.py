"""GradCache's gradient is that of the whole batch: for any chunks, with dropout, over ranks."""

import copy
import dataclasses
import functools
import gc
import json
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import ranks
import torch
import torch.nn.functional as F
from checks import close, distance, equal, expect
from forked import on_ranks, said_on
from ranks import MOST, SOME
from torch import nn
from torch.utils._pytree import tree_leaves

import contrastive
from data import Item, Pair
from plumbing.errors import InputError
from plumbing.families import vision_tower
from plumbing.memory import Budget, token_chunks, until_it_fits
from plumbing.replay import replay, rng_state


@pytest.fixture(scope="module")
def built():
    """trained -> (embedder, what the plain whole batch gives), computed once each."""
    results = {}

    def get(trained):
        if trained not in results:
            results[trained] = ranks.whole_batch(ranks.built(trained))
        return ranks.built(trained), results[trained]

    return get


def check_step(got, want, hint, rel=1e-10):
    close(got.loss, want.loss, f"{hint}: loss of all queries", rel)
    equal(got.top1, want.top1, f"{hint}: share of hits")
    equal(got.columns, want.columns, f"{hint}: the targets that the loss saw")
    close(got.grad, want.grad, f"{hint}: gradient", rel)


# -------------------------------------------------------------------------------- two_passes alone


class Small:
    """A network with dropout 0.5 that embeds eight rows by their numbers."""

    def __init__(self):
        torch.manual_seed(0)
        layers = nn.Linear(5, 7), nn.Dropout(0.5), nn.Tanh(), nn.Linear(7, 3)
        self.net = nn.Sequential(*layers).double()
        self.rows = torch.randn(8, 5, dtype=torch.float64)
        self.calls = 0

    def embed(self, chunk):
        self.calls += 1
        return self.net(self.rows[chunk])  # (len(chunk), 3)

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.net.parameters()])


def info_nce_of_four(z):
    """InfoNCE of 4 queries and 4 targets."""
    z = F.normalize(z, dim=1)
    return contrastive.paper_info_nce(z[:4], z[4:], 0.2)


CHUNKINGS = (
    [[i] for i in range(8)],
    [[3, 0, 6], [5], [1, 2, 7, 4]],
    [list(range(8))],
    [[], [], [3, 0, 6], [], [5, 1, 2, 7, 4], []],  # as ranks with less work than others have them
)


def check_two_passes(two_passes):
    for chunks in CHUNKINGS:
        whole = Small()
        torch.manual_seed(5)
        z = torch.cat([whole.embed(chunk) for chunk in chunks])
        rows = [row for chunk in chunks for row in chunk]
        loss = info_nce_of_four(torch.stack([z[rows.index(i)] for i in range(8)]))
        loss.backward()
        after = torch.rand(1)
        for keep in (0, 1, len(chunks), MOST):
            small, hint = Small(), f"chunks {chunks}, keep {keep}"
            torch.manual_seed(5)
            got = two_passes(small.embed, chunks, info_nce_of_four, keep)
            equal(torch.rand(1), after, f"{hint}: the next random number")
            expect(not got.requires_grad, "a loss with a graph", "one without", "detach")
            close(got, loss, f"{hint}: loss of the rows in their order", 1e-10)
            close(small.gradient(), whole.gradient(), f"{hint}: gradient", 1e-10)
            once, twice = min(keep, len(chunks)), max(0, len(chunks) - keep)
            equal(small.calls, once + 2 * twice, f"{hint}: forward passes")


def test_two_passes_have_the_gradient_of_one_graph():
    """two_passes on a small network with dropout, float64, to 1e-10: chunks of one row, of some in
    any order, of all, empty ones; no, one and all graphs kept; a chunk without a kept graph runs
    twice, one with it once; the random numbers go on where pass 1 left them."""
    check_two_passes(contrastive.two_passes)


def in_the_chunks_order(embed, chunks, loss_of, keep=0):
    """The loss sees the rows as the chunks come."""
    rows = [row for chunk in chunks for row in chunk]
    return contrastive.two_passes(embed, chunks, lambda z: loss_of(z[rows]), keep)


def at_once(embed, chunks, loss_of, keep=0):
    """One graph of everything: right, and nothing is saved."""
    rows = [row for chunk in chunks for row in chunk]
    return contrastive.two_passes(embed, [rows], loss_of, keep=1)


@contextmanager
def no_replay(state):
    """The typical mistake: the second pass goes on with fresh random numbers."""
    yield


def test_the_check_of_two_passes_fails_for_wrong_ones(monkeypatch):
    """Negative control: rows out of order, a plain batch; dropout that falls anew in pass 2."""
    for wrong in (in_the_chunks_order, at_once):
        with pytest.raises(AssertionError):
            check_two_passes(wrong)
    monkeypatch.setattr(contrastive, "replay", no_replay)
    with pytest.raises(AssertionError, match="keep 0: "):
        check_two_passes(contrastive.two_passes)


# -------------------------------------------------------------------------------- the batch's parts


def test_the_global_batch_is_the_same_for_any_number_of_ranks(shared):
    """draw and local_batch: the ranks' rows, side by side, are those of one process; blocks of
    --block pairs come from one data set; a step is a function of (seed, step)."""
    cfg = ranks.batch_config()
    drawn = contrastive.draw(ranks.PAIRS, cfg, 0)
    equal(contrastive.draw(ranks.PAIRS, copy.copy(cfg), 0), drawn, "a pure function")
    steps = [contrastive.draw(ranks.PAIRS, cfg, s) for s in range(4)]
    expect(len({str(x) for x in steps}) == 4, steps, "four batches", "the step is part of the seed")
    for i in range(0, cfg.batch, cfg.block):
        names = {name for name, _ in drawn[i : i + cfg.block]}
        equal(len(names), 1, "a block comes from one data set")
    alone = ranks.batch_of(shared)
    for world in (2, 4):
        parts = [ranks.batch_of(shared, r, world) for r in range(world)]
        ids = []
        for part in parts:
            ids += part.ids
        equal(ids, alone.ids, "the same pairs")
        keys = torch.cat([part.keys for part in parts])
        equal(keys[:, 0], alone.keys[:, 0], "the same columns")


def check_batch(local_batch, embedder):
    for rank, world in ((0, 1), (1, 2), (2, 4)):
        cfg, share = ranks.batch_config(), 16 // world
        batch = local_batch(ranks.PAIRS, embedder.collate, cfg, 0, rank, world)
        drawn = contrastive.draw(ranks.PAIRS, cfg, 0)
        pairs = [ranks.PAIRS[name][i] for name, i in drawn[rank * share : (rank + 1) * share]]
        columns = [x for pair in pairs for x in (*pair.targets, *pair.negatives)]
        for row, item in zip(batch.rows, [p.query for p in pairs] + columns, strict=True):
            want = embedder.collate.row(item).tokens["input_ids"]
            equal(row.tokens["input_ids"], want, "queries, then each pair's targets, negatives")
        equal(batch.keys[:, 0].tolist(), [x.key for x in columns], "the key of its content")
        owners = [p.query.key for p in pairs for _ in p.targets]
        right = batch.labels[batch.labels >= 0]
        equal(batch.keys[right, 1].tolist(), owners, "and of the query that it is a target of")
        for pair, mine in zip(pairs, batch.labels.tolist(), strict=True):
            named = [columns[p] for p in mine if p >= 0]
            equal(named, list(pair.targets), "the labels point at the pair's own targets")


def test_a_batch_is_queries_targets_negatives_and_where_the_positives_stand(shared):
    """local_batch on several ranks: rows, keys and labels, column by column."""
    check_batch(contrastive.local_batch, shared)


def test_the_batch_check_fails_for_labels_that_forget_hard_negatives(shared):
    """Negative control: query i's first positive at column i."""

    def forgets(*args):
        batch = contrastive.local_batch(*args)
        shift = batch.labels[:, :1] - torch.arange(len(batch.labels))[:, None]
        return batch._replace(labels=(batch.labels - shift).where(batch.labels >= 0, -1))

    with pytest.raises(AssertionError):
        check_batch(forgets, shared)


def test_what_is_right_for_an_equal_query_is_no_negative(shared):
    """A caption of two pictures, on two lines: a model that knows both has loss 0, and hits."""
    pictures = [Item("<image>", (f"{i}.png",)) for i in range(3)]
    red, blue = Item("a red circle"), Item("a blue one")
    pairs = [Pair(red, (pictures[0],)), Pair(red, (pictures[1],)), Pair(blue, (pictures[2],))]
    collate = SimpleNamespace(row=lambda item: item)
    cfg = contrastive.Config(batch=3, block=3)
    batch = contrastive.local_batch({"a": pairs}, collate, cfg, 0, 0, 1)
    z = torch.tensor(
        [[1.0, 0] if item in (red, *pictures[:2]) else [0, 1.0] for item in batch.rows]
    )
    _, (loss, top1, _) = contrastive.loss_over_ranks(z, batch, 0.03)
    expect(loss < 1e-6 and top1 == 1, (loss, top1), (0, 1), "queries of one key")


def test_keys_are_unique_where_false_negatives_stay(shared):
    """--no-mask-false-negatives: no two columns share a key, on all ranks together; nor do, where
    they are masked, a hard negative and any other column of another content."""
    for masked in (False, True):
        cfg = dataclasses.replace(ranks.batch_config(), mask_false_negatives=masked)
        keys = []
        for rank in (0, 1):
            batch = contrastive.local_batch(ranks.PAIRS, shared.collate, cfg, 0, rank, 2)
            rights = batch.labels[batch.labels >= 0].tolist()
            wrong = [i for i in range(len(batch.keys)) if i not in rights]
            keys += batch.keys[wrong if masked else slice(None), 1].tolist()
        equal(len(set(keys)), len(keys), f"masked: {masked}")


# ------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(
    ("trained", "budget"),
    [
        ("all", Budget(1, 0, "off")),
        ("all", Budget(200, 1, "device")),  # nothing is cached of a tower that is trained
        ("all", Budget(MOST, MOST, "host")),
        ("all", Budget(200, MOST, "off")),
        ("frozen", Budget(1, 1, "host")),
        ("frozen", Budget(200, 0, "device")),
        ("frozen", Budget(200, 1, "off")),
        ("frozen", Budget(MOST, 0, "host")),
        ("lora", Budget(1, MOST, "device")),
        ("lora", Budget(200, 1, "host")),
        ("lora", Budget(200, 0, "off")),
        ("lora", Budget(MOST, 1, "device")),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else x,
)
def test_the_gradient_is_that_of_the_whole_batch(built, trained, budget):
    """float64, to 1e-10: chunks of one item, some, all; no, one and all graphs kept; vision
    trained, frozen and cached on the device or the host, LoRA. The batch has pictures and plain
    text, hard negatives, several positives, repeated targets. (A covering list of pairs of
    settings.)"""
    embedder, want = built(trained)
    got = ranks.step(embedder, ranks.batch_of(embedder), budget)
    check_step(got, want, f"{trained}, {budget}")
    equal(got.chunk_tokens, budget.chunk_tokens, "it fitted")


def test_the_batch_of_these_tests_holds_the_hard_cases(built):
    """Pictures and text-only items, hard negatives, several positives, repeated targets."""
    embedder, want = built("all")
    batch = ranks.batch_of(embedder)
    pictures = sum(bool(row.images) for row in batch.rows)
    expect(0 < pictures < len(batch.rows), pictures, "some pictures, some text", "ranks.PAIRS")
    positives = (batch.labels >= 0).sum(1)
    expect(set(positives.tolist()) == {1, 2}, positives, "1 and 2 positives", "ranks.picture_pair")
    columns = len(batch.keys)
    expect(columns > positives.sum(), columns, f"> {positives.sum()}", "hard negatives are columns")
    expect(len(batch.keys[:, 0].unique()) < columns, columns, "repeated targets", "their keys")
    size = want.grad.norm()
    expect(size > 1e-2, size, "> 0.01", "a gradient of nothing is met by anything")
    expect(0 < want.top1 < 1, want.top1, "some hits, not all", "too easy a batch")


def test_the_gradient_is_added_to_grad(built):
    """As autograd does: two steps without zero_grad leave the sum."""
    embedder, want = built("lora")
    embedder.zero_grad(set_to_none=True)
    for _ in range(2):
        batch = ranks.batch_of(embedder)
        contrastive.gradcache_step(embedder, batch, ranks.TEMPERATURE, SOME)
    close(ranks.gradient(embedder), 2 * want.grad, "accumulation over two steps", 1e-10)


def test_float32_is_as_good_as_a_plain_float32_batch(built):
    """The relative gap to the whole batch in float32 is rounding: below 1e-5."""
    embedder, want = built("all, float32")
    check_step(ranks.step(embedder, ranks.batch_of(embedder)), want, "float32", 1e-5)


def looks(embedder, budget):
    """How many times each patch of the batch's pictures goes through the vision tower in one
    step."""
    seen, batch = [], ranks.batch_of(embedder)
    patch_embed = embedder.mllm.get_encoder(modality="image").patch_embed
    hook = patch_embed.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    ranks.step(embedder, batch, budget)
    hook.remove()
    return sum(seen) / sum(len(row.images.get("pixel_values", ())) for row in batch.rows)


def test_a_frozen_tower_sees_each_picture_once(built):
    """vision_cache: one look at each picture where the tower is frozen; two with "off", and two
    where the tower is trained (with one the gradient would be wrong)."""
    frozen, trained = built("frozen")[0], built("all")[0]
    for where in ("device", "host"):
        equal(looks(frozen, Budget(200, 0, where)), 1, f"{where}: once a picture")
    equal(looks(frozen, Budget(200, 0, "off")), 2, "off: in both passes")
    equal(looks(trained, Budget(200, 0, "device")), 2, "trained: in both passes")
    equal(looks(trained, Budget(200, MOST)), 1, "with its graph kept a chunk is run once")


# ----------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("in_pass", [1, 2])
def test_a_chunk_that_does_not_fit_halves_the_budget(built, monkeypatch, in_pass):
    """When memory runs out, in pass 1 or in pass 2, the step begins again with half the tokens,
    leaves the right gradient and returns the budget that worked; where no budget can help it says
    so."""
    embedder, want = built("frozen")
    forward = embedder.forward

    def small_machine(inputs):
        if inputs["input_ids"].numel() > 300 and torch.is_grad_enabled() >= (in_pass == 2):
            raise torch.OutOfMemoryError("no memory")
        return forward(inputs)

    def no_memory(inputs):
        raise torch.OutOfMemoryError("no memory at all")

    budget, batch = Budget(1000, 0, "device"), ranks.batch_of(embedder)
    monkeypatch.setattr(embedder, "forward", small_machine)
    got = ranks.step(embedder, batch, budget)
    check_step(got, want, "after running out of memory")
    equal(got.chunk_tokens, 250, "1000, 500, 250: what fits 300")
    monkeypatch.setattr(embedder, "forward", no_memory)
    # The longest row has 42 tokens: below that each stands alone, and smaller ones change nothing.
    with pytest.raises(
        InputError, match="out of memory at --chunk-tokens 31, the longest row alone: "
    ):
        ranks.step(embedder, batch, budget)


class Marked(torch.autograd.Function):
    """Does nothing, and notes a weak reference to its place in the graph."""

    @staticmethod
    def forward(ctx, z, held):
        held.append(weakref.ref(ctx))
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@contextmanager
def noted_memory(embedder):
    """Gives a list of weak references: to the graphs that the block makes, and to what the vision
    tower says in it. Memory that waits for the garbage collector is not free: it is off."""
    held = []

    def mark(module, args, z):
        return Marked.apply(z, held) if z.requires_grad else z

    def note(module, args, output):
        held.extend(map(weakref.ref, tree_leaves(output)))

    tower = embedder.mllm.get_encoder(modality="image")
    hooks = [embedder.register_forward_hook(mark), tower.register_forward_hook(note)]
    gc.disable()
    try:
        yield held
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()


def check_second_attempt(built, until_it_fits, in_pass):
    """A step whose first attempt fails in the middle of a pass: at its beginning the second one has
    all the memory, and what it leaves is the gradient. Two graphs are kept, so that there is one
    when pass 1 fails; when pass 2 does, a part of the gradient is there, and what the tower said to
    the chunks that are to come."""
    embedder, want = built("frozen")
    batch, budget = ranks.batch_of(embedder), Budget(200, 2, "host")
    chunks = ranks.forwards(batch, budget)
    number = {1: chunks - 1, 2: chunks + 1}[in_pass]  # the last one in pass 1, the second in pass 2
    alive = []  # of the references, when an attempt begins

    def watched(attempt, *others):
        def noted(chunk_tokens):
            alive.append(sum(x() is not None for x in held))
            attempt(chunk_tokens)

        return until_it_fits(noted, *others)

    with (
        noted_memory(embedder) as held,
        mock.patch.object(contrastive, "until_it_fits", watched),
        ranks.out_of_memory(embedder, number),
    ):
        got = ranks.step(embedder, batch, budget)
    expect(len(held) > chunks, len(held), f"more than {chunks}", "are the hooks called?")
    equal(got.chunk_tokens, 100, "half of 200: the first attempt failed, the second did not")
    equal(alive, [0, 0], "graphs and features of the first attempt when the second one begins")
    check_step(got, want, f"out of memory in pass {in_pass}")


@pytest.mark.parametrize("in_pass", [1, 2])
def test_a_step_that_begins_again_has_all_memory_and_leaves_the_gradient(built, in_pass):
    """until_it_fits: graphs, gradients and the frozen tower's remembered output of a failed attempt
    are gone, whichever pass it failed in."""
    check_second_attempt(built, until_it_fits, in_pass)


def keeps_the_gradient(attempt, chunk_tokens, longest, start_over):
    return until_it_fits(attempt, chunk_tokens, longest, lambda: None)


def tries_inside_of_the_handler(attempt, chunk_tokens, longest, start_over):
    """There the error is alive, its traceback, and all that the failed attempt held."""
    try:
        attempt(chunk_tokens)
    except torch.OutOfMemoryError:
        start_over()
        return tries_inside_of_the_handler(attempt, chunk_tokens // 2, longest, start_over)
    return chunk_tokens


def test_the_check_of_the_second_attempt_fails_for_what_the_first_one_leaves(built):
    """Negative control: half a gradient stays; graphs and features stay until the step ends."""
    with pytest.raises(AssertionError, match="gradient"):
        check_second_attempt(built, keeps_the_gradient, 2)
    for in_pass in (1, 2):
        with pytest.raises(AssertionError, match="of the first attempt"):
            check_second_attempt(built, tries_inside_of_the_handler, in_pass)


# ------------------------------------------------------------------------------------------ dropout


def one_graph(embedder):
    """The chunks of `SOME` in their order, so the same random numbers, but all in one graph. ->
    (Result, the next random number)."""
    batch = ranks.batch_of(embedder)
    z = [None] * len(batch.rows)
    torch.manual_seed(5)
    for chunk in token_chunks([row.length for row in batch.rows], SOME.chunk_tokens):
        part = embedder(embedder.collate.pad_rows([batch.rows[i] for i in chunk]))
        for i, z_of_row in zip(chunk, part, strict=True):
            z[i] = z_of_row
    after = torch.rand(1).item()
    return ranks.from_embeddings(embedder, torch.stack(z), batch), after


@pytest.fixture(scope="module")
def dropping():
    """trained -> (an embedder in training mode, its `one_graph`), made once each: dropout 0.1 in
    all attention, or in front of LoRA's matrices."""
    results = {}

    def get(trained, **flags):
        key = (trained, *flags)
        if key not in results:
            if trained == "lora":
                flags["lora_dropout"] = 0.1
            embedder = ranks.build(trained, **flags).train()
            for part in embedder.mllm.model.language_model.modules():
                if hasattr(part, "attention_dropout") and trained != "lora":
                    part.attention_dropout = 0.1
            results[key] = embedder, *one_graph(embedder)
        return results[key]

    return get


def check_dropout(embedder, want, after, budget):
    torch.manual_seed(5)
    check_step(ranks.step(embedder, ranks.batch_of(embedder), budget), want, f"dropout, {budget}")
    equal(torch.rand(1).item(), after, f"{budget}: the next random number is that after pass 1")


@pytest.mark.parametrize(
    ("trained", "keep", "vision_cache"),
    [("all", 1, "off"), ("frozen", 0, "device"), ("lora", 1, "host"), ("lora", MOST, "off")],
)
def test_dropout_falls_alike_in_both_passes(dropping, trained, keep, vision_cache):
    """With dropout 0.1 the gradient is that of one graph over the same chunks with the same random
    numbers, to 1e-10: the second pass replays the generator's state. After the step the generator
    is where pass 1 left it, so that a run is a function of its seed whatever --graph-memory is."""
    check_dropout(*dropping(trained), Budget(SOME.chunk_tokens, keep, vision_cache))


def test_dropout_falls_alike_under_gradient_checkpointing(dropping):
    """--checkpointing runs each layer twice more; the random numbers are still those of pass 1."""
    check_dropout(*dropping("all", checkpointing=True), SOME._replace(keep_graphs=0))


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_the_dropout_check_fails_without_replay(dropping, monkeypatch, trained):
    """Negative control: fresh random numbers in the second pass give the gradient of no loss."""
    budget = SOME._replace(keep_graphs=0)
    embedder, want, after = dropping(trained)
    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "replay", no_replay)
        torch.manual_seed(5)
        got = ranks.step(embedder, ranks.batch_of(embedder), budget)
    gap = distance(got.grad, want.grad)
    expect(gap > 0.01, f"gap {gap:.1e}", "> 0.01", "does the model drop anything?")
    check_dropout(embedder, want, after, budget)


def test_the_random_numbers_of_the_ranks_own_gpu_are_drawn_again(monkeypatch):
    """Dropout on a GPU takes them from its generator; the other ranks' GPUs are left alone."""
    forked, set_to = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: "of the GPU")
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_to.append)
    monkeypatch.setattr(torch.random, "fork_rng", lambda gpus: forked.append(gpus) or nullcontext())
    with replay(rng_state()):
        equal(forked, [[3]], "put back behind it")
        equal(set_to, ["of the GPU"], "set to what it was in pass 1")


# ------------------------------------------------------------------- dropout inside a frozen tower


@pytest.fixture(scope="module")
def tower_that_drops():
    """An embedder in training mode whose frozen vision tower has dropout 0.5 in it (families other
    than Qwen have some), and its whole batch in one graph."""
    embedder = ranks.build("frozen")
    vision_tower(embedder.mllm).merger.mlp.append(nn.Dropout(0.5))
    embedder.train()
    return embedder, ranks.whole_batch(embedder)


REMEMBERED = SOME._replace(keep_graphs=0, vision_cache="device")


def test_a_frozen_tower_drops_nothing(tower_that_drops):
    """It is in evaluation mode while the rest is trained: what the vision cache remembers of the
    first pass is what the second would have computed."""
    embedder, want = tower_that_drops
    equal(vision_tower(embedder.mllm).training, False, "Embedder.train")
    equal(embedder.mllm.model.language_model.training, True, "the rest is trained")
    for cache in ("off", "device"):
        got = ranks.step(
            embedder, ranks.batch_of(embedder), REMEMBERED._replace(vision_cache=cache)
        )
        check_step(got, want, f"vision cache {cache}")


def test_the_check_of_the_frozen_tower_fails_in_training_mode(tower_that_drops):
    """Negative control: a tower that drops."""
    embedder, want = tower_that_drops
    vision_tower(embedder.mllm).train()
    try:
        got = ranks.step(embedder, ranks.batch_of(embedder), REMEMBERED)
    finally:
        embedder.train()
    gap = distance(got.grad, want.grad)
    expect(gap > 0.01, f"gap {gap:.1e}", "> 0.01", "does the tower drop anything?")


def test_a_tower_that_is_trained_goes_into_training_mode(embedder):
    """Nothing is frozen: everything trains."""
    embedder.train()
    equal(vision_tower(embedder.mllm).training, True, "families.rest_frozen_tower")


# ------------------------------------------------------------------------------------ several ranks


@pytest.fixture(scope="module")
def ranks_of(once):
    """world -> what tests/ranks.py finds on so many ranks, started once each."""
    references = functools.cache(ranks.references)  # the same for all

    def start(world, folder):
        wanted, result = references(), folder / "result.json"  # as far as the ranks came
        on_ranks(world, lambda: ranks.main(wanted, result), folder)

    def get(world):
        folder = once(f"ranks-{world}", functools.partial(start, world))
        result = folder / "result.json"
        results = json.loads(result.read_text()) if result.exists() else {}
        return {**results, "said": said_on(folder)}

    return get


def check_rank(results, name, bound):
    """A setting's gradient, loss and hits on all ranks are those of one process."""
    hint = f"a result for {name!r}"
    expect(name in results, results["said"], hint, "tests/ranks.py ended early")
    of_ranks = results[name]
    gap = max(mine["gap"] for mine in of_ranks)
    loss = max(mine["loss"] for mine in of_ranks)
    top1 = max(mine["top1"] for mine in of_ranks)
    expect(gap <= bound, f"{name}: gap {gap:.1e}", f"<= {bound}", "d loss / d weights")
    expect(loss <= 10 * bound, loss, f"<= {10 * bound}", f"{name}: mean over all queries")
    expect(top1 < 1e-6, top1, 0, f"{name}: hits over all ranks")


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_have_the_gradient_of_one_process(ranks_of, world):
    """Ranks over gloo: each rank's gradient, the loss and the share of hits are those of one
    process on the whole batch (float64 1e-10, float32 1e-5), for chunks of one, some and all rows,
    a cached frozen tower, LoRA; the ranks differ in columns, in chunks and in having pictures."""
    results = ranks_of(world)
    expect("ranks" in results, results["said"], "a result", "tests/ranks.py did not start")
    for share in ("columns", "chunks", "pictures"):
        values = [mine[share] for mine in results["ranks"]]
        expect(len(set(values)) > 1, f"{share}: {values}", "unequal ranks", "ranks.batch_config")
    equal(results["ranks"][-1]["pictures"], 0, "the last rank has text alone")
    for name in ("one chunk at a time", "chunks, one graph kept", "everything in one chunk"):
        check_rank(results, name, 1e-10)
    for name in ("unequal queries", "several buckets", "frozen vision, cached", "LoRA"):
        check_rank(results, name, 1e-10)
    queries = [mine["queries"] for mine in results["unequal queries"]]
    expect(len(set(queries)) == world and sum(queries) == 16, queries, "unequal", "unequal_share")
    buckets = {mine["sums"] for mine in results["several buckets"]}
    expect(len(buckets) == 1 and min(buckets) > 2, buckets, "as many on all ranks", "sum_gradients")
    check_rank(results, "float32", 1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_begin_again_when_one_runs_out_of_memory(ranks_of, world):
    """In pass 1 or in pass 2, of rank 1 alone: every rank goes on with half the budget, and the
    gradient is that of one process, to 1e-10."""
    results = ranks_of(world)
    for name in ("out of memory in pass 1", "out of memory in pass 2"):
        check_rank(results, name, 1e-10)
        budgets = [mine["chunk_tokens"] for mine in results[name]]
        equal(budgets, [SOME.chunk_tokens // 2] * world, f"{name}: half, on all ranks")
    expect(results["ranks"][1]["chunks"] > 1, results["ranks"], "a second chunk", "ranks.SETTINGS")


@pytest.mark.parametrize("world", [2, 4])
def test_the_rank_check_fails_for_a_mean_and_for_a_gradient_that_stays(ranks_of, world):
    """Negative control: the mean over ranks has 1 / world of the gradient, in both stages; without
    the gradient that other ranks' queries have for my targets it is another one."""
    results = ranks_of(world)
    for name in ("wrong: mean over ranks", "wrong: stage 1, mean over ranks"):
        with pytest.raises(AssertionError, match="d loss"):
            check_rank(results, name, 1e-3)
        for mine in results[name]:
            close(mine["gap"], 1 - 1 / world, "exactly 1 / world of it", 1e-3)
    with pytest.raises(AssertionError, match="d loss"):
        check_rank(results, "wrong: targets' gradient stays", 0.1)


@pytest.mark.parametrize("world", [2, 4])
def test_stage_1_and_evaluation_are_the_same_on_several_ranks(ranks_of, world):
    """pretrain.accumulate (ranks with unequal answers) and evaluate.encode_over_ranks, to 1e-5."""
    check_rank(ranks_of(world), "stage 1", 1e-5)
    check_rank(ranks_of(world), "encode", 1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_ranks_have_the_gradient_of_one_process(ranks_of, world):
    """--fsdp (FSDP2): the same gradient to 1e-10, though the ranks have different numbers of chunks
    and only some of them see pictures. A step reduces each unit's gradient once: in the backward
    pass of the last chunk."""
    check_rank(ranks_of(world), "sharded", 1e-10)
    units = len(ranks.built("all").mllm.get_decoder().layers) + 1  # see sharding.shard
    sums = [mine["sums"] for mine in ranks_of(world)["sharded"]]
    equal(sums, [units] * world, "one reduction of each unit a step")
    expect(ranks_of(world)["ranks"][0]["chunks"] > 1, "one chunk", "several", "ranks.SOME")


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_gradients_in_bfloat16_are_summed_in_float32(ranks_of, world):
    """On a GPU --fsdp computes in bfloat16; of 96 chunks the sum is as good as of one. Negative
    control: without reduce_dtype it is not."""
    for mine in ranks_of(world)["bfloat16"]:
        expect(mine["96"] < 1.2 * mine["1"], mine, "no growth with chunks", "sharding.PRECISION")
    for mine in ranks_of(world)["wrong: sums in bfloat16"]:
        expect(mine["96"] > 3 * mine["1"], mine, "growth with chunks", "does the check see it?")
