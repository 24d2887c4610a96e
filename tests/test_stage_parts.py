"""The three main functions hand on what they are given: a short run of each in one process, with
parts of it watched or replaced. (What a flag moves in the end: test_every_flag.py.)"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checks import equal, expect, toy

import contrastive
import evaluate
import model
import plumbing.log
import plumbing.ranks
import pretrain
from data import Item, Task, read_dialogues, read_pairs
from plumbing.errors import InputError
from plumbing.sampling import epoch_batch

STAGES = [pretrain, contrastive]
FLAGS = dict(model="toy-random", steps=2, batch=4, save_every=0, workers=0, muon_lr=0.0)


class Enough(Exception):
    """What a test wanted to see has been seen."""


def config(stage, out, **flags):
    flags = {**FLAGS, "out": str(out), **flags}
    return stage.Config(**flags, **({"block": 2} if stage is contrastive else {}))


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(r, world): this process takes itself for one of several, and meets nobody."""

    def become(rank, world):
        monkeypatch.setattr(plumbing.ranks, "rank", lambda: rank)
        monkeypatch.setattr(plumbing.ranks, "world", lambda: world)

    return become


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """watched(stage, **flags) -> what main asks of its loader: the function that makes a batch, the
    steps, the workers; and its Config. Nothing is trained."""

    def run(stage, begin=0, start=None, **flags):
        cfg, seen = config(stage, tmp_path / "out", **flags), {}
        monkeypatch.setattr(stage.checkpoint, "begin", lambda cfg: torch.device("cpu"))
        monkeypatch.setattr(stage, "load_for", lambda *_: start or toy())
        monkeypatch.setattr(stage.checkpoint, "start_or_resume", lambda *_: begin)

        def log(cfg, start):
            seen.update(logged_from=start)
            return SimpleNamespace(waiting=iter)

        def prefetch(make, steps, workers, device):
            seen.update(make=make, steps=steps, workers=workers, device=device)
            raise Enough

        monkeypatch.setattr(stage, "Log", log)
        monkeypatch.setattr(stage, "prefetch", prefetch)
        with pytest.raises(Enough):
            stage.main(cfg)
        return SimpleNamespace(**seen, cfg=cfg)

    return run


# -------------------------------------------------------------------------------- before it trains


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_goes_on_asks_for_the_steps_that_are_left(watched, stage):
    """From a checkpoint at step 3 of 7, with the flags' loader processes, for the rank's device: to
    a GPU pictures travel in half the bytes. The log keeps what it says of the steps before."""
    seen = watched(stage, begin=3, steps=7, workers=1)
    equal((seen.steps, seen.workers, seen.device), (range(3, 7), 1, torch.device("cpu")), "main")
    equal(seen.logged_from, 3, "Log(cfg, start)")


@pytest.mark.parametrize("stage", STAGES)
def test_the_data_have_a_digest_that_a_checkpoint_will_hold(watched, stage):
    """So that it is not resumed with others: a number, and the same for the same data."""
    one, other = (watched(stage, seed=seed).cfg.data_digest for seed in (0, 0))
    expect(one == other and one, one, "a number", "cfg.data_digest")


@pytest.fixture
def seed_of_loading(tmp_path, monkeypatch):
    """Of a stage and --seed: torch's seed when the model is loaded."""

    def load_for(cfg, device):
        raise Enough

    def seed_of(stage, seed):
        monkeypatch.setattr(stage.checkpoint, "begin", lambda cfg: torch.device("cpu"))
        monkeypatch.setattr(stage, "load_for", load_for)
        with pytest.raises(Enough):
            stage.main(config(stage, tmp_path, seed=seed))
        return torch.initial_seed()

    return seed_of


@pytest.mark.parametrize("stage", STAGES)
def test_the_seed_is_set_before_the_model_is_loaded(seed_of_loading, stage):
    """LoRA's matrices are drawn."""
    seeds = [seed_of_loading(stage, seed) for seed in (3, 4)]
    equal(seeds, [3, 4], "torch.manual_seed")


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_drawn_anew_is_the_same_on_all_ranks(seed_of_loading, as_rank, stage):
    """LoRA's matrices: only gradients are summed, so ranks that began apart would stay apart, and
    what is saved would be rank 0's alone."""
    seeds = []
    for rank in (0, 1):
        as_rank(rank, 2)
        seeds.append(seed_of_loading(stage, 3))
    equal(seeds, [3, 3], "torch.manual_seed, rank by rank")


