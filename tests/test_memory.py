"""What fits into memory: chunks of rows within a token budget, and a budget that is halved; where
ranks meet, and a step is left. (The gradient of a step that ran out of memory: test_gradcache.py;
real signals: test_ending.py.)"""

import weakref
from types import SimpleNamespace

import families
import pytest
import torch
from checks import equal, expect
from PIL import Image
from torch.utils._pytree import tree_leaves

import model
from data import IMAGE, Item
from plumbing import memory
from plumbing.config import CHUNK_TOKENS
from plumbing.ending import StepLeft
from plumbing.errors import InputError, OfAllRanks
from plumbing.families import vision_tower
from plumbing.memory import Budget, answering, meeting, token_chunks, until_it_fits


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
    way_out = "at --chunk-tokens 50, the longest row alone: try a smaller --graph-memory"
    with pytest.raises(OfAllRanks, match=f"out of memory {way_out}"):
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
    with pytest.raises(InputError, match="in the loss, where smaller chunks do not help") as told:
        meeting(loss_of)(z).backward()
    equal(type(told.value), InputError, "of one rank: the others hear nothing of it")


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


@pytest.mark.parametrize(("where", "waits"), [("device", "meta"), ("host", "cpu")])
def test_a_towers_output_waits_where_it_is_asked_to(where, waits, monkeypatch):
    """On the GPU, or beside it, where there is more room; recalled it is on the GPU again. (The
    device "meta" stands for it.)"""
    moves, tower = [], torch.nn.Linear(2, 3, device="meta")
    monkeypatch.setattr(memory, "to_device", lambda x, device: moves.append(device.type) or x)
    for second_pass in (False, True):
        with torch.set_grad_enabled(second_pass), answering(tower, outputs := {}, 0, where):
            outputs.update({(0, 0): "said"} if second_pass else {})
            tower(torch.ones(1, 2, device="meta"))
    equal(moves, [waits, "meta"], "--vision-cache")


# ------------------------------------------------------------------------------------ many towers


class Tower(torch.nn.Linear):
    """It counts how often it looks."""

    looks = 0

    def forward(self, x):
        self.looks += 1
        return super().forward(x)


class Seeing(torch.nn.Module):
    """A model that is a tower."""

    def __init__(self, trained):
        super().__init__()
        self.tower = Tower(2, 3).requires_grad_(trained)

    def get_encoder(self, modality):
        return self.tower

    def embed(self, chunk):
        return self.tower(torch.tensor(chunk, dtype=torch.float32)[:, None].expand(-1, 2))


@pytest.mark.parametrize(
    ("trained", "where", "remembers"),
    [(False, "device", True), (False, "host", True), (False, "off", False), (True, "host", False)],
)
def test_only_a_frozen_tower_is_remembered_and_where_it_is_asked_for(trained, where, remembers):
    """Chunks are told apart by their first row, not by their size; weights that are trained say
    something else in pass 2, or need their graph."""
    mllm = Seeing(trained)
    embed = memory.remember_tower(mllm.embed, mllm, where)
    expect((embed == mllm.embed) != remembers, embed, f"remembers: {remembers}", "remember_tower")
    with torch.no_grad():
        first = [embed(chunk) for chunk in ([1, 2], [3, 4])]
        looks = mllm.tower.looks
    expect(not torch.equal(*first), first, "two outputs", "the test would be too easy")
    again = [embed(chunk) for chunk in ([1, 2], [3, 4])]
    equal([x.tolist() for x in again], [x.tolist() for x in first], "each chunk its own")
    equal(mllm.tower.looks - looks, 0 if remembers else 2, "passes through the tower in pass 2")


def test_what_was_said_is_remembered_as_it_was_said():
    """Trap: the Qwens put something else into the fields of it."""

    class Family(torch.nn.Linear):
        def forward(self, x):
            return {"features": super().forward(x)}

    tower, x, outputs = Family(2, 3), torch.randn(1, 2), {}
    with torch.no_grad(), answering(tower, outputs, 0, "device"):
        said = tower(x)
        features = said["features"]
        said["features"] = None
    with answering(tower, outputs, 0, "device"):
        equal(tower(x)["features"], features, "memory.to_device: a container of its own")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_is_remembered_is_what_the_language_model_takes(family, tmp_path):
    """Of a Qwen's tower its tokens, and not its patches; and the embedding is the same."""
    folder = families.build(family, tmp_path / "m")
    embedder = model.load(folder, 4, "mean", "chat", "cpu").eval()
    tower, outputs = vision_tower(embedder.mllm).requires_grad_(False), {}
    inputs = embedder.collate([Item(IMAGE, (Image.new("RGB", (64, 64), "red"),))])
    with torch.no_grad(), answering(tower, outputs, 0, "device"):
        first = embedder(inputs)
    (said,) = outputs.values()
    kept = sum(x.numel() for x in tree_leaves(said) if isinstance(x, torch.Tensor))
    with answering(tower, outputs, 0, "device"):
        equal(embedder(inputs).tolist(), first.tolist(), "from what is remembered")
    if family in ("qwen2_vl", "qwen2_5_vl"):
        tokens = int((inputs["mm_token_type_ids"] > 0).sum())
        width = embedder.mllm.config.get_text_config().hidden_size
        equal(kept, tokens * width, "numbers")


