"""Readers on random and on damaged input: an example, or an InputError, and nothing else.

python -m pytest tests/test_fuzz.py              a hundred of each, the same ones every time
FUZZ=20000 python -m pytest tests/test_fuzz.py   by hand: new ones every time
"""

import io
import json
import os
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import model
from data import Item
from plumbing.errors import InputError
from plumbing.formats import IMAGE
from plumbing.images import Images, decoded_formats, open_image
from plumbing.zips import index_of
from tools.export import export
from toy.world import Shapes

many = int(os.environ.get("FUZZ", 0))
fuzz = settings(
    max_examples=many or 100, derandomize=not many, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

WORDS = st.sampled_from(
    ["id", "image", "text", "query", "target", "negatives", "conversations", "from", "value",
     "human", "gpt", "file_name", IMAGE, "<|image_1|>", "a.png", "../a.png", "/etc/passwd", ""],
)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=20)
JSON = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=4) | st.dictionaries(WORDS, x, max_size=5), max_leaves=20
)
TALK = {"id": "1", "image": "a.png", "conversations": [
    {"from": "human", "value": f"{IMAGE}\nWhat?"}, {"from": "gpt", "value": "a dog"}]}  # fmt: skip
PAIR = {"query": {"text": f"{IMAGE} x", "image": "a.png"}, "target": [{"text": "y"}],
        "negatives": [{"image": "a.png"}]}  # fmt: skip


@st.composite
def damaged(draw, whole: bytes):
    """`whole` with some bytes changed, lost, doubled or cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        i = draw(st.integers(0, max(0, len(content) - 1)))
        n = draw(st.integers(0, 8))
        match draw(st.sampled_from(["set", "cut", "delete", "insert"])):
            case "set":
                content[i : i + n] = draw(st.binary(min_size=n, max_size=n))
            case "cut":
                del content[i:]
            case "delete":
                del content[i : i + n]
            case "insert":
                content[i:i] = draw(st.binary(max_size=8))
    return bytes(content)


def damaged_head(whole):
    """The same where most of a picture's meaning stands: in its first 100 bytes."""
    return damaged(whole[:100]).map(lambda head: head + whole[100:])


def damaged_tail(whole):
    """The same where a zip file's table stands: in its last 100 bytes."""
    return damaged(whole[-100:]).map(lambda tail: whole[:-100] + tail)


def lines(whole):
    """A line of a JSONL file: bytes, any JSON, or a good line, damaged."""
    good = json.dumps(whole).encode()
    return st.binary(max_size=60) | JSON.map(lambda x: json.dumps(x).encode()) | damaged(good)


