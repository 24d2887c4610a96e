"""Exercise 9: for each bug of the official code the test that catches it."""

import bugs
import pytest
from checks import expect

pytestmark = pytest.mark.ex9


@pytest.mark.parametrize("bug", bugs.BUGS)
def test_the_named_test_catches_the_bug(student, bug):
    """It passes on our code and fails where the bug is planted."""
    name = str(student.BUGS[bug])
    problem = bugs.problem(name)
    expect(not problem, f"{bug}: {name!r}", "test_file.py::test_name", problem)
    ours = bugs.fails(name, others=map(str, student.BUGS.values()))
    expect(ours is False, f"{name}: fails {ours}", "it passes", "on our code it must pass")
    planted = bugs.fails(name, bug)
    expect(planted, f"{name}: fails {planted}", f"it fails with {bug}", bugs.BUGS[bug].story)
