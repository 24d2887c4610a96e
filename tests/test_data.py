"""What is read: pictures, JSONL, MMEB's parquet and zip files. Good input in odd clothes is read
right, bad input gets a clear error that names its place (test_golden.py: the same as ever)."""

import json
import os
import unicodedata
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from checks import equal
from PIL import Image

import data
import pretrain
from data import Item
from plumbing import files, mmeb
from plumbing.errors import InputError
from plumbing.formats import IMAGE, checked_digest
from plumbing.images import Images, open_image
from plumbing.lines import Lazy
from tools.export import export
from toy.world import Shapes

# ----------------------------------------------------------------------------------------- pictures


def saved(folder, name, image, **options):
    """The file of a picture."""
    path = folder / name
    image.save(path, **options)
    return path


def test_odd_but_good_pictures_are_read_upright_as_rgb(tmp_path):
    """CMYK, 16 bits, palettes with transparency, EXIF rotation, animations, 1 x 1, odd names."""
    red = Image.new("RGB", (40, 20), "red")
    assert open_image(saved(tmp_path, "a.jpg", red.convert("CMYK"))).mode == "RGB"
    grey = Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16))
    level = open_image(saved(tmp_path, "b.png", grey)).getpixel((0, 0))[0]
    assert 120 <= level <= 135, f"16-bit mid grey became {level}, want about 127"
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert open_image(saved(tmp_path, "c.png", clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255] * 256)
    image = open_image(saved(tmp_path, "d.png", palette, transparency=0))
    assert image.getpixel((0, 0)) == (255, 255, 255), "a transparent palette entry must be white"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert open_image(saved(tmp_path, "e.jpg", red, exif=exif)).size == (20, 40)
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    gif = saved(tmp_path, "f.gif", frames[0], save_all=True, append_images=frames[1:])
    assert open_image(gif).getpixel((0, 0)) == (255, 0, 0)
    odd_name = saved(tmp_path, "g \u00fc\u732b.png", Image.new("L", (1, 1)))
    assert open_image(odd_name).size == (1, 1)


def test_bad_pictures_are_named(tmp_path):
    """Missing, truncated, empty, no picture at all, floats, a line of pixels, a bomb."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    whole = saved(tmp_path, "whole.png", Image.fromarray(noise)).read_bytes()
    for name, content in (("cut.png", whole[:2000]), ("empty.png", b""), ("text.png", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} \({len(content)} bytes\): not a readable"):
            open_image(tmp_path / name)
    with pytest.raises(InputError, match=r"gone.png: no such picture\. Those of a list .*-root$"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(InputError, match="float.tiff .* floats, of no known range"):
        open_image(saved(tmp_path, "float.tiff", Image.new("F", (8, 8), 0.5)))
    with pytest.raises(InputError, match="20000 x 10 pixels"):
        open_image(saved(tmp_path, "line.png", Image.new("L", (20000, 10))))
    with pytest.raises(InputError, match="bomb.png .*400000000 pixels"):
        open_image(saved(tmp_path, "bomb.png", Image.new("1", (20000, 20000))))


def test_pictures_are_read_from_the_hubs_zip_files_without_unpacking(tmp_path):
    """images_zip/A.zip, in which the paths begin with the set's name."""
    picture = Image.new("RGB", (9, 7), "red")
    saved(tmp_path, "x.png", picture)
    (tmp_path / "images_zip").mkdir()
    with zipfile.ZipFile(tmp_path / "images_zip" / "A.zip", "w") as archive:
        archive.write(tmp_path / "x.png", "A/train/x.png")
    (tmp_path / "x.png").unlink()
    found = Images(tmp_path).find("A/train/x.png", "A")
    assert open_image(found).tobytes() == picture.tobytes()


def test_pictures_of_other_sizes_are_other_items():
    """64 x 32 and 32 x 64 of one colour have the same bytes."""
    wide, high = (Item(IMAGE, (Image.new("RGB", s, "red"),)) for s in ((64, 32), (32, 64)))
    assert wide.key != high.key == Item(IMAGE, (Image.new("RGB", (32, 64), "red"),)).key


# -------------------------------------------------------------------------------------------- lines

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dog"}]


