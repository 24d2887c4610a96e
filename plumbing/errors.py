"""The one kind of error that a user is shown as a single clear line."""

from contextlib import contextmanager


class InputError(ValueError):
    """Something that the user can put right; the message says where it is and the way out."""


class OfAllRanks(InputError):
    """Raised on all ranks alike, so that they may still do something together."""


def brief(x, most=200) -> str:
    """What of a user's text, name or answer an error shows: one line, `most` characters, all of
    them printable (a name that is not UTF-8 has halves of surrogate pairs, which print refuses)."""
    text = " ".join(str(x)[: 10 * most].split())
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


@contextmanager
def needs(package, purpose):
    """Around the import of a package that only one flag needs: missing, it is an InputError."""
    try:
        yield
    except ImportError:
        raise InputError(f"{purpose} needs {package}: pip install {package}") from None
