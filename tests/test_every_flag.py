"""Every flag of the three stages moves what it should, and nothing else: a short run with it, one
without it, and what differs between the two. (Which values are taken: test_flags.py.)"""

import copy
import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
from checks import distance, equal, expect, shorten
from PIL import Image

import contrastive
import evaluate
import model
import pretrain
from plumbing.families import vision_tower

STAGES = {"pretrain": pretrain, "contrastive": contrastive, "evaluate": evaluate}
LOAD_FOR = {name: module.load_for for name, module in STAGES.items()}
TRAINING = dict(model="toy-random", steps=2, save_every=0, muon_lr=0.0, warmup=0.0)
SHORT = {
    "pretrain": dict(TRAINING, batch=2),
    "contrastive": dict(TRAINING, batch=4, block=2),
    "evaluate": dict(model="toy-random", subsets="vqa", limit=2, chunk_tokens=10**6),
}
MODEL_FLAGS = "model compress_tokens pooling prompt min_pixels max_pixels max_length".split()


# ---------------------------------------------------------------------------------- what is watched


class Seen(NamedTuple):
    """What a run did; a field's name stands in the tables below."""

    rows: str  # what is drawn, as model inputs
    loss: float  # of the first step; evaluation: the embeddings' sum of cubes
    gradient: float = 0.0  # its norm, before clipping
    rates: tuple = ()  # AdamW's, of each step
    trained: tuple = ()  # names of what is trained
    start: str = ""  # its weights before the first step
    weights: torch.Tensor = torch.zeros(1)  # and in the end
    passes: int = 0  # through the first layer
    looks: int = 0  # through the vision tower
    workers: int = 0
    kept: tuple = ()  # checkpoints when the last step is over
    steps: int = 0
    settings: tuple = ()  # K, pooling, prompt style
    sets: str = ""  # names of evaluation sets, with their numbers of queries


def digest(*parts) -> str:
    """Of anything that has a repr."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def content(tensor):
    """All of a tensor. (The repr of its numbers would take longer than a training step.)"""
    numbers = hashlib.blake2b(tensor.detach().numpy().tobytes(), digest_size=8)
    return tuple(tensor.shape), numbers.hexdigest()


def row_digest(row) -> str:
    """Of all tensors of a row."""
    tensors = {**row.tokens, **row.images}
    return digest([(key, content(x)) for key, x in sorted(tensors.items())])


def rows_of(batch) -> list:
    """Digests of a batch's rows, of either stage or of evaluation."""
    if isinstance(batch, dict):
        return list(map(row_digest, batch.values()))
    if isinstance(batch, contrastive.Batch):
        return [*map(row_digest, batch.rows), batch.labels.tolist(), batch.keys.tolist()]
    rows = [x.row for x in batch] + [x.teacher_row for x in batch if x.teacher_row]
    return list(map(row_digest, rows))


@functools.cache
def loaded(stage, flags):
    """What a stage loads for these flags of the model, {name: value}.items(), once."""
    cfg = STAGES[stage].Config(**dict(flags))
    embedder = LOAD_FOR[stage](cfg, torch.device("cpu"))
    return embedder if embedder.adapter else shorten(embedder)


def watch(stage, patch, calls, noted):
    """Lets a stage load a copy, count its passes, and note the rows and the loader."""
    module = STAGES[stage]
    names = MODEL_FLAGS + {"pretrain": ["compress"], "evaluate": ["dim"]}.get(stage, [])

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    def load_for(cfg, device):
        flags = {name: getattr(cfg, name) for name in names}
        with torch.random.fork_rng(devices=[]):  # else LoRA's start would tell a first load
            embedder = copy.deepcopy(loaded(stage, tuple(flags.items())))
        embedder.mllm.get_decoder().layers[0].self_attn.register_forward_pre_hook(count("passes"))
        tower = vision_tower(embedder.mllm)
        tower.patch_embed.register_forward_pre_hook(count("looks"))
        return embedder

    # The loader of training stands in the stage, that of evaluation in the model.
    place = model if stage == "evaluate" else module
    prefetch = place.prefetch

    def watched(make, numbers, workers, device):
        noted["workers"] = workers
        for batch in prefetch(make, numbers, 0, device):
            noted["rows"] = digest(noted["rows"], rows_of(batch))
            yield batch

    patch.setattr(module, "load_for", load_for)
    patch.setattr(place, "prefetch", watched)


def trained_in(embedder):
    """-> (names, weights in one vector) of what is trained."""
    trained = [(name, p) for name, p in embedder.named_parameters() if p.requires_grad]
    return tuple(x[0] for x in trained), torch.cat([p.detach().flatten() for _, p in trained])