def test_the_flags_of_the_data_reach_both_stages(watched, monkeypatch):
    """Source, pictures and --skip-bad's list, seed, and what is a stage's own."""
    read = []

    def reader(function):
        def noted(source, place, *rest):
            read.append((source, place.image_root, place.skip_bad, *rest))
            return function()

        return noted

    monkeypatch.setattr(pretrain, "read_dialogues", reader(pretrain.read_dialogues))
    monkeypatch.setattr(contrastive, "read_pairs", reader(contrastive.read_pairs))
    watched(pretrain, seed=3, texts=0.5, turns=2)
    watched(pretrain, seed=3, caption=True)
    watched(pretrain, data="talks.jsonl", image_root="r", skip_bad="bad")
    watched(contrastive, seed=3, subsets="vqa:5")
    flags = dict(subsets="A", split="diverse_instruction", image_root="r", skip_bad="bad")
    watched(contrastive, data="a folder", **flags)
    want = [
        ("shapes", "", "", 3, 2, False, 0.5), ("shapes", "", "", 3, 0, True, 0.0),
        ("talks.jsonl", "r", "bad", 0, 0, False, 0.0), ("shapes", "", "", "vqa:5", 3, "original"),
        ("a folder", "r", "bad", "A", 0, "diverse_instruction"),
    ]  # fmt: skip
    equal(read, want, "read_dialogues, read_pairs")


def test_each_rank_of_stage_1_makes_its_own_share(watched, as_rank):
    """Of the batch of one process; here rank 1 of 2."""
    as_rank(1, 2)
    seen = watched(pretrain)
    want = [f"shapes-train-{i}" for i in epoch_batch(10**9, seen.cfg, 5, 1, 2)]
    equal([x.id for x in seen.make(5)], want, "epoch_batch(..., rank, world)")


def test_each_rank_of_stage_2_makes_its_own_share(watched, as_rank):
    """Of the batch of one process; here rank 1 of 2."""
    as_rank(1, 2)
    seen = watched(contrastive)
    alone = contrastive.draw({name: range(10**9) for name in seen_sets(seen)}, seen.cfg, 5)
    equal(seen.make(5).ids, [f"{name}[{i}]" for name, i in alone[2:]], "local_batch")


def seen_sets(seen):
    return contrastive.read_pairs(seen.cfg.data, None, seen.cfg.subsets)


def test_which_dialogues_are_asked_first_is_drawn_anew_in_each_step(watched, monkeypatch):
    """--question-first: a question that stood before the code in one epoch stands behind it in
    another."""
    seen, steps = watched(pretrain), []

    def noted(dialogue, cfg, step):
        steps.append(step)
        return dialogue

    monkeypatch.setattr(pretrain, "ask_first", noted)
    seen.make(3)
    equal(steps, [3] * 4, "the step of the batch that is made")


def test_the_teacher_is_asked_what_the_model_is_asked(watched):
    """--objective kl --question-first 1: the question stands before the code, and in the teacher's
    row beside the picture."""
    embedder = toy()
    seen = watched(pretrain, start=embedder, objective="kl", question_first=1.0)
    for example in seen.make(0):
        question, _ = read_dialogues()[int(example.id.rpartition("-")[2])].turns[0]
        for tokens in (example.row.tokens, example.teacher_row.tokens):
            content = tokens["input_ids"][tokens["roles"] == pretrain.CONTENT]
            said = embedder.processor.tokenizer.decode(content)
            expect(question in said, said, question, "sampling.ask_first, of both rows")


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_that_ranks_cannot_share_is_refused_by_main(stage, tmp_path, as_rank, monkeypatch):
    """Before the model is loaded."""
    as_rank(0, 3)
    monkeypatch.setattr(stage.checkpoint, "begin", lambda cfg: torch.device("cpu"))
    monkeypatch.setattr(stage, "load_for", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match="--batch 2"):
        stage.main(config(stage, tmp_path, batch=2))


def test_what_is_sharded_is_sharded_before_its_optimiser_is_made(watched, monkeypatch):
    """An optimiser of the whole weights would train none of the shards."""
    order = []
    make = contrastive.optim.make_optimizers
    monkeypatch.setattr(contrastive.combinations, "refuse_impossible", lambda cfg, world: None)
    monkeypatch.setattr(contrastive.sharding, "shard", lambda _: order.append("shard"))

    def noted(embedder, cfg):
        order.append("optimiser")
        return make(embedder, cfg)

    monkeypatch.setattr(contrastive.optim, "make_optimizers", noted)
    watched(contrastive, fsdp=True)
    watched(contrastive)
    equal(order, ["shard", "optimiser", "optimiser"], "--fsdp, and without it")


