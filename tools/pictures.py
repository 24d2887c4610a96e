"""The pictures of a folder, for the commands that read one (search, generate)."""

import os

from PIL import Image

from plumbing.errors import InputError


def find_pictures(folder) -> list:
    """The pictures below a folder, by their names' endings: relative paths, sorted."""
    endings = tuple(Image.registered_extensions())
    pictures = []
    for top, _, names in os.walk(folder, followlinks=False):
        below = os.path.relpath(top, folder)
        for name in names:
            if name.lower().endswith(endings):
                pictures.append(os.path.normpath(f"{below}/{name}"))
    if not pictures:
        raise InputError(f"--images {folder}: no such folder, or no pictures in it")
    return sorted(pictures)
