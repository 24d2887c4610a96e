"""Locks: what one process writes is refused to all others, for as long as that process lives."""

import fcntl
import os
import socket
from contextlib import contextmanager, suppress

from plumbing.errors import InputError, brief

OF_A_RUN = "checkpoints/lock"  # in OUT; goes with the checkpoints when the run is over
OF_A_MODEL = ".part.lock"  # in a folder, while a model is written into it
held = {}  # path of a lock -> the file that holds it, open until it is given up


def lock(path, folder):
    """Holds the lock file `path` until it is given up, or this process ends, however it does.
    InputError where another process holds it: the folder is in use."""
    path = path.resolve()
    # Trap: to close a file gives up the lock that a later one holds; so the earlier one first.
    if path in held:
        held.pop(path).close()
    file = open(path, "a+")
    try:
        # Trap: not flock. The loader's workers would inherit it, and hold it after a killed rank.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(file.fileno()).st_nlink:
            raise BlockingIOError  # who held it ended this very moment, and removed it
    except (BlockingIOError, PermissionError):  # which of them, POSIX leaves open
        file.seek(0)
        writer = brief(file.read())
        file.close()
        raise InputError(f"{folder} is in use by another command ({writer})") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    held[path] = file


@contextmanager
def locked(path, folder):
    """A lock around some work; its file goes with it."""
    lock(path, folder)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        held.pop(path.resolve()).close()


def refuse_locked(path, folder):
    """InputError where another process holds the lock file `path`."""
    if path.exists() and path.resolve() not in held:
        with suppress(OSError):  # of another user, whose folder cannot be written either
            lock(path, folder)
            held.pop(path.resolve()).close()
