"""The grader is graded: every stub fails, the reference passes, each planted mistake is found."""

import csv
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import equal, expect

from exercises import (
    bugs,
    grade,
    hand_out,
    ladder,
    mistakes,
    questions,
    test_ex0_one_bit,
    test_ex1_infonce,
    test_ex2_mask,
    test_ex3_labels,
    test_ex4_pooling,
    test_ex5_gradcache,
    test_ex6_ranks,
    test_ex7_precision,
    test_ex8_predict,
    test_ex9_bugs,
    test_ex10_ablation,
    test_ex11_layout,
    test_ex12_cache,
    test_ex13_gradient,
    test_ex14_hardness,
    test_ex15_matryoshka,
)
from tools import explain

pytestmark = pytest.mark.grader
MODULES = (
    test_ex0_one_bit, test_ex1_infonce, test_ex2_mask, test_ex3_labels, test_ex4_pooling,
    test_ex5_gradcache, test_ex6_ranks, test_ex7_precision, test_ex8_predict, test_ex9_bugs,
    test_ex10_ablation, test_ex11_layout, test_ex12_cache, test_ex13_gradient,
    test_ex14_hardness, test_ex15_matryoshka,
)  # fmt: skip


def parameters_of(test):
    """The arguments that a test is parametrized with, one dict a case."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            name, values = mark.args
            return [{name: value} for value in values]
    return [{}]


def cases_of(exercise):
    """(name, function, its parametrized arguments) of every test of an exercise."""
    for module in MODULES:
        if module.pytestmark.name != exercise:
            continue
        # Trap: a module's first warning adds to its names.
        for name, test in list(vars(module).items()):
            if name.startswith("test_") and inspect.isfunction(test):
                for case in parameters_of(test):
                    yield f"{name}{list(case.values()) or ''}", test, case


def failures(exercise, student, shared):
    """-> ({failing test: its error}, how many tests there are). The very tests that `-m exN`
    runs."""
    failed, total = {}, 0
    for name, test, case in cases_of(exercise):
        total += 1
        with pytest.MonkeyPatch.context() as monkeypatch:
            fixtures = {"student": student, "shared": shared, "monkeypatch": monkeypatch}
            wanted = inspect.signature(test).parameters
            try:
                test(**case, **{name: fixtures[name] for name in wanted if name in fixtures})
            except Exception as e:
                failed[name] = e
    return failed, total


def test_every_exercise_has_tests_and_two_to_eight_mistakes():
    """Sixteen exercises, 100 points; of exercise 8 two or three wrong answers to each question."""
    equal(list(mistakes.ALL), list(ladder.EXERCISES), "an exercise without mistakes, or a name")
    names = [module.pytestmark.name for module in MODULES]
    equal(names, list(ladder.EXERCISES), "a file for each")
    equal(sum(e.points for e in ladder.EXERCISES.values()), 100, "the points")
    for name in ladder.EXERCISES:
        count = len(mistakes.mistakes(name))
        expect(2 <= count <= 8 or name == "ex8", count, "2 to 8", name)


def test_the_students_page_has_every_exercise_and_nothing_of_the_grader():
    """exercises/README.md: a row and its points for each; the teacher's page apart."""
    page = (ladder.HERE / "README.md").read_text()
    for name, exercise in ladder.EXERCISES.items():
        row = rf"\| {name[2:]} \| .* \| {exercise.points} \|"
        expect(
            re.search(row, page), name, f"a row that ends with {exercise.points} points", "table"
        )
    for word in ("solution", "mistakes.py", "reference", "test_grader", "sandbox"):
        expect(word not in page, word, "nothing of it", "TEACHING.md is for that")


def test_explain_shows_exercise_0_the_positions_that_it_grades(shared, capsys):
    """`python -m tools.explain pretrain`: the roles in the mask that it draws."""
    explain.main(["pretrain"])
    drawn = re.findall(r"^  ([hxCQA]) [#.]+$", capsys.readouterr().out, re.MULTILINE)
    roles = test_ex0_one_bit.roles_of_explain(shared)[0].tolist()
    want = [explain.LETTER[role] for role in roles]
    equal("".join(drawn), "".join(want), "the mask's letters; roles_of_explain")


