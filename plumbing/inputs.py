"""What users pass to `encode`: texts, pictures, or both at once, in the forms that
sentence-transformers takes, become (text, pictures); anything else is an InputError that shows the
right forms. And how `encode` runs: without dropout and gradients, from several threads at once."""

import numbers
import os
import threading
import weakref
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial, wraps

import numpy as np
import torch
from PIL import Image

from plumbing.errors import InputError, brief
from plumbing.families import refuse_longer_row
from plumbing.formats import IMAGE, Content, with_marks
from plumbing.images import load_pixels

FORMS = (
    'a text, Image.open(FILE), pathlib.Path(FILE), {"image": either of them, "text": ...}, a numpy '
    "picture (H, W, 3) of uint8, or an Item"
)


def wrong_input(x, why) -> InputError:
    """The error for what `encode` cannot take: why, what it was, and the forms that it takes."""
    return InputError(f"encode: {why}: {brief(repr(x), 80)}; each input is {FORMS}")


def no_list(way) -> InputError:
    """The error for what holds no inputs one after the other: the way out, and the forms."""
    return InputError(f"encode: takes a list; {way}. Each input is {FORMS}")


def is_picture(x) -> bool:
    """Whether it is opened as a picture where it stands alone: a string would be a text."""
    return isinstance(x, Image.Image | os.PathLike | np.ndarray) or hasattr(x, "render")


def picture_of(x):
    """A picture that `open_image` takes, from what a user has for one."""
    if not isinstance(x, np.ndarray):
        return x
    colours = x.ndim == 2 or (x.ndim == 3 and x.shape[2] in (3, 4))
    if x.dtype != np.uint8 or not colours or not x.size:
        raise InputError(f"encode: an array {x.shape} of {x.dtype}; a picture is (H, W, 3) of "
                         "uint8, 0 to 255")  # fmt: skip
    return Image.fromarray(x.copy())  # a camera's buffer may hold the next picture by then


def content_of(x) -> Content:
    """(text with `<image>` marks, pictures) of one input, see FORMS; a tuple of a text and a
    picture is both, in either order."""
    if isinstance(x, str):
        return Content(with_marks(str(x)))
    if is_picture(x):
        return Content(IMAGE, (picture_of(x),))
    if isinstance(x, tuple) and len(x) == 2:
        texts = [part for part in x if isinstance(part, str)]
        pictures = [part for part in x if is_picture(part)]
        if len(texts) == len(pictures) == 1:
            return content_of({"image": pictures[0], "text": texts[0]})
    if not isinstance(x, dict):
        raise wrong_input(x, f"an input of type {type(x).__name__}")
    if not x or not x.keys() <= {"image", "text"}:
        raise wrong_input(x, f"a dict with {', '.join(map(repr, x)) or 'nothing'} in it")
    return both(x)


def both(x) -> Content:
    """Of a dict with "image" (one or a list; here a string is a path) and "text": the pictures come
    first where the text has no marks for them, as in the exported folder's template."""
    text, pictures = x.get("text"), x.get("image")
    if not isinstance(text, str | None):
        raise wrong_input(x, f'its "text" is of type {type(text).__name__}')
    if pictures is None or (isinstance(pictures, str) and not pictures):  # as in files
        pictures = []
    elif not isinstance(pictures, list | tuple):
        pictures = [pictures]
    for picture in pictures:
        if not isinstance(picture, str) and not is_picture(picture):
            raise wrong_input(x, f'its "image" is of type {type(picture).__name__}')
    text = with_marks(text or "")
    if not text and not pictures:
        raise wrong_input(x, "neither text nor picture")
    if IMAGE not in text:
        text = IMAGE * len(pictures) + text
    return Content(text, tuple(picture_of(picture) for picture in pictures))


def checked(item):
    """The Item itself; InputError where its text is no string, or one of its images no picture."""
    good = isinstance(item.text, str) and isinstance(item.images, tuple | list)
    if not good or not all(isinstance(x, str) or is_picture(x) for x in item.images):
        raise wrong_input(item, "an Item is Item(text, (picture, ...))")
    return item


