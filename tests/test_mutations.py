"""The list of planted mistakes (mutate.py, run by hand) fits the code and leaves nothing out."""

import ast
from pathlib import Path

import mutate
from checks import expect
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