def test_two_ranks_that_are_stopped_say_so_once_and_what_gives_them_more_time():
    """A right file on a busy machine is stopped, too: its owner must not look for a mistake."""
    errors = test_ex6_ranks.two_ranks("reference", seconds=0.01)["reference"]
    for error in errors.values():
        equal(error.count("no end after 0.01 s"), 1, error)
        more = f"EXERCISES_SECONDS={3 * ladder.SECONDS}"
        expect(more in error, error, more, "start")


def test_a_conclusion_in_other_words_is_told_the_three_that_there_are(shared):
    """The right one with a capital letter is none of them; the numbers are not what is wrong."""
    failed, _ = failures("ex10", mistakes.table(conclusion="Higher"), shared)
    said = str(failed["test_the_difference_and_what_may_be_said"])
    expect("higher | lower | cannot tell" in said, said, "the three words", "test_ex10_ablation.py")


@pytest.mark.parametrize("exercise", ladder.EXERCISES)
def test_the_stub_fails_every_test(exercise, shared):
    """Not one point for an untouched file."""
    failed, total = failures(exercise, ladder.load(ladder.STUB), shared)
    equal(len(failed), total, f"{exercise}: a stub passes; failed: {[*failed]}")


@pytest.mark.parametrize(
    ("exercise", "functions"),
    [
        ("ex2", ["compression_mask"]),
        ("ex3", ["answer_labels", "answer_loss"]),
        ("ex11", ["layout"]),
    ],
)
def test_a_body_of_pass_fails_every_test(exercise, functions, shared):
    """What returns nothing spoils nothing, which some tests ask for; that alone is no point."""
    nothing = mistakes.Wrong(**dict.fromkeys(functions, lambda *_: None))
    failed, total = failures(exercise, nothing, shared)
    equal(len(failed), total, f"{exercise}: None passes; failed: {[*failed]}")


@pytest.mark.parametrize("exercise", ladder.EXERCISES)
def test_the_reference_passes(exercise, shared):
    """All points for our own code, also while a student's file is being graded."""
    equal(failures(exercise, mistakes.OURS, shared)[0], {}, exercise)


@pytest.mark.parametrize("exercise", ladder.EXERCISES)
def test_every_planted_mistake_fails(exercise, shared):
    """At least one test each, by a check that says what is wrong; a crash alone is no finding."""
    for name, wrong in mistakes.mistakes(exercise).items():
        failed, _ = failures(exercise, wrong, shared)
        noticed = any(isinstance(e, AssertionError) for e in failed.values())
        expect(noticed, f"{exercise}, {name}: {failed}", "a failed check", "a blind grader")


def test_the_stub_names_its_exercise_and_holds_no_solution():
    """Each function's body is a docstring and a NotImplementedError that says how it is graded."""
    for name, function in inspect.getmembers(ladder.load(ladder.STUB), inspect.isfunction):
        code = inspect.getsource(function).split('"""')
        body = code[2].strip()
        expect(body.startswith("raise NotImplementedError(") and body.count("\n") == 0, body,
               "one raise", name)  # fmt: skip
        with pytest.raises(
            NotImplementedError, match=r"Exercise \d+: .*grade with pytest -m ex\d+"
        ):
            function(*[None] * len(inspect.signature(function).parameters))
        expect("oughly" in code[1], code[1], "roughly N lines", name)


@pytest.mark.parametrize(
    "line",
    [
        "import contrastive",
        "from model import compression_pool",
        "from exercises.ladder import Reference",
        "from test_mask import oracle",
        "import checks",
        "from tests.checks import equal",
    ],
)
def test_a_file_that_imports_a_solution_is_refused(tmp_path, line):
    """The message names line and file."""
    (tmp_path / "a.py").write_text(f"import torch\n{line}\n")
    with pytest.raises(ImportError, match="a.py, line 2 imports"):
        ladder.load(tmp_path / "a.py")


