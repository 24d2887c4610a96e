"""Pictures: where they are, a file as upright 8-bit RGB, the image tensors of a batch."""

import os
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps

from plumbing.errors import InputError

MOST_PIXELS, MOST_STRETCHED = 100_000_000, 200  # beyond: a bomb; a line that no model takes


def open_image(ref, name=None) -> Image.Image:
    """The picture as upright 8-bit RGB (an animation's first frame; transparent becomes white), or
    an InputError. `ref`: path, open file, PIL image, or an object with `.render()`."""
    if hasattr(ref, "render"):
        return ref.render()
    is_path = isinstance(ref, str | os.PathLike)
    name = name or (ref if is_path else "the picture")
    try:
        image = ref if isinstance(ref, Image.Image) else Image.open(ref)
        w, h = image.size
        if w * h > MOST_PIXELS or max(w, h) > MOST_STRETCHED * min(w, h):
            raise InputError(f"{name}: {w} x {h} pixels; at most 1e8 and 200:1 are read. Crop it")
        return upright_rgb(image)
    except FileNotFoundError:
        raise InputError(f"{name}: no such picture. Is --image-root right?") from None
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        size = os.path.getsize(ref) if is_path else "?"
        raise InputError(f"{name} ({size} bytes): not a readable picture: {e}") from None


def upright_rgb(image) -> Image.Image:
    """Turned as its camera says, 16 bits scaled to 8, on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":  # Trap: convert("RGB") takes 0 to 1 for black
        raise ValueError("its pixels are floats, of no known range; save it with 8 bits")
    if image.mode.startswith("I"):  # Trap: 16 bits; convert("RGB") would clip it to white
        image = image.convert("I").point(lambda v: v / 256).convert("L")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class ZipImage(NamedTuple):
    """A picture inside a zip file: the hub's `images_zip/*.zip` are read without unpacking."""

    zip: str
    member: str

    def render(self):
        """The picture, or an InputError with the zip's and its own name."""
        try:
            with zipfile.ZipFile(self.zip) as archive, archive.open(self.member) as file:
                return open_image(file, f"{self.zip}:{self.member}")
        except (zipfile.BadZipFile, KeyError, OSError, RuntimeError, zlib.error) as e:
            raise InputError(f"{self.zip}:{self.member}: {e}; download the zip file again") from e


class Images:
    """Finds the pictures of a data set below `root`, unpacked or in the hub's zip files; a path
    that leaves `root` (`..`, absolute, through a symbolic link) is an InputError."""

    def __init__(self, root):
        self.root = Path(root)
        self.lost = []  # pictures that were looked for and are nowhere
        zips = [*self.root.glob("images_zip/*.zip"), *self.root.glob("images.zip")]
        self.zips = {path.stem: str(path) for path in zips}

    def find(self, path: str, subset=""):
        """-> a path or a ZipImage. What is nowhere is reported when it is opened."""
        for base in (self.root / "images", self.root):
            top, full = os.path.realpath(base), os.path.realpath(base / path)
            # realpath: a link that leads out is found out, too.
            if not full.startswith(os.path.join(top, "")) and self.root.exists():
                raise InputError(f"the picture {path!r} lies outside of {base}")
            if os.path.exists(full):
                return full
        archive = self.zips.get(subset) or self.zips.get("images")
        if archive:
            names = zip_names(archive)
            # The hub's zips have the subset's folder on top, or `images`, or neither.
            for member in (path, "images/" + path, path.partition("/")[2]):
                if member in names:
                    return ZipImage(archive, member)
        self.lost.append(str(self.root / path))
        return str(self.root / path)


@lru_cache(64)
def zip_names(path):
    """The names in a zip file, as a set."""
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        raise InputError(f"{path}: {e}; download the zip file again") from e


# ------------------------------------------------------------------------------- as model inputs


class EncodedPicture(NamedTuple):
    """A picture as the processor writes it: token columns {input_ids, ...: (L,)}, and the image
    tensors {pixel_values, ...: (n, ...)}."""

    columns: dict
    images: dict


def encode_picture(processor, marker, image) -> EncodedPicture:
    """marker: the template's text around and for one picture."""
    encoded = processor(
        text=[marker], images=[image], add_special_tokens=False, return_tensors="pt"
    )
    encoded.pop("attention_mask", None)
    columns, images = {}, {}
    for key, value in encoded.items():
        if key == "input_ids" or "type_ids" in key:
            columns[key] = value[0]
        else:
            images[key] = value
    return EncodedPicture(columns, images)


def join_images(rows) -> dict:
    """The image tensors {key: (n, ...)} of several rows, end to end; a row may have none."""
    keys = dict.fromkeys(key for images in rows for key in images)
    joined = {}
    for key in keys:
        joined[key] = cat_padded([images[key] for images in rows if key in images])
    return joined


def cat_padded(tensors) -> torch.Tensor:
    """Tensors end to end along their first axis; the other axes zero-padded to the largest."""
    sizes = zip(*(t.shape[1:] for t in tensors), strict=True)
    largest = [max(size) for size in sizes]
    # Tiles of pictures of other shapes: zeros are what the processors pad with.
    joined = tensors[0].new_zeros(sum(map(len, tensors)), *largest)
    start = 0
    for t in tensors:
        inner = [slice(n) for n in t.shape[1:]]
        joined[(slice(start, start + len(t)), *inner)] = t
        start += len(t)
    return joined
