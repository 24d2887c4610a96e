"""The list of planted mistakes (mutate.py, run by hand) fits the code and leaves nothing out."""

import ast
import select
import subprocess
import time
from pathlib import Path

import mutate
import pytest
from checks import equal, expect
from mutations import MUTATIONS


def test_planted_mistakes_stand_once_and_are_python():
    """Each one's text is in its file exactly once, the file with the mistake is still a program,
    and the tests that should notice it are there."""
    wrong = []
    for number, mutation in enumerate(MUTATIONS):
        try:
            mutate.line_of(mutation)
            text = Path(mutate.ROOT, mutation.file).read_text()
            ast.parse(text.replace(mutation.old, mutation.new))
        except (ValueError, SyntaxError) as e:
            wrong.append(f"{number}: {e}")
        files = [word.partition("::")[0] for word in mutation.tests.split()]
        lost = [f for f in files if f.endswith(".py") and not Path(mutate.ROOT, f).exists()]
        if lost or mutation.old == mutation.new:
            wrong.append(f"{number}: {mutation.old}: changes nothing, or no tests {lost}")
    expect(not wrong, wrong, "a list that fits", "tests/mutations_*.py: the code has moved on")


def test_every_function_has_a_planted_mistake():
    """Of the five files and of plumbing/."""
    names = mutate.untouched()
    hint = "add a one-line mistake for each to tests/mutations.py"
    expect(not names, names, "no function left out", hint)


# --------------------------------------------------------------------------------------- the runner


@pytest.mark.parametrize(
    ("limit", "status", "command"),
    [(0.1, mutate.OVERDUE, "sleep 600"), (600, 3, "exit 3"), (600, 0, "true")],
)
def test_tests_that_hang_are_ended_and_others_have_their_status(tmp_path, limit, status, command):
    """After the limit, with all that they started: nothing is waited for that never ends."""
    words = ["sh", "-c", f"{command} & wait $!"]
    process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE)
    run = mutate.Run(process.pid, tmp_path, time.time(), limit)
    while (ended := run.ended()) is None:
        time.sleep(0.01)
    equal(ended, status, command)
    process.returncode = ended  # it is waited for already
    closed, _, _ = select.select([process.stdout], [], [], 60)  # by the last that could write
    expect(closed, "somebody lives", "nobody", "Run.end_group")
    process.stdout.close()


@pytest.mark.parametrize(
    ("bare", "status", "word"),
    [
        (0, 0, "SURVIVED"),
        (0, 1, "noticed"),
        (0, mutate.OVERDUE, "noticed"),
        (0, mutate.STRANGE, "BROKEN"),
        (0, -15, "BROKEN"),
        (1, 1, "BROKEN"),
    ],
)
def test_a_verdict_is_what_came_of_the_tests(tmp_path, bare, status, word):
    """A hang is noticed; tests that fail anyway, or that somebody else ended, say nothing."""
    mutation = mutate.MUTATIONS[0]
    (tmp_path / mutation.file).write_text(f"x {mutation.old} y")
    seen = []

    class Planned(mutate.Campaign):
        def tests_in(self, house, tests):
            yield
            seen.append((house / mutation.file).read_text())
            return (bare, status)[len(seen) - 1], 1.0, ""

    campaign = Planned({0: mutation})
    list(campaign.one(tmp_path, 0, mutation))
    equal(campaign.verdicts[mutation].word, word, f"{bare} without it, {status} with it")
    both = [f"x {mutation.old} y", f"x {mutation.new} y"]
    equal(seen, both if not bare else both[:1], "what the tests found")
    equal((tmp_path / mutation.file).read_text(), both[0], "put back")
