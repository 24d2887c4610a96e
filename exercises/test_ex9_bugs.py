"""Exercise 9: for each bug of the official code the test that catches it."""

import pytest
from checks import expect

from exercises import bugs

pytestmark = pytest.mark.ex9


@pytest.mark.parametrize("bug", bugs.BUGS)
def test_the_named_test_catches_the_bug(student, bug):
    """It passes on our code and fails where the bug is planted."""
    names = {b: bugs.plain(student.BUGS.get(b, "")) for b in bugs.BUGS}
    name = names[bug]
    problem = bugs.problem(name)
    expect(not problem, f"{bug}: {name!r}", "test_file.py::test_name", problem)
    ours = bugs.fails(name, others=names.values())
    said = f"{name} {'fails' if ours else 'could not be run'} on our code"
    expect(ours is False, said, "a test that passes there", "it must fail with the bug alone")
    said = f"{name} passes with {bug} planted: it does not notice this bug"
    expect(bugs.fails(name, bug), said, "a test that fails with it", bugs.BUGS[bug].hint)