def test_a_tower_of_which_a_part_is_trained_is_not_remembered():
    """One weight that moves is enough."""
    mllm = Seeing(trained=False)
    mllm.tower.bias.requires_grad_()
    equal(memory.remember_tower(mllm.embed, mllm, "device") == mllm.embed, True, "any(...)")


def test_what_is_remembered_is_a_copy_and_not_the_same_container():
    """Trap: the Qwens overwrite fields of what their tower said."""
    output = {"a": [torch.ones(2)]}
    moved = memory.to_device(output, torch.device("cpu"))
    moved["a"].append(3)
    equal(len(output["a"]), 1, "another container")
    moved = memory.to_device({"a": torch.ones(2), "b": 1}, torch.device("meta"))
    equal(moved["a"].device.type, "meta", "to_device")


@pytest.mark.parametrize("is_there", [False, True])
def test_what_goes_to_a_gpu_is_pinned_where_it_is_on_the_host(is_there):
    """What a GPU holds cannot be pinned: a frozen tower's output that waits there."""
    went = []

    class Moving(torch.Tensor):
        is_cuda = is_there

        def pin_memory(self):
            went.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            went.append((device.type, non_blocking))
            return self

    memory.to_device({"a": torch.ones(2).as_subclass(Moving)}, torch.device("cuda"))
    equal(went, ["pinned"] * (not is_there) + [("cuda", True)], "and the host goes on")


# ----------------------------------------------------------------------------- what a step may take


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_budget_is_what_has_fitted_else_the_flags_else_the_devices(device):
    """Chunks; how many graphs are kept is measured (plumbing/graphs.py)."""
    device = torch.device(device)
    own = CHUNK_TOKENS[device.type]
    for fitting, chunk_tokens, want in ((0, None, own), (0, 7, 7), (5, 7, 5), (5, None, 5)):
        cfg = SimpleNamespace(fitting=fitting, chunk_tokens=chunk_tokens, vision_cache="host")
        equal(tuple(Budget.of(cfg, device, 3)), (want, 3, "host"), f"{fitting} {chunk_tokens}")


# -------------------------------------------------------------------------------- where ranks meet


@pytest.fixture
def others(monkeypatch):
    """others(words): what the other ranks say at the next meetings; what this one said."""

    def say(*words):
        said, left = [], list(words)

        def gather(word):
            said.append(word)
            return [word, *left.pop(0)]

        monkeypatch.setattr(memory, "gather_objects", gather)
        return said

    return say


FITS, FITS_NOT, LEFT = memory.FITS, memory.FITS_NOT, memory.LEFT


def test_the_worst_word_of_any_rank_counts(others):
    """Who leaves ends the step for all, also where another one is out of memory."""
    for word, words, error in (
        (FITS, (FITS, FITS), None), (FITS, (FITS, FITS_NOT), memory.DoesNotFit),
        (FITS_NOT, (FITS, FITS), memory.DoesNotFit), (FITS, (LEFT, FITS), StepLeft),
        (LEFT, (FITS_NOT, FITS), StepLeft), (FITS_NOT, (LEFT, FITS), StepLeft),
    ):  # fmt: skip
        others(words)
        if error is None:
            memory.meet(word)
        else:
            with pytest.raises(error):
                memory.meet(word)


@pytest.mark.parametrize("late", [None, 0, 1, 3])
def test_chunks_end_where_a_signal_has_waited_too_long(others, monkeypatch, late):
    """Before the chunk that is next; in the end all ranks hear it, and leave. Without a signal, or
    where there is no next chunk, all of them come; another rank's leaving is heard in the end."""
    seen = []
    monkeypatch.setattr(memory, "overdue", lambda: late is not None and len(seen) >= late)

    def all_chunks():
        with memory.all_ranks_or_none():
            for chunk in memory.unless_overdue("abc"):
                seen.append(chunk)

    said = others((FITS,))
    if late in (None, 3):
        all_chunks()
    else:
        with pytest.raises(StepLeft):
            all_chunks()
    equal("".join(seen), "abc"[:late], "chunks")
    equal(said, [FITS if late in (None, 3) else LEFT], "one meeting, in the end")
    if late is None:
        others((LEFT,))
        with pytest.raises(StepLeft):
            all_chunks()