def test_a_file_may_hold_dataclasses_whose_annotations_are_text(tmp_path):
    """`dataclass` looks their words up in the module, by its name."""
    lines = "from __future__ import annotations", "from dataclasses import dataclass"
    (tmp_path / "a.py").write_text("\n".join([*lines, "@dataclass", "class A:", "    x: int"]))
    equal(ladder.load(tmp_path / "a.py").A(3).x, 3, "sys.modules")


def test_what_is_computed_is_what_the_stub_asks():
    """Exercise 8: the numbers in its questions, which stand in another file than the truth."""
    text, names = ladder.STUB.read_text(), ("HEAD", "CONTENT", "COMPRESS", "QUESTION", "ANSWER")
    row = [f"{questions.ROLES.count(getattr(questions, name))} {name}" for name in names]
    chunks, keep = questions.forward_passes.__defaults__
    world, _ = questions.mean_over_ranks.__defaults__
    for words in (
        f"{', '.join(row)} tokens",
        f"over {chunks} chunks of equal size; the last {keep} keep",
        f"# {world} ranks. Each",
    ):
        expect(words in text, "another number", words, "questions.py and stub.py")


def in_float32(q, c, candidates, tie=1e-6):
    return np.float32(mistakes.precision_at_1(q, c, candidates, tie))


def printed_ablation():
    """Worked out from numbers of two decimals. The scores leave 2.33 +- 1.17: "cannot tell"."""
    a = {"command": "a", "scores": {0: 59.0, 1: 60.3, 2: 59.0}, "mean": 59.43, "se": 0.43}
    b = {"command": "b", "scores": {0: 63.8, 1: 60.1, 2: 61.4}, "mean": 61.77, "se": 1.08}
    said = {"difference": 2.34, "difference_se": 1.16, "conclusion": "higher"}
    return {"question": "?", "arms": {"a": a, "b": b}, **said}


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [("ex7", {"precision_at_1": in_float32}), ("ex10", {"ABLATION": printed_ablation()})],
)
def test_a_right_solution_written_otherwise_passes(exercise, answer, shared):
    """A mean in float32; an ablation by hand."""
    equal(failures(exercise, mistakes.Wrong(**answer), shared)[0], {}, exercise)


def normalises_the_whole_too(loss, q, t, lengths):
    return mistakes.matryoshka_loss(loss, F.normalize(q, dim=1), F.normalize(t, dim=1), lengths)


def detaches_a_graph(embed, chunks, loss_of):
    """Right numbers; the first pass builds graphs, and throws them away."""

    def embed_with_graphs(chunk):
        with torch.enable_grad():
            z = embed(chunk)
        return z if torch.is_grad_enabled() else z.detach()

    return mistakes.two_passes(embed_with_graphs, chunks, loss_of)


def empties_the_chunks(embed, chunks, loss_of):
    loss = mistakes.two_passes(embed, [*chunks], loss_of)
    chunks.clear()
    return loss


@pytest.mark.parametrize(
    ("exercise", "answer", "hint"),
    [
        ("ex15", {"matryoshka_loss": normalises_the_whole_too}, "normalising it again changes"),
        ("ex5", {"two_passes": detaches_a_graph}, "16 rows with a graph"),
        ("ex5", {"two_passes": empties_the_chunks}, "not yours to empty"),
    ],
)
def test_the_hint_names_the_cause(exercise, answer, hint, shared):
    """The whole normalised once more; detach in the place of no_grad; the grader's own lists."""
    failed, _ = failures(exercise, mistakes.Wrong(**answer), shared)
    expect(failed and all(hint in str(e) for e in failed.values()), failed, hint, exercise)


