"""Pictures: where they are, a file as upright 8-bit RGB, the image tensors of a batch.

Top to bottom: decoding - where they are - as model inputs."""

import ctypes
import io
import logging
import os
import unicodedata
import warnings
from array import array
from bisect import bisect_left
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from plumbing.errors import InputError, brief
from plumbing.files import is_url, open_file
from plumbing.zips import open_zip

MOST_PIXELS, MOST_STRETCHED = 100_000_000, 200  # beyond: a bomb; a line that no model takes
MOST_BYTES = 8 * MOST_PIXELS  # of a file: four channels of 16 bits. Some decoders read it whole
DEEPEST = 200  # folders of a name that are listed one by one, each by a call in a call
# Trap: Pillow reads 40 formats, and starts a program (Ghostscript) for one of them, by the content.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
TURNS = {  # EXIF's orientation -> what sets the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def quiet_pillow():
    """No remarks on odd pictures: what is wrong enough is an error, the rest nobody asked for."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # A PNG is not lost to a text of more than 1 MB in it; of all of them 64 MB are read.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    # libtiff writes a line of a damaged fax for each of its lines, past Python's stderr. The
    # library is one that Pillow's own has loaded; where it is built in, it stays as it is.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


quiet_pillow()  # Trap: not around each picture: `catch_warnings` is everyone's, threads' too


# ---------------------------------------------------------------------------------------- decoding


@lru_cache(1)
def decoded_formats() -> tuple:
    """Those of FORMATS that this Pillow has (AVIF came with 11.3)."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(ref, name=None) -> Image.Image:
    """The picture as upright 8-bit RGB (an animation's first frame; transparent becomes white), or
    an InputError. `ref`: path, open file, PIL image, or an object with `.render()`. Formats are
    told by the content, and only FORMATS are decoded."""
    if hasattr(ref, "render"):
        return ref.render()
    if isinstance(ref, str | os.PathLike):
        # No question, "is --image-root right?": a list's were found before, others have no flag.
        hint = "Those of a list are looked for below --image-root"
        with open_file(ref, name, "picture", hint) as file:
            size = os.fstat(file.fileno()).st_size
            shown = f"{brief(name or ref)} ({size} bytes)"
            if size > MOST_BYTES:
                raise InputError(f"{shown}: at most {MOST_BYTES:,} bytes are read. Save it anew")
            return decode(file, shown)
    if not isinstance(ref, Image.Image) and not hasattr(ref, "read"):
        kind = type(ref).__name__
        raise InputError(f"{kind} {brief(ref, 60)}: a picture is a path, a PIL image, an open file")
    return decode(ref, brief(name or "the picture"))


def decode(ref, name) -> Image.Image:
    """An open file or a PIL image as upright RGB; whatever its decoder raises is an InputError."""
    try:
        is_image = isinstance(ref, Image.Image)
        image = ref if is_image else Image.open(ref, formats=decoded_formats())
        load_pixels(image)
        turn = turn_of(image)
        image = to_rgb(image)
        return image.transpose(turn) if turn is not None else image
    except UnidentifiedImageError:
        kinds = f"{', '.join(FORMATS)} (the last from Pillow 11.3 on)"
        reason = f"its content is none of {kinds}, or it is cut off or damaged"
    except Exception as e:  # Trap: damaged bytes lead decoders to errors of every type
        closed = "; is its file closed?" if isinstance(e, AssertionError) else ""  # Pillow's
        reason = brief(e) or f"{type(e).__name__}{closed}"
    raise InputError(f"{name}: not a readable picture: {reason}")


def load_pixels(image):
    """Has PIL read the pixels from the image's file, which it puts off until they are wanted;
    ValueError where they are too many, or a program."""
    refuse_size(image.size)
    if image.format == "EPS":  # a PIL image of the user's; loaded, it would run
        raise ValueError("EPS is a program; save it as PNG")
    image.load()


def refuse_size(size):
    """ValueError, before anything is decoded, for a picture that is too large or no picture's
    shape."""
    w, h = size
    if w * h > MOST_PIXELS or max(w, h) > MOST_STRETCHED * min(w, h) or not w * h:
        raise ValueError(f"{w} x {h} pixels; at most 1e8 and 200:1 are read. Crop it")


def turn_of(image):
    """What sets it upright, None where nothing does, or where the EXIF is damaged. Trap: not
    `exif_transpose`: that writes the whole EXIF again, and fails at oddities that nobody needs."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # the pixels are loaded and whole: a photograph is not lost to its EXIF
        return None


def to_rgb(image) -> Image.Image:
    """8-bit RGB of any mode, on white where it is transparent."""
    if image.mode == "F":  # Trap: convert("RGB") takes 0 to 1 for black
        raise ValueError("its pixels are floats, of no known range; save it with 8 bits")
    if image.mode.startswith("I"):
        return eight_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode in ("La", "RGBa"):  # colours times alpha: only these conversions divide by it
        image = image.convert(image.mode.upper())
    key = image.info.get("transparency")
    is_of_16_bits = isinstance(key, tuple) and max(key) > 255  # as the file's pixels were
    if image.mode == "RGB" and is_of_16_bits:
        image = image.copy()
        image.info["transparency"] = tuple(v // 256 for v in key)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def eight_bits(image) -> Image.Image:
    """A grey picture of whole numbers as 8 bits. "I;16" and PNG are of 16 bits, the high byte
    counts. Trap: mode "I" holds any numbers, so its range decides: below 256 they are 8 bits."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels go from {low} to {high}; save it with 8 or 16 bits")
    is_16_bits = image.mode != "I" or image.format == "PNG" or high > 255
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # 0 is white there
        values = 65535 - values  # Pillow turns those of 8 bits itself
    grey = (values // 256 if is_16_bits else values).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey)


def pixels_of(image) -> tuple:
    """(mode, size, bytes) of a PIL image as a model will see it: its palette counts."""
    image = open_image(image)
    return image.mode, image.size, image.tobytes()


# ---------------------------------------------------------------------------------- where they are


class ZipImage(NamedTuple):
    """A picture inside a zip file: the hub's `images_zip/*.zip` are read without unpacking."""

    zip: str
    member: str

    def render(self):
        """The picture, or an InputError with the zip's and its own name."""
        content = open_zip(self.zip).read(self.member)
        return open_image(io.BytesIO(content), f"{self.zip}:{self.member}")


class Folder(NamedTuple):
    """What is in a folder, as hashes: a million names are 8 MB, and are looked up in 1 us."""

    path: str  # without links
    names: array  # sorted
    links: array  # sorted; those of the names that are symbolic links
    others: array  # sorted; those that are no files either: folders, pipes


def list_folder(path):
    """The Folder at a path without links; None where there is none that can be listed."""
    names, links, others = array("q"), array("q"), array("q")
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                names.append(hash(entry.name))
                if entry.is_symlink():
                    links.append(names[-1])
                elif not entry.is_file():
                    others.append(names[-1])
    except OSError:
        return None
    for hashes in (names, links, others):
        np.frombuffer(hashes, np.int64).sort()  # in place
    return Folder(path, names, links, others)


def holds(hashes, name) -> bool:
    """Is the name's hash in a sorted array?"""
    i = bisect_left(hashes, hash(name))
    return i < len(hashes) and hashes[i] == hash(name)


def own_places(root) -> list:
    """The folders, without links, in which the pictures of a data set may lie: its root, the folder
    `images` in it, and what the links *directly in* a folder named `images` lead to (a subset that
    the user keeps on another disk); where the root is in the hub's cache, the cache's own `blobs`,
    to which all of its files are links. No other link may lead out: it came with the data."""
    real = Path(os.path.realpath(root))
    places = [str(real)]
    for folder in (Path(root), Path(root, "images")):
        if folder.name == "images" and folder.is_dir():
            places.append(os.path.realpath(folder))
            with suppress(OSError), os.scandir(folder) as entries:
                linked = [e.path for e in entries if e.is_symlink() and e.is_dir()]
                places += map(os.path.realpath, linked)
    for folder in (real, *real.parents):
        if folder.parent.name == "snapshots" and "--" in folder.parent.parent.name:
            places.append(str(folder.parent.parent / "blobs"))
    return places


def names_in_zip(inner, archive) -> list:
    """What a picture may be called in images_zip/SUBSET.zip or images.zip: the hub's have the zip's
    own name as a folder on top, or `images`, or neither. Trap: where another folder is left out of
    its name, another set's picture is taken for it."""
    names = [inner, f"images/{inner}"]
    top, _, rest = inner.partition("/")
    if top in ("images", Path(archive).stem):
        names.append(rest)
    return names


class Images:
    """Finds the pictures of a data set below `root`, unpacked or in the hub's zip files; a path
    that leaves it (`..`, absolute, through a link: see own_places) is an InputError. Folders are
    listed once: a look-up asks the disk only for links, and for what is not there."""

    def __init__(self, root):
        self.root = Path(root)
        if not os.path.isdir(root):  # Path.is_dir raises for a name that is too long
            raise InputError(f"--image-root {brief(root)}: no such folder")
        self.lost = []  # pictures that were looked for and are nowhere
        zips = [*self.root.glob("images_zip/*.zip"), *self.root.glob("images.zip")]
        self.zips = {path.stem: str(path) for path in zips if not path.is_dir()}
        top = os.path.abspath(root)
        self.tops = [top, f"{top}/images"]  # a name as it stands comes first
        self.places = own_places(root)
        self.folder = lru_cache(10_000)(self.read_folder)
        self.folders = lru_cache(10_000)(self.look_up_folders)

    def zip_of(self, subset):
        """The zip file that a subset's pictures may be in: its own, or that of all; else None."""
        return self.zips.get(subset) or self.zips.get("images")

    def prepare(self, subset):
        """Indexes a subset's zip file, for all the processes that will be forked. A damaged one is
        refused when a picture is looked for in it."""
        if archive := self.zip_of(subset):
            with suppress(InputError):
                open_zip(archive)

    def find(self, path: str, subset=""):
        """-> a path or a ZipImage. What is nowhere is noted in `lost`."""
        cut = path.rfind("/") + 1
        name = path[cut:]
        for folder in self.folders(path[:cut]):
            if holds(folder.names, name) and not holds(folder.others, name):
                full = f"{folder.path}/{name}"
                if not holds(folder.links, name) or self.is_there(full, path):
                    return full
        inner = self.below_root(path)
        if archive := self.zip_of(subset):
            members = open_zip(archive)
            for member in names_in_zip(inner, archive):
                if member in members:
                    return ZipImage(archive, member)
        for top in self.tops:  # newer than our list of its folder, or spelled in another case
            if self.is_there(full := os.path.join(top, inner), path):
                return full
        shown = self.root / path if path == path.strip() else repr(path)  # blanks are seen
        self.lost.append(brief(shown) + self.other_spelling(inner))  # for messages
        return str(self.root / path)

    def below_root(self, path) -> str:
        """A path of the data relative to a top; absolute where it lies in another of the places."""
        if is_url(path):
            raise InputError(f"the picture {brief(path)!r} is a URL; save it as a file")
        inner = os.path.normpath(path)
        if os.path.isabs(inner):
            for top in (self.tops[0], self.places[0]):
                start = os.path.join(top, "")
                if inner.startswith(start):
                    return inner.removeprefix(start)
            self.refuse_outside(inner, path)
        elif inner.split("/", 1)[0] == "..":
            raise self.outside(path)
        return inner

    def look_up_folders(self, head) -> list:
        """The Folders that the beginning of a path may stand for: one below each top, where there
        is one that may be read."""
        if head.count("/") > DEEPEST:
            return []
        try:
            inner = self.below_root(head)
        except InputError:  # it will be raised again, with the whole path
            return []
        directories = (os.path.normpath(os.path.join(top, inner)) for top in self.tops)
        return [folder for x in directories if (folder := self.folder(x))]

    def read_folder(self, directory):
        """The Folder of a directory below a top; None where there is none, or a link leads out."""
        if directory in self.tops:
            return list_folder(os.path.realpath(directory))
        above, _, name = directory.rpartition("/")
        parent = self.folder(above) if above else None
        if parent is None or not holds(parent.names, name):
            return None
        real = f"{parent.path}/{name}"
        if holds(parent.links, name):
            real = os.path.realpath(real)
        return list_folder(real) if self.is_inside(real) else None

    def is_there(self, full, path) -> bool:
        """Is there a file at `full`? An InputError where it lies outside of all places."""
        if not os.path.lexists(full):
            return False
        self.refuse_outside(full, path)
        return os.path.isfile(full)

    def other_spelling(self, inner) -> str:
        """A remark where a file is there by a name that looks the same: an accent is a character of
        its own, as Macs write it, or one with its letter."""
        for form in () if inner.isascii() else ("NFC", "NFD"):
            name = unicodedata.normalize(form, inner)
            if any(os.path.lexists(os.path.join(top, name)) for top in self.tops):
                return f" (a file of this name in Unicode {form} is there: rename it)"
        return ""

    def is_inside(self, real) -> bool:
        """Does a path without links lie in one of the places?"""
        return any(real == x or real.startswith(os.path.join(x, "")) for x in self.places)

    def refuse_outside(self, full, path):
        """An InputError where `full`, without its links, lies outside of all places."""
        if not self.is_inside(os.path.realpath(full)):
            raise self.outside(path)

    def outside(self, path) -> InputError:
        """The error of a path that leaves the places."""
        return InputError(
            f"the picture {brief(path)!r} lies outside of {self.root} (--image-root). A link to "
            "another disk stands as images/NAME in it"
        )


# ------------------------------------------------------------------------------- as model inputs


MOST_SIZES = 256  # of pictures, whose tokens are remembered


class EncodedPicture(NamedTuple):
    """A picture as the processor writes it: token columns {input_ids, ...: (L,)}, and the image
    tensors {pixel_values, ...: (n, ...)}."""

    columns: dict
    images: dict


def encode_picture(processor, marker, image) -> EncodedPicture:
    """One picture through the whole processor. marker: the template's text around and for it."""
    encoded = processor(
        text=[marker], images=[image], add_special_tokens=False, return_tensors="pt"
    )
    encoded.pop("attention_mask", None)
    columns, images = {}, {}
    for key, value in encoded.items():
        if key == "input_ids" or "type_ids" in key:
            columns[key] = value[0].tolist()
        else:
            images[key] = value
    return EncodedPicture(columns, images)


class OfOneSize(NamedTuple):
    """What pictures of one size have in common."""

    columns: dict  # their token columns
    shapes: dict  # {key: shape} of their image tensors


class PictureEncoder:
    """Pictures as the processor writes them. Two thirds of its call go into what the picture's size
    decides: the tokens. Of a size that comes again they are remembered, and the image processor is
    called alone, where it was seen to make the same tensors as inside the processor."""

    def __init__(self, processor, marker):
        self.processor, self.marker = processor, marker  # see encode_picture
        self.times, self.known = Counter(), {}  # both by size
        # Families differ in their token columns: one encoded picture shows them.
        self.columns = list(self(Image.new("RGB", (64, 64))).columns)

    def __call__(self, image) -> EncodedPicture:
        if known := self.known.get(image.size):
            images = self.tensors(image, known.shapes)
            if shapes_of(images) == known.shapes:  # and nobody has changed its settings since
                return EncodedPicture(known.columns, images)
        encoded = encode_picture(self.processor, self.marker, image)
        self.learn(image, encoded)
        return encoded

    def learn(self, image, encoded):
        """Remembers a size when it comes for the second time: many data sets have no size twice."""
        if image.size not in self.times and len(self.times) == MOST_SIZES:
            self.times.clear()
            self.known.clear()
        self.times[image.size] += 1
        if self.times[image.size] == 2:
            # Trap: a processor may give its image processor other settings than its own.
            alone = self.tensors(image, encoded.images)
            if alone.keys() != encoded.images.keys():
                return
            if all(torch.equal(tensor, encoded.images[key]) for key, tensor in alone.items()):
                self.known[image.size] = OfOneSize(encoded.columns, shapes_of(alone))

    def tensors(self, image, keys) -> dict:
        """Those of the image processor that the model takes."""
        tensors = self.processor.image_processor(images=[image], return_tensors="pt")
        return {key: tensors[key] for key in keys if key in tensors}


def shapes_of(images) -> dict:
    """{key: shape} of image tensors."""
    return {key: tensor.shape for key, tensor in images.items()}


def join_images(rows) -> dict:
    """The image tensors {key: (n, ...)} of several rows, end to end; a row may have none."""
    keys = dict.fromkeys(key for images in rows for key in images)
    joined = {}
    for key in keys:
        joined[key] = cat_padded([images[key] for images in rows if key in images])
    return joined


def cat_padded(tensors) -> torch.Tensor:
    """Tensors end to end along their first axis; the other axes zero-padded to the largest."""
    if len(tensors) == 1:  # pictures are large: no copy
        return tensors[0]
    if len({t.shape[1:] for t in tensors}) == 1:  # and none is filled with zeros first
        return torch.cat(tensors)
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