@pytest.mark.parametrize("together", [False, True])
def test_a_step_of_gradcache_is_left_before_its_next_chunk(others, monkeypatch, together):
    """A rank by itself, to say so where the ranks meet; sharded ranks look together, each time."""
    late = []
    monkeypatch.setattr(memory, "overdue", lambda: bool(late))
    monkeypatch.setattr(memory.sharding, "sharded", lambda _: together)
    embed = memory.leavable(lambda chunk: chunk, None)
    said = others((FITS,), (FITS,), (LEFT,))
    equal(embed([1]), [1], "as it is")
    late.append(1)
    with pytest.raises(StepLeft if together else memory.Leaving):
        embed([2])
    equal(said, [FITS, LEFT] if together else [], "meetings")
    if together:
        late.clear()
        with pytest.raises(StepLeft):
            embed([3])


def raising(error):
    def attempt(chunk_tokens):
        if error:
            raise error

    return attempt


def test_each_attempt_ends_with_a_meeting_whatever_befell_it(others):
    """Out of memory, left, or well: the others hear it; any other error is one."""
    no_room = torch.OutOfMemoryError("planted")
    for error, word in ((None, FITS), (no_room, FITS_NOT), (memory.Leaving(), LEFT)):
        for theirs in (FITS, FITS_NOT, LEFT):
            said = others((theirs,))
            worst = max(word, theirs)
            if worst == LEFT:
                with pytest.raises(StepLeft):
                    memory.fits_into_memory(raising(error), 100)
            else:
                equal(memory.fits_into_memory(raising(error), 100), worst == FITS, "fits")
            equal(said, [word], f"{error!r}")
    said = others((FITS,))
    with pytest.raises(memory.DoesNotFit):
        raising(memory.DoesNotFit())(1)
    equal(memory.fits_into_memory(raising(memory.DoesNotFit()), 100), False, "heard on the way")
    equal(said, [], "all have met already")
    with pytest.raises(ZeroDivisionError):
        memory.fits_into_memory(raising(ZeroDivisionError()), 100)


def test_the_graphs_of_a_rank_without_memory_are_gone_before_the_ranks_meet(monkeypatch):
    """On a GPU to meet takes memory, too; and an error keeps what its frames held."""
    made, alive = [], []

    def attempt(chunk_tokens):
        z = torch.ones(2, requires_grad=True).exp()
        made.append(weakref.ref(z))
        raise torch.OutOfMemoryError("planted")

    def gather(x):
        alive.append(made[0]() is not None)
        return [x]

    monkeypatch.setattr(memory, "gather_objects", gather)
    equal(memory.fits_into_memory(attempt, 100), False, "planted")
    equal(alive, [False], "a graph while the ranks meet")


@pytest.mark.parametrize("mine", [False, True])
def test_where_one_rank_has_no_memory_in_stage_1_all_end_with_the_way_out(others, mine):
    """Whichever it is. The weights are as they were, and so the steps before can be saved."""
    others((FITS if mine else FITS_NOT,))
    with pytest.raises(OfAllRanks, match="out of memory: try a smaller --chunk-tokens"):
        with memory.all_ranks_or_none():
            raising(torch.OutOfMemoryError("planted") if mine else None)(100)


def test_all_ranks_give_up_together_where_each_row_stands_alone(others):
    """By the shortest of all ranks' longest rows, and not by one's own."""
    starts = []

    def attempt(chunk_tokens):
        if chunk_tokens > 60:
            raise torch.OutOfMemoryError("planted")

    # Meeting, longest rows; this rank's longest row has 500 tokens, the other's 80.
    others((FITS,), (80,), (FITS,))
    equal(until_it_fits(attempt, 80, 500, lambda: starts.append(1)), 40, "two short rows")
    equal(starts, [1], "from the beginning")
    others((FITS,), (80,))
    with pytest.raises(OfAllRanks, match="--chunk-tokens 70, the longest row alone: try"):
        until_it_fits(attempt, 70, 500, starts.clear)


def test_ranks_meet_before_the_loss(others):
    """Where one ran out of memory in pass 1 no rank computes a loss."""
    others((FITS_NOT,))
    with pytest.raises(memory.DoesNotFit):
        meeting(lambda z: pytest.fail("a loss"))(torch.ones(2, requires_grad=True))
    others((FITS,))
    z = torch.ones(2, requires_grad=True)
    loss = meeting(lambda z: 3 * z.sum())(z)
    loss.backward()
    equal((loss.item(), z.grad.tolist()), (6.0, [3.0, 3.0]), "both fit")
