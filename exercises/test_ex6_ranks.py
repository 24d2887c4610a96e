"""Exercise 6: rows to all ranks, gradients home; two processes over gloo (two_ranks.py)."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from checks import equal, expect

from exercises import ladder, planting
from exercises.two_ranks import CHECKS, WRONG

pytestmark = pytest.mark.ex6

SECONDS = ladder.SECONDS * 11 // 12  # before conftest.py's end


def environment():
    """One thread, no torchrun of somebody else, and our files on the path of an empty folder."""
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    variables["OMP_NUM_THREADS"] = "1"
    variables["CUDA_VISIBLE_DEVICES"] = ""
    variables["PYTHONPATH"] = os.pathsep.join([str(planting.ROOT), str(planting.TESTS)])
    return variables


def start(folder, subjects, seconds):
    """Runs both ranks, which write their results into the folder. -> what they printed."""
    module = [sys.executable, "-m", "exercises.two_ranks"]
    with open(Path(folder, "printed"), "w+") as output:
        ranks = []
        for rank in range(2):
            command = [*module, str(rank), folder, *subjects]
            ranks.append(
                subprocess.Popen(
                    command, cwd=folder, env=environment(), stdout=output, stderr=subprocess.STDOUT
                )
            )
        try:
            for process in ranks:
                process.wait(seconds)
        except subprocess.TimeoutExpired:
            reason = f"does a rank wait for the other one? {ladder.MORE_TIME}"
            output.write(f"\nno end after {seconds} s: {reason}")
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        output.seek(0)
        return output.read()[-2000:]


@functools.cache
def two_ranks(*subjects, seconds=SECONDS):
    """Starts both ranks once for all checks. -> {subject: {check: "" or both ranks' errors}}."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        printed = start(folder, subjects, seconds)
        for rank in range(2):
            file = Path(folder, f"{rank}.json")
            results.append(json.loads(file.read_text()) if file.exists() else {})
    lost = f"not reached; the processes said: {printed}"
    errors = {}
    for subject in subjects:
        errors[subject] = {}
        for name in CHECKS:
            both = [result.get(subject, {}).get(name, lost) for result in results]
            errors[subject][name] = " / ".join(dict.fromkeys(filter(None, both)))
    return errors


def check(student, name):
    subject = getattr(student, "SUBJECT", getattr(student, "__file__", "reference"))
    known = ("reference", str(ladder.STUB), *WRONG)  # all at once: test_grader.py wants them too
    error = two_ranks(*(known if subject in known else [subject]))[subject][name]
    if error and "AssertionError" not in error:  # no check failed: a stub, a crash, a rank lost
        raise RuntimeError(error)
    expect(not error, error, "no error on two ranks", f"two_ranks.py: check_{name}")


def test_one_rank_is_the_same_code_without_a_process_group(student):
    """World 1: the rows, and the gradient, as they are."""
    x = torch.arange(6.0).view(3, 2)
    equal(student.gather_rows(x, [3]), x, "one rank: its own rows")
    equal(student.scatter_sum(x, [3]), x, "one rank: its own gradient")


def test_every_rank_sees_all_rows(student):
    """3 rows on rank 0, 5 on rank 1: 8 on both; then 5 and 3."""
    check(student, "gather")


def test_gradients_come_home_as_a_sum(student):
    """Each rank gets its rows, summed over what both ranks say of them."""
    check(student, "scatter")


def test_two_ranks_have_the_gradient_of_one_process(student):
    """InfoNCE of a linear model, to 1e-10."""
    check(student, "gradient")
