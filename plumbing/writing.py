"""Files that a command writes: refused before the work where they cannot be written, and never half
there. (A model's folder: folders.py; checkpoints: checkpoint.py.)"""

import errno
import json
import os
import re
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path

from plumbing.errors import InputError, brief
from plumbing.files import open_file
from plumbing.lines import MOST


def refuse_unwritable(path, name, read=()):
    """Tries now, before any work, whether a file could be written at `path`, and makes its folder.
    Raises InputError where it is a folder or no file, lies below a file, may not be written, or is
    one of `read`, which the command reads. name: what the message calls it, as "--json"."""
    if os.path.realpath(path) in map(os.path.realpath, read):
        raise InputError(f"{name} {brief(path)}: would be written over what is read; take another")
    with naming_errors(path, name):
        part = part_of(path, name)
        open(part, "ab").close()
        os.unlink(part)


def refuse_no_folder(path, name):
    """Raises InputError where files would go into a folder that can be none: of an empty name, in
    the place of a file. name: what the message calls it, as "DIR"."""
    if not str(path).strip():
        raise InputError(f"{name} is empty; name a folder")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InputError(f"{name} {brief(path)}: is no folder; name one")


def refuse_no_list(path, name):
    """Raises InputError where lines of JSON would get a name that readers take for another format:
    they tell a list by its ending. name: what the message calls it, as "--out"."""
    if str(path) and os.path.splitext(path)[1].lower() != ".jsonl":
        raise InputError(f"{name} {brief(path)}: a list, one example a line; end it with .jsonl")


def refuse_other(path, name, is_ours, kind):
    """Raises InputError where a file of another kind is at `path` already: nobody wants a picture
    or a model's config replaced by scores. is_ours(path): whether it is what the command writes; an
    InputError of it means that it is not."""
    ours = not os.path.isfile(path) or not os.path.getsize(path)
    with suppress(InputError):
        ours = ours or is_ours(path)
    if not ours:
        text = f"is there already, and is no {kind}, so it stays; take another name"
        raise InputError(f"{name} {brief(path)}: {text}")


def first_record(path):
    """The object of JSON that is a file's first line; None where that is none."""
    try:
        with open_file(path) as file:
            first = json.loads(file.readline(MOST))
    except (ValueError, RecursionError):  # or an InputError, of a file that may not be read
        return None
    return first if isinstance(first, dict) else None


def holds_lines(path, keys) -> bool:
    """Whether a file's first line is an object of JSON with one of these keys."""
    return any(key in keys for key in first_record(path) or ())


@contextmanager
def written(path, name):
    """Gives the path of a new file to write. When all is well it is renamed to `path`; where it is
    not (a full disk), what was there before stays whole, and InputError says so."""
    with naming_errors(path, name):
        part = part_of(path, name)
        try:
            yield part
            os.replace(part, os.path.realpath(path))
        finally:
            with suppress(OSError):  # renamed, or never there
                os.unlink(part)


def part_of(path, name) -> Path:
    """Where a file is written before it has its name: on the same disk, with the same ending."""
    real = Path(os.path.realpath(path))  # of a link the file is written, and the link stays
    reason = ""
    if not str(path):
        reason = "an empty name"
    elif real.is_dir():
        reason = "a folder"
    elif real.exists() and not real.is_file():
        reason = "no ordinary file (a device or a pipe)"
    if reason:
        raise InputError(f"{name} {brief(path)}: {reason}; give the path of a file")
    real.parent.mkdir(parents=True, exist_ok=True)
    # Trap: not the process' number. Two containers that share a disk have the same ones.
    return real.with_name(f".{secrets.token_hex(8)}.part{real.suffix}")


def is_part(name) -> bool:
    """Whether a file's name is one of `part_of`: a command writes it now, or was killed."""
    return re.match(r"\.[0-9a-f]{16}\.part", name) is not None


@contextmanager
def naming_errors(path, name):
    """Inside, an OSError becomes an InputError that names the file."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or str(e)
        text = f"{name} {brief(path)}: not written: {brief(reason)}. What was there stays as it was"
        raise InputError(text) from None


def append_whole(path, line, name):
    """`write_whole` for a file that is not open."""
    with naming_errors(path, name), open(path, "ab", buffering=0) as file:
        write_whole(file, line)


def write_whole(file, line):
    """One more line at the end of a file, or an OSError and none of it: a half-written one is cut
    off again. The file has no buffer: what is left in one would be written when it is closed."""
    size = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) < len(line):  # a disk that is nearly full takes a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with suppress(OSError):
            file.truncate(size)
        raise
