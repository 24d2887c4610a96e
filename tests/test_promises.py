"""The table of docs/promises.md, a row a test: what it names as proof is there, under that name.

`pytest -v tests/test_promises.py` prints the table; to run a row's proof: `pytest -k` and its name.
"""

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest
from checks import expect

ROOT = Path(__file__).parent.parent
# What users give us -> a word of the row that says what becomes of it, if it is bad.
INPUTS = {
    "flags": "every number of every flag has a range",
    "flags together": "a flag that does nothing beside the others",
    "ranks that differ": "lists that differ are refused on both",
    "special files": "a pipe, device, socket, folder, loop of links",
    "programs and code": "nothing from a checkpoint is unpickled or executed",
    "pictures": "no program is started; whatever a decoder raises",
    "lists": "bad data are one clear line",
    "folders of models": "damaged, another family's, of absurd size, or not finite",
    "checkpoints": "a checkpoint that is damaged (cut off, unreadable, of other shapes) is said",
    "disks": "a full disk (a real one)",
    "what is written": "refused before the work where it cannot be written",
    "load and encode": "`load` and `encode` take what sentence-transformers' users pass",
}


def rows() -> list:
    """[(promise, names of tests)] of the table. A name may be a file's, or end in an ellipsis."""
    lines = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8").splitlines()
    table = []
    for line in lines:
        if line.startswith("| ") and line != "| promise | test |":
            # A bar inside of a cell is written \|.
            promise, proof = re.split(r"(?<!\\)\|", line.strip("| "))
            table.append((promise.strip(), re.findall(r"`(test_[^`]*)`", proof)))
    return table


@lru_cache(1)
def names_of_tests() -> frozenset:
    """Names of the files of tests, and of all tests in them."""
    names = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        names.add(file.name)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                names.add(node.name)
    return frozenset(names)


def proof_of(name) -> list:
    """The tests that a name stands for."""
    if name.endswith("…"):
        return [test for test in names_of_tests() if test.startswith(name[:-1])]
    return [test for test in names_of_tests() if test == name]


@pytest.mark.parametrize("promise, proof", rows(), ids=[promise for promise, _ in rows()])
def test_promise(promise, proof):
    """Each row names at least one test, and all that it names are there."""
    expect(proof, proof, "a test's name", promise)
    for name in proof:
        expect(proof_of(name), f"no test {name}", "a test or a file of tests", promise)


@pytest.mark.parametrize("kind", INPUTS)
def test_each_kind_of_input_has_a_row(kind):
    """What becomes of it, if it is bad, is promised once."""
    found = [promise for promise, _ in rows() if INPUTS[kind] in promise]
    expect(len(found) == 1, found, INPUTS[kind], "docs/promises.md")


def test_a_name_that_is_not_there_is_noticed():
    """Negative control: a renamed test, a beginning of none, a missing ellipsis."""
    for name in ("test_no_such.py", "test_no_such_…", "test_a_full_disk"):
        expect(not proof_of(name), proof_of(name), "nothing", name)
    expect(len(proof_of("test_a_full_disk_…")) > 1, proof_of("test_a_full_disk_…"), "several", "")