def talks(folder, *dialogues):
    """A file of dialogues, one a line."""
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps(d) + "\n" for d in dialogues))
    return str(path)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"conversations": TALK}, "has 1 <image> for 0 pictures"),
        ({"image": "a.png", "conversations": TALK[:1] * 2}, r'conversations\[1\].* "from": "gpt"'),
        ({"image": "../a.png", "conversations": TALK}, "lies outside of"),
        ({"image": "/etc/passwd", "conversations": TALK}, "lies outside of"),
        ({"image": "link.png", "conversations": TALK}, "lies outside of"),
        ({"image": 7, "conversations": TALK}, "a path or a list of paths"),
    ],
)
def test_a_bad_line_is_named_before_training(tmp_path, second, says):
    """The file, the line, the field; a path may not leave its root, by a symbolic link either."""
    os.symlink("/etc/hostname", tmp_path / "link.png")
    first = {"id": "1", "image": "a.png", "conversations": TALK}
    with pytest.raises(InputError, match=rf"talks.jsonl, line 2: .*{says}"):
        data.read_dialogues(talks(tmp_path, first, second))


def test_missing_pictures_are_named_before_training(tmp_path):
    """All lines are looked up first; the message names the first one, and counts them."""
    lines = [{"id": "1", "image": f"gone{i}.png", "conversations": TALK} for i in range(3)]
    out = tmp_path / "out"
    cfg = pretrain.Config(data=talks(tmp_path, *lines), out=str(out), workers=0)
    with pytest.raises(InputError, match=r"gone0.png: no such picture \(and 2 more are missing"):
        pretrain.main(cfg)
    assert not (out / "log.jsonl").exists()
    two = {"image": ["a.png", "b.png"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"query": two, "target": {"text": "y"}}))
    pairs = data.read_pairs(str(tmp_path / "pairs.jsonl"))
    with pytest.raises(InputError, match=r"a.png: no such picture \(and 1 more are missing"):
        checked_digest(pairs.values())
    assert pairs["pairs"][0].query.text == IMAGE * 2, "pictures without a text are they alone"


@pytest.mark.parametrize("top", ["", "images"])
@pytest.mark.parametrize(("there", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_missing_picture_whose_name_only_looks_the_same_is_said_to_be(
    tmp_path, there, asked, top
):
    """From a Mac: `ls` shows the very name that the message calls missing. In either place where a
    picture may lie."""
    file = tmp_path / top / unicodedata.normalize(there, "dögs/é.png")
    file.parent.mkdir(parents=True)
    file.touch()
    images = Images(tmp_path)
    images.find(unicodedata.normalize(asked, "dögs/é.png"))
    images.find(unicodedata.normalize(asked, "dögs/ü.png"))
    first, second = images.lost
    assert first.endswith(f" (a file of this name in Unicode {there} is there: rename it)"), first
    assert second.endswith(".png"), "it is nowhere"


def test_the_ablations_of_stage_1_change_what_is_asked(tmp_path):
    """turns: the first questions of a dialogue, of a file's too; caption: one full description as
    the answer; texts: that share is about a description, without a picture."""
    full, single = data.read_dialogues(), data.read_dialogues(turns=1)
    described, texts = data.read_dialogues(caption=True), data.read_dialogues(texts=1.0)
    for i in range(5):
        (scene,) = full[i].item.images
        assert len(full[i].turns) > 1 and single[i] == full[i]._replace(turns=full[i].turns[:1])
        ((_, answer),) = described[i].turns
        assert answer == scene.describe() and described[i].item == full[i].item
        assert texts[i] == full[i]._replace(item=Item(scene.describe()))
    two = {"id": "1", "image": "a.png", "conversations": TALK + [{**t, "value": "x"} for t in TALK]}
    assert len(data.read_dialogues(talks(tmp_path, two))[0].turns) == 2
    assert len(data.read_dialogues(talks(tmp_path, two), turns=1)[0].turns) == 1


def test_dialogues_without_ids_are_told_apart(tmp_path):
    """`--question-first` draws by id: with one id for all, all would move or none."""
    lines = [{"image": f"{i}.png", "conversations": TALK} for i in range(3)]
    assert len({d.id for d in data.read_dialogues(talks(tmp_path, *lines))}) == 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"query": {"text": "x"}, "target": []}, 'needs "query" and "target"'),
        ({"query": {"text": "x", "image": "a.png"}, "target": {"text": "y"}}, "0 <image> for 1"),
        ({"query": {"text": "x <image>"}, "target": {"text": "y"}}, "1 <image> for 0"),
    ],
)
def test_a_bad_pair_is_named(tmp_path, line, says):
    """No target, a picture without a place for it, a place without a picture."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=f"pairs.jsonl, line 1: .*{says}"):
        data.read_pairs(str(tmp_path / "pairs.jsonl"))


def test_pairs_of_ones_own_have_several_targets_and_negatives(tmp_path):
    """A list of targets, all of them right, and a list of negatives."""
    line = {
        "query": {"text": "q"},
        "target": [{"text": "a"}, {"text": "b"}],
        "negatives": [{"text": "c"}],
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    (pair,) = data.read_pairs(str(tmp_path / "pairs.jsonl"))["pairs"]
    assert pair == data.Pair(Item("q"), (Item("a"), Item("b")), (Item("c"),))


# ------------------------------------------------------------------------------------- MMEB's files

COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")


def write_pairs(path, query="x", columns=COLUMNS):
    """A parquet file in MMEB-train's layout, with one pair of texts."""
    path.parent.mkdir(exist_ok=True)
    row = {"qry": [query], "qry_image_path": [""], "pos_text": ["t"], "pos_image_path": [""]}
    pq.write_table(pyarrow.table({c: row[c] for c in columns}), path)