# ---------------------------------------------------------------------------------- while it trains


def trained(monkeypatch, stage, out, take_step=None, **flags):
    """A run of a stage from a toy that is there already, stage 2's with another step if one is
    given. -> (its Config, the calls in their order, the lines of log.jsonl)."""
    cfg, calls = config(stage, out, **flags), []
    K = flags.get("compress_tokens", 4)
    embedder = toy() if K else model.load("toy-random", compress_tokens=0, device="cpu")
    embedder.eval()
    monkeypatch.setattr(stage, "load_for", lambda *_: embedder)
    sum_gradients, end_step = plumbing.ranks.sum_gradients, stage.optim.end_step

    def summed(parameters):
        parameters = list(parameters)
        calls.append(("sum", len(parameters), embedder.training))
        sum_gradients(parameters)

    def ended(*args):
        norm = end_step(*args)
        calls.append(("step", args[3], args[4], norm, args[5]))
        return norm

    def finish(save, embedder, cfg, **options):
        calls.append(("finish", options))

    monkeypatch.setattr(plumbing.ranks, "sum_gradients", summed)
    monkeypatch.setattr(stage.optim, "end_step", ended)
    monkeypatch.setattr(stage.checkpoint, "finish", finish)
    stage.main(cfg, **({"take_step": take_step} if take_step else {}))
    lines = Path(out, "log.jsonl").read_text().splitlines()[1:]
    return cfg, calls, [json.loads(line) for line in lines], embedder


def names_of(stage, cfg, step) -> list:
    """What messages call the examples of a step."""
    if stage is pretrain:
        dialogues = read_dialogues(seed=cfg.seed)
        return [dialogues[i].id for i in epoch_batch(len(dialogues), cfg, step, 0, 1)]
    pairs = read_pairs(seed=cfg.seed)
    return [f"{name}[{i}]" for name, i in contrastive.draw(pairs, cfg, step)]


@pytest.mark.parametrize("stage", STAGES)
def test_in_each_step_gradients_are_summed_over_ranks_before_the_step(monkeypatch, tmp_path, stage):
    """All parameters', once, in training mode; and in the end the model is saved as an embedder."""
    out, flags = tmp_path / "out", dict(steps=2, warmup=1.0)
    cfg, calls, lines, embedder = trained(monkeypatch, stage, out, **flags)
    n = len(list(embedder.parameters()))
    summed = ("sum", n, True)
    equal([calls[0], calls[2]], [summed] * 2, "before each step")
    equal([call[:2] for call in (calls[1], calls[3])], [("step", 0), ("step", 1)], "in order")
    equal(calls[4], ("finish", {"is_embedder": True} if stage is pretrain else {}), "K = 4")
    equal([x["step"] for x in lines], [1, 2], "log.jsonl")
    more = {"exact"} if stage is pretrain else {"chance", "top1"}
    for line, (_, step, loss, norm, ids) in zip(lines, (calls[1], calls[3]), strict=True):
        equal(set(line), {"step", "loss", "norm", "lr"} | more, "log.jsonl")
        equal((line["loss"], line["norm"]), (loss, norm), "those of the step")
        equal(line["lr"], cfg.lr * (step + 1) / 2, "AdamW's rate, which rises over two steps")
        equal(ids, names_of(stage, cfg, step), "its examples, for the message of a NaN")


