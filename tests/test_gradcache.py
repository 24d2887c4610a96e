"""GradCache's gradient is that of the whole batch: for any chunks, with dropout, over ranks."""

import copy
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import ranks
import torch
from checks import close, distance, equal, expect

import contrastive
import model

ALL = 10**6  # a budget, and a number of graphs, that takes everything


@pytest.fixture(scope="module")
def built():
    """trained -> (embedder, what the plain whole batch gives), made once each."""
    made = {}

    def get(trained):
        if trained not in made:
            embedder = ranks.build(trained)
            made[trained] = embedder, ranks.whole_batch(embedder)
        return made[trained]

    return get


def check_step(got, want, hint, rel=1e-10):
    close(got["loss"], want["loss"], f"{hint}: loss of all queries", rel)
    equal(got["top1"], want["top1"], f"{hint}: share of hits")
    close(got["grad"], want["grad"], f"{hint}: gradient", rel)


# ------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(
    ("trained", "chunk_tokens", "keep", "vision_cache"),
    [
        ("all", 1, 0, "off"),
        ("all", 200, 1, "device"),  # nothing is cached of a tower that is trained
        ("all", ALL, ALL, "host"),
        ("all", 200, ALL, "off"),
        ("frozen", 1, 1, "host"),
        ("frozen", 200, 0, "device"),
        ("frozen", 200, 1, "off"),
        ("frozen", ALL, 0, "host"),
        ("lora", 1, ALL, "device"),
        ("lora", 200, 1, "host"),
        ("lora", 200, 0, "off"),
        ("lora", ALL, 1, "device"),
    ],
)
def test_the_gradient_is_that_of_the_whole_batch(built, trained, chunk_tokens, keep, vision_cache):
    """float64, to 1e-10: chunks of one item, some, all; no, one and all graphs kept; vision
    trained, frozen and cached on the device or the host, LoRA. The batch has pictures and plain
    text, hard negatives, several positives, repeated targets. (A covering list of pairs of
    settings.)"""
    embedder, want = built(trained)
    got = ranks.step(
        embedder,
        ranks.batch_of(embedder),
        chunk_tokens=chunk_tokens,
        keep=keep,
        vision_cache=vision_cache,
    )
    check_step(got, want, f"{trained}, chunk {chunk_tokens}, keep {keep}, cache {vision_cache}")
    equal(got["columns"], len(ranks.batch_of(embedder)["keys"]), "the targets that the loss saw")


def test_the_batch_of_these_tests_holds_the_hard_cases(built):
    """Pictures and text-only items, hard negatives, several positives, repeated targets."""
    embedder, want = built("all")
    batch = ranks.batch_of(embedder)
    pictures = sum(bool(r["images"]) for r in batch["rows"])
    expect(0 < pictures < len(batch["rows"]), pictures, "some pictures, some text", "ranks.PAIRS")
    positives = (batch["labels"] >= 0).sum(1)
    expect(set(positives.tolist()) == {1, 2}, positives, "1 and 2 positives", "ranks.picture_pair")
    columns = len(batch["keys"])
    expect(columns > positives.sum(), columns, f"> {positives.sum()}", "hard negatives are columns")
    expect(len(set(batch["keys"].tolist())) < columns, columns, "repeated targets", "their keys")
    size, top1 = want["grad"].norm(), want["top1"]
    expect(size > 1e-2 and 0 < top1 < 1, (size, top1), "a gradient, some hits", "too easy a batch")


def test_the_gradient_is_added_to_grad(built):
    """As autograd does: two steps without zero_grad leave the sum."""
    embedder, want = built("lora")
    batch = ranks.batch_of(embedder)
    embedder.zero_grad(set_to_none=True)
    for _ in range(2):
        contrastive.gradcache_step(
            embedder, batch["rows"], batch["labels"], batch["keys"], ranks.TEMPERATURE, 200
        )
    close(ranks.gradient(embedder), 2 * want["grad"], "accumulation over two steps", 1e-10)


