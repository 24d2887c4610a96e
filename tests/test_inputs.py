"""What `encode` takes becomes a text and its pictures; what is none is refused. (With a model:
test_folders.py.)"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checks import equal
from PIL import Image

from data import Item
from plumbing.errors import InputError
from plumbing.formats import IMAGE
from plumbing.images import open_image
from plumbing.inputs import (
    checked,
    content_of,
    evaluating,
    in_evaluation,
    listed,
    row_of,
    whole_number,
)

PICTURE = Image.new("RGB", (6, 4), "red")
RGBA = np.asarray(PICTURE.convert("RGBA"))


@pytest.mark.parametrize(
    ("x", "text", "pictures"),
    [
        ("a", "a", 0), (PICTURE, IMAGE, 1), (RGBA, IMAGE, 1), (RGBA[..., 0], IMAGE, 1),
        (("a", PICTURE), f"{IMAGE}a", 1), ((PICTURE, "a"), f"{IMAGE}a", 1),
        ({"image": PICTURE}, IMAGE, 1), ({"text": "a"}, "a", 0), ({"image": "a.png"}, IMAGE, 1),
        ({"text": "a", "image": [PICTURE, RGBA]}, f"{IMAGE}{IMAGE}a", 2),
        ({"text": "a", "image": (PICTURE, "b.png")}, f"{IMAGE}{IMAGE}a", 2),
        ({"text": f"a {IMAGE}", "image": PICTURE}, f"a {IMAGE}", 1),
        ("<|image_1|> a", f"{IMAGE} a", 0), ({"text": "<|image_1|>a"}, f"{IMAGE}a", 0),
    ],
)  # fmt: skip
def test_an_input_is_a_text_with_marks_and_its_pictures(x, text, pictures):
    """Pictures come first where the text has no marks for them."""
    content = content_of(x)
    equal((content.text, len(content.images)), (text, pictures), f"{x}")


@pytest.mark.parametrize(
    "x",
    [
        {"text": "a", "label": 1}, {}, {"text": ""}, {"image": []}, {"text": "", "image": ()},
        ("a", "b"), (PICTURE, PICTURE), RGBA.astype(np.float32), RGBA.astype(np.int64),
        RGBA[..., :2], RGBA[None], RGBA[:0], 7, {"text": 7}, {"image": [7]}, None,
        [["y" * 5000]],
    ],
)  # fmt: skip
def test_what_is_no_input_is_refused_in_brief(x):
    """A key that nothing reads, nothing at all, numbers that are no bytes, other shapes."""
    with pytest.raises(InputError, match="^encode: ") as error:
        content_of(x)
    assert len(str(error.value)) < 400


def test_an_item_is_checked():
    """Its pictures may be paths as well; numbers are none."""
    for images in ((), ("a.png",), [PICTURE, "b.png"]):
        item = Item("a", images)
        assert checked(item) is item
    for item in (Item(7), Item("a", "b.png"), Item("a", (7,)), Item("a", ("b.png", None))):
        with pytest.raises(InputError, match="an Item is Item"):
            checked(item)


def test_a_list_is_anything_with_elements_in_an_order():
    """No set, whose order is another one each time; not one text, picture, dict or tensor."""
    pictures = np.stack([RGBA[..., :3]] * 2)
    for items, n in ((["a"], 1), (("a", "b"), 2), (np.array(["a", "b"]), 2), (pictures, 2),
                     ((x for x in "ab"), 2), ({"a": 1, "b": 2}.keys(), 2)):  # fmt: skip
        equal(len(listed(items, content_of)), n, f"{items}")
    for items in ("a", b"a", {"text": "a"}, PICTURE, {"a"}, frozenset("a"), torch.zeros(2), 7,
                  RGBA, RGBA[..., 0], np.array("a")):  # fmt: skip
        with pytest.raises(InputError, match="takes a list"):
            listed(items, content_of)


class Table:
    """As a data frame, which gives the names of its columns."""

    columns = ("text",)

    def __iter__(self):
        return iter(self.columns)

    def __getitem__(self, name):
        return ["a", "b"]


def test_a_table_is_no_list():
    """Its rows are not what it gives; one of its columns is a list."""
    table = Table()
    with pytest.raises(InputError, match="takes a list; of a table one column"):
        listed(table, content_of)
    equal(len(listed(table["text"], content_of)), 2, "a column")


def test_a_wrong_input_is_named_by_its_number():
    """From 0, as Python counts."""
    with pytest.raises(InputError, match="^input 2: encode: an input of type float: nan"):
        listed(["a", "b", float("nan")], content_of)


def test_an_error_of_a_picture_without_a_name_says_which_input_it_is_of(tmp_path):
    """Where it has one, that says more."""

    def row(item):
        raise InputError("broken")

    embedder = SimpleNamespace(collate=SimpleNamespace(row=row))
    items = [Item(IMAGE, ("a.png",)), Item("a"), Item(IMAGE * 2, ("a.png", PICTURE))]
    for i, says in enumerate(("^broken", "^input 1: broken", "^input 2: broken")):
        with pytest.raises(InputError, match=says):
            row_of(embedder, items, i)


def test_pictures_are_read_before_processes_and_threads_share_their_files(tmp_path):
    """The pixels of an opened file are there; where they cannot be, its row says so."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    good, bad = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    contents = listed(["a", {"image": [good, "c.png"]}, bad, good], content_of)
    equal([len(content.images) for content in contents], [0, 2, 1, 1], "listed")
    assert not good.tile and bad.tile, "what is still to be read"
    with pytest.raises(InputError, match="not a readable picture"):
        open_image(bad)