def test_stage_2_says_what_its_loss_sees_and_what_chance_is(monkeypatch, tmp_path, capsys):
    """And how many pairs each data set has."""
    trained(monkeypatch, contrastive, tmp_path / "out", steps=0, subsets="vqa:5")
    said = capsys.readouterr().out
    line = f"loss sees N = 4 pairs (ln N = {math.log(4):.2f})"
    expect(line in said, said, line, "contrastive.main")
    expect(" ".join(said.split()).startswith("vqa 5 pairs"), said, "vqa 5 pairs", "first of all")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_goes_on_counts_its_steps_from_the_first_on(monkeypatch, tmp_path, stage):
    """Its learning rate, and the number of a checkpoint, are those of the last of four steps."""
    saved_after, steps = stage.checkpoint.saved_after, []

    def noted(embedder, optimizers, cfg, step):
        steps.append(step)
        return saved_after(embedder, optimizers, cfg, step)

    monkeypatch.setattr(stage.checkpoint, "saved_after", noted)
    monkeypatch.setattr(stage.checkpoint, "start_or_resume", lambda *_: 3)
    flags = dict(steps=4, warmup=1.0)
    cfg, calls, (line,), _ = trained(monkeypatch, stage, tmp_path / "out", **flags)
    equal((line["step"], line["lr"]), (4, cfg.lr), "log.jsonl; a rate that rises over four steps")
    equal((steps, calls[1][:2]), ([3], ("step", 3)), "checkpoint.saved_after, optim.end_step")


def test_a_model_without_a_code_is_saved_as_no_embedder(monkeypatch, tmp_path):
    """K = 0: plain instruction tuning."""
    flags = dict(compress_tokens=0, compress=False, steps=1)
    _, calls, _, _ = trained(monkeypatch, pretrain, tmp_path / "out", **flags)
    equal(calls[-1], ("finish", {"is_embedder": False}), "checkpoint.finish")


def test_a_model_with_a_code_is_an_embedder_without_the_mask_too(monkeypatch, tmp_path):
    """--no-compress keeps the K tokens: stage 2 finds them in nanocoma.json."""
    _, calls, _, _ = trained(monkeypatch, pretrain, tmp_path / "out", compress=False, steps=1)
    equal(calls[-1], ("finish", {"is_embedder": True}), "checkpoint.finish")


def test_what_a_step_of_stage_1_found_goes_into_the_log(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "accumulate", lambda *_: (1.5, 0.25, 77))
    monkeypatch.setattr(pretrain.optim, "end_step", lambda *_: 0.5)
    _, _, lines, _ = trained(monkeypatch, pretrain, tmp_path / "out")
    want = {"loss": 1.5, "exact": 0.25, "norm": 0.5}
    equal({key: lines[0][key] for key in want}, want, "log.jsonl")


def test_what_a_step_of_stage_2_found_goes_into_the_log_and_the_next_step(monkeypatch, tmp_path):
    """Chance is ln of the columns, hard negatives among them; what fitted into memory is the next
    step's budget, and --temperature the loss'."""
    budgets = []

    def step(embedder, batch, temperature, budget, loss):
        budgets.append((budget.chunk_tokens, temperature))
        return contrastive.Step(1.5, 0.25, 77, 123)

    monkeypatch.setattr(contrastive.optim, "end_step", lambda *_: 0.5)
    flags = dict(chunk_tokens=500, temperature=0.07)
    cfg, _, lines, _ = trained(monkeypatch, contrastive, tmp_path / "out", step, **flags)
    equal(budgets, [(500, 0.07), (123, 0.07)], "Budget.of")
    equal(cfg.fitting, 123, "kept by a checkpoint")
    want = {"loss": 1.5, "chance": math.log(77), "top1": 0.25}
    equal({key: lines[0][key] for key in want}, want, "log.jsonl")


def test_the_speed_that_stage_2_says_is_that_of_all_ranks(monkeypatch, tmp_path, as_rank):
    """N pairs a step, of which this rank has half."""
    as_rank(0, 2)

    def alike(everyone, mine):
        everyone[:] = [mine] * len(everyone)

    speeds = []
    monkeypatch.setattr(plumbing.ranks.dist, "all_gather_object", alike)
    one = contrastive.Step(1.5, 0.25, 77, 123)
    monkeypatch.setattr(contrastive.optim, "end_step", lambda *_: 0.5)
    monkeypatch.setattr(
        plumbing.log.Log,
        "line",
        lambda log, step, unit, numbers: speeds.append((log.count, unit)) or "",
    )
    trained(monkeypatch, contrastive, tmp_path / "out", lambda *_: one)
    equal(speeds, [(4, "pairs"), (8, "pairs")], "Log(...)")


