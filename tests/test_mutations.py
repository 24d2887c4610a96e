"""The list of planted mistakes (mutate.py, run by hand) fits the code and leaves nothing out."""

import ast
from pathlib import Path

import mutate
import pytest
from checks import expect
from mutations import MUTATIONS


@pytest.mark.parametrize("number", range(len(MUTATIONS)))
def test_a_planted_mistake_stands_once_and_is_python(number):
    """Its text is in the file exactly once, and the file with the mistake is still a program."""
    mutation = MUTATIONS[number]
    mutate.line_of(mutation)
    text = Path(mutate.ROOT, mutation.file).read_text()
    ast.parse(text.replace(mutation.old, mutation.new))
    hint = "a mistake that changes nothing"
    expect(mutation.old != mutation.new, mutation.new, "another text", hint)
    for word in mutation.tests.split():
        file = word.partition("::")[0]
        known = not file.endswith(".py") or Path(mutate.ROOT, file).exists()
        expect(known, file, "a file of tests", "which tests should notice it?")


def test_every_function_has_a_planted_mistake():
    """Of the five files and of plumbing/."""
    names = mutate.untouched()
    hint = "add a one-line mistake for each to tests/mutations.py"
    expect(not names, names, "no function left out", hint)
