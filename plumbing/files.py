"""Files whose names come from data: opened only where they are ordinary files."""

import errno
import os
import stat
import zlib
from typing import BinaryIO

from plumbing.errors import InputError, brief

BLOCK = 2**20  # bytes that are read at a time
CAPTIONS = ("metadata.jsonl", "metadata.csv")  # one of them makes a folder one with captions
# Trap: the opening of a pipe without a writer waits for ever, that of a device may do anything.
SPECIAL = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}
FAILURES = {
    errno.ELOOP: "is a symbolic link that leads to itself",
    errno.ENAMETOOLONG: "is longer than a file's name can be",
    errno.ENOTDIR: "lies below a file, which is no folder",
    errno.EMFILE: "cannot be opened: this process has too many files open (ulimit -n)",
    errno.EACCES: "may not be read by this user (permissions)",
    errno.EPERM: "may not be read by this user (permissions)",
}


def open_file(path, name=None, kind="file", hint="") -> BinaryIO:
    """An ordinary file, opened for reading bytes; an InputError says what anything else is: a pipe,
    a device, a socket, a folder, a link that leads nowhere, a URL. Nothing of these is opened.
    name: as the message calls it (the path); kind: "picture", "list"; hint: the way out."""
    name, cause = brief(path if name is None else name), None
    try:
        kind_of_file = stat.S_IFMT(os.stat(path).st_mode)
        if kind_of_file == stat.S_IFREG:
            return open(path, "rb")
        reason = f"{SPECIAL.get(kind_of_file, 'is no file')}; a {kind} must be an ordinary file"
    except FileNotFoundError:
        reason = absence(path, kind)
    except OSError as e:
        reason, cause = FAILURES.get(e.errno, brief(e.strerror or e)), e
    except ValueError:  # a NUL byte, half a surrogate pair
        reason = "holds a character that no file's name can have"
    raise InputError(f"{name}: {reason}. {hint}" if hint else f"{name}: {reason}") from cause


def refuse_special(path, name=None, kind="file"):
    """`open_file` for readers that open by themselves: an InputError, or nothing."""
    open_file(path, name, kind).close()


def names_a_list(source) -> bool:
    """Whether data are one file of examples: it is there, or its name says so."""
    is_file = os.path.lexists(source) and not os.path.isdir(source)
    return is_file or str(source).lower().endswith((".jsonl", ".json", ".csv"))


def captions_in(folder) -> list:
    """The names of CAPTIONS that are in a folder, be it as links that lead nowhere."""
    if not os.path.isdir(folder):
        return []
    return [name for name in CAPTIONS if os.path.lexists(os.path.join(folder, name))]


def on_the_disk(folder):
    """All files of a folder, before a name says so: a power cut keeps names, and may lose bytes."""
    for top, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(top, name), "rb") as file:
                os.fsync(file.fileno())


def digest_of_content(path) -> int:
    """A number that changes with a file's bytes."""
    digest = 0
    with open_file(path) as file:
        while block := file.read(BLOCK):
            digest = zlib.crc32(block, digest)
    return digest


def digest_of_all(digests) -> int:
    """One number of several, which changes with each and with their order; of one its own."""
    total = 0
    for digest in digests:
        total = (31 * total + digest) % 2**32
    return total


def absence(path, kind) -> str:
    """Why there is nothing at `path`."""
    if is_url(os.fsdecode(path)):
        return f"is a URL; save it as a file and give its path: a {kind} is never fetched"
    if os.path.islink(path):
        return f"is a symbolic link to {brief(os.readlink(path))}, which is not there"
    return f"no such {kind}"


def is_url(path) -> bool:
    """Is it an address, or content spelled as one (`data:`), and no file's name?"""
    return path.startswith("data:") or "://" in path[:10]
