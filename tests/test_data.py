"""Bad input gets a clear error that names its place; good input in odd clothes is read right."""

import json
import os
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from PIL import Image

import contrastive
import data
import model
import pretrain
from data import IMAGE, InputError, Item


@pytest.fixture(scope="module")
def collate():
    return model.load("toy", compress_tokens=4, device="cpu").collate


def saved(folder, name, image, **how):
    path = folder / name
    image.save(path, **how)
    return path


def test_odd_but_good_pictures_are_read_upright_as_rgb(tmp_path):
    """CMYK, 16 bits, palettes with transparency, EXIF rotation, animations, 1 x 1, odd names."""
    red = Image.new("RGB", (40, 20), "red")
    assert data.open_image(saved(tmp_path, "a.jpg", red.convert("CMYK"))).mode == "RGB"
    grey = Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16))
    level = data.open_image(saved(tmp_path, "b.png", grey)).getpixel((0, 0))[0]
    assert 120 <= level <= 135, f"16-bit mid grey became {level}, want about 127"
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert data.open_image(saved(tmp_path, "c.png", clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255] * 256)
    image = data.open_image(saved(tmp_path, "d.png", palette, transparency=0))
    assert image.getpixel((0, 0)) == (255, 255, 255), "a transparent palette entry must be white"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert data.open_image(saved(tmp_path, "e.jpg", red, exif=exif)).size == (20, 40)
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    gif = saved(tmp_path, "f.gif", frames[0], save_all=True, append_images=frames[1:])
    assert data.open_image(gif).getpixel((0, 0)) == (255, 0, 0)
    assert data.open_image(saved(tmp_path, "g \u00fc\u732b.png", Image.new("L", (1, 1)))).size == (
        1,
        1,
    )