def test_float32_is_as_good_as_a_plain_float32_batch():
    """The relative gap to the whole batch in float32 is rounding: below 1e-5."""
    embedder = ranks.build(dtype=torch.float32)
    want = ranks.whole_batch(embedder)
    check_step(ranks.step(embedder, ranks.batch_of(embedder)), want, "float32", 1e-5)


def looks(embedder, **how):
    """How many times each patch of the batch's pictures goes through the vision tower in one
    step."""
    seen, batch = [], ranks.batch_of(embedder)
    embed = embedder.mllm.get_encoder(modality="image").patch_embed
    hook = embed.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    ranks.step(embedder, batch, **how)
    hook.remove()
    return sum(seen) / sum(len(r["images"]["pixel_values"]) for r in batch["rows"] if r["images"])


def test_a_frozen_tower_sees_each_picture_once(built):
    """vision_cache: one look at each picture where the tower is frozen; two with "off", and two
    where the tower is trained (with one the gradient would be wrong)."""
    frozen, trained = built("frozen")[0], built("all")[0]
    for where in ("device", "host"):
        equal(looks(frozen, keep=0, vision_cache=where), 1, f"{where}: once a picture")
    equal(looks(frozen, keep=0, vision_cache="off"), 2, "off: in both passes")
    equal(looks(trained, keep=0, vision_cache="device"), 2, "trained: in both passes")
    equal(looks(trained, keep=ALL), 1, "with its graph kept a chunk is run once")


@pytest.mark.parametrize("only_with_graph", [False, True])
def test_a_chunk_that_does_not_fit_halves_the_budget(built, monkeypatch, only_with_graph):
    """When memory runs out, in pass 1 or in pass 2, the step begins again with half the tokens,
    leaves the right gradient and returns the budget that worked."""
    embedder, want = built("frozen")
    forward = type(embedder).forward

    def small_machine(self, inputs):
        if inputs["input_ids"].numel() > 300 and torch.is_grad_enabled() >= only_with_graph:
            raise torch.OutOfMemoryError("no memory")
        return forward(self, inputs)

    monkeypatch.setattr(type(embedder), "forward", small_machine)
    batch = ranks.batch_of(embedder)
    got = ranks.step(embedder, batch, chunk_tokens=1000, keep=0, vision_cache="device")
    check_step(got, want, "after running out of memory")
    equal(got["chunk_tokens"], 250, "1000, 500, 250: what fits 300")
    with pytest.raises(model.InputError, match="out of memory"):
        monkeypatch.setattr(type(embedder), "forward", no_memory)
        ranks.step(embedder, batch, chunk_tokens=1000)


def no_memory(self, inputs):
    raise torch.OutOfMemoryError("no memory at all")


# ------------------------------------------------------------------------------------------ dropout


def one_graph(embedder, chunk_tokens=200):
    """The same chunks in the same order, so the same random numbers, but all in one graph."""
    batch = ranks.batch_of(embedder)
    rows, z = batch["rows"], {}
    torch.manual_seed(5)
    for chunk in model.token_chunks([len(r["tokens"]["input_ids"]) for r in rows], chunk_tokens):
        part = embedder(embedder.collate.pad_rows([rows[i] for i in chunk]))
        z |= dict(zip(chunk, part, strict=True))
    z = torch.stack([z[i] for i in range(len(rows))])
    loss, top1 = ranks.plain_loss(z, batch["labels"], batch["keys"])
    embedder.zero_grad(set_to_none=True)
    loss.backward()
    return dict(loss=loss.item(), top1=top1, grad=ranks.gradient(embedder))


def with_dropout(trained, **more):
    """An embedder in training mode: dropout 0.1 in all attention, or in front of LoRA's
    matrices."""
    if trained == "lora":
        return ranks.build("lora", lora_dropout=0.1, **more).train()
    embedder = ranks.build(trained, **more).train()
    for part in embedder.mllm.model.language_model.modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.1
    return embedder


def check_dropout(embedder, **how):
    want = one_graph(embedder)
    torch.manual_seed(5)
    check_step(ranks.step(embedder, ranks.batch_of(embedder), **how), want, f"dropout, {how}")