def train(stage, out, flags) -> Seen:
    """A training stage's main; the model itself is not saved."""
    module, calls, noted = STAGES[stage], dict(passes=0, looks=0), dict(rows="")
    resume = module.checkpoint.start_or_resume

    def begin(embedder, optimizers, cfg):
        noted["start"] = digest(content(trained_in(embedder)[1]))
        return resume(embedder, optimizers, cfg)

    def finish(save, embedder, cfg, **options):
        noted["trained"], noted["weights"] = trained_in(embedder)
        noted["settings"] = embedder.K, embedder.pooling, embedder.style
        noted["kept"] = tuple(sorted(path.name for path in Path(out, "checkpoints").glob("*")))

    with pytest.MonkeyPatch.context() as patch:
        watch(stage, patch, calls, noted)
        patch.setattr(module.checkpoint, "start_or_resume", begin)
        patch.setattr(module.checkpoint, "finish", finish)
        module.main(module.Config(**SHORT[stage] | flags, out=str(out)))
    _, *lines = Path(out, "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    noted.update(loss=log[0]["loss"], gradient=log[0]["norm"], steps=len(log))
    return Seen(rates=tuple(x["lr"] for x in log), **calls, **noted)


def score(out, flags) -> Seen:
    """Evaluation's main."""
    calls, noted, sums = dict(passes=0, looks=0), dict(rows=""), []
    encode = evaluate.encode_over_ranks

    def summed(*args):
        z = encode(*args)
        sums.append(float((z.astype(float) ** 3).sum()))
        return z

    with pytest.MonkeyPatch.context() as patch:
        watch("evaluate", patch, calls, noted)
        patch.setattr(evaluate, "encode_over_ranks", summed)
        evaluate.main(evaluate.Config(**SHORT["evaluate"] | flags, json=str(out)))
    scores = json.loads(out.read_text())
    sets = [(name, row["queries"]) for name, row in scores["sets"].items()]
    return Seen(loss=sum(sums), sets=repr(sets), **calls, **noted)


def run(stage, out, flags) -> Seen:
    """A short run of a stage, whatever random numbers were drawn before."""
    torch.seed()
    return score(out, flags) if stage == "evaluate" else train(stage, out, flags)


def differing(a, b) -> set:
    """Names of the fields in which two runs differ by more than rounding."""
    names = set()
    for name, x, y in zip(Seen._fields, a, b, strict=True):
        if isinstance(x, torch.Tensor):  # Adam makes much of what is rounded
            differ = x.shape != y.shape or distance(x, y) > 1e-3
        elif isinstance(x, float):
            differ = not math.isclose(x, y, rel_tol=1e-5)
        else:
            differ = x != y
        if differ:
            names.add(name)
    return names


# --------------------------------------------------------------------------------------- the table

LEARNT = "loss gradient weights"
BOTH, FIRST, SECOND = ["pretrain", "contrastive"], ["pretrain"], ["contrastive"]
LORA, MUON = dict(lora_rank=2), dict(lora_rank=2, muon_lr=0.02)  # Muon is slow on whole matrices
LARGE = dict(max_pixels=112 * 112)
TALKS, PAIRS = (dict(data=f"{name}.jsonl", image_root="a") for name in ("talks", "pairs"))
TABLE = [  # (stages, what both runs have, what the second one has, what must differ: all of it)
    (BOTH, {}, {}, ""),  # two runs are alike
    (BOTH, LORA, {}, ""),
    (BOTH, {}, dict(model="toy"), f"start {LEARNT}"),
    (BOTH, {}, dict(compress_tokens=3), f"settings rows start {LEARNT}"),
    (FIRST, {}, dict(pooling="last"), "settings"),
    (SECOND, {}, dict(pooling="last"), f"settings {LEARNT}"),
    (BOTH, {}, dict(prompt="coma"), f"settings rows {LEARNT}"),
    (BOTH, {}, dict(max_pixels=56 * 56), f"rows {LEARNT}"),
    (BOTH, LARGE, dict(min_pixels=112 * 112), f"rows {LEARNT}"),
    (FIRST, {}, dict(max_length=90), f"rows {LEARNT}"),
    (SECOND, {}, dict(max_length=33), f"rows {LEARNT}"),
    (FIRST, {}, dict(chunk_tokens=1), "passes looks"),
    (SECOND, dict(graph_memory="0"), dict(chunk_tokens=1), "passes looks"),
    (FIRST, {}, TALKS, f"rows {LEARNT}"),
    (SECOND, {}, PAIRS, f"rows {LEARNT}"),
    (FIRST, TALKS, dict(image_root="b"), f"rows {LEARNT}"),
    (SECOND, PAIRS, dict(image_root="b"), f"rows {LEARNT}"),
    (BOTH, {}, dict(seed=1), f"rows {LEARNT}"),
    (BOTH, LORA, dict(seed=1), f"rows start {LEARNT}"),
    (FIRST, TALKS, dict(seed=1), f"rows {LEARNT}"),
    (SECOND, PAIRS, dict(seed=1), f"rows {LEARNT}"),
    (BOTH, {}, dict(workers=2), "workers"),
    (BOTH, {}, dict(steps=3), "rows rates weights passes looks steps"),
    (BOTH, {}, dict(batch=6), f"rows {LEARNT}"),
    (BOTH, {}, dict(lr=1e-3), "rates weights"),
    (BOTH, LORA, dict(muon_lr=0.02), "weights"),
    (BOTH, MUON, dict(muon_lr=0.1), "weights"),
    (BOTH, MUON, dict(weight_decay=5.0), "weights"),
    (BOTH, {}, dict(weight_decay=0.5), "weights"),
    (BOTH, dict(steps=4, lr=0.03), dict(schedule="linear"), "rates weights"),
    (BOTH, dict(steps=4), dict(warmup=0.5), "rates weights"),
    (BOTH, {}, dict(clip=1e-8), "weights"),
    (FIRST, {}, LORA, "trained start weights gradient"),
    # Stage 2's first step keeps no graph: a frozen tower looks once there, and a trained one twice.
    (SECOND, {}, LORA, "trained start weights gradient looks"),
    (BOTH, LORA, dict(lora_alpha=8), "gradient weights"),
    (BOTH, LORA, dict(lora_dropout=0.5), "gradient weights"),
    (BOTH, LORA, dict(dora=True), "trained start weights gradient"),
    (FIRST, {}, dict(freeze_vision=True), "trained start weights gradient"),
    (SECOND, {}, dict(freeze_vision=True), "trained start weights gradient looks"),
    (BOTH, {}, dict(checkpointing=True), "passes"),
    (BOTH, {}, dict(save_every=1), "kept"),
    (BOTH, dict(LORA, steps=4, save_every=1), dict(keep=1), "kept"),  # small files
    (FIRST, {}, dict(compress=False), LEARNT),
    (FIRST, {}, dict(turns=1), f"rows {LEARNT}"),
    (FIRST, {}, dict(caption=True), f"rows {LEARNT}"),
    (FIRST, {}, dict(question_first=1.0), f"rows {LEARNT}"),
    (FIRST, {}, dict(texts=1.0), f"rows {LEARNT} looks"),
    (FIRST, {}, dict(objective="kl"), f"rows {LEARNT} passes looks"),
    (SECOND, {}, dict(block=4), f"rows {LEARNT}"),
    (SECOND, {}, dict(subsets="classify"), f"rows {LEARNT}"),
    (SECOND, dict(subsets="classify"), dict(subsets="classify:2"), f"rows {LEARNT}"),
    (SECOND, dict(data="mmeb"), dict(split="diverse_instruction"), f"rows {LEARNT}"),
    (SECOND, {}, dict(temperature=0.1), LEARNT),
    (SECOND, {}, dict(mask_false_negatives=False), "rows"),
    (SECOND, {}, dict(symmetric=True), LEARNT),
    (SECOND, {}, dict(hardness=9.0), LEARNT),
    (SECOND, {}, dict(margin=1e-4), LEARNT),
    (SECOND, {}, dict(matryoshka="32,64"), LEARNT),
    (SECOND, {}, dict(graph_memory="0"), "passes looks"),
    (SECOND, dict(graph_memory="0", freeze_vision=True), dict(vision_cache="off"), "looks"),
    (["evaluate"], {}, {}, ""),
    (["evaluate"], {}, dict(model="toy"), "loss"),
    (["evaluate"], {}, dict(compress_tokens=3), "rows loss"),
    (["evaluate"], {}, dict(pooling="last"), "loss"),
    (["evaluate"], {}, dict(prompt="coma"), "rows loss"),
    (["evaluate"], {}, dict(max_pixels=56 * 56), "rows loss"),
    (["evaluate"], LARGE, dict(min_pixels=112 * 112), "rows loss"),
    (["evaluate"], {}, dict(max_length=27), "rows loss"),
    (["evaluate"], {}, dict(chunk_tokens=1), "passes looks"),
    (["evaluate"], {}, dict(seed=1), "rows loss"),
    (["evaluate"], {}, dict(dim=32), "loss"),
    (["evaluate"], {}, dict(workers=2), "workers"),
    (["evaluate"], {}, dict(limit=3), "rows loss sets"),
    (["evaluate"], {}, dict(subsets="ground"), "rows loss sets"),
    (["evaluate"], {}, dict(PAIRS, subsets=""), "rows loss sets"),
    (["evaluate"], dict(PAIRS, subsets=""), dict(image_root="b"), "rows loss"),
]
ELSEWHERE = {  # a flag that a short run in one process cannot show -> where it is shown
    "attn": "test_mask.py",
    "out": "test_scripts.py",
    "json": "test_scripts.py",
    "resume": "test_resume.py",
    "skip_bad": "test_skip_bad.py",
    "merge": "test_every_flag.py",
    "fsdp": "stages_on_ranks.py",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A working folder: a list for each stage, its pictures in two roots that differ, MMEB."""
    folder = tmp_path_factory.mktemp("files")
    for root, color in (("a", "red"), ("b", "blue")):
        (folder / root).mkdir()
        for i in range(8):
            Image.new("RGB", (56, 56 + 28 * (i % 3)), color).save(folder / root / f"{i}.png")
    talks, pairs = [], []
    for i in range(8):
        turns = [{"from": "human", "value": f"<image>\n{i}?"}, {"from": "gpt", "value": str(i)}]
        talks.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
        query = {"text": f"<image> number {i}", "image": f"{i}.png"}
        pairs.append({"query": query, "target": {"text": str(i)}})
    for name, lines in (("talks", talks), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "mmeb" / "A").mkdir(parents=True)
    for split in ("original", "diverse_instruction"):
        texts = [f"{split} {i}" for i in range(8)]
        columns = {"qry": texts, "pos_text": texts, "qry_image_path": [""] * 8}
        table = pyarrow.table({**columns, "pos_image_path": [""] * 8})
        pq.write_table(table, folder / "mmeb" / "A" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(stage, flags) -> the run of these flags, once."""
    runs = {}

    def get(stage, flags):
        key = stage, tuple(flags.items())
        if key not in runs:
            runs[key] = run(stage, tmp_path_factory.mktemp("base") / "out", flags)
        return runs[key]

    return get


CASES = [(stage, *rest) for stages, *rest in TABLE for stage in stages]
NAMES = [f"{stage}-{'-'.join(more) or 'alike'}" for stage, _, more, _ in CASES]


@pytest.mark.parametrize(("stage", "both", "more", "moves"), CASES, ids=NAMES)
def test_a_flag_moves_what_it_should_and_nothing_else(
    stage, both, more, moves, base, files, tmp_path, monkeypatch
):
    """Two short runs, one of them with the flag: the rows drawn, the first loss and its gradient,
    rates, weights, passes, the loader, checkpoints, sets; each differs or is the same."""
    monkeypatch.chdir(files)
    got = differing(base(stage, both), run(stage, tmp_path / "out", both | more))
    equal(got, set(moves.split()), f"{stage}: {both} and with {more}")


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_has_a_row(stage):
    """A new one fails here until the table says what it moves."""
    flags = {f.name for f in dataclasses.fields(STAGES[stage].Config) if f.init}
    moved = {name for case in CASES if case[0] == stage for name in case[2]}
    equal(flags - moved - set(ELSEWHERE), set(), "a row of TABLE, or of ELSEWHERE")
    for flag, file in ELSEWHERE.items():
        text = Path(__file__).with_name(file).read_text()
        named = flag in text or f"--{flag.replace('_', '-')}" in text
        expect(named, file, flag, "ELSEWHERE names a file that has nothing of it")


def test_an_adapter_is_folded_in_first_or_trained_on(embedder, files, tmp_path, monkeypatch):
    """Stage 2 after stage 1 with LoRA: with --merge all weights of a plain model, or, with
    --lora-rank, a new adapter of it, beside which it then stands; without it the old adapter."""
    monkeypatch.chdir(files)
    model.choose_trained(embedder, pretrain.Config(model="toy-random", lora_rank=2))
    model.save(embedder, "adapter")
    merged = run("contrastive", tmp_path / "a", dict(model="adapter"))
    going_on = run("contrastive", tmp_path / "b", dict(model="adapter", merge=False))
    anew = run("contrastive", tmp_path / "c", dict(model="adapter", lora_rank=3))
    has_lora = [any("lora" in name for name in x.trained) for x in (merged, going_on, anew)]
    equal(has_lora, [False, True, True], "what is trained")
    expect(len(merged.trained) > 50, merged.trained, "all weights", "model.merge")
    there = [(tmp_path / x / "merged" / "config.json").exists() for x in "abc"]
    equal(there, [False, False, True], "the plain model that a new adapter is one of")
    left = (tmp_path / "c" / "merged" / "adapter_config.json").exists()
    expect(not left, "stage 1's adapter", "folded in", "keep_base")


def test_the_flags_check_fails_for_a_flag_that_does_nothing(base, files, tmp_path, monkeypatch):
    """Negative control: the learning rate of who ignores it."""
    monkeypatch.chdir(files)
    got = run("pretrain", tmp_path / "out", {})
    with pytest.raises(AssertionError):
        equal(differing(base("pretrain", {}), got), {"rates", "weights"}, "--lr")
