"""The study's tables: by hand, and docs/ and README say nothing that is not in them."""

import argparse
import re

import pytest
import torch
from bench import reproduce
from checks import close, equal, expect

from tools import study_tables
from tools.records import RECORDS

DOCS = RECORDS.parent
MEAN_AND_ERROR = re.compile(r"[+-]?\d+\.\d ± \d+\.\d")


def run(score, meta=0.0):
    """A record of one score everywhere, but for one meta-task."""
    metas = {"Classification": score, "VQA": meta, "Retrieval": score, "Grounding": score}
    return dict(overall=score, ind=score, ood=score, meta_tasks=metas)


def runs(*scores):
    return [run(score) for score in scores]


# --------------------------------------------------------------------------------------- the pages


def test_the_page_of_all_tables_is_what_the_records_say(capsys):
    """docs/tables.md, line by line."""
    reproduce.show(argparse.Namespace(study=",".join(reproduce.STUDIES), json=RECORDS))
    want = capsys.readouterr().out.splitlines()
    here = (DOCS / "tables.md").read_text().splitlines()
    for line, other in zip(here, want, strict=False):
        equal(line, other, "`python tests/bench/reproduce.py --show > docs/tables.md`")
    equal(len(here), len(want), "its lines")


def without_bold(name) -> str:
    """A page's text."""
    return (DOCS.parent / name).read_text().replace("**", "")


def test_every_row_stands_among_all_tables():
    """Of docs/results.md."""
    rows = re.findall(r"^\|.*±.*\|$", without_bold("docs/results.md"), re.M)
    assert len(rows) > 30, "rows of the study"
    tables = without_bold("docs/tables.md")
    for row in rows:
        expect(row in tables, "another row", row, "docs/tables.md")


@pytest.mark.parametrize("name", ["docs/results.md", "docs/predictions.md", "README.md"])
def test_no_number_is_without_a_table(name):
    """Each mean with its error, in sentences too, stands in docs/tables.md."""
    known = set(MEAN_AND_ERROR.findall(without_bold("docs/tables.md")))
    numbers = MEAN_AND_ERROR.findall(" ".join(without_bold(name).split()))
    assert len(numbers) > 5, "numbers of the study"
    for number in numbers:
        expect(number in known, "in no table", number, name)


# ---------------------------------------------------------------------------------------- by hand


def test_rows_are_means_errors_and_gains_paired_by_seed():
    """Two arms of two seeds: the second is 10 ahead, then 20."""
    arms = {"none": [run(0.5, 0.25), run(0.6, 0.3)], "x": [run(0.6, 0.3), run(0.8, 0.4)]}
    low, high = "55.0 ± 5.0", "70.0 ± 10.0"
    first, line, *rows = study_tables.table(arms)
    metas = "Classification | VQA | Retrieval | Grounding"
    equal(first, f"| 2 seeds | overall | over contrastive only | IND | OOD | {metas} |", "head")
    equal(line, "|---" * 9 + "|", "head")
    want = [
        f"| contrastive only | {low} | – | {low} | {low} | {low} | 27.5 ± 2.5 | {low} | {low} |"
    ]
    want += [
        f"| x | {high} | +15.0 ± 5.0 | {high} | {high} | {high} | 35.0 ± 5.0 | {high} | {high} |"
    ]
    equal(rows, want, "table")


def test_equal_arms_show_no_difference():
    """By any seed: zero is not outside of an interval of no width. One seed is no "seeds"."""
    *_, row = study_tables.table({"none": runs(0.5, 0.6, 0.7), "x": runs(0.5, 0.6, 0.7)})
    expect(row.startswith("| x | 60.0 ± 5.8 | +0.0 ± 0.0 |"), row, "plain zero", "neither bold")
    head, *_ = study_tables.table({"none": runs(0.5)})
    expect(head.startswith("| 1 seed |"), head, "1 seed", "head")