def test_bad_pictures_are_named(tmp_path):
    """Missing, truncated, empty, no picture at all, floats, a line of pixels, a bomb."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    whole = saved(tmp_path, "whole.png", Image.fromarray(noise)).read_bytes()
    for name, content in (("cut.png", whole[:2000]), ("empty.png", b""), ("text.png", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} \({len(content)} bytes\): not a readable"):
            data.open_image(tmp_path / name)
    with pytest.raises(InputError, match="gone.png: no such picture. Is --image-root right"):
        data.open_image(tmp_path / "gone.png")
    with pytest.raises(InputError, match="float.tiff .* floats, of no known range"):
        data.open_image(saved(tmp_path, "float.tiff", Image.new("F", (8, 8), 0.5)))
    with pytest.raises(InputError, match="20000 x 10 pixels"):
        data.open_image(saved(tmp_path, "line.png", Image.new("L", (20000, 10))))
    with pytest.raises(InputError, match="bomb.png .*400000000 pixels"):
        data.open_image(saved(tmp_path, "bomb.png", Image.new("1", (20000, 20000))))


TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dog"}]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{broken", "Expecting property name"),
        ("[1, 2]", '"conversations" must be a list'),
        (json.dumps(dict(image="a.png")), '"conversations" must be a list'),
        (json.dumps(dict(image="a.png", conversations=TALK[::-1])), r'conversations\[0\].*"human"'),
        (json.dumps(dict(image="a.png", conversations=TALK[:1])), "questions and answers in turn"),
        (json.dumps(dict(conversations=TALK)), "has 1 <image> for 0 pictures"),
        (json.dumps(dict(image="../a.png", conversations=TALK)), "lies outside of"),
        (json.dumps(dict(image="/etc/passwd", conversations=TALK)), "lies outside of"),
        (json.dumps(dict(image="link.png", conversations=TALK)), "lies outside of"),
        (json.dumps(dict(image=7, conversations=TALK)), "a path or a list of paths"),
    ],
)
def test_a_bad_line_is_named_before_training(tmp_path, line, says):
    """The file, the line, the field; a path may not leave its root, by a symbolic link either."""
    root = tmp_path / "root"
    root.mkdir()
    os.symlink("/etc/hostname", root / "link.png")
    good = json.dumps(dict(id="1", image="a.png", conversations=TALK))
    (root / "talks.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match=rf"talks.jsonl, line 2: .*{says}"):
        data.read_dialogues(str(root / "talks.jsonl"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (dict(target={"text": "x"}), 'needs "query" and "target"'),
        (dict(query={"text": "x"}, target=[]), 'needs "query" and "target"'),
        (dict(query={"text": ""}, target={"text": "x"}), 'needs "query" and "target"|not empty'),
        (dict(query={"text": "x", "image": "a.png"}, target={"text": "y"}), "0 <image> for 1"),
        (dict(query={"text": "x <image>"}, target={"text": "y"}), "1 <image> for 0"),
        (dict(query={"text": "x"}, target={"text": 3}), '"text" must be a string'),
    ],
)
def test_a_bad_pair_is_named(tmp_path, line, says):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=f"pairs.jsonl, line 1: .*({says})"):
        data.read_pairs(str(tmp_path / "pairs.jsonl"))


def test_pairs_of_ones_own_have_several_targets_and_negatives(tmp_path):
    line = dict(
        query={"text": "q"}, target=[{"text": "a"}, {"text": "b"}], negatives=[{"text": "c"}]
    )
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    (pair,) = data.read_pairs(str(tmp_path / "pairs.jsonl"))["pairs"]
    assert pair == data.Pair(Item("q"), (Item("a"), Item("b")), (Item("c"),))


def test_bad_parquet_is_named(tmp_path):
    """A file cut off, a missing column, a subset that is not there."""

    path = tmp_path / "A" / "original-00000-of-00001.parquet"
    path.parent.mkdir()
    columns = ("qry", "qry_image_path", "pos_text", "pos_image_path")
    pq.write_table(pyarrow.table({c: ["x" * ("path" not in c)] for c in columns}), path)
    assert data.read_pairs(str(tmp_path))["A"][0].query == Item("x")
    with pytest.raises(InputError, match="--subsets B:: choose name or name:rows of A"):
        data.read_pairs(str(tmp_path), subsets="B")
    assert len(data.read_pairs(str(tmp_path), subsets="A:1")["A"]) == 1
    pq.write_table(pyarrow.table({c: ["x"] for c in columns[:3]}), path)
    with pytest.raises(InputError, match="original.*no column pos_image_path; it has qry"):
        data.read_pairs(str(tmp_path))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="not a readable parquet file"):
        data.read_pairs(str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        data.read_pairs(str(tmp_path / "nothing"))


def test_pictures_are_read_from_the_hubs_zip_files_without_unpacking(tmp_path):
    picture = data.Shapes().dialogue(0).item.images[0].render()
    picture.save(tmp_path / "x.png")
    (tmp_path / "images_zip").mkdir()
    with zipfile.ZipFile(tmp_path / "images_zip" / "A.zip", "w") as archive:
        archive.write(tmp_path / "x.png", "A/train/x.png")
    (tmp_path / "x.png").unlink()
    found = data.Images(tmp_path).find("A/train/x.png", "A")
    assert data.open_image(found).tobytes() == picture.tobytes()


def test_a_row_that_is_too_long_loses_text_and_never_pictures_or_code(collate):
    """Text from the middle of the content; with turns, the last ones; a report of how much."""
    picture = Image.new("RGB", (64, 64))
    item = Item(f"{IMAGE} " + " ".join(f"word{i}" for i in range(60)) + " end", (picture,))
    long = collate.row(item)
    collate.max_length = 60
    try:
        short = collate.row(item)
        ids, roles = short["tokens"]["input_ids"], short["tokens"]["roles"]
        assert len(ids) == 60 and short["cut"] == len(long["tokens"]["input_ids"]) - 60
        image_token = collate.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert (ids == image_token).sum() == 16 and (roles == data.COMPRESS).sum() == 4
        text = collate.tokenizer.decode(ids)
        assert "word0" in text and text.count(" end") == 1 and "word30" not in text
        d = data.Shapes().dialogue(0)
        assert 0 < collate.row(d.item, d.turns)["cut"] and len(d.turns) > 1
        words = " ".join(["word"] * 70)
        both = collate.row(Item(f"{IMAGE} {words} {IMAGE} {words}", (picture, picture)))
        assert len(both["tokens"]["input_ids"]) == 60, "two long texts: both give way"
        collate.max_length = 12
        with pytest.raises(InputError, match="--max-length 12: .* lower --max-pixels"):
            collate.row(item)
    finally:
        collate.max_length = 0


def test_a_text_of_a_million_characters_goes_through(collate):
    collate.max_length = 100
    try:
        assert len(collate.row(Item("a dog " * 170_000))["tokens"]["input_ids"]) == 100
    finally:
        collate.max_length = 0


def test_missing_pictures_are_named_before_training(tmp_path):
    """All lines are looked up first; the message counts them."""
    line = json.dumps(dict(id="1", image="gone.png", conversations=TALK)) + "\n"
    (tmp_path / "talks.jsonl").write_text(line * 3)
    cfg = pretrain.Config(data=str(tmp_path / "talks.jsonl"), out=str(tmp_path / "o"), workers=0)
    with pytest.raises(InputError, match=r"gone.png: no such picture \(and 2 more are missing"):
        pretrain.main(cfg)
    assert not (tmp_path / "o").exists()


def test_other_data_are_not_resumed_with(tmp_path, monkeypatch):
    """The same name, the same number of lines, another word: not the same run."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(dict(query=dict(text="q"), target=dict(text="t"))) + "\n")
    cfg = dict(model="toy-random", data=str(pairs), out=str(tmp_path / "o"), steps=2, batch=2)
    cfg = contrastive.Config(**cfg, block=2, workers=0, save_every=1)
    monkeypatch.setattr(model, "finish", lambda *_: None)
    contrastive.main(cfg)
    cfg.resume = True
    pairs.write_text(pairs.read_text().replace('"q"', '"r"'))
    with pytest.raises(InputError, match="not the same run: data_digest was"):
        contrastive.main(cfg)


