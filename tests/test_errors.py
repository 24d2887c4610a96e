"""What a message shows of what a user gave: in one line, and in brief."""

import pytest
from checks import equal

from plumbing import errors


@pytest.mark.parametrize("most", [20, 60, 200])
def test_a_text_of_any_length_is_shown_in_so_many_letters(most):
    """As it is up to there; of a longer one the beginning, and that it goes on."""
    for n in (most - 1, most):
        equal(errors.brief("x" * n, most), "x" * n, f"{n} letters")
    for n in (most + 1, 3 * most, 10 * most, 10**6):
        shown = errors.brief("x" * n, most)
        equal(shown, "x" * (most - 1) + "…", f"{n} letters")
    equal(len(errors.brief("x" * 10**6)), 200, "by default")


def test_a_text_of_several_lines_is_shown_in_one():
    """Blanks, tabs and line ends are one blank; whatever it is, it has a text."""
    equal(errors.brief(" a\n\tb  c\r\n"), "a b c", "one line")
    equal(errors.brief(ValueError("no\nway")), "no way", "an error")
    equal(errors.brief(""), "", "nothing")
    equal(errors.brief("a\ud800b\x07"), "a\\ud800b\\x07", "what cannot be printed")


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it():
    """Other errors are what they are."""
    with pytest.raises(errors.InputError, match="^--x needs y: pip install y$"):
        with errors.needs("y", "--x"):
            raise ImportError
    with pytest.raises(ZeroDivisionError), errors.needs("y", "--x"):
        raise ZeroDivisionError