def test_the_speed_that_stage_1_says_is_in_answer_tokens_of_all_ranks(
    monkeypatch, tmp_path, as_rank
):
    """What its loss is a mean over; dialogues are of unequal lengths."""
    as_rank(0, 2)

    def alike(everyone, mine):
        everyone[:] = [mine] * len(everyone)

    speeds = []
    monkeypatch.setattr(plumbing.ranks.dist, "all_gather_object", alike)
    monkeypatch.setattr(pretrain, "accumulate", lambda *_: (1.5, 0.25, 77))
    monkeypatch.setattr(plumbing.ranks.dist, "all_reduce", lambda x: None)
    monkeypatch.setattr(pretrain.optim, "end_step", lambda *_: 0.5)
    monkeypatch.setattr(
        plumbing.log.Log,
        "line",
        lambda log, step, unit, numbers: speeds.append((log.count, unit)) or "",
    )
    trained(monkeypatch, pretrain, tmp_path / "out")
    equal(speeds, [(77, "answer tokens"), (154, "answer tokens")], "Log(...)")


@pytest.mark.parametrize("stage", STAGES)
def test_tokens_that_are_cut_are_those_of_all_rows_of_a_step(monkeypatch, tmp_path, stage):
    """Dialogues; queries, targets and negatives. Here row i costs i tokens."""
    want = []

    def prefetch(make, steps, workers, device):
        for step in steps:
            batch = make(step)
            rows = [x.row for x in batch] if stage is pretrain else batch.rows
            rows = [row._replace(cut=i) for i, row in enumerate(rows)]
            want.append(sum(range(len(rows))))
            if stage is pretrain:
                yield [x._replace(row=row) for x, row in zip(batch, rows, strict=True)]
            else:
                yield batch._replace(rows=rows)

    monkeypatch.setattr(stage, "prefetch", prefetch)
    _, _, lines, _ = trained(monkeypatch, stage, tmp_path / "out", steps=1)
    equal([line["cut"] for line in lines], want, "log.jsonl")


def test_tokens_that_are_cut_are_counted_over_all_ranks(monkeypatch, tmp_path):
    """Of each step, and in the log."""
    monkeypatch.setattr(plumbing.sampling, "all_sum", lambda x: 10 * x)
    cut = plumbing.sampling.tokens_cut([SimpleNamespace(cut=3), SimpleNamespace(cut=4)])
    log = plumbing.log.Log(config(pretrain, tmp_path), 0)
    log(0, (1, "pairs"), {"loss": 1.0, "cut": cut, "lr": 0.1})
    (_, line) = (tmp_path / "log.jsonl").read_text().splitlines()
    equal(json.loads(line), {"step": 1, "loss": 1.0, "cut": 70, "lr": 0.1}, "log.jsonl")


# --------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def evaluated(monkeypatch, tmp_path, capsys):
    """evaluated(**flags) -> (the flags that the tasks are read by, the model, what is printed, the
    sets in the order of their scores). Nothing is embedded."""
    monkeypatch.chdir(tmp_path)

    def run(rank=0, **flags):
        seen = {"order": [], "agreed": []}
        kinds = ("far", "VQA", True), ("near", "VQA", False), ("other", "Retrieval", False)
        tasks = [Task(*kind, ()) for kind in kinds]

        def read_tasks(*args):
            seen["read"] = args
            return tasks

        def score(embedder, task, cfg):
            seen["order"].append(task.name)
            return {"p_at_1": 0.5, "chance": 0.1, "queries": 3, "meta_task": task.meta_task,
                    "ood": task.ood}  # fmt: skip

        def load_for(cfg, device):
            equal(seen["agreed"], ["flags", cfg.model], "alike on all ranks, before it is loaded")
            seen["model"] = cfg.model
            return SimpleNamespace(style="chat", pooling="mean", K=4)

        monkeypatch.setattr(evaluate.score_file, "rank", lambda: rank)
        for name, stub in (("read_tasks", read_tasks), ("score", score), ("load_for", load_for)):
            monkeypatch.setattr(evaluate, name, stub)
        monkeypatch.setattr(evaluate.checkpoint, "same_model", seen["agreed"].append)
        monkeypatch.setattr(evaluate.agreement, "join", lambda cfg: seen["agreed"].append("flags"))
        evaluate.main(evaluate.Config(**flags))
        return SimpleNamespace(**seen, said=capsys.readouterr().out)

    return run


def test_the_last_stage_that_is_there_is_evaluated(evaluated, tmp_path):
    """Stage 2's model, else stage 1's, else the toy; --model is any other."""
    equal(evaluated().model, "toy", "nothing is there")
    for stage in ("pretrain", "contrastive"):
        (tmp_path / "out" / stage).mkdir(parents=True)
        (tmp_path / "out" / stage / "config.json").write_text("{}")
        equal(evaluated().model, f"out/{stage}", "weights.first_model")
    equal(evaluated(model="x").model, "x", "--model")