def test_dialogues_without_ids_are_told_apart(tmp_path):
    """`--question-first` draws by id: with one id for all, all would move or none."""
    talk = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    lines = [json.dumps(dict(conversations=talk, image=f"{i}.png")) for i in range(3)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines).replace('"a?"', '"<image>a?"'))
    assert len({d.id for d in data.read_dialogues(str(tmp_path / "d.jsonl"))}) == 3


def test_pictures_of_other_sizes_are_other_items():
    """64 x 32 and 32 x 64 of one colour have the same bytes."""
    wide, high = (Item(IMAGE, (Image.new("RGB", s, "red"),)) for s in ((64, 32), (32, 64)))
    assert wide.key != high.key == Item(IMAGE, (Image.new("RGB", (32, 64), "red"),)).key


def test_what_has_no_subsets_says_so(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"query": {"text": "a"}, "target": {"text": "b"}}')
    with pytest.raises(InputError, match="--subsets x:7: chooses sets of MMEB or shapes"):
        data.read_pairs(str(tmp_path / "p.jsonl"), subsets="x:7")


def test_a_set_of_several_parquet_files_is_read_whole(tmp_path):
    """`original-00000-of-00002` and its brother: no row is left out."""
    (tmp_path / "s").mkdir()
    for part in range(2):
        row = dict(qry=[f"q{part}"], qry_image_path=[""], pos_text=["t"], pos_image_path=[""])
        name = f"original-0000{part}-of-00002.parquet"
        pq.write_table(pyarrow.table(row), tmp_path / "s" / name)
    pairs = data.read_pairs(str(tmp_path))["s"]
    assert [p.query.text for p in pairs] == ["q0", "q1"]