def run(*words, cwd=ladder.ROOT, **variables):
    """python WORDS ..., with these environment variables, and none of another grading."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("EXERCISES")}
    env.update(variables)
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=cwd)


def test_a_class_is_graded_and_no_submission_harms_another(tmp_path):
    """An endless loop, an exit in the middle of garbage, and a good one after them; the whole
    grading's files stay."""
    (tmp_path / "a_loop.py").write_text("while True:\n    pass\n")
    garbage = "import os\nprint('{\"' * 9999)\nseen = []\ndef __getattr__(name):\n"
    garbage += "    return 'no table' if not seen.append(name) and len(seen) < 2 else os._exit(0)\n"
    (tmp_path / "b_exit.py").write_text(garbage)
    (tmp_path / "scores.csv").write_text("a whole grading's")
    (tmp_path / "._b_exit.py").write_text("what a Mac keeps beside a file")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "good.py").write_text(f"ABLATION = {mistakes.OURS.ABLATION!r}\n")
    done = run("-m", "exercises.grade", tmp_path, "--only", "ex10", EXERCISES_SECONDS="1")
    equal(done.returncode, 0, done.stderr[-2000:])
    equal((tmp_path / "scores.csv").read_text(), "a whole grading's", "--only ex10 leaves it")
    with open(tmp_path / "scores-ex10.csv") as file:
        rows = {r["submission"]: r for r in csv.DictReader(file)}
    equal({k: float(r["ex10"]) for k, r in rows.items()},
          {"a_loop.py": 0.0, "b_exit.py": 0.0, "c/good.py": 9.0}, done.stdout)  # fmt: skip
    loop, gone, good = (
        (tmp_path / "reports-ex10" / f"{n}.txt").read_text()
        for n in ("a_loop.py", "b_exit.py", "c/good.py")
    )
    limit = "no end after 1 seconds: a loop without an end? A busy machine needs more, "
    limit += "EXERCISES_SECONDS=3 (now 1)"
    expect(limit in loop, loop[-2000:], limit, "conftest.py")
    equal(loop.count("\nnot run: the exercise timed out before"), 2, "one wait an exercise")
    remark = "ended early (exit code 0) in test_ex10_ablation.py::test_means_and_standard_errors"
    equal(rows["b_exit.py"]["remark"], remark, "the test that was running")
    expect("got:  no table" in gone and remark in gone, gone[-2000:], "what was done", "grade.py")
    expect("3 of 3 tests" in good, good[-2000:], "a score line", "conftest.py")


def test_a_submission_that_cannot_be_interrupted_is_killed(tmp_path):
    """After --seconds, with no points."""
    loop = "while True:\n    try:\n        while True:\n            pass\n"
    (tmp_path / "a.py").write_text(loop + "    except BaseException:\n        pass\n")
    points, remark = grade.grade(tmp_path / "a.py", seconds=1, only="ex10")
    equal((points, remark), ({"ex10": 0}, "stopped after 1 s"), "the process' time limit")


def test_a_submission_writes_no_large_file(tmp_path, monkeypatch):
    """Neither of its own nor by printing without end: the disk is everybody's. In the place of its
    tests a program that writes and nothing else."""
    start, line = subprocess.Popen, "open('large', 'wb', 0).write(bytes(2**17)) == 2**17 or 1 / 0"
    monkeypatch.setattr(
        grade.subprocess, "Popen", lambda _, **more: start([sys.executable, "-c", line], **more)
    )
    for largest, status in ((2**16, 1), (2**18, 0)):
        monkeypatch.setattr(grade, "LARGEST", largest)
        with open(tmp_path / "report.txt", "w") as output:
            equal(grade.run_tests(["ex10"], dict(os.environ), output, 60), status, f"{largest}")


def test_a_file_that_is_named_from_here_is_found_from_the_empty_folder(tmp_path, monkeypatch):
    """`python -m exercises.grade my.py`"""
    graded = []

    def run_tests(names, environment, *_):
        graded.append(environment["EXERCISES"])
        return 1

    monkeypatch.setattr(grade, "run_tests", run_tests)
    monkeypatch.chdir(tmp_path)
    Path("my.py").touch()
    grade.grade(Path("my.py"), only="ex10")
    equal(graded, [str(tmp_path / "my.py")], "its whole path")


def test_of_what_was_noted_the_last_record_of_a_test_counts(tmp_path):
    """And half a line, or what a submission writes between them, is no record."""
    first, last = ({"exercise": "ex1", "test": "a", **more} for more in ({}, {"passed": True}))
    other = {"exercise": "ex1", "test": "b", "passed": False}
    lines = [json.dumps(x) for x in (first, {}, [], 5, other, last)]
    (tmp_path / "notes").write_text("\n".join(lines) + '\n{"exercise": "ex1", "te')
    equal(grade.read_records(tmp_path / "notes"), {"ex1": {"a": last, "b": other}}, "read_records")
    equal(grade.read_records(tmp_path / "none"), {}, "no test was found")