def test_bad_parquet_is_named(tmp_path):
    """A missing column, a subset that is not there; a subset may be capped."""
    path = tmp_path / "A" / "original-00000-of-00001.parquet"
    write_pairs(path)
    assert data.read_pairs(str(tmp_path))["A"][0].query == Item("x")
    with pytest.raises(InputError, match="--subsets B: choose name or name:rows of A"):
        data.read_pairs(str(tmp_path), subsets="B")
    assert len(data.read_pairs(str(tmp_path), subsets="A:1")["A"]) == 1
    write_pairs(path, columns=COLUMNS[:3])
    with pytest.raises(InputError, match="original.*no column pos_image_path; it has qry"):
        data.read_pairs(str(tmp_path))


MMEB_36 = {  # VLM2Vec, Table 1: the trained sets with the rows that are used, and the others
    "Classification": (
        {"ImageNet-1K": 100_000, "N24News": 50_000, "HatefulMemes": 10_000, "VOC2007": 10_000,
         "SUN397": 20_000},
        {"Place365", "ImageNet-A", "ImageNet-R", "ObjectNet", "Country211"},
    ),
    "VQA": (
        {"OK-VQA": 10_000, "A-OKVQA": 20_000, "DocVQA": 40_000, "InfographicsVQA": 25_000,
         "ChartQA": 28_000, "Visual7W": 70_000},
        {"ScienceQA", "VizWiz", "GQA", "TextVQA"},
    ),
    "Retrieval": (
        {"VisDial": 130_000, "CIRR": 30_000, "VisualNews_t2i": 100_000, "VisualNews_i2t": 100_000,
         "MSCOCO_t2i": 100_000, "MSCOCO_i2t": 120_000, "NIGHTS": 20_000, "WebQA": 20_000},
        {"FashionIQ", "Wiki-SS-NQ", "OVEN", "EDIS"},
    ),
    "Grounding": ({"MSCOCO": 100_000}, {"RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing"}),
}  # fmt: skip


def test_mmebs_36_sets_are_those_of_the_papers_table():
    """Their meta-tasks, which are never trained on, and what `--subsets mmeb20` takes of each."""
    caps = {}
    for kind, (trained, others) in MMEB_36.items():
        for name in (*trained, *others):
            assert mmeb.meta_task_of(name) == (kind, name in others), name
        caps.update(trained)
    known = [subset.name for subset in mmeb.MMEB]
    assert sorted(known) == sorted([*caps, *(x for _, others in MMEB_36.values() for x in others)])
    caps["ImageNet_1K"] = caps.pop("ImageNet-1K")  # its name in MMEB-train
    mix = dict(word.split(":") for word in mmeb.training_mix().split(","))
    assert {name: int(rows) for name, rows in mix.items()} == caps
    assert mmeb.meta_task_of("a set of one's own") == ("Other", False)


def test_a_set_of_several_parquet_files_is_read_whole(tmp_path):
    """`original-00000-of-00002` and its brother: no row is left out."""
    for part in range(2):
        write_pairs(tmp_path / "s" / f"original-0000{part}-of-00002.parquet", f"q{part}")
    pairs = data.read_pairs(str(tmp_path))["s"]
    assert [p.query.text for p in pairs] == ["q0", "q1"]


