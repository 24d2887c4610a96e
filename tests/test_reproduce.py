"""The reproduction: its arms are flags that exist, its records are of these arms, it goes on."""

import argparse
import json
import random
import runpy
import sys
from pathlib import Path

import pytest
from bench import reproduce
from checks import equal, expect
from forked import Fork

import contrastive
import model
import pretrain
from data import Item, read_pairs
from plumbing import checkpoint
from plumbing.combinations import refuse_impossible
from tools import condense
from tools.records import RECORDS, read_records
from toy.world import IMAGE, Shapes


def test_every_arm_is_made_of_flags_that_exist():
    """Parsed and checked as the stages do, with the pairs that they ask for."""
    for study, (seeds, arms) in reproduce.STUDIES.items():
        for first, second in arms.values():
            if first is not None:
                words = f"{reproduce.STAGE1} {first}".split()
                pretrain.Config.parse([w for w in words if w != "short"])
            words = f"{reproduce.STAGE2} {second}".split()
            stage = condense if "condense" in words else contrastive
            cfg = stage.Config.parse(
                [w for w in words if w not in ("bare", "prefixes", "mined", "condense")]
            )
            refuse_impossible(cfg, 1)
            pairs = sum(map(len, read_pairs(subsets=cfg.subsets).values()))
            assert seeds > 0 and pairs >= 200, (study, pairs)


def test_the_records_are_of_these_studies():
    """docs/reproduce.json was made with the arms that the script has now."""
    kept = json.loads(RECORDS.read_text())
    for study, (_, arms) in reproduce.STUDIES.items():
        equal(
            kept["studies"][study], {a: list(f) for a, f in arms.items()}, "run it: it writes them"
        )
    runs = [(r["first"], r["second"], r["seed"]) for r in kept["runs"]]
    equal(len(set(runs)), len(runs), "no run twice")


def test_a_study_begins_with_the_first_seed_that_all_its_arms_have(tmp_path):
    """And goes on with such seeds alone; before there is one, it is left out."""
    arms = {"none": (None, ""), "coma": ("", "")}

    def seeds(*runs):
        file = tmp_path / "records.json"
        numbers = dict(pairs=0, K=4, steps=[], curve=[], ind=0, ood=0, overall=0)
        kept = [dict(numbers, first=a, second=b, seed=seed) for (a, b), seed in runs]
        file.write_text(json.dumps(dict(studies={"arms": arms}, runs=kept)))
        study = read_records(file).get("arms", {})
        return {arm: [run["seed"] for run in runs] for arm, runs in study.items()}

    none, coma = arms.values()
    equal(seeds((none, 0), (none, 1)), {}, "one arm")
    equal(seeds((none, 0), (coma, 1)), {}, "other seeds")
    equal(seeds((none, 0), (none, 1), (coma, 1)), dict(none=[1], coma=[1]), "one in common")


def test_a_run_has_a_process_of_its_own_that_is_paid_for_or_told_of():
    """What it printed, and its CPU seconds; where it fails, what it said."""
    said, seconds = reproduce.call("-c", "print(sum(range(10**7)))")
    equal(said, f"{sum(range(10**7))}\n", "its output")
    assert 0 <= seconds < 60
    with pytest.raises(RuntimeError, match="(?s)-c 1/0.*ZeroDivisionError"):
        reproduce.call("-c", "1/0")


def test_such_a_process_is_one_stage_2(monkeypatch, capsys):
    """`reproduce.py --run JOB`, whatever else: with the job's flags, which are refused here."""
    name = "saved_after"
    monkeypatch.setattr(checkpoint, name, checkpoint.saved_after)  # put back, whatever it does
    job = dict(first="", second="--steps many", seed=0, queries=1, init="toy")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--show", "--run", json.dumps(job)])
    with pytest.raises(SystemExit):
        runpy.run_path(reproduce.__file__, run_name="__main__")
    expect("--steps: invalid int value: 'many'" in (said := capsys.readouterr().err), said, "", "")