def test_why_no_test_could_run_is_remarked(tmp_path, monkeypatch):
    """pytest says it in its report alone, and ends as after tests that fail."""
    monkeypatch.setattr(grade, "run_tests", lambda *_: 1)
    (tmp_path / "a.py").write_text("import contrastive\n")
    _, remark = grade.grade(tmp_path / "a.py", only="ex10")
    expect(remark.startswith("ImportError: a.py, line 1 imports"), remark, "why", "grade.refused")


def test_a_part_of_an_exercise_is_a_part_of_its_points(tmp_path, monkeypatch):
    """Two tests of three."""
    tests = {"a": {"passed": True}, "b": {"passed": False}, "c": {"passed": True}}
    monkeypatch.setattr(grade, "run_tests", lambda *_: 1)
    monkeypatch.setattr(grade, "read_records", lambda _: {"ex10": tests})
    (tmp_path / "a.py").write_text("")
    points = ladder.EXERCISES["ex10"].points
    equal(grade.grade(tmp_path / "a.py", only="ex10"), ({"ex10": points * 2 / 3}, ""), "grade")


@pytest.mark.parametrize(("words", "seconds"), [(["--seconds", "7"], 7.0), ([], 300)])
@pytest.mark.parametrize("single", [True, False])
def test_a_file_is_given_the_seconds_of_the_command_line(
    tmp_path, monkeypatch, single, words, seconds
):
    """Alone, or as one of a class; without the flag those that TEACHING.md says."""
    asked = []

    def note(path, seconds=300, only="", report=None):
        asked.append((path.name, seconds, only))
        return {"ex10": 0}, ""

    (tmp_path / "a.py").touch()
    words = [str(tmp_path / "a.py" if single else tmp_path), *words, "--only", "ex10"]
    monkeypatch.setattr(grade, "grade", note)
    monkeypatch.setattr(grade, "heed_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["grade", *words])
    grade.main()
    equal(asked, [("a.py", seconds, "ex10")], "grade.main")


@pytest.mark.parametrize(("only", "most"), [("", 100), ("ex10", 9)])
def test_a_score_is_said_beside_what_there_is_to_get(tmp_path, monkeypatch, capsys, only, most):
    """Of each exercise, and of all that were graded; a class has the same sum in its table."""
    points = {"ex10": 6.0} if only else dict.fromkeys(ladder.EXERCISES, 1.5) | {"ex10": 6.0}
    monkeypatch.setattr(grade, "grade", lambda *_: (points, "a remark"))
    (tmp_path / "a.py").touch()
    cfg = SimpleNamespace(path=tmp_path / "a.py", only=only, seconds=1)
    grade.grade_file(cfg)
    *rows, last = capsys.readouterr().out.splitlines()
    total = 6.0 if only else 28.5
    equal(last.split(), ["total", f"{total}", "of", f"{most}", "a", "remark"], "in all")
    equal(len(rows), len(points), "a line each")
    expect("ex10  ablation               6.0 of 9" in rows, rows, "of its points", "grade_file")
    cfg.path = tmp_path
    grade.grade_class(cfg)
    with open(next(tmp_path.glob("scores*.csv"))) as file:
        (row,) = csv.DictReader(file)
    got = [row[name] for name in ("submission", "ex10", "total", "remark")]
    equal(got, ["a.py", "6.0", f"{total}", "a remark"], "scores.csv")


def test_a_score_is_in_the_table_before_the_next_submission_runs(tmp_path, monkeypatch):
    """A grading of hours may be killed."""
    seen = []

    def note(*_):
        seen.append((tmp_path / "scores-ex10.csv").read_text().count("\n"))
        return {"ex10": 0}, ""

    for name in "ab":
        (tmp_path / f"{name}.py").touch()
    monkeypatch.setattr(grade, "grade", note)
    grade.grade_class(SimpleNamespace(path=tmp_path, only="ex10", seconds=1))
    equal(seen[1], 2, "the head, and a.py")


def test_a_class_is_graded_again_into_the_same_files(tmp_path, monkeypatch):
    """When the last ones have come: of all that are there now."""
    monkeypatch.setattr(grade, "grade", lambda *_: ({"ex10": 0}, ""))
    cfg = SimpleNamespace(path=tmp_path, only="", seconds=1)
    with pytest.raises(SystemExit, match="no .*.py in it or in its folders"):
        grade.grade_class(cfg)
    equal(list(tmp_path.iterdir()), [], "nothing is written")
    (tmp_path / "b").mkdir()
    for name in ("a.py", "b/c.py"):
        (tmp_path / name).touch()
        grade.grade_class(cfg)
    with open(tmp_path / "scores.csv") as file:
        equal([row["submission"] for row in csv.DictReader(file)], ["a.py", "b/c.py"], "both")


@pytest.mark.parametrize("word", ["0", "-1", "nan", "inf"])
def test_a_grading_takes_some_time_and_ends(word):
    """--seconds 0 would stop each submission before its first test: no points for anybody."""
    with pytest.raises(ArgumentTypeError, match="must be above 0"):
        grade.duration(word)


def test_a_class_may_lie_below_a_hidden_folder(tmp_path, monkeypatch):
    """What is hidden in it is no submission."""
    folder, graded = tmp_path / ".class", []
    folder.mkdir()
    for name in ("a.py", "._a.py"):
        (folder / name).touch()
    monkeypatch.setattr(grade, "grade", lambda path, *_: (graded.append(path.name), ({}, ""))[1])
    grade.grade_class(SimpleNamespace(path=folder, only="ex10", seconds=1))
    equal(graded, ["a.py"], "grade.is_hidden")


def test_under_nohup_a_closed_terminal_ends_no_grading(monkeypatch):
    """nohup ignores SIGHUP, and so it stays."""
    set_to, now = {}, {signal.SIGHUP: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}
    monkeypatch.setattr(grade.signal, "getsignal", now.get)
    monkeypatch.setattr(grade.signal, "signal", set_to.__setitem__)
    grade.heed_signals()
    equal((signal.SIGHUP in set_to, signal.SIGTERM in set_to), (False, True), "heed_signals")


def is_alive(process_id) -> bool:
    """Whether there is such a process, and not only its exit status."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_grading_that_is_ended_leaves_no_submission_behind(tmp_path):
    """SIGTERM, while one runs that cannot be interrupted."""
    note = tmp_path / "id"
    loop = f"import os\nopen({str(note)!r}, 'w').write(str(os.getpid()) + ' ')\nwhile True:\n"
    loop += "    try:\n        while True:\n            pass\n"
    (tmp_path / "a.py").write_text(loop + "    except BaseException:\n        pass\n")
    command = [sys.executable, "-m", "exercises.grade", str(tmp_path / "a.py"), "--only", "ex10"]
    grading = subprocess.Popen(command, cwd=ladder.ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (note.exists() and note.read_text().endswith(" ")) and time.monotonic() < end:
        time.sleep(0.1)
    grading.send_signal(signal.SIGTERM)
    equal(grading.wait(60), 128 + signal.SIGTERM, "as a shell says it")
    submission = int(note.read_text())
    while is_alive(submission) and time.monotonic() < end:
        time.sleep(0.1)
    alive = is_alive(submission)
    if alive:
        os.kill(submission, signal.SIGKILL)
    expect(not alive, "it still runs", "killed with its group", "grade.heed_signals")


def test_a_submission_that_python_cannot_read_is_remarked(tmp_path):
    """Nested too deep; gone. The class behind it is graded all the same."""
    (tmp_path / "a.py").write_text("x = " + 200_000 * "-" + "1")
    remark = grade.refused(tmp_path / "a.py")
    expect(remark.startswith(("MemoryError", "RecursionError")), remark, "a remark", "refused")
    remark = grade.refused(tmp_path / "gone.py")
    expect(remark.startswith("FileNotFoundError"), remark, "a remark", "refused")


def test_a_closed_pipe_ends_in_silence(tmp_path):
    """`python -m exercises.grade my.py | head -1`"""
    (tmp_path / "a.py").write_text("ABLATION = None\n")
    command = [sys.executable, "-m", "exercises.grade", str(tmp_path / "a.py"), "--only", "ex10"]
    read, write = os.pipe()
    os.close(read)  # whoever read is gone
    done = subprocess.run(command, cwd=ladder.ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    equal(done.stderr, "", "no traceback")


def test_a_bug_is_planted_in_one_process_alone():
    """Workers of pytest-xdist would run without it, and pass."""
    done = run("-m", "exercises.bugs", "b3", "tests/test_answers.py", "-q", "-n", "1")
    expect("without -n" in done.stderr and done.returncode, done.stderr, "refused", "bugs.main")


def test_a_test_may_be_named_as_pytest_prints_it_and_a_file_that_is_not_there_is_one_line():
    """Exercise 9: folder and [parameters] are no part of the name. EXERCISES=nofile.py."""
    line = "tests/test_gradcache.py::test_the_gradient_is_added_to_grad[False]"
    equal(bugs.problem(bugs.plain(line)), "", "bugs.plain")
    done = run("-m", "pytest", "-q", ladder.HERE, EXERCISES="nofile.py")
    expect("nofile.py: no such file" in done.stderr and done.stderr.count("\n") <= 2, done.stderr,
           "one line", "conftest.py")  # fmt: skip


def test_a_teachers_files_are_not_handed_out(tmp_path, monkeypatch):
    """Other students' solutions, their scores, photographs: at the root, or among the exercises."""
    clone = hand_out.hand_out(tmp_path / "clone")
    for name in ("alice.py", "photo.jpg", "class26/bob.py", "out/reports/a.txt",
                 "exercises/.ipynb_checkpoints/eve.py", "exercises/__pycache__/eve.pyc",
                 "exercises/submissions/eve.py", "exercises/reports/eve.txt"):  # fmt: skip
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    monkeypatch.setattr(ladder, "ROOT", clone)
    copy = hand_out.hand_out(tmp_path / "copy")
    words = ("alice", "photo", "bob", "eve", "a.txt")
    there = [path.name for path in copy.rglob("*") if path.stem in words or path.name in words]
    expect(not there, there, "none of them", "hand_out")


def test_a_students_copy_is_graded_where_it_is(tmp_path):
    """hand_out, then the command that it prints: the stub at the root is graded, and fails; a
    second hand_out does not overwrite it."""
    copy = hand_out.hand_out(tmp_path / "copy")
    there = {path.name for path in copy.iterdir()}
    tracked = {"LICENSE", "README.md", "pyproject.toml", "requirements.txt", "my_exercises.py"}
    tracked |= {f"{name}.py" for name in ("data", "model", "pretrain", "contrastive", "evaluate")}
    tracked |= {"plumbing", "toy", "tools", "exercises", "tests", "docs"}
    equal(there, tracked, "ours alone, and all of it: hand_out")
    expect(not (copy / "exercises" / "TEACHING.md").exists(), "TEACHING.md", "none", "LEFT_OUT")
    named = (copy / "README.md").read_text().count("exercises/TEACHING.md")
    expect(named == 0, named, "no link to what is not there", "hand_out")
    words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "ex10"]
    done = run(*words, "exercises/test_ex10_ablation.py", cwd=copy)
    score = f"my_exercises.py: {'ex10 ablation':<24} 0 of 3 tests (stopped after 1)"
    expect(score in done.stdout, done.stdout[-2000:], score, "conftest.py")
    with pytest.raises(FileExistsError, match="not empty"):
        hand_out.hand_out(copy)
    with pytest.raises(FileExistsError, match="inside"):
        hand_out.hand_out(ladder.ROOT / "copy")
    with pytest.raises(FileExistsError, match="is a file"):
        hand_out.hand_out(copy / ladder.OWN.name)
    below = tmp_path / "copy" / ladder.OWN.name / "deeper"
    done = run("-m", "exercises.hand_out", below)
    expect("Not a directory" in done.stderr and done.stderr.count("\n") == 1, done.stderr,
           "one line", "hand_out.main")  # fmt: skip