@pytest.mark.parametrize(
    ("names", "whole"),
    [
        (["00000-of-00002-0a1b2c3d4e5f6071", "00001-of-00002-8f9e0d1c2b3a4958"], True),
        (["00000-of-00003-0a1b2c3d4e5f6071", "00001-of-00003-8f9e0d1c2b3a4958"], False),
        (["00000-of-00001", "00000-of-00001-0a1b2c3d4e5f6071"], False),
        (["00000-of-00001", "00000-of-00001 (1)"], False),
        (["00000-of-00001", "00000-of-00001 - Copy"], False),
    ],
)
def test_the_parts_of_a_set_are_counted_however_their_names_go_on(tmp_path, names, whole):
    """The hub writes a hash behind the numbers, a browser " (1)": such parts were not counted, and
    a set of half its rows, or of each row twice, was scored."""
    for name in names:
        write_pairs(tmp_path / "s" / f"original-{name}.parquet")
    if whole:
        equal(len(data.read_pairs(str(tmp_path))["s"]), 2, "both parts")
    else:
        with pytest.raises(InputError, match="/s: holds original-0000.*, no whole set"):
            data.read_pairs(str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [("0-of-3", "1-of-3"), ("0-of-1", "0-of-2", "1-of-2"), ("1-of-1",), ("0-of-9999999999999",)],
)
def test_a_set_of_which_a_part_is_missing_is_refused(tmp_path, names):
    """Or of which an older version is left: what it says would be said of a part."""
    for name in names:
        number, count = name.split("-of-")
        write_pairs(tmp_path / "s" / f"original-{number:0>5}-of-{count:0>5}.parquet")
    with pytest.raises(InputError, match="/s: holds original-0000.*, no whole set"):
        data.read_pairs(str(tmp_path))
    write_pairs(tmp_path / "t" / "original-mine.parquet")
    data.read_pairs(str(tmp_path), subsets="t")


@pytest.mark.parametrize("other", ["old", "00000"])
def test_a_file_of_another_name_beside_a_sets_numbered_ones_is_refused(tmp_path, other):
    """A version that was set aside, `test-old.parquet`: each row of the set was read twice."""
    for name in (other, "00000-of-00001"):
        write_pairs(tmp_path / "s" / f"original-{name}.parquet")
    with pytest.raises(InputError, match=f"/s: holds .*original-{other}.parquet.*, no whole set"):
        data.read_pairs(str(tmp_path))


def test_a_set_that_cannot_be_looked_into_is_refused(tmp_path, monkeypatch):
    """A link to a disk that is not there, a folder of another user: not a set less, but for those
    who say which sets they mean."""
    write_pairs(tmp_path / "a" / "original-0.parquet")
    (tmp_path / "b").symlink_to("nowhere")
    with pytest.raises(InputError, match="/b: is a symbolic link to nowhere, .*--subsets"):
        data.read_pairs(str(tmp_path))
    data.read_pairs(str(tmp_path), subsets="a")
    (tmp_path / "b").unlink()
    data.read_pairs(str(tmp_path))
    (tmp_path / "b").mkdir()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, how: may(path, how) and "/b" not in str(path))
    with pytest.raises(InputError, match="/b: is a folder that may not be read"):
        data.read_pairs(str(tmp_path))


def test_a_set_that_has_no_table_of_the_kind_that_is_read_is_named(tmp_path, capsys):
    """Of --split's other kind, or misnamed: it was left out without a word. Of a folder whose sets
    are all read, and where a user says which sets are meant, nothing is said."""
    for name in ("a/original", "b/diverse_instruction", "c/train"):
        write_pairs(tmp_path / f"{name}-0.parquet")
    assert list(data.read_pairs(str(tmp_path))) == ["a"]
    want = f"{tmp_path}: left out for want of original-*.parquet: b, c\n"
    equal(capsys.readouterr().out, want, "mmeb.say_left_out")
    data.read_pairs(str(tmp_path), subsets="a")
    for name in "bc":
        write_pairs(tmp_path / name / "original-0.parquet")
    data.read_pairs(str(tmp_path))
    equal(capsys.readouterr().out, "", "nothing is left out")