def test_the_tables_are_those_of_the_studies_that_are_asked_for(monkeypatch, capsys):
    """A study that is none is named, and what there is."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--show", "--study", "weight,wait"])
    with pytest.raises(SystemExit):
        runpy.run_path(reproduce.__file__, run_name="__main__")
    said = capsys.readouterr().err
    expect("--study: no wait; there are arms, " in said, said, "the name", "reproduce.py")
    reproduce.show(argparse.Namespace(study="weight,pooling", json=RECORDS))
    tables = [x for x in capsys.readouterr().out.splitlines() if x.startswith("## `")]
    equal(tables, ["## `weight`", "## `pooling`"], "show")


@pytest.fixture
def forks(monkeypatch, tmp_path):
    """In the place of `reproduce.call`, with all that this process has imported. -> the scripts."""
    scripts = []

    def call(script, *words):
        def run():
            if words[0] == "--run-first":
                reproduce.run_compression(json.loads(words[1]))
            else:
                print(json.dumps(reproduce.run_contrastive(json.loads(words[1]))))

        scripts.append(words[0])
        said = tmp_path / f"said-{len(scripts)}"
        equal(Fork(run, said).wait(), 0, script)
        return said.read_text(), 1.0

    monkeypatch.setattr(reproduce, "call", call)
    return scripts


def test_it_runs_what_is_missing_and_nothing_twice(forks, tmp_path, monkeypatch, capsys):
    """Two arms, a few steps each; the second time nothing is left to do."""
    monkeypatch.setattr(reproduce, "QUERIES", 1)
    monkeypatch.setattr(reproduce, "CURVE", 2)
    monkeypatch.setattr(reproduce, "STAGE1", "--steps 1 --batch 2 --workers 0 --muon-lr 0")
    small = "--steps 2 --batch 4 --block 4 --muon-lr 0"
    arms = {"none": (None, small), "caption": ("--caption short", small)}
    monkeypatch.setattr(reproduce, "STUDIES", dict(arms=(1, arms)))
    args = argparse.Namespace(study="arms", seeds=None, jobs=1)
    args.out, args.json = tmp_path / "out", tmp_path / "r.json"
    reproduce.main(args)
    equal(forks, ["--run", "--run-first", "--run"], "a stage 1, and two stages 2")
    runs = json.loads(args.json.read_text())["runs"]
    equal([r["steps"] for r in runs], [[1, 2]] * 2, "scored twice")
    equal(sorted(r["seconds1"] > 0 for r in runs), [False, True], "one of them had a stage 1")
    said = capsys.readouterr().out
    expect("2 runs after 1 stages 1" in said, said, "the sum", "show")
    reproduce.main(args)
    equal(len(forks), 3, "nothing is run twice")


def test_a_short_caption_is_the_names_alone(monkeypatch):
    """Of the descriptions; all other answers are as they were."""
    monkeypatch.setattr(Shapes, "_answer", Shapes._answer)  # it is put back
    scene = Shapes().scene(random.Random(0), 3, 3)
    long = {kind: answer for kind, _, answer in Shapes().ask(random.Random(1), scene)}
    reproduce.short_captions()
    short = {kind: answer for kind, _, answer in Shapes().ask(random.Random(1), scene)}
    equal(short.pop("describe"), "orange circle and green triangle and purple diamond", "short")
    assert long.pop("describe").startswith("a small orange circle at the top right and")
    equal(short, long, "all other answers")


def test_arms_with_larger_pictures_start_from_a_toy_that_has_seen_such(monkeypatch, tmp_path):
    """Made once, by stage 1 without a mask: 64 image tokens, in a folder that says so. The other
    arms start from the toy."""
    called = []

    def call(script, flag, words):
        called.append(flag)
        folder = Path(json.loads(words)[-1])
        large = model.load("toy", 0, device="cpu", min_pixels=128**2, max_pixels=128**2)
        model.save(large, folder, is_embedder=False)
        return "", 1.0

    monkeypatch.setattr(reproduce, "call", call)
    equal(reproduce.start_of("--symmetric", tmp_path), "toy", "its start")
    for _ in range(2):
        large = reproduce.start_of(f"{reproduce.LARGE} condense", tmp_path)
    equal(called, ["--run-first"], "made once")
    picture = Item(IMAGE, (Shapes().scene(random.Random(0)),))
    for name, tokens in ((large, 64), ("toy", 16)):
        embedder = model.load(name, device="cpu")
        ids = embedder.collate.row(picture).tokens["input_ids"]
        equal(int((ids == embedder.mllm.config.image_token_id).sum()), tokens, f"of {name}")