def listed(inputs, item_of) -> list:
    """The Items of a list, tuple, generator, array or column of inputs, each by `item_of`."""
    single = isinstance(inputs, str | bytes | dict | Image.Image | os.PathLike | torch.Tensor)
    if isinstance(inputs, np.ndarray):  # of one picture, a list of its rows
        single = inputs.ndim == 0 or (inputs.ndim in (2, 3) and inputs.dtype == np.uint8)
    if hasattr(inputs, "columns"):  # it would give their names
        raise no_list('of a table one column, as table["text"]')
    if single or isinstance(inputs, set | frozenset) or not hasattr(inputs, "__iter__"):
        raise no_list(f"[{brief(repr(inputs), 80)}] for a single one")
    items = []
    for i, x in enumerate(inputs):
        try:
            items.append(item_of(x))
        except InputError as e:
            raise InputError(f"input {i}: {e}") from None
    read_once(picture for item in items for picture in item.images)
    return items


def refuse_empty(collate, row, item):
    """InputError for a row without a token."""
    if not row.length:
        raise InputError(f"nothing to embed in {item}: text and picture are empty")


def refuse_unfit_row(mllm, collate, row, item):
    """InputError for a row that is empty, or longer than the model was made for. Here, where it is
    made: of rows embedded together nobody knows whose it is, and one rank alone would end."""
    refuse_empty(collate, row, item)
    try:
        refuse_longer_row(mllm, collate, row)
    except InputError as e:
        shown = item.images[0] if item.images else brief(item.text, 80)
        raise InputError(f"{e}; {brief(shown)}") from None


def fits(mllm):
    """What a Collator for this model asks of each row. Trap: with the embedder, which has the
    collator, it would be a circle, and a dropped model's memory would wait for Python's search."""
    return partial(refuse_unfit_row, mllm)


def row_of(embedder, items, i):
    """The row of items[i]; an InputError says which input it is, where no picture's name tells."""
    try:
        return embedder.collate.row(items[i])
    except InputError as e:
        pictures = items[i].images
        if pictures and all(isinstance(x, str | os.PathLike) for x in pictures):
            raise
        raise InputError(f"input {i}: {e}") from None


def read_once(pictures):
    """PIL images' pixels, before anything else reads them. Trap: an image that is not loaded yet
    has one place in its file, which forked workers and threads would move for each other: pixels
    of another place, or a file that seems cut off."""
    for picture in pictures:
        if isinstance(picture, Image.Image):
            with one_at_a_time, suppress(Exception):  # what is wrong is told with its row
                load_pixels(picture)


def whole_number(name, value, least):
    """`value`, where it is None or a whole number of at least `least`."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if value is not None and (not is_whole or value < least):
        raise InputError(f"{name} {brief(repr(value), 80)}: a whole number of at least {least}")
    return value


@dataclass
class Inside:
    """Of a module that evaluates: how many threads are at it, and the modes of its parts before."""

    count: int
    modes: list  # of (part, whether it was training)


inside, one_at_a_time = weakref.WeakKeyDictionary(), threading.Lock()  # module -> its Inside


@contextmanager
def evaluating(module):
    """A module without dropout; at the end, after an error too, each part of it is in the mode that
    it was in. (`train()` would also wake a frozen tower.)"""
    # Trap: the first of several threads that is through must not wake the dropout of the others.
    with one_at_a_time:
        if module not in inside:
            inside[module] = Inside(0, [(part, part.training) for part in module.modules()])
            module.eval()
        inside[module].count += 1
    try:
        yield
    finally:
        with one_at_a_time:
            inside[module].count -= 1
            if not inside[module].count:
                for part, mode in inside.pop(module).modes:
                    part.training = mode


def in_evaluation(method):
    """Around a module's method: `evaluating`, and without gradients."""

    @wraps(method)
    def wrapper(module, *args, **kwargs):
        with evaluating(module), torch.no_grad():
            return method(module, *args, **kwargs)

    return wrapper
