"""The student's file as a fixture, a time limit for each of its tests, and the score lines.

    EXERCISES=my.py python -m pytest -m ex3 exercises

grades my.py; without EXERCISES my_exercises.py at the root, if there is one, else the reference."""

import json
import os
import re
import signal

import pytest
from conftest import shared  # noqa: F401  the suite's own: one thread, no network, a toy embedder

from exercises import ladder

scores = {}  # exercise -> test -> passed; None: not run
late = set()  # exercises with a test that did not end


def pytest_configure():
    path = ladder.chosen()
    if path and not path.is_file():
        raise pytest.UsageError(f"EXERCISES={path}: no such file")


@pytest.fixture
def student():
    """The functions that are graded."""
    return ladder.subject(ladder.chosen())


class TooLong(BaseException):
    """Not an Exception, so that a student's `except Exception` does not swallow it."""


@pytest.fixture(autouse=True)
def time_limit(request):
    exercise = exercise_of(request.node)
    if not exercise or not ladder.chosen():
        yield
        return
    if exercise in late:
        pytest.fail("not run: the exercise timed out before", pytrace=False)
    seconds = ladder.SECONDS
    if exercise == "ex9":
        seconds *= 5  # there our own tests run, many at once

    def stop(*_):
        late.add(exercise)
        reason = f"a loop without an end? {ladder.MORE_TIME}"
        raise TooLong(f"no end after {seconds} seconds: {reason}")

    if not hasattr(signal, "SIGALRM"):  # Windows
        yield
        return
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def exercise_of(item):
    """The exercise that a test grades; None for the tests of the grader."""
    marks = [m.name for m in item.iter_markers() if re.fullmatch(r"ex\d+", m.name)]
    return marks[0] if marks and "student" in item.fixturenames else None


def note(**record):
    """A line for grade.py, at once: what is done stays when the process is killed later."""
    if os.environ.get("EXERCISES_REPORT"):
        with open(os.environ["EXERCISES_REPORT"], "a") as file:
            file.write(json.dumps(record) + "\n")


def pytest_collection_modifyitems(items):
    for item in items:
        if exercise := exercise_of(item):
            item.user_properties.append(("exercise", exercise))


def pytest_collection_finish(session):
    for item in session.items:
        if exercise := exercise_of(item):
            scores.setdefault(exercise, {})[item.nodeid] = None
            note(exercise=exercise, test=item.nodeid)


def pytest_runtest_logreport(report):
    exercise = dict(report.user_properties).get("exercise")
    if not exercise or not (report.when == "call" or report.failed or report.skipped):
        return
    scores.setdefault(exercise, {})[report.nodeid] = report.passed
    note(exercise=exercise, test=report.nodeid, passed=report.passed, said=report.longreprtext)


def pytest_terminal_summary(terminalreporter):
    path = ladder.chosen()
    if not path:
        return
    for name, exercise in ladder.EXERCISES.items():
        if name not in scores:
            continue
        results = list(scores[name].values())
        label = f"{name} {exercise.title}"
        line = f"{path.name}: {label:<24} {results.count(True)} of {len(results)} tests"
        ran = len(results) - results.count(None)
        if ran < len(results):
            line += f" (stopped after {ran})"
        terminalreporter.write_line(line)