def test_a_difference_shows_by_students_t_of_its_seeds():
    """So many standard errors are enough with five seeds, and not with three."""
    three = [0.02, 0.11, 0.05]  # 6.0 ± 2.6: 2.3 standard errors
    equal(study_tables.difference(three), "+6.0 ± 2.6", "three seeds, 4.30")
    surely = [0.05, 0.06, 0.08]  # 7.2 standard errors
    equal(study_tables.difference(surely), "**+6.3 ± 0.9**", "three seeds")
    four, five = [-0.02, -0.04, -0.04, -0.06], [0.02, 0.02, 0.06, 0.08, 0.02]
    equal(study_tables.difference(four), "**-4.0 ± 0.8**", "four seeds, 4.9 of 3.18")
    equal(study_tables.difference(five), "**+4.0 ± 1.3**", "five seeds, 3.2 of 2.78")
    equal(study_tables.difference(five[1:]), "+4.5 ± 1.5", "four seeds, 3.0 of 3.18")
    equal(study_tables.difference([0.05, 0.06]), "+5.5 ± 0.5", "two seeds, 11 of 12.71")
    equal(study_tables.difference([0.5]), "+50.0", "one seed shows nothing")


def test_the_intervals_are_those_of_students_t():
    """Its density, integrated: 95 % lies within so many standard errors."""
    for n, t in study_tables.STUDENT.items():
        if n > 1:
            student = torch.distributions.StudentT(float(n - 1))
            x = torch.linspace(-t, t, 200_001, dtype=torch.float64)
            inside = torch.trapezoid(student.log_prob(x).exp(), x)
            close(inside, torch.tensor(0.95, dtype=torch.float64), f"{n} seeds", 2e-4)


def test_a_part_is_worth_the_mean_of_its_contrasts():
    """Two contrasts, two seeds; VQA apart."""
    arms = {
        "a": [run(0.5, 0.1), run(0.6, 0.1)],
        "b": [run(0.4, 0.3), run(0.4, 0.2)],
        "c": [run(0.9, 0.1), run(0.9, 0.1)],
        "d": [run(0.7, 0.1), run(0.8, 0.1)],
    }
    worth = study_tables.worth(arms, (("a", "b"), ("c", "d")))
    want = [[0.15, 0.15, -0.1, 0.15, 0.15], [0.15, 0.15, -0.05, 0.15, 0.15]]
    close(worth, want, "(with - without), the mean of both", 1e-12)
    records = {"pairs-200": {"coma": arms["a"], "plain": arms["b"]}}
    *_, row = study_tables.parts(records)
    part = "| the mask, dialogues of pictures | 200 | 2 |"
    expect(row.startswith(f"{part} +15.0 ± 5.0 | +15.0 ± 5.0 | -15.0 ± 5.0 |"), row, "", "parts")


def test_arms_stand_side_by_side_for_every_number_of_pairs():
    """A score, and what the other arm is over it; a study that has not been run has no column."""
    few = {"none": runs(0.2, 0.3), "coma": runs(0.3, 0.4)}
    many = {"none": runs(0.5, 0.7), "coma": runs(0.4, 0.7)}
    records = {"lora": many, "lora-200": few}
    want = ["| 2 seeds | 200 | unlimited |", "|---|---|---|"]
    want += ["| contrastive only | 25.0 ± 5.0 | 60.0 ± 10.0 |"]
    want += [f"| CoMa | {study_tables.difference([0.1, 0.1])} | -5.0 ± 5.0 |"]
    equal(study_tables.by_pairs(records, study_tables.LORA), want, "table")
    three = {"none": runs(0.5, 0.6, 0.7), "coma": runs(0.5, 0.6, 0.7)}
    head, *_ = study_tables.by_pairs({"lora": three, "lora-200": few}, study_tables.LORA)
    equal(head, "| 2 seeds or 3 seeds | 200 | unlimited |", "head")
    page = "\n".join(study_tables.page({"arms": many}, []))
    expect("By the number of pairs, all weights" in page, "its section", page, "page")
    expect("By the number of pairs, LoRA" not in page, "a section of nothing", page, "page")


