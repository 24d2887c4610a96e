"""The pictures of a folder, for the commands that read one (search, generate)."""

import os
import sys
from collections import Counter

from PIL import Image

from plumbing.config import is_unicode
from plumbing.errors import InputError, brief
from plumbing.images import decoded_formats
from plumbing.ranks import say
from plumbing.writing import is_part

SHOWN = 5  # files that are left out, by name


def find_pictures(folder, quiet=False) -> list:
    """The pictures below a folder, by their names' endings: relative paths, sorted. Left out, and
    named unless `quiet`: a link to a folder, what is no ordinary file (a pipe would wait for ever),
    what has a name that is not UTF-8, which no list of pictures can hold; others are counted."""
    if not os.path.isdir(folder):
        reason = "is no folder" if os.path.lexists(folder) else "no such folder"
        raise InputError(f"--images {brief(folder)}: {reason}; name one that holds pictures")
    decoded, pictures, left_out, others = decoded_formats(), [], [], Counter()
    endings = tuple(x for x, kind in Image.registered_extensions().items() if kind in decoded)

    def unreadable(e):
        left_out.append(f"{brief(os.path.relpath(e.filename, folder))}: {e.strerror}")

    for top, folders, names in os.walk(folder, onerror=unreadable, followlinks=False):
        for name in folders:
            if os.path.islink(link := os.path.join(top, name)):
                left_out.append(f"{brief(os.path.relpath(link, folder))}: a link to a folder")
        for name in names:
            if name.lower().endswith(endings):
                path = os.path.relpath(os.path.join(top, name), folder)
                if reason := why_not(top, name):
                    left_out.append(f"{brief(path)}: {reason}")
                else:
                    pictures.append(path)
            else:
                others[brief(os.path.splitext(name)[1].lower() or "no ending")] += 1
    if not quiet:
        say_others(others)
        say_left_out(left_out)
    if not pictures:
        raise InputError(f"--images {brief(folder)}: no pictures in it, by the endings of names")
    return sorted(pictures)


def say_others(others):
    """How many files have no picture's ending, as a phone's .heic. others: {ending: count}."""
    if others:
        most_first = sorted(others.items(), key=lambda x: (-x[1], x[0]))
        counts = [f"{n:,} {ending}" for ending, n in most_first[:SHOWN]]
        if unlisted := sum(n for _, n in most_first[SHOWN:]):
            counts.append(f"{unlisted:,} more")
        say(f"left out, by their endings: {', '.join(counts)}")


def say_left_out(left_out):
    """The first ones by name."""
    for line in left_out[:SHOWN]:
        say(f"left out: {line}")
    if len(left_out) > SHOWN:
        say(f"left out: {len(left_out) - SHOWN:,} more")


def why_not(folder, name) -> str:
    """Why a file is left out; empty: it is not."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return "no ordinary file"
    if is_part(name):
        return "half of a file; remove it if no command writes it now"
    return "" if is_unicode(path) else "its name is not UTF-8; rename it"


if __name__ == "__main__":
    sys.exit("tools/pictures.py has no commands: tools/search.py and tools/generate.py import it")