def test_files_of_a_set_may_hold_their_texts_in_any_of_arrows_ways(tmp_path):
    """And have columns beside them that differ in kind."""
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", "string")]
    names = [f"s/original-{part:05}-of-00003.parquet" for part in range(3)]
    for part, kind in enumerate(kinds):
        write_pairs(tmp_path / names[part], f"q{part}")
        table = pq.read_table(tmp_path / names[part])
        column = table.column_names.index("qry")
        table = table.set_column(column, "qry", table["qry"].cast(kind))
        ids = pyarrow.array([part] if part else ["a"])
        pq.write_table(table.append_column("id", ids), tmp_path / names[part])
    pairs = data.read_pairs(str(tmp_path))["s"]
    assert [p.query.text for p in pairs] == ["q0", "q1", "q2"]


def test_a_list_whose_rows_are_not_those_it_had_ends_no_iteration(tmp_path):
    """Trap: an IndexError would be taken for the sequence's end, and a part be scored."""
    file = tmp_path / "s" / "original-0.parquet"
    write_pairs(file)
    table = mmeb.Table([file], mmeb.Layout(COLUMNS))
    rows = pq.read_table(file)
    pq.write_table(pyarrow.concat_tables([rows, rows]), file)
    with pytest.raises(InputError, match="original-0.parquet: has changed since the command"):
        table.load()
    short = Lazy(3, [1, 2].__getitem__)
    with pytest.raises(IndexError):
        list(short)


def test_other_rows_of_the_same_size_are_other_data(tmp_path):
    """A run is not resumed with them, and a list of bad rows is none of theirs."""
    digests = []
    for query in "xyx":
        file = tmp_path / "s" / "original-0.parquet"
        write_pairs(file, query)
        digests.append(mmeb.train_rows([file], "s", Images(tmp_path)).source.digest)
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize("place", [0, 7, 9])
def test_a_digest_is_of_all_of_a_file(tmp_path, monkeypatch, place):
    """Which is read in blocks; here of four bytes: in the first, the second and the last of them a
    byte is another one."""
    monkeypatch.setattr(files, "BLOCK", 4)
    content = bytearray(b"0123456789")
    (tmp_path / "a").write_bytes(content)
    content[place] ^= 1
    (tmp_path / "b").write_bytes(content)
    one, other = (files.digest_of_content(tmp_path / name) for name in "ab")
    assert one != other, "digest_of_content"


def test_a_column_without_a_value_in_the_first_file_has_those_of_the_others(tmp_path):
    """Trap: of nothing but nulls it has no type there; the texts of the second file could not be
    read as none."""
    files = [tmp_path / f"s/original-0000{part}-of-00002.parquet" for part in range(2)]
    for part, file in enumerate(files):
        write_pairs(file, f"q{part}")
    table = pq.read_table(files[0])
    column = table.column_names.index("qry_image_path")
    nulls = pyarrow.nulls(len(table))
    pq.write_table(table.set_column(column, "qry_image_path", nulls), files[0])
    pairs = data.read_pairs(str(tmp_path))["s"]
    assert [p.query.text for p in pairs] == ["q0", "q1"]


def same_item(a, b):
    """The same text, the same pixels."""
    assert a.text == b.text and len(a.images) == len(b.images), (a, b)
    for x, y in zip(a.images, b.images, strict=True):
        assert open_image(x).tobytes() == open_image(y).tobytes()


def test_the_toy_world_as_files_reads_back_to_the_same_examples(tmp_path):
    """Dialogue JSONL, MMEB's two parquet layouts and PNG: the same texts, the same pixels; and
    what is read is what toy/world.py says, as Items."""
    n = 3
    export(str(tmp_path), n)
    toy, read = data.read_dialogues(), data.read_dialogues(str(tmp_path / "dialogues.jsonl"))
    assert len(read) == n
    for i in range(n):
        same_item(toy[i].item, read[i].item)
        assert toy[i] == data.Dialogue.of(Shapes().dialogue(i))
        assert toy[i].turns == read[i].turns and toy[i].id == read[i].id
    toy, read = data.read_pairs(), data.read_pairs(str(tmp_path / "MMEB-train"))
    assert sorted(toy) == sorted(read)
    for name in toy:
        for i in range(n):
            assert toy[name][i] == data.Pair.of(Shapes().pair(name, i))
            same_item(toy[name][i].query, read[name][i].query)
            same_item(toy[name][i].targets[0], read[name][i].targets[0])
    toy = data.read_tasks(limit=n)
    read = {t.name: t.queries for t in data.read_tasks(str(tmp_path / "MMEB-eval"))}
    for task in toy:
        for (query, choices), (query2, choices2) in zip(task.queries, read[task.name], strict=True):
            same_item(query, query2)
            for a, b in zip(choices, choices2, strict=True):
                same_item(a, b)
