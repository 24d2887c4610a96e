"""The one kind of error that a user is shown as a single clear line."""

from contextlib import contextmanager


class InputError(ValueError):
    """Something that the user can put right; the message says where it is and the way out."""


@contextmanager
def needs(package, purpose):
    """Around the import of a package that only one flag needs: missing, it is an InputError."""
    try:
        yield
    except ImportError:
        raise InputError(f"{purpose} needs {package}: pip install {package}") from None
