"""The reproduction: its arms are flags that exist, its records are of these arms, it goes on."""

import argparse
import json

from bench import reproduce
from checks import equal, expect

import contrastive
import pretrain
from data import read_pairs
from plumbing.config import refuse_impossible
from tools.drawings import ARMS
from tools.records import RECORDS, percent, read_records


def test_every_arm_is_made_of_flags_that_exist():
    """Parsed and checked as the stages do, with the pairs that they ask for."""
    for study, (seeds, arms) in reproduce.STUDIES.items():
        for first, second in arms.values():
            if first is not None:
                pretrain.Config.parse(f"{reproduce.STAGE1} {first}".split())
            words = f"{reproduce.STAGE2} {second}".split()
            cfg = contrastive.Config.parse([w for w in words if w != "bare"])
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


def test_the_pages_say_what_the_records_say():
    """Two tables of arms and the table of the other studies, number by number."""
    pages = [reproduce.ROOT / "README.md", *reproduce.ROOT.glob("docs/*.md")]
    section = "\n".join(page.read_text().replace("**", "") for page in pages)
    runs = read_records()

    def cell(rows, key):
        return percent([r["meta_tasks"].get(key, r.get(key)) for r in rows])

    keys = ("overall", "ind", "ood", "Classification", "VQA", "Retrieval", "Grounding")
    for arm, name in ARMS.items():
        row = " | ".join(cell(runs["arms"][arm], key) for key in keys)
        expect(f"| {name} | {row} |" in section, "another row", row, f"of {name}")
    amounts = {
        "pairs-200": "200",
        "pairs-1000": "1,000",
        "pairs-5000": "5,000",
        "arms": "unlimited",
    }
    for study, pairs in amounts.items():
        row = " | ".join(cell(runs[study][arm], "overall") for arm in ARMS)
        expect(f"| {pairs} | {row} |" in section, "another row", row, f"of {pairs} pairs")
    for study in set(runs) - set(amounts):
        (line,) = [x for x in section.splitlines() if x.startswith("| ") and f"(`{study}`" in x]
        for arm, rows in runs[study].items():
            expect(cell(rows, "overall") in line, line, cell(rows, "overall"), f"{study}, {arm}")


def test_it_runs_what_is_missing_and_nothing_twice(tmp_path, monkeypatch, capsys):
    """Two arms, a few steps each; the second time nothing is left to do."""
    monkeypatch.setattr(reproduce, "QUERIES", 1)
    monkeypatch.setattr(reproduce, "STAGE1", "--steps 1 --batch 2 --workers 0")
    small = "--steps 4 --batch 4 --block 4"
    arms = {"none": (None, small), "plain": ("--no-compress", small)}
    monkeypatch.setattr(reproduce, "STUDIES", dict(arms=(1, arms)))
    args = argparse.Namespace(study="arms", seeds=None, jobs=2)
    args.out, args.json = tmp_path / "out", tmp_path / "r.json"
    reproduce.main(args)
    runs = json.loads(args.json.read_text())["runs"]
    equal([r["steps"] for r in runs], [[1, 2, 3, 4]] * 2, "scored four times")
    equal(sorted(r["seconds1"] > 0 for r in runs), [False, True], "one of them had a stage 1")
    said = capsys.readouterr().out
    expect("2 runs after 1 stages 1" in said, said, "the sum", "show")
    monkeypatch.setattr(reproduce, "call", None)
    reproduce.main(args)