@pytest.mark.parametrize(
    ("trained", "how"),
    [
        ("all", dict(keep=0)),
        ("all", dict(keep=1)),
        ("frozen", dict(keep=0, vision_cache="device")),
        ("lora", dict(keep=0)),
        ("lora", dict(keep=1, vision_cache="host")),
        ("lora", dict(keep=ALL)),
    ],
)
def test_dropout_falls_alike_in_both_passes(trained, how):
    """With dropout 0.1 the gradient is that of one graph over the same chunks with the same random
    numbers, to 1e-10: the second pass replays the generator's state."""
    check_dropout(with_dropout(trained), **how)


def test_dropout_falls_alike_under_gradient_checkpointing():
    """--checkpointing runs each layer twice more; the random numbers are still those of pass 1."""
    embedder = with_dropout("all", checkpointing=True)
    check_dropout(embedder, keep=0)


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_the_dropout_check_fails_without_replay(monkeypatch, trained):
    """Negative control: fresh random numbers in the second pass give the gradient of no loss."""
    embedder = with_dropout(trained)
    want = one_graph(embedder)

    @contextmanager
    def no_replay(state, device):
        yield

    monkeypatch.setattr(contrastive, "replay", no_replay)
    torch.manual_seed(5)
    got = ranks.step(embedder, ranks.batch_of(embedder), keep=0)
    gap = distance(got["grad"], want["grad"])
    expect(gap > 0.01, f"gap {gap:.1e}", "> 0.01", "does the model drop anything?")
    monkeypatch.undo()
    check_dropout(embedder, keep=0)


def test_replay_leaves_the_generator_as_it_was():
    """After a step with dropout the next random numbers are those after pass 1, so that a run is a
    function of its seed whatever --keep-graphs is."""
    embedder, after = with_dropout("lora"), []
    for keep in (0, 1, ALL):
        torch.manual_seed(5)
        ranks.step(embedder, ranks.batch_of(embedder), keep=keep)
        after.append(torch.rand(1).item())
    equal(after, after[:1] * 3, "replay forks the generator")


# ------------------------------------------------------------------------------------ several ranks


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory):
    """world -> what tests/ranks.py found with so many ranks; one torchrun each."""
    folder, done = tmp_path_factory.mktemp("ranks"), {}
    torch.save(ranks.references(), folder / "references.pt")

    def get(world):
        if world not in done:
            script, result = str(Path(ranks.__file__)), folder / f"result{world}.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(world), script]
            command += [str(folder / "references.pt"), str(result)]
            given = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
            run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=given)
            done[world] = json.loads(result.read_text()) if result.exists() else {}
            done[world]["stderr"] = run.stderr[-3000:]
        return done[world]

    return get