def test_that_the_model_is_the_same_is_asked_again_when_it_is_loaded(evaluated):
    """Reading MMEB's sets takes minutes, and a training may end in that folder meanwhile: the file
    of scores had the digest of the old model, and of several ranks some could have loaded it."""
    hint = "before the sets are read, and behind load_for"
    equal(evaluated(model="x").agreed, ["flags", "x", "x"], hint)


def test_sets_in_distribution_come_first_each_under_its_heading(evaluated):
    """And each once."""
    seen = evaluated(model="x")
    equal(seen.order, ["near", "other", "far"], "in distribution, then out of it")
    heads = [line for line in seen.said.splitlines() if line.startswith("-- ")]
    want = ["-- in distribution", "-- out of distribution", "-- mean over sets"]
    equal(heads, want, "headings")


def test_what_was_left_out_is_said_beside_each_mean(evaluated):
    """Who copies the last line alone into a paper has it there."""
    for flags, note in (({}, ""), *(({"limit": n}, f"(partial: --limit {n})") for n in (1, 3))):
        lines = evaluated(model="x", **flags).said.splitlines()
        for name in ("Precision@1 x 100", "IND", "OOD", "Overall"):
            noted = [x for x in lines if x.startswith(name) and x.endswith(note)]
            equal(len(noted), 1, f"{name} {note}: {lines}")
            equal("partial" in noted[0], bool(flags), noted[0])


def test_the_flags_of_the_data_reach_the_tasks(evaluated):
    """Source, pictures, sets, queries, seed."""
    flags = dict(data="d", image_root="r", subsets="s", limit=3)
    equal(evaluated(model="x", **flags).read, ("d", "r", "s", 3, 0), "read_tasks")
    equal(evaluated(model="x", seed=4).read[4], 4, "read_tasks")
    equal(evaluated(model="x").read, ("shapes", "", "", 0, 0), "the defaults")


def test_rank_0_alone_writes_the_scores(evaluated, tmp_path):
    """Or the ranks would write into one file together."""
    for rank, there in ((1, False), (0, True)):
        file = tmp_path / f"{rank}.json"
        evaluated(rank, model="x", json=str(file))
        equal(file.exists(), there, f"rank {rank}")
    expect(set(json.loads(file.read_text())["sets"]) == {"far", "near", "other"}, file, "", "sets")


def test_json_that_cannot_be_written_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    """A folder, for one."""
    monkeypatch.setattr(evaluate, "load_for", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match="--json"):
        evaluate.main(evaluate.Config(model="toy-random", json=str(tmp_path)))


def scored(monkeypatch, z, ood=False, meta_task="VQA"):
    """evaluate.score of one query and three candidates, whose embeddings are the rows of z."""
    items = [Item(str(i)) for i in range(len(z))]
    monkeypatch.setattr(evaluate, "encode_over_ranks", lambda *_: z)
    task = Task("t", meta_task, ood, [(items[0], items)])
    return evaluate.score(None, task, evaluate.Config())


def test_only_embeddings_that_are_all_alike_are_called_collapsed(monkeypatch):
    """By the component that differs most from item to item, however it differs from the others: a
    spread of 0.0005 is none, one of 0.002 is some; a single item is alike with nothing."""
    for spread, warns in ((0.0, True), (5e-4, True), (2e-3, False), (0.05, False), (0.5, False)):
        z = torch.linspace(-0.5, 0.5, 8).repeat(4, 1).numpy()
        z[::2, 3] += 2 * spread
        said = scored(monkeypatch, z).get("warning", "")
        equal(said.startswith("collapsed"), warns, f"spread {spread}: {said!r}")
    equal("warning" in scored(monkeypatch, z[:1]), False, "one item")
    z[2, 5] = math.nan
    equal(scored(monkeypatch, z)["warning"], "NaN in the embeddings", "a single NaN")


def test_a_score_says_what_set_it_is_of(monkeypatch):
    """Meta-task, distribution, the number of queries, and chance."""
    z = torch.eye(4).numpy()
    for ood in (False, True):
        got = scored(monkeypatch, z, ood, "Grounding")
        of = dict(queries=1, meta_task="Grounding", ood=ood, data_digest=0)
        equal(got, dict(p_at_1=1.0, chance=0.25, **of), "evaluate.score")
