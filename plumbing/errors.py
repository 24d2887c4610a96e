"""The one kind of error that a user is shown as a single clear line."""

from contextlib import contextmanager


class InputError(ValueError):
    """Something that the user can put right; the message says where it is and the way out."""


def brief(x, most=200) -> str:
    """What of a user's text, name or answer an error shows: one line, `most` characters."""
    text = " ".join(str(x).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


@contextmanager
def needs(package, purpose):
    """Around the import of a package that only one flag needs: missing, it is an InputError."""
    try:
        yield
    except ImportError:
        raise InputError(f"{purpose} needs {package}: pip install {package}") from None