def check_rank(found, name, bound):
    """A setting's gradient, loss and hits on all ranks are those of one process."""
    expect(name in found, found["stderr"], f"a result for {name!r}", "tests/ranks.py ended early")
    got = found[name]
    expect(
        got["gap"] <= bound, f"{name}: gap {got['gap']:.1e}", f"<= {bound}", "d loss / d weights"
    )
    expect(
        got["loss"] <= 10 * bound, got["loss"], f"<= {10 * bound}", f"{name}: mean over all queries"
    )
    expect(got["top1"] < 1e-9, got["top1"], 0, f"{name}: hits over all ranks")


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_have_the_gradient_of_one_process(ranks_of, world):
    """torchrun over gloo: each rank's gradient, the loss and the share of hits are those of one
    process on the whole batch (float64 1e-10, float32 1e-5), for chunks of one, some and all rows,
    a cached frozen tower, LoRA; the ranks differ in columns, in chunks and in having pictures."""
    found = ranks_of(world)
    expect("ranks" in found, found["stderr"], "a result", "tests/ranks.py did not start")
    for what, values in found["ranks"].items():
        expect(len(set(values)) > 1, f"{what}: {values}", "unequal ranks", "ranks.batch_config")
    equal(found["ranks"]["pictures"][-1], 0, "the last rank has text alone")
    for name in ("one chunk at a time", "chunks, one graph kept", "everything in one chunk"):
        check_rank(found, name, 1e-10)
    check_rank(found, "frozen vision, cached", 1e-10)
    check_rank(found, "LoRA", 1e-10)
    check_rank(found, "float32", 1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_the_rank_check_fails_for_a_mean_and_for_a_gradient_that_stays(ranks_of, world):
    """Negative control: the mean over ranks has 1 / world of the gradient, in both stages; without
    the gradient that other ranks' queries have for my targets it is another one."""
    found = ranks_of(world)
    for name in ("wrong: mean over ranks", "wrong: stage 1, mean over ranks"):
        with pytest.raises(AssertionError, match="d loss"):
            check_rank(found, name, 1e-3)
        close(found[name]["gap"], 1 - 1 / world, "exactly 1 / world of it", 1e-3)
    with pytest.raises(AssertionError, match="d loss"):
        check_rank(found, "wrong: targets' gradient stays", 0.1)


@pytest.mark.parametrize("world", [2, 4])
def test_stage_1_and_evaluation_are_the_same_on_several_ranks(ranks_of, world):
    """pretrain.accumulate (ranks with unequal answers) and evaluate.encode_sharded, to 1e-5."""
    check_rank(ranks_of(world), "stage 1", 1e-5)
    check_rank(ranks_of(world), "encode", 1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_ranks_have_the_gradient_of_one_process(ranks_of, world):
    """--fsdp (FSDP2): the same gradient to 1e-10, though the ranks have different numbers of chunks
    and only some of them see pictures."""
    check_rank(ranks_of(world), "sharded", 1e-10)


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
        equal([i for p in parts for i in p["ids"]], alone["ids"], "the same pairs")
        equal(torch.cat([p["keys"] for p in parts]), alone["keys"], "the same columns")


def check_batch(local_batch, embedder):
    for rank, world in ((0, 1), (1, 2), (2, 4)):
        cfg, share = ranks.batch_config(), 16 // world
        batch = local_batch(ranks.PAIRS, embedder.collate, cfg, 0, rank, world)
        drawn = contrastive.draw(ranks.PAIRS, cfg, 0)
        pairs = [ranks.PAIRS[name][i] for name, i in drawn[rank * share : (rank + 1) * share]]
        columns = [x for pair in pairs for x in (*pair.targets, *pair.negatives)]
        for row, item in zip(batch["rows"], [p.query for p in pairs] + columns, strict=True):
            want = embedder.collate.row(item)["tokens"]["input_ids"]
            equal(row["tokens"]["input_ids"], want, "queries, then each pair's targets, negatives")
        equal(batch["keys"].tolist(), [x.key for x in columns], "one key a column, its content's")
        for pair, mine in zip(pairs, batch["labels"].tolist(), strict=True):
            named = [columns[p] for p in mine if p >= 0]
            equal(named, list(pair.targets), "the labels point at the pair's own targets")


def test_a_batch_is_queries_targets_negatives_and_where_the_positives_stand(shared):
    """local_batch on several ranks: rows, keys and labels, column by column."""
    check_batch(contrastive.local_batch, shared)


def test_the_batch_check_fails_for_labels_that_forget_hard_negatives(shared):
    """Negative control: query i's first positive at column i."""

    def forgets(*args):
        batch = contrastive.local_batch(*args)
        shift = batch["labels"][:, :1] - torch.arange(len(batch["labels"]))[:, None]
        return batch | dict(labels=torch.where(batch["labels"] >= 0, batch["labels"] - shift, -1))

    with pytest.raises(AssertionError):
        check_batch(forgets, shared)


def test_keys_are_unique_where_false_negatives_stay(shared):
    """--no-mask-false-negatives: no two columns share a key, on all ranks together."""
    cfg = ranks.batch_config()
    cfg.mask_false_negatives = False
    parts = [
        contrastive.local_batch(ranks.PAIRS, shared.collate, cfg, 0, r, 2)["keys"] for r in (0, 1)
    ]
    keys = torch.cat(parts).tolist()
    equal(len(set(keys)), len(keys), "each column is a negative of every other query")