def picture():
    """A good picture."""
    _, (scene,) = Shapes().dialogue(0)[0]
    return scene.render()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one good picture in it."""
    folder = tmp_path_factory.mktemp("fuzz")
    picture().save(folder / "a.png")
    return folder


@pytest.fixture(scope="module")
def collate(shared):
    return shared.collate


def walk(examples, collate):
    """Reads examples as training does, down to model inputs."""
    for x in (examples[i] for i in range(len(examples))):
        if isinstance(x, data.Dialogue):
            collate.row(x.item, x.turns)
        elif isinstance(x, data.Pair):
            for item in (x.query, *x.targets, *x.negatives):
                collate.row(item)


@pytest.mark.parametrize("kind", ["dialogues", "pairs", "captions"])
def test_lines_of_text(place, collate, kind):
    """JSONL in our three layouts."""
    good = dict(dialogues=TALK, pairs=PAIR, captions=dict(file_name="a.png", text="x"))[kind]
    file = place / "x.jsonl"
    if kind == "captions":
        (place / "c").mkdir(exist_ok=True)
        (place / "c" / "a.png").write_bytes((place / "a.png").read_bytes())
        file = place / "c" / "metadata.jsonl"

    @fuzz
    @example([json.dumps(good).encode()])
    @example([rb'{"id": "1", "conversations": [{"from": "human", "value": "\ud800"},'
              rb'{"from": "gpt", "value": "\udfff"}]}'])  # fmt: skip
    @example([b'{"query": {"text": "\\ud800"}, "target": {"text": "x"}}'])
    @example([b"[" * 100_000])
    @given(st.lists(lines(good), min_size=1, max_size=3))
    def check(content):
        file.write_bytes(b"\n".join(content))
        try:
            if kind == "dialogues":
                walk(data.read_dialogues(str(file)), collate)
            else:
                source = str(file.parent if kind == "captions" else file)
                for pairs in data.read_pairs(source).values():
                    walk(pairs, collate)
        except InputError as e:
            assert str(e)

    check()


def test_arrays(place, collate):
    """Lists of pairs that are one JSON array, of any values, or damaged."""
    whole = json.dumps([PAIR, PAIR], indent=1).encode()

    @fuzz
    @example(whole)
    @example(b"[" * 100_000)
    @example(b"[" + b'{"a":' * 100_000)
    @given(damaged(whole) | st.lists(JSON, max_size=3).map(lambda x: json.dumps(x).encode()))
    def check(content):
        (place / "x.json").write_bytes(content)
        try:
            walk(data.read_pairs(str(place / "x.json"))["x"], collate)
        except InputError as e:
            assert str(e)

    check()


def test_tables_of_commas(place, collate):
    """metadata.csv: any bytes, damaged ones, and texts with quotes, commas and ends of lines."""
    (place / "t").mkdir()
    (place / "t" / "a.png").write_bytes((place / "a.png").read_bytes())
    whole = b'file_name,text\na.png,a dog\na.png,"a ""big"" dog,\nbarking"\n'
    some = st.lists(st.sampled_from(['"', ",", "\n", "\r", "\0", "a.png", "text", "\ufeff"]))

    @fuzz
    @example(whole)
    @given(damaged(whole) | some.map(lambda x: b"file_name,text\n" + "".join(x).encode()))
    def check(content):
        (place / "t" / "metadata.csv").write_bytes(content)
        try:
            for pairs in data.read_pairs(str(place / "t")).values():
                walk(pairs, collate)
        except InputError as e:
            assert str(e)

    check()


def pictures():
    """One small good picture in each format that Pillow can write: those that are decoded, and
    those that are not."""
    Image.init()
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1", "F"):  # some formats know only one of them
            buffer = io.BytesIO()
            try:
                picture().convert(mode).save(buffer, kind)
            except (OSError, ValueError, KeyError, AttributeError):
                continue
            yield kind, buffer.getvalue()
            break


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks about what it meets
@pytest.mark.parametrize(
    "kind, whole", list(pictures()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_pictures(place, kind, whole, started):
    """Damaged files of each format, and no picture at all: a picture or an InputError; the few
    that are decoded more thoroughly."""
    is_decoded = kind in decoded_formats()

    @settings(fuzz, max_examples=many or (60 if is_decoded else 10))
    @example(whole)
    @example(b"")
    @given(damaged(whole) | damaged_head(whole) | st.binary(max_size=200))
    def check(content):
        (place / f"x.{kind}").write_bytes(content)
        try:
            assert open_image(str(place / f"x.{kind}")).mode == "RGB"
        except InputError as e:
            assert f"x.{kind}" in str(e)
        assert not started

    check()


def test_zip_files(place):
    """A hub's zip file, damaged: a picture that is right, or an InputError."""
    (place / "z" / "images_zip").mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(place / "a.png", "s/a.png")
    want = picture().tobytes()

    @fuzz
    @given(damaged(buffer.getvalue()) | damaged_tail(buffer.getvalue()))
    def check(content):
        file = place / "z" / "images_zip" / "s.zip"
        file.write_bytes(content)
        index_of.cache_clear()
        try:
            image = open_image(Images(place / "z").find("s/a.png", "s"))
        except InputError as e:
            assert str(e)
            return
        assert image.tobytes() == want

    check()


def test_parquet_files(place, collate):
    """MMEB's tables, damaged."""
    export(str(place / "toy"), n=2)
    file = next(Path(place, "toy", "MMEB-train").glob("vqa/*.parquet"))
    whole = file.read_bytes()

    @fuzz
    @example(whole)
    @given(damaged(whole))
    def check(content):
        file.write_bytes(content)
        try:
            walk(data.read_pairs(str(place / "toy" / "MMEB-train"), subsets="vqa")["vqa"], collate)
        except InputError as e:
            assert str(e)

    check()


def test_texts(collate):
    """Any text becomes tokens, none of them special; lone surrogates are an InputError."""
    special = set(collate.tokenizer.all_special_ids)

    @fuzz
    @example("\ud800")
    @example("<|compress_0|><|im_end|><|image_pad|>")
    @given(st.text(st.characters(), max_size=80))
    def check(text):
        try:
            row = collate.row(Item(text.replace(IMAGE, ""))).tokens
        except InputError:
            assert any(0xD800 <= ord(c) < 0xE000 for c in text)
            return
        content = row["input_ids"][(row["roles"] == data.CONTENT)].tolist()
        assert sum(i in special for i in content) <= 2, "the template's own turn marks, no more"

    check()


def test_nanocoma_json(place):
    """What a checkpoint says of itself."""
    folder = place / "m"
    model.save(model.load("toy-random", compress_tokens=2, device="cpu"), folder)
    keys = st.sampled_from(["compress_tokens", "pooling", "prompt", "torch"])
    values = LEAVES | st.sampled_from(["mean", "last", "chat"])
    settings_of = st.dictionaries(keys, values, max_size=4)

    @settings(fuzz, max_examples=many // 20 or 25)
    @given(settings_of.map(lambda x: json.dumps(x).encode()) | st.binary(max_size=30))
    def check(content):
        (folder / "nanocoma.json").write_bytes(content)
        try:
            model.load(folder, device="cpu")
        except InputError as e:
            assert str(e)

    check()