def test_a_change_is_by_how_much_a_part_is_worth_more():
    """CoMa's gain at K = 16, less that at K = 1, by seed: one seed's luck is in both."""
    arms = {
        "CoMa, K=16": [run(0.5, 0.2), run(0.9, 0.2)],
        "contrastive only, K=16": [run(0.6, 0.1), run(1.0, 0.2)],
        "CoMa, K=1": [run(0.3, 0.2), run(0.6, 0.2)],
        "contrastive only, K=1": [run(0.6, 0.2), run(1.0, 0.2)],
    }
    *_, row = study_tables.parts({"K-control": arms})
    name = "| CoMa, over contrastive only, K = 16 over K = 1 | unlimited | 2 |"
    # -10 and -10, less -30 and -40; VQA +10 and 0, less nothing.
    expect(row.startswith(f"{name} +25.0 ± 5.0 | +25.0 ± 5.0 | +5.0 ± 5.0 |"), row, "", "a change")
    del arms["CoMa, K=1"]
    rows = study_tables.parts({"K-control": arms})
    expect("over K" not in " ".join(rows), rows, "", "one of its arms has not been run")


def test_what_has_not_been_run_has_no_row():
    """A study without some of the arms; a study of its own."""
    records = {"arms": {"coma": runs(0.5, 0.6), "none": runs(0.5, 0.5)}, "rate": {}}
    *_, row = study_tables.parts(records)
    equal(len(study_tables.parts(records)), 3, "its head, and CoMa")
    expect(row.startswith("| CoMa, over contrastive only | unlimited | 2 |"), row, "", "the row")
    *_, row = study_tables.beside_the_literature(records)
    equal(len(study_tables.beside_the_literature(records)), 3, "its head, and CoMa")
    expect(row.startswith("| CoMa | contrastive only | +5.0 ± 5.0"), row, "", "the row")


def test_a_curve_is_a_mean_over_seeds_at_each_step():
    """Two steps, two seeds; the page has it where the pairs are the question."""
    made = [dict(run(0.5), steps=[50, 100], curve=curve) for curve in ([0.1, 0.3], [0.2, 0.3])]
    head, _, row = study_tables.curves({"none": made})
    equal(head, "| IND, 2 seeds | after 50 steps | after 100 steps |", "head")
    equal(row, "| contrastive only | 15.0 ± 5.0 | 30.0 ± 0.0 |", "the means")
    lines = study_tables.page({"arms": {"none": made}, "rate": {"none": made}}, ["rate", "arms"])
    equal([x for x in lines if x.startswith("## `")], ["## `rate`", "## `arms`"], "order")
    equal(lines.count(head), 1, "of `arms` alone")


def test_a_cut_embedding_is_held_against_the_first_arm_cut_alike():
    """Two arms of two seeds at 16 numbers, and one that was not cut."""
    arms = {"x": runs(0.9, 0.9), "y": runs(0.8, 0.8), "z": runs(0.7, 0.7)}
    for arm, scores in {"y": (0.2, 0.3), "z": (0.4, 0.7)}.items():
        for its, score in zip(arms[arm], scores, strict=True):
            its["prefixes"] = {"16": score}
    want = ["| 2 seeds | 16 numbers | over y |", "|---|---|---|"]
    want += ["| y | 25.0 ± 5.0 | – |", "| z | 55.0 ± 15.0 | +30.0 ± 10.0 |"]
    equal(study_tables.prefixes(arms), want, "the table")


def test_the_literature_stands_beside_what_was_seen():
    """Five seeds: one arm surely behind as in the paper, one ahead by all seeds but the first, one
    that varies."""
    dialogues = {
        "multi-turn": runs(0.5, 0.6, 0.5, 0.6, 0.5),
        "single turn": runs(0.4, 0.5, 0.41, 0.5, 0.4),
        "long description": runs(0.49, 0.7, 0.61, 0.7, 0.6),
        "caption": runs(0.6, 0.5, 0.6, 0.5, 0.6),
    }
    *_, single, long, caption = study_tables.beside_the_literature({"dialogues": dialogues})
    ours, paper = "-9.8 ± 0.2 (44.2 ± 2.4)", "-0.7 (64.8)"
    equal(single, f"| single turn | multi-turn | {ours} | {paper} | same direction |", "a row")
    equal([row.split(" | ")[-1] for row in (long, caption)], ["opposite |", "cannot tell |"], "")