def test_a_text_that_no_row_takes_is_named_by_its_number():
    """It has no name; a picture's path would tell by itself."""

    def row(item):
        raise InputError("half a surrogate pair")

    embedder = SimpleNamespace(collate=SimpleNamespace(row=row))
    items = [Item("a"), Item("b", ("x.png",))]
    with pytest.raises(InputError, match="^input 0: half"):
        row_of(embedder, items, 0)
    with pytest.raises(InputError, match="^half"):
        row_of(embedder, items, 1)
    with pytest.raises(InputError, match="neither text nor picture"):
        content_of({"image": ""})
    equal(content_of({"image": "", "text": "x"}).images, (), "an empty path, as in files")


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3), (4, 4, 4)])
def test_a_buffer_that_is_filled_again_is_another_picture(shape):
    """As a camera's, in a generator: all inputs are read before the first one is embedded."""
    buffer = np.zeros(shape, np.uint8)

    def frames():
        for value in (0, 128, 255):
            buffer[:] = value
            yield buffer

    pictures = [content.images[0] for content in listed(frames(), content_of)]
    equal([int(np.asarray(x).max()) for x in pictures], [0, 128, 255], "pixels")


def test_a_whole_number_has_a_least_value():
    """Which it may have; True is no number; None is none asked for."""
    for value in (None, 2, 3, np.int64(2)):
        equal(whole_number("n", value, 2), value, "least 2")
    for value in (1, -2, 2.0, True, "2"):
        with pytest.raises(InputError, match="n .*: a whole number of at least"):
            whole_number("n", value, 2 if value is not True else 0)


def test_evaluation_leaves_each_part_in_its_own_mode():
    """After an error, too; and there are no gradients in it."""
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    module.train()
    module[1].eval()
    before = [part.training for part in module.modules()]
    with pytest.raises(KeyError), evaluating(module):
        equal([part.training for part in module.modules()], [False] * 4, "eval")
        raise KeyError
    equal([part.training for part in module.modules()], before, "as it was")
    seen = in_evaluation(lambda module: (module.training, torch.is_grad_enabled()))(module)
    equal((seen, torch.is_grad_enabled()), ((False, False), True), "in_evaluation")
