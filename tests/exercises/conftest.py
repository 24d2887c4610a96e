"""The student's file as a fixture, a time limit for each of its tests, and the score lines.

    EXERCISES=my.py python -m pytest -m ex3 tests/exercises

grades my.py; without EXERCISES exercises.py at the root, if there is one, else the reference."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]

import ladder  # noqa: E402

# Of one test: an endless loop costs its own points and no others.
SECONDS = int(os.environ.get("EXERCISES_SECONDS", "60"))
scores = {}  # exercise -> [passed, all]


@pytest.fixture
def student():
    """The functions that are graded."""
    return ladder.subject(ladder.chosen())


class TooLong(BaseException):
    """Not an Exception, so that a student's `except Exception` does not swallow it."""


@pytest.fixture(autouse=True)
def time_limit(request):
    if "student" not in request.fixturenames or not ladder.chosen():
        yield
        return

    def stop(*_):
        raise TooLong(f"no end after {SECONDS} seconds")

    old = signal.signal(signal.SIGALRM, stop) if hasattr(signal, "SIGALRM") else None
    if old is not None:
        signal.alarm(SECONDS)
    yield
    if old is not None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def exercise_of(item):
    marks = [m.name for m in item.iter_markers() if re.fullmatch(r"ex\d+", m.name)]
    return marks[0] if marks and "student" in item.fixturenames else None


def note(**what):
    """A line for grade.py, at once: what is done stays when the process is killed later."""
    if os.environ.get("EXERCISES_REPORT"):
        with open(os.environ["EXERCISES_REPORT"], "a") as file:
            file.write(json.dumps(what) + "\n")


def pytest_collection_modifyitems(items):
    for item in items:
        if exercise := exercise_of(item):
            item.user_properties.append(("exercise", exercise))


def pytest_collection_finish(session):
    for item in session.items:
        if exercise := exercise_of(item):
            note(exercise=exercise, test=item.nodeid, passed=False)


def pytest_runtest_logreport(report):
    exercise = dict(report.user_properties).get("exercise")
    if not exercise or not (report.when == "call" or report.failed or report.skipped):
        return
    passed, total = scores.get(exercise, (0, 0))
    passed += report.passed
    scores[exercise] = (passed, total + (report.when != "teardown"))
    note(exercise=exercise, test=report.nodeid, passed=report.passed)


def pytest_terminal_summary(terminalreporter):
    if path := ladder.chosen():
        for exercise, (passed, total) in scores.items():
            name = f"{exercise} {ladder.NAMES[exercise]}"
            terminalreporter.write_line(f"{path.name}: {name:<24} {passed} of {total} tests")
