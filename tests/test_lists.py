"""Lists, as a careless user writes them: what no code would read is refused and not dropped, and
the message names file, line, field, and what is meant. What is read right: test_data.py."""

import codecs
import errno
import gzip
import io
import json
import os
import re
import sys
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq
import pytest
from checks import equal
from PIL import Image

import contrastive
import data
import evaluate
import pretrain
from data import Item
from plumbing import first_pass, lines, mmeb
from plumbing.errors import InputError
from plumbing.files import digest_of_content
from plumbing.formats import checked_digest, choose
from plumbing.images import Images
from plumbing.lines import Source, open_lines, parse_json
from plumbing.mmeb import contents_of, eval_rows, last_loaded, training_mix
from plumbing.parquet import Layout, Table, stamp_of

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dog"}]
MORE = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "there"}]
DIALOGUE = {"id": "1", "image": "a.png", "conversations": TALK}
PAIR = {"query": {"text": "<image> x", "image": "a.png"}, "target": {"text": "y"}}
CAPTION = {"file_name": "a.png", "text": "a dog"}


@pytest.fixture
def place(tmp_path):
    """A folder with one picture."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    return tmp_path


def jsonl(folder, *records, name="list.jsonl"):
    """A list of these records, one a line."""
    path = folder / name
    path.write_text("".join(json.dumps(x) + "\n" for x in records))
    return str(path)


def turn(i, **change):
    """A dialogue of two questions whose i-th turn is changed."""
    talk = [dict(x) for x in TALK + MORE]
    talk[i].update(change)
    return {**DIALOGUE, "conversations": talk}


# ------------------------------------------------------------------- nothing is dropped in silence

DIALOGUES = {
    "a key that is not read": ({**DIALOGUE, "images": ["b.png"]}, 'unknown key "images".*"image"'),
    "a turn with a weight": (turn(1, weight=0), r"conversations\[1\] has more than"),
    "a later picture": (turn(2, value="<image> And?"), r"conversations\[2\] has <image>"),
    "a picture in an answer": (turn(1, value="<image>"), r"conversations\[1\] has <image>"),
    "a blank answer": (turn(3, value=" \n"), r'conversations\[3\] .*"value".* not blank'),
    "an answer that is a number": (turn(1, value=2), r'conversations\[1\] .*"value", a string'),
    "a question without an answer": (
        {**DIALOGUE, "conversations": TALK + MORE[:1]},
        '"conversations" must be a list of questions and answers in turn',
    ),
    "a first turn of a picture alone": (
        turn(0, value="<image>\n"),
        r"conversations\[0\] has <image> al",
    ),
    "MMEB's mark alone": (turn(0, value=" <|image_1|>"), r"conversations\[0\] has <image> alone"),
    "MMEB's mark later": (turn(2, value="<|image_1|> And?"), r"conversations\[2\] has <image>"),
    "no picture at all": ({"conversations": MORE}, 'has no "image".* nothing to compress'),
    "a list of no pictures": (
        {"image": [], "conversations": MORE},
        'has no "image".* nothing to compress',
    ),
    "an id of another type": ({**DIALOGUE, "id": ["1"]}, '"id" must be a string or a number'),
    "a number as picture": ({**DIALOGUE, "image": 0}, '"image" a path'),
    "a list": ([DIALOGUE], "needs an object .*in a file that is called .json"),
    "a pair": (PAIR, "a pair, which stage 2 reads: contrastive.py"),
    "a caption": (CAPTION, "a caption: call the list metadata.jsonl"),
    "a chat as others write it": (
        {"messages": [{"role": "user", "content": "What is it?"}]},
        'a chat; pretrain.py reads "conversations" of "from" and "value", as LLaVA has',
    ),
    "an object with the list in it": ({"data": [DIALOGUE]}, 'unknown key "data"'),
}
PAIRS = {
    "a near miss": ({**PAIR, "negative": [{"text": "z"}]}, 'unknown key "negative".*"negatives"'),
    "pictures": ({**PAIR, "query": {"text": "x", "images": ["a.png"]}}, '"query": unknown key "i'),
    "a word too many": ({**PAIR, "target": {"text": "y", "score": 1}}, '"target": unknown key'),
    "a text as query": ({**PAIR, "query": "x"}, '"query": needs .*, not a str'),
    "blanks as query": ({**PAIR, "query": {"text": "  "}}, '"query": needs .* not empty'),
    "a false text": ({**PAIR, "target": {"text": False}}, '"target": "text" must be a string'),
    "an empty path": ({**PAIR, "query": {"text": "x", "image": [""]}}, '"query": .*"image" a path'),
    "the second target": ({**PAIR, "target": [{"text": "y"}, {}]}, r'"target\[1\]": needs'),
    "negatives as object": ({**PAIR, "negatives": {"text": "z"}}, '"negatives" must be a list'),
    "negatives as text": ({**PAIR, "negatives": ""}, '"negatives" must be a list, not a str'),
    "a negative that is its target": (
        {**PAIR, "negatives": [{"text": "z"}, {"text": "z"}, PAIR["target"]]},
        r"negatives\[2\] is a target, too",
    ),
    "a bad negative": ({**PAIR, "negatives": [{"text": 7}]}, r'"negatives\[0\]": "text" must be'),
    "a dialogue": (DIALOGUE, "a dialogue, which stage 1 reads: pretrain.py"),
    "a caption": (CAPTION, "a caption: call the list metadata.jsonl"),
}
CAPTIONS = {
    "blanks": (
        {**CAPTION, "text": " "},
        "needs \"text\", a string that is not empty; it has 'file_name', 't",
    ),
    "a key that is not read": ({**CAPTION, "captions": ["b"]}, 'unknown key "captions"'),
    "a picture's mark": (
        {**CAPTION, "text": "an <image> tag"},
        '"text" has <image> .*, where a pic',
    ),
    "MMEB's mark": ({**CAPTION, "text": "<|image_1|> a dog"}, '"text" has .*MMEB.*, where a pic'),
    "a dialogue": (DIALOGUE, "a dialogue, which stage 1 reads"),
}


@pytest.mark.parametrize("record, says", DIALOGUES.values(), ids=DIALOGUES)
def test_a_bad_dialogue_is_told_by_line_and_field(place, record, says):
    with pytest.raises(InputError, match=rf"list.jsonl, line 2: .*{says}"):
        data.read_dialogues(jsonl(place, DIALOGUE, record))


@pytest.mark.parametrize("record, says", PAIRS.values(), ids=PAIRS)
def test_a_bad_pair_is_told_by_line_and_field(place, record, says):
    with pytest.raises(InputError, match=rf"list.jsonl, line 2: .*{says}"):
        data.read_pairs(jsonl(place, PAIR, record))


@pytest.mark.parametrize("record, says", CAPTIONS.values(), ids=CAPTIONS)
def test_a_bad_caption_is_told_by_line_and_field(place, record, says):
    jsonl(place, CAPTION, record, name="metadata.jsonl")
    with pytest.raises(InputError, match=rf"metadata.jsonl, line 2: .*{says}"):
        data.read_pairs(str(place))


def test_one_key_twice_is_refused(place):
    """The json module keeps the last of two, and says nothing."""
    path = place / "twins.jsonl"
    path.write_text('{"query": {"text": "a", "text": "b"}, "target": {"text": "y"}}\n')
    with pytest.raises(InputError, match='line 1: "text" stands twice in one object'):
        data.read_pairs(str(path))


def test_what_real_lists_say_beside_an_example_is_read_over(place):
    """LLaVA's mixes name the model or the source that an answer comes from."""
    beside = {**DIALOGUE, "model": "gpt-4", "source": "coco", "width": 32, "height": 32}
    assert len(data.read_dialogues(jsonl(place, beside))) == 1


def test_equal_targets_and_negatives_of_a_line_count_once(place):
    """Targets are averaged: one that stands twice had the weight of two. A picture's captions are
    its targets, too."""
    a, b, n = ({"text": text} for text in "abn")
    line = {"query": {"text": "q"}, "target": [a, a, b, a], "negatives": [n, n]}
    (pair,) = data.read_pairs(jsonl(place, line))["list"]
    equal(pair, data.Pair(Item("q"), (Item("a"), Item("b")), (Item("n"),)), "parse_pair")
    texts = [{**CAPTION, "text": text} for text in ("a dog", "a dog", "a cat")]
    jsonl(place, *texts, name="metadata.jsonl")
    (pair,) = data.read_pairs(str(place))[f"{place.name}_i2t"]
    equal([x.text for x in pair.targets], ["a dog", "a cat"], "caption_pairs")


def test_mmebs_mark_is_a_picture_s_place_wherever_there_are_pictures(place):
    """In pairs, in dialogues and in what `encode` takes."""
    line = {"query": {"text": "<|image_1|>\nWhat?", "image": "a.png"}, "target": {"text": "y"}}
    (pair,) = data.read_pairs(jsonl(place, line))["list"]
    (talk,) = data.read_dialogues(jsonl(place, turn(0, value="<|image_1|>\nWhat?")))
    equal(pair.query.text, "<image>\nWhat?", "parse_content")
    equal(
        Item.of({"image": pair.query.images[0], "text": "<|image_1|>\nWhat?"}), pair.query, "both"
    )
    equal((talk.item.text, talk.turns[0]), ("<image>", ("What?", "a dog")), "parse_dialogue")


# ----------------------------------------------------------------------------- other kinds of lists


@pytest.mark.parametrize("name", ["talks.json", "talks.jsonl"])
def test_llavas_own_list_is_one_json_array(place, name):
    """Read where the file is called .json, with any white space; else the message says so."""
    path = place / name
    second = {**DIALOGUE, "id": 2}
    path.write_text(f"\n [ {json.dumps(DIALOGUE, indent=2)} ,\n{json.dumps(second)}]\n")
    if name.endswith(".json"):
        assert [d.id for d in data.read_dialogues(str(path))] == ["1", "2"]
    else:
        path.write_text(json.dumps([DIALOGUE, second]).replace("}]}, ", "}]},\n"))
        with pytest.raises(InputError, match="line 1: not JSON.* in a file that is called .j"):
            data.read_dialogues(str(path))


@pytest.mark.parametrize("half", [r"\ud800", r"\uD800", r"\uDFFF"])
def test_half_a_surrogate_pair_is_no_text(half):
    """Good JSON, which no tokenizer takes; a whole pair is a character."""
    with pytest.raises(ValueError, match="surrogates not allowed"):
        parse_json(f'{{"text": "{half}"}}'.encode())
    equal(parse_json(rb'{"text": "\uD83D\uDC31"}'), {"text": "\U0001f431"}, "a whole one")


def test_an_array_is_read_a_block_at_a_time(place, monkeypatch):
    """Whatever falls on the edge of a block: 60 elements in blocks of 7 characters."""
    records = [{**DIALOGUE, "id": str(i)} for i in range(60)]
    path = place / "talks.json"
    path.write_text(json.dumps(records))
    monkeypatch.setattr(lines, "BLOCK", 7)
    with open(path) as file:
        blocks = lines.Blocks(file)
        blocks.peek()
        equal(blocks.text, path.read_text()[:7], "what is in memory")
    assert [d.id for d in data.read_dialogues(str(path))] == [str(i) for i in range(60)]


@pytest.mark.parametrize(
    "text, says",
    [
        ("[]", "holds no lines"),
        ('[{"a": 1}', 'example 1: .*no "," or "]" after it'),
        ('[{"a": 1} {"a": 2}]', 'example 1: .*no "," or "]"'),
        ('[{"a": 1},]', "example 2: not JSON"),
        ('[{"a": 1}] []', "example 1: .*after the array's end"),
        ('[{"a": oops}]', "example 1: not JSON: Expecting value"),
        ("[" * 5000, "example 1: "),
    ],
)
def test_a_damaged_array_is_told_by_its_example(place, text, says):
    (place / "x.json").write_text(text)
    with pytest.raises(InputError, match=says):
        data.read_pairs(str(place / "x.json"))


@pytest.mark.parametrize(
    "text, says",
    [
        ("file_name,text\na.png,a dog, in snow\n", "line 2: has more fields than .* needs quotes"),
        ("file_name,text,text\na.png,a,b\n", "two columns .* one name"),
        ("file_name;text\na.png;a dog\n", "line 1: .* semicolons or tabs; save it with commas"),
        ("file_name\ttext\na.png\ta dog, b\n", "line 1: .* semicolons or tabs; save it with"),
        ("file_name,text,label\na.png,a,b\n", 'line 2: unknown key "label"'),
        ("file_name,text\na.png\n", 'line 2: needs "text"'),
        ('file_name,text\na.png,"a dog\nb.png,"a cat"\n', "after line"),
    ],
)
def test_a_csv_loses_nothing(place, text, says):
    """A comma in a text without quotes, a column that is not read, a field too few."""
    (place / "metadata.csv").write_text(text)
    with pytest.raises(InputError, match=says):
        data.read_pairs(str(place))


def test_a_csv_s_text_keeps_its_own_ends_of_lines(place):
    """Inside of quotes: as its program wrote them."""
    (place / "x.csv").write_bytes(b'file_name,text\r\na.png,"a dog\r\nin snow"\r\n')
    ((_, line),) = lines.csv_rows(place / "x.csv")
    equal(json.loads(line)["text"], "a dog\r\nin snow", "csv_rows")


def test_two_lists_in_one_folder_are_refused(place):
    """metadata.jsonl would be read, and metadata.csv not."""
    jsonl(place, CAPTION, name="metadata.jsonl")
    (place / "metadata.csv").write_text("file_name,text\na.png,a dog\n")
    with pytest.raises(InputError, match="metadata.jsonl and metadata.csv; remove one"):
        data.read_dialogues(str(place))


def test_bytes_that_are_no_utf_8_are_told_by_line_and_place(place):
    """A list in Latin-1, as an old program writes it."""
    path = place / "list.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b'\n{"query": "\xe4"}\n')
    with pytest.raises(InputError, match="line 2: not UTF-8: byte 12 is 0xe4"):
        data.read_pairs(str(path))


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_bytes_that_are_no_utf_8_are_told_by_their_line_far_into_a_file(place, kind):
    """Excel's cp1252. What decodes the file is blocks ahead of the row that is read."""
    good, bad = b"a.png,a dog", b"a.png,caf\xe9"
    lines = [b"file_name,text", *[good] * 3000, bad, *[good] * 3000]
    if kind == "json":
        pair = json.dumps(PAIR).encode()
        lines = [b"[", *[pair + b","] * 3000, b'"caf\xe9",', *[pair + b","] * 3000, pair + b"]"]
    path = place / ("metadata.csv" if kind == "csv" else "list.json")
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=rf"{path.name}, line 3002: not UTF-8: 0xe9"):
        data.read_dialogues(str(place)) if kind == "csv" else data.read_pairs(str(path))
    path.write_bytes(b"\n".join(lines[:3])[:-1] + b"\xe9")  # a whole character needs two more
    with pytest.raises(InputError, match=r"line 3: not UTF-8: cut off"):
        data.read_dialogues(str(place)) if kind == "csv" else data.read_pairs(str(path))


def test_a_column_without_a_name_is_told_so(place):
    """pandas' to_csv() writes its index into one."""
    (place / "metadata.csv").write_text(",file_name,text\n0,a.png,a dog\n")
    with pytest.raises(InputError, match=r"a column \(a key\) has no name, and would be lost"):
        data.read_dialogues(str(place))


def test_a_list_that_windows_wrote_has_the_same_questions(place):
    """What stands between the picture's mark and the question is none of either."""
    for first in ("<image>\nWhat?", "<image>\r\nWhat?", "<image> \n What?", "What?\r\n<image>"):
        raw = {"image": "a.png", "conversations": [{"from": "human", "value": first}]}
        raw["conversations"].append({"from": "gpt", "value": "A dog."})
        jsonl(place, raw, name="talk.jsonl")
        talk = data.read_dialogues(str(place / "talk.jsonl"))[0]
        equal(talk.turns, (("What?", "A dog."),), repr(first))


def test_a_list_is_a_sequence(place):
    """Slices, and numbers from the end, as of any."""
    talks = data.read_dialogues()
    equal([d.id for d in talks[:3]], [talks[i].id for i in range(3)], "a slice")
    equal(talks[-1].id, talks[len(talks) - 1].id, "the last one")
    for i in (10**9, -(10**9) - 1):
        with pytest.raises(IndexError):
            talks[i]


@pytest.mark.parametrize("wrong", [-1, 1.5, "5"])
def test_how_many_is_a_whole_number(wrong):
    """A negative one would cut the last turn off each dialogue, and say nothing."""
    with pytest.raises(InputError, match="turns .*: a whole number of at least 0"):
        data.read_dialogues(turns=wrong)
    with pytest.raises(InputError, match="limit .*: a whole number of at least 0"):
        data.read_tasks(limit=wrong)


def test_a_list_whose_lines_end_in_cr_alone_is_told_so(place):
    """To everybody else it is one line; where they end in CR and LF nothing is wrong."""
    path, line = place / "list.jsonl", json.dumps(PAIR).encode()
    path.write_bytes(line + b"\r" + line + b"\r")
    with pytest.raises(InputError, match="line 1: not JSON: .* end in CR alone.*; save it with LF"):
        data.read_pairs(str(path))
    path.write_bytes(line + b"\r\n" + b"oops\r\n")
    with pytest.raises(InputError, match="line 2: not JSON: .*column 1. An example is an o"):
        data.read_pairs(str(path))


def test_a_line_of_200_megabytes_is_refused_before_it_is_read(place, monkeypatch):
    """In a .jsonl and in an array; the limit is lowered here, and said."""
    monkeypatch.setattr(lines, "MOST", 2_000)
    monkeypatch.setattr(lines, "BLOCK", 500)
    huge = {"query": {"text": "x" * 5_000}, "target": {"text": "y"}}
    with pytest.raises(InputError, match="line 2: longer than .* MB"):
        data.read_pairs(jsonl(place, PAIR, huge))
    (place / "x.json").write_text(json.dumps([PAIR, huge]))
    with pytest.raises(InputError, match="example 2: .*longer than .* MB"):
        data.read_pairs(str(place / "x.json"))


def test_a_list_that_is_something_else_is_called_what_it_is(place):
    """A folder, a pipe, nothing, a folder of lists, MMEB's layout; with the stage that takes it."""
    (place / "folder.jsonl").mkdir()
    os.mkfifo(place / "pipe.jsonl")
    (place / "link").mkdir()
    (place / "link" / "metadata.jsonl").symlink_to("nowhere")
    pairs = place / "mmeb" / "A" / "original-0.parquet"
    write(pairs, TRAIN)
    with zipfile.ZipFile(place / "zip.jsonl", "w") as archive:
        archive.writestr("list.jsonl", "{}")
    (place / "gzip.jsonl").write_bytes(gzip.compress(b"{}"))
    (place / "little.jsonl").write_bytes("\ufeff{}".encode("utf-16-le"))
    (place / "big.csv").write_bytes("\ufefffile_name".encode("utf-16-be"))
    other = place / "lists"
    other.mkdir()
    jsonl(other, PAIR, name="my.jsonl")
    for read in (data.read_dialogues, data.read_pairs):
        for name, says in (
            ("folder.jsonl", "a folder without metadata|no <subset>"),
            ("pipe.jsonl", "is a pipe"),
            ("no.jsonl", "no such list"),
            ("no.json", "no such list"),
            ("no.csv", "no such list"),
            ("link", "metadata.jsonl.* is a symbolic link to nowhere, which is not there"),
            ("lists", "name .*my.jsonl"),
            (str(pairs), "is a parquet file; give the folder that holds its subset's"),
            ("zip.jsonl", "is a zip file; unpack it"),
            ("gzip.jsonl", "is compressed; unpack it"),
            ("little.jsonl", "is UTF-16; save it as UTF-8"),
            ("big.csv", "is UTF-16; save it as UTF-8"),
        ):
            with pytest.raises(InputError, match=says):
                read(str(place / name))
    with pytest.raises(InputError, match="MMEB's layout; stage 2 reads .* stage 1 takes a list"):
        data.read_dialogues(str(place / "mmeb"))
    with pytest.raises(InputError, match="for training: contrastive.py"):
        data.read_tasks(str(place / "mmeb"))
    write(place / "eval" / "A" / "test-0.parquet", EVAL)
    with pytest.raises(InputError, match="test-.*parquet are for evaluate.py"):
        data.read_pairs(str(place / "eval"))
    with pytest.raises(InputError, match="one subset itself"):
        data.read_pairs(str(place / "mmeb" / "A"))


def test_a_list_that_changes_is_an_error_and_no_other_example(place):
    """Lines are read when they are drawn, hours after the first pass."""
    path = jsonl(place, *[PAIR] * 3)
    pairs = data.read_pairs(path)["list"]
    assert pairs[2].query.text == "<image> x"
    for size in (os.path.getsize(path) - 5, 100):  # within its line, before it
        os.truncate(path, size)
        with pytest.raises(InputError, match="has changed since the command began"):
            pairs[2]
    talk = jsonl(place, DIALOGUE, {**DIALOGUE, "id": "9"})
    talks = data.read_dialogues(talk)
    jsonl(place, {**DIALOGUE, "id": "9"}, DIALOGUE)  # sorted, in place: as long as before
    with pytest.raises(InputError, match="has changed since the command began"):
        talks[0]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_table_that_changes_is_an_error_and_no_other_row(place, rows):
    """Whether it has fewer rows, as many or more."""
    file = place / "A" / "test-0.parquet"
    file.parent.mkdir()
    pq.write_table(pyarrow.table({name: value * 2 for name, value in EVAL.items()}), file)
    queries = eval_rows([file], "A", Images(place))
    other = {name: value * rows for name, value in EVAL.items()} | {"qry_text": ["new"] * rows}
    pq.write_table(pyarrow.table(other), file)
    for read in (lambda: queries[0], lambda: queries.source.raw.copy([0], place / "x.parquet")):
        with pytest.raises(InputError, match="test-0.parquet: has changed since the command") as e:
            read()
        assert "not a readable" not in str(e.value), "it is as readable as before"


def test_a_table_that_is_touched_is_the_same(place):
    """As by a copy that is checked, or a backup: its bytes count."""
    file = place / "test-0.parquet"
    pq.write_table(pyarrow.table(EVAL), file)
    queries = eval_rows([file], "A", Images(place))
    os.utime(file, ns=(1, 1))
    equal(queries[0][0].text, "q", "Table.load")


def test_a_table_s_stamp_is_neither_of_both_alone(place):
    """Another size at the same time, the same size at another one."""
    file, stamps = place / "x", set()
    for size, time in ((3, 1), (3, 2), (4, 2), (4, 2)):
        file.write_bytes(b"x" * size)
        os.utime(file, ns=(time, time))
        stamps.add(stamp_of(file))
    equal(len(stamps), 3, "stamp_of")


def test_where_no_room_for_a_copy_is_is_said(place, monkeypatch):
    """The lines of a csv or an array are kept in a file of our own, on another disk perhaps."""

    class Full(io.BytesIO):
        def write(self, line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (place / "talks.json").write_text(json.dumps([DIALOGUE]))
    monkeypatch.setattr(lines.tempfile, "TemporaryFile", Full)
    with pytest.raises(InputError, match=r"talks.json: No space left.*is made in .* \(TMPDIR\)"):
        data.read_dialogues(str(place / "talks.json"))


def test_the_digest_of_data_is_of_their_order_too(place):
    """A set that gets another name, files of one set that change theirs: other batches are drawn.
    One file's is its own, by which --skip-bad knows it."""
    for name, texts in (("A", "ab"), ("B", "cd")):
        (place / name).mkdir()
        for k, text in enumerate(texts):
            row = dict(qry=[text], qry_image_path=[""], pos_text=[text * 2], pos_image_path=[""])
            path = place / name / f"original-{k:05d}-of-00002.parquet"
            pq.write_table(pyarrow.table(row), path)

    def digest():
        return checked_digest(data.read_pairs(str(place)).values())

    digests = [digest()]
    (place / "A").rename(place / "C")
    digests.append(digest())
    first, second = sorted((place / "B").glob("*"))
    first.rename(place / "x")
    second.rename(first)
    (place / "x").rename(second)
    digests.append(digest())
    equal(len(set(digests)), 3, f"digests that differ: {digests}")
    one = Table([first], Layout(mmeb.TRAIN))
    equal(one.digest, digest_of_content(first), "of one file")


# ------------------------------------------------------------------------------------ MMEB's tables

TRAIN = {"qry": ["q", "r"], "qry_image_path": ["", ""], "pos_text": ["t", "u"]}
TRAIN["pos_image_path"] = ["", ""]
EVAL = {"qry_text": ["q"], "qry_img_path": [""], "tgt_text": [["t", "u"]]}
EVAL["tgt_img_path"] = [["", ""]]
TEXT, LONG = pyarrow.string(), pyarrow.int32()
LISTS = pyarrow.list_(TEXT)


def write(path, columns):
    """A parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"qry": [1, 2]}, "column qry must hold texts, not int64"),
        ({"qry": [["q"], ["r"]]}, "column qry must hold texts, not list"),
        ({"pos_text": [{"a": "t"}, {"a": "u"}]}, "column pos_text must hold texts, not struct"),
        ({"neg_image": ["a.png", ""]}, "column neg_image would be lost; it takes .*neg_image_path"),
        ({"negatives": ["n", "m"]}, "column negatives would be lost; it takes .*neg_text"),
        ({name: [] for name in TRAIN}, "original-0.parquet: holds no rows"),
        ({"pos_text": ["t", ""]}, "row 2: pos_text, pos_image_path: needs"),
        ({"qry": ["q", "<image> r"]}, "row 2: qry, qry_image_path: the text has 1 <image> for 0"),
    ],
)
def test_a_bad_table_is_told_by_file_row_and_column(tmp_path, change, says):
    """Before training: all rows are read once."""
    write(tmp_path / "A" / "original-0.parquet", {**TRAIN, **change})
    with pytest.raises(InputError, match=says):
        data.read_pairs(str(tmp_path))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"tgt_text": ["t"]}, "column tgt_text must hold lists of texts, not text"),
        ({"tgt_text": [[1, 2]]}, "column tgt_text must hold lists of texts, not list<"),
        ({"tgt_images": [[""]]}, "column tgt_images would be lost"),
        ({"tgt_text": pyarrow.nulls(1)}, "column tgt_text must hold lists of texts, not nothing"),
        (dict.fromkeys(EVAL, pyarrow.array([], LISTS)) | {"qry_text": [], "qry_img_path": []},
         "test-0.parquet: holds no rows"),
    ],
)  # fmt: skip
def test_a_bad_table_of_candidates_is_told_by_column(tmp_path, change, says):
    write(tmp_path / "A" / "test-0.parquet", {**EVAL, **change})
    with pytest.raises(InputError, match=says):
        data.read_tasks(str(tmp_path))


@pytest.mark.parametrize(
    ("texts", "paths"),
    [(["t"], ["", ""]), ([], [""]), ([], []), (["t"], []), (["t"], None), (None, [""])],
)
def test_a_row_without_its_candidates_is_refused(tmp_path, texts, paths):
    """None at all, or one text for two pictures."""
    lists = {
        "tgt_text": pyarrow.array([texts], LISTS),
        "tgt_img_path": pyarrow.array([paths], LISTS),
    }
    write(tmp_path / "A" / "test-0.parquet", {**EVAL, **lists})
    with pytest.raises(InputError, match="test-0.parquet, row 1: tgt_text and tgt_img_path must"):
        data.read_tasks(str(tmp_path))[0].queries[0]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"qry_text": ["q", "q", "<image> r"]}, "row 3: qry_text, qry_img_path: the text has 1"),
        ({"tgt_text": [["t", "u"], ["t", "u"], ["t", " "]]}, "row 3: tgt_text.1., .*: needs {"),
        (
            {"tgt_text": [["t", "u"], ["u", "<image>"], ["t", "<image>"]]},
            "row 2: tgt_text.1., .*: the text has 1",
        ),
        (
            {"qry_text": ["q", "", "q"], "qry_img_path": ["", "../a", ""]},
            "row 2: .* lies outside of",
        ),
        ({"tgt_text": [["t", "u"], ["t", "u"], ["t"]]}, "row 3: tgt_text and tgt_img_path must be"),
        ({"tgt_text": [["t", "u"], None, ["t", "u"]]}, "row 2: tgt_text and tgt_img_path must be"),
    ],
)
def test_a_bad_row_of_an_evaluation_set_is_told_before_any_is_scored(tmp_path, change, says):
    """The query or a candidate, in the last of several sets: hours of scoring and the JSON were
    lost to it. Where only the rows before it are scored it is let be."""
    good = {name: column * 3 for name, column in EVAL.items()}
    write(tmp_path / "A" / "test-0.parquet", good)
    write(tmp_path / "B" / "test-0.parquet", {**good, **change})
    with pytest.raises(InputError, match=f"B/test-0.parquet, {says}"):
        data.read_tasks(str(tmp_path))
    data.read_tasks(str(tmp_path), limit=1)


def test_of_candidates_that_repeat_each_is_parsed_once(tmp_path, monkeypatch):
    """1,000 queries with 1,000 candidates each are a million, of a few thousand distinct ones."""
    parsed, parse = [], mmeb.parse_content
    monkeypatch.setattr(mmeb, "parse_content", lambda raw, *x: parsed.append(raw) or parse(raw, *x))
    lists = {"tgt_text": [["t", "u"], ["u", "v"]] * 20, "tgt_img_path": [["", ""]] * 40}
    write(
        tmp_path / "A" / "test-0.parquet",
        {**EVAL, "qry_text": ["q"] * 40, "qry_img_path": [""] * 40, **lists},
    )
    data.read_tasks(str(tmp_path))
    equal([raw["text"] for raw in parsed], ["q", "t", "u", "v"], "in the order of their rows")
    table = Table([tmp_path / "A" / "test-0.parquet"], Layout(tuple(EVAL)[:2], tuple(EVAL)[2:]))
    found = list(mmeb.distinct_candidates(table.load(), [2] * 40))
    equal(sorted(found), [(0, ("t", "")), (0, ("u", "")), (1, ("v", ""))], "the first row of each")


def not_utf8(texts) -> pyarrow.Array:
    """A column of texts, of which \\xff is one byte, as a program that knows no UTF-8 writes it."""
    column = pyarrow.array([text.encode("latin-1") for text in texts])
    return pyarrow.Array.from_buffers(TEXT, len(texts), column.buffers())


def test_a_text_of_a_table_that_is_not_utf8_is_told_by_its_row(tmp_path):
    """Arrow reads it, and failed with a traceback when the row was drawn; among candidates too."""
    write(tmp_path / "A" / "original-0.parquet", TRAIN)
    bad = {**TRAIN, "pos_text": not_utf8(["t", "\xff"])}
    write(tmp_path / "A" / "original-1.parquet", bad)
    with pytest.raises(InputError, match="original-1.parquet, row 2: a text in it is not UTF-8"):
        data.read_pairs(str(tmp_path))
    write(tmp_path / "A" / "original-1.parquet", {**TRAIN, "pos_text": not_utf8(["\xff", "\xff"])})
    with pytest.raises(InputError, match="original-1.parquet, row 1: a text in it is not UTF-8"):
        data.read_pairs(str(tmp_path))
    offsets = pyarrow.array([0, 2], LONG)
    lists = pyarrow.ListArray.from_arrays(offsets, not_utf8(["t", "\xff"]))
    for change in ({"qry_text": not_utf8(["\xff"])}, {"tgt_text": lists}):
        write(tmp_path / "A" / "test-0.parquet", {**EVAL, **change})
        with pytest.raises(InputError, match="test-0.parquet, row 1: a text in it is not UTF-8"):
            data.read_tasks(str(tmp_path))


def test_a_bad_field_of_a_row_to_evaluate_is_told_by_its_column(tmp_path):
    """A row has a query and up to a thousand candidates."""
    for column, value, says in (
        ("qry_text", [""], "row 1: qry_text, qry_img_path: needs"),
        ("tgt_text", [["t", ""]], r"row 1: tgt_text\[1\], tgt_img_path\[1\]: needs"),
    ):
        write(tmp_path / "A" / "test-0.parquet", {**EVAL, column: value})
        with pytest.raises(InputError, match=says):
            data.read_tasks(str(tmp_path))


def test_queries_with_nothing_to_compare_with_are_told(tmp_path, capsys):
    """They are hits, whatever the model."""
    one = {**EVAL, "tgt_text": [["t"]], "tgt_img_path": [[""]]}
    write(tmp_path / "A" / "test-0.parquet", one)
    data.read_tasks(str(tmp_path))
    assert "1 of 1 queries have a single candidate" in capsys.readouterr().out
    write(tmp_path / "A" / "test-0.parquet", EVAL)
    data.read_tasks(str(tmp_path))
    assert "single candidate" not in capsys.readouterr().out


def test_a_negatives_column_that_is_there_twice_is_refused(tmp_path):
    """As any other; arrow's own error names no file."""
    table = {**TRAIN, "neg_text": ["a", "b"], "neg_image_path": ["", ""]}
    write(tmp_path / "A" / "original-0.parquet", table)
    twice = pq.read_table(tmp_path / "A" / "original-0.parquet")
    twice = twice.append_column("neg_text", twice["neg_text"])
    pq.write_table(twice, tmp_path / "A" / "original-0.parquet")
    with pytest.raises(InputError, match="original-0.parquet: several columns neg_text"):
        data.read_pairs(str(tmp_path))


def test_columns_are_read_however_they_are_stored(tmp_path):
    """Long strings, as polars writes them; and dictionaries, as pandas does for categories."""
    rows = []
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(LONG, TEXT)]
    with suppress(AttributeError, pyarrow.ArrowNotImplementedError):  # of newer pyarrow
        pyarrow.array(["x"]).cast(pyarrow.string_view())
        kinds.append(pyarrow.string_view())
    for kind in kinds:
        one = {name: pyarrow.array(column).cast(kind) for name, column in TRAIN.items()}
        write(tmp_path / "A" / "original-0.parquet", one)
        rows.append(list(data.read_pairs(str(tmp_path))["A"]))
        for lists in (pyarrow.list_(kind), pyarrow.large_list(kind)):
            many = {}
            for name in EVAL:
                column = pyarrow.array(EVAL[name])
                many[name] = column.cast(lists if name.startswith("tgt") else kind)
            write(tmp_path / "A" / "test-0.parquet", many)
            (query, candidates) = data.read_tasks(str(tmp_path))[0].queries[0]
            equal([query.text, *(x.text for x in candidates)], ["q", "t", "u"], f"{lists}")
    assert all(row == rows[0] for row in rows)


def test_what_is_no_parquet_file_is_said(tmp_path, monkeypatch):
    """Text, nothing, a cut-off file, a folder, a pipe; and where pyarrow is missing, what to do."""
    file = tmp_path / "A" / "original-0.parquet"
    write(file, TRAIN)
    for content in (b"no parquet", b"", file.read_bytes()[:-9]):
        file.write_bytes(content)
        with pytest.raises(InputError, match="original-0.parquet: not a readable parquet file: "):
            data.read_pairs(str(tmp_path))
    file.unlink()
    for make in (os.mkdir, os.mkfifo):
        make(file)
        with pytest.raises(InputError, match="a list must be an ordinary file"):
            data.read_pairs(str(tmp_path))
        file.rename(tmp_path / make.__name__)
    write(file, TRAIN)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="MMEB's parquet files needs pyarrow: pip install pyarrow"):
        data.read_pairs(str(tmp_path))


def test_a_column_that_stands_twice_is_refused(tmp_path):
    """Which one would be read?"""
    names, columns = [*TRAIN, "qry"], [*TRAIN.values(), ["x", "y"]]
    table = pyarrow.Table.from_arrays([pyarrow.array(x) for x in columns], names)
    (tmp_path / "A").mkdir()
    pq.write_table(table, tmp_path / "A" / "original-0.parquet")
    with pytest.raises(InputError, match="several columns qry"):
        data.read_pairs(str(tmp_path))


def test_other_columns_are_let_be(tmp_path):
    """Nothing of them is read, so that the files of a set may differ in them."""
    for i in range(2):
        own = {f"own_{i}": pyarrow.array([i, "ab"[i]][i : i + 1] * 2)}
        write(tmp_path / "A" / f"original-{i}.parquet", {**TRAIN, **own})
    pairs = data.read_pairs(str(tmp_path))["A"]
    equal([pair.query.text for pair in pairs], ["q", "r", "q", "r"], "Table.load: columns")
    assert pairs.source.raw.load().column_names == list(TRAIN)


def test_other_files_are_other_data(tmp_path):
    """The digest is of all files of a set, and a subset takes as many rows as is said."""
    for i in range(2):
        write(tmp_path / "A" / f"original-{i}.parquet", TRAIN)
    sets = data.read_pairs(str(tmp_path))
    write(tmp_path / "A" / "original-0.parquet", {**TRAIN, "qry": ["quite another one" * 9, "r"]})
    assert checked_digest(sets.values()) != checked_digest(data.read_pairs(str(tmp_path)).values())
    assert len(sets["A"]) == len(list(sets["A"])) == 4
    few = data.read_pairs(str(tmp_path), subsets="A:3")["A"]
    assert len(few) == len(list(few)) == 3


def test_what_is_read_in_turn_is_what_is_read_one_by_one(tmp_path):
    """The first pass takes a range of rows at a time, wherever it begins."""
    names = [f"q{i}" for i in range(9)]
    long = {name: column[:1] * 9 for name, column in TRAIN.items()}
    write(tmp_path / "A" / "original-0.parquet", {**long, "qry": names})
    pairs = data.read_pairs(str(tmp_path))["A"]
    for indices in (range(0, 4), range(4, 9), range(7, 9)):
        got = [query.text for query, *_ in pairs.source.read(indices)]
        equal(got, [pairs[i].query.text for i in indices], f"{indices}")


def test_the_split_is_the_files_that_are_named_so(tmp_path):
    """MMEB-train has each set twice, with other instructions."""
    write(tmp_path / "A" / "original-0.parquet", TRAIN)
    write(tmp_path / "A" / "diverse_instruction-0.parquet", {**TRAIN, "qry": ["v", "w"]})
    for split, want in (("original", ["q", "r"]), ("diverse_instruction", ["v", "w"])):
        pairs = data.read_pairs(str(tmp_path), split=split)["A"]
        equal([pair.query.text for pair in pairs], want, split)


@pytest.mark.parametrize(
    ("texts", "paths", "want"),
    [
        (["n", ""], ["", "n.png"], [[("n", 0)], [("<image>", 1)]]),
        ([None, ""], ["n.png", ""], [[("<image>", 1)], []]),
        (["<|image_1|> n", "n"], ["n.png", None], [[("<image> n", 1)], [("n", 0)]]),
    ],
)
def test_a_negative_is_a_text_or_a_picture_or_both(place, texts, paths, want):
    """Either column may be empty or null in a row; where both are, it has no negative."""
    Image.new("RGB", (8, 8)).save(place / "n.png")
    negatives = {"neg_text": texts, "neg_image_path": paths}
    write(place / "neg" / "A" / "original-0.parquet", {**TRAIN, **negatives})
    pairs = data.read_pairs(str(place / "neg"), image_root=str(place))["A"]
    read = [[(x.text, len(x.images)) for x in pair.negatives] for pair in pairs]
    equal(read, want, "neg_text, neg_image_path")


def test_blanks_around_a_name_are_seen(tmp_path):
    """Of a picture, and of a column: lists made line by line keep the ends of lines. In a csv file
    one behind a comma means nothing."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    captions = tmp_path / "metadata.jsonl"
    captions.write_text('{"file_name": "a.png\\n", "text": "red"}\n')
    with pytest.raises(InputError, match=r"'a.png\\n': no such picture"):
        checked_digest([data.read_dialogues(str(tmp_path))])
    captions.unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text \na.png,red\n")
    with pytest.raises(InputError, match="it has 'file_name', 'text '"):
        data.read_dialogues(str(tmp_path))
    (tmp_path / "metadata.csv").write_text('file_name, text\na.png, "red, or blue"\na.png, x\n')
    texts = [turns[0][1] for _, turns, _ in data.read_dialogues(str(tmp_path))]
    equal(texts, ["red, or blue", "x"], "csv_rows: skipinitialspace")


@pytest.mark.parametrize("name", [".", "sub", "sub.png", "pipe.png", "/".join(["a"] * 900)])
def test_what_is_no_file_is_no_picture(place, name):
    """A folder, a pipe, a path of more folders than calls fit into each other: known before any
    training, as whatever is missing."""
    (place / "sub").mkdir()
    (place / "sub.png").mkdir()
    os.mkfifo(place / "pipe.png")
    pairs = jsonl(place, {**PAIR, "query": {"image": name}}, {**PAIR, "target": {"text": "z"}})
    with pytest.raises(InputError, match="line 1: .*no such picture"):
        checked_digest(data.read_pairs(pairs).values())
    link = place / "link.png"
    link.symlink_to(place / "a.png")
    pairs = jsonl(
        place, {**PAIR, "query": {"image": "link.png"}}, {**PAIR, "target": {"text": "z"}}
    )
    checked_digest(data.read_pairs(pairs).values())


def test_of_a_set_that_is_evaluated_only_what_is_scored_is_looked_up(tmp_path):
    """--limit and --subsets A:rows; the query's picture too, and the others are counted."""
    rows = {"qry_text": ["<|image_1|>"] * 3, "qry_img_path": ["a.png", "b.png", "c.png"]}
    rows.update(tgt_text=[["t", "u"]] * 3, tgt_img_path=[["", ""]] * 3)
    write(tmp_path / "A" / "test-0.parquet", rows)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"b.png: no such picture \(and 1 more are missing\)"):
        data.read_tasks(str(tmp_path))
    for words in ({"limit": 1}, {"subsets": "A:1"}, {"subsets": "A:1", "limit": 2}):
        (task,) = data.read_tasks(str(tmp_path), **words)
        equal(len(task.queries), 1, f"{words}")
        query, candidates = task.queries[0]
        equal([len(query.images), len(candidates)], [1, 2], "the query's own picture")


def test_files_of_one_set_are_read_in_the_order_of_their_names(tmp_path, monkeypatch):
    """In whatever order a disk lists them: a pair has the same number everywhere."""
    for part in "01":
        write(
            tmp_path / "A" / f"original-{part}.parquet", {**TRAIN, "qry": [f"{part}a", f"{part}b"]}
        )
    glob = Path.glob
    for backwards in (False, True):
        monkeypatch.setattr(Path, "glob", lambda *x, r=backwards: sorted(glob(*x), reverse=r))
        pairs = data.read_pairs(str(tmp_path))["A"]
        equal([x.query.text for x in pairs], ["0a", "0b", "1a", "1b"], "find_subsets")


def test_files_of_one_set_must_agree(tmp_path):
    """One has no negatives, the other has, and they would be dropped; whichever comes first, the
    columns are named."""
    negatives = {"neg_text": ["n", "n"], "neg_image_path": ["", ""]}
    says = "original-1.parquet: has other columns than .*original-0.parquet: neg_image_path, neg_t"
    for parts in ((TRAIN, {**TRAIN, **negatives}), ({**TRAIN, **negatives}, TRAIN)):
        for i, part in enumerate(parts):
            write(tmp_path / "A" / f"original-{i}.parquet", part)
        with pytest.raises(InputError, match=says):
            data.read_pairs(str(tmp_path))


def test_a_row_is_told_by_its_own_file(tmp_path):
    """Of several files the one, and the row in it."""
    write(tmp_path / "A" / "original-0.parquet", TRAIN)
    write(tmp_path / "A" / "original-1.parquet", {**TRAIN, "pos_text": ["t", ""]})
    with pytest.raises(InputError, match="original-1.parquet, row 2: "):
        data.read_pairs(str(tmp_path))
    for i in range(4):
        write(tmp_path / "B" / f"{i}.parquet", {name: x * (i + 1) for name, x in TRAIN.items()})
    table = Table(sorted((tmp_path / "B").iterdir()), Layout(tuple(TRAIN)))
    rows = [f"{tmp_path}/B/{i}.parquet, row {k + 1}" for i in range(4) for k in range(2 * i + 2)]
    equal([table.where(i) for i in range(len(table))], rows, "Table.where")


def test_a_copy_of_some_rows_has_all_of_their_columns(tmp_path):
    """Those that nobody here reads, too; and of no row it has the columns."""
    own = {**TRAIN, "own": [1.5, 2.5]}
    write(tmp_path / "a.parquet", own)
    table = Table([tmp_path / "a.parquet"], Layout(tuple(TRAIN)))
    for chosen in ([1], []):
        table.copy(chosen, tmp_path / "b.parquet")
        want = {name: [column[i] for i in chosen] for name, column in own.items()}
        equal(pq.read_table(tmp_path / "b.parquet").to_pydict(), want, f"{chosen}")


def test_missing_pictures_of_mmeb_are_known_before_training_and_scoring(tmp_path):
    """By a look-up of all names; of candidates too."""
    change = {"qry": ["<|image_1|> q", "r"], "qry_image_path": ["A/x.png", ""]}
    write(tmp_path / "A" / "original-0.parquet", {**TRAIN, **change})
    with pytest.raises(InputError, match=r"A/x.png: no such picture\. "):
        checked_digest(data.read_pairs(str(tmp_path)).values())
    change = {"tgt_text": [["t", "<|image_1|>"]], "tgt_img_path": [["", "A/y.png"]]}
    write(tmp_path / "A" / "test-0.parquet", {**EVAL, **change})
    with pytest.raises(InputError, match="A/y.png: no such picture"):
        data.read_tasks(str(tmp_path))


# ------------------------------------------------------------------------------------------ subsets


@pytest.mark.parametrize(
    "subsets, says",
    [
        ("C", "--subsets C: choose name or name:rows of A,B"),
        ("A:", "--subsets A:: choose"),
        ("A:0", "--subsets A:0: choose"),
        ("A:\u00b2", "--subsets A:\u00b2: choose"),
        ("A,,B", "--subsets A,,B: choose"),
        ("A:1" + "0" * 18, "--subsets A:10*: choose"),
        ("A:" + "9" * 5000, "--subsets A:999.*: choose"),
        ("A,B,A:3", "A stands twice"),
    ],
)
def test_bad_subsets_are_told_as_they_were_written(subsets, says):
    with pytest.raises(InputError, match=says):
        choose(subsets, ["A", "B"])
    assert choose("A:3, B", ["A", "B"]) == {"A": 3, "B": None}


def test_of_the_hub_the_lists_and_pictures_of_the_subsets_are_asked_for(tmp_path, monkeypatch):
    """Of each its own zip, and the one of all; without --subsets all there are."""
    for name in "AB":
        write(tmp_path / name / "test-0.parquet", EVAL)
    asked = []
    monkeypatch.setattr(mmeb, "fetch", lambda *words: asked.append(words) or str(tmp_path))
    for subsets, names in (("A:3, B", "AB"), ("", "*")):
        root, found = mmeb.find_subsets("org/name", subsets, "test-*.parquet")
        equal((root, sorted(found)), (tmp_path, ["A", "B"]), "what was fetched")
        zips = [f"images_zip/{name}.zip" for name in names] + ["images.zip"]
        lists = [f"{name}/test-*.parquet" for name in names]
        equal(asked.pop(), ("org/name", "dataset", zips, lists), "hub.fetch")


def test_a_part_of_mmeb_is_told_with_the_words_that_take_it(tmp_path):
    """--subsets mmeb20, where 2 of the 20 sets were downloaded."""
    for name in ("CIRR", "NIGHTS"):
        write(tmp_path / name / "original-0.parquet", TRAIN)
    with pytest.raises(InputError, match="lacks ImageNet_1K.*: --subsets CIRR:30000,NIGHTS:20000$"):
        data.read_pairs(str(tmp_path), subsets="mmeb20")
    assert sorted(data.read_pairs(str(tmp_path), subsets="CIRR:30000,NIGHTS:20000"))
    assert len(training_mix().split(",")) == 20


@pytest.mark.parametrize("hub", [False, True])
def test_mmeb20_takes_its_20_sets_with_their_caps_and_asks_the_hub_for_no_others(
    tmp_path, monkeypatch, hub
):
    """By their names in MMEB-train; a set of one's own beside them stays out."""
    mix = dict(word.split(":") for word in training_mix().split(","))
    for name in (*mix, "mine"):
        write(tmp_path / name / "original-0.parquet", TRAIN)
    asked = []
    monkeypatch.setattr(mmeb, "fetch", lambda *words: asked.append(words) or str(tmp_path))
    source = "org/name" if hub else str(tmp_path)
    _, found = mmeb.find_subsets(source, "mmeb20", "original-*.parquet")
    equal({name: str(rows) for name, (rows, _) in found.items()}, mix, "sets and caps")
    lists = [need for *_, need in asked]
    equal(lists, [[f"{name}/original-*.parquet" for name in mix]] if hub else [], "hub.fetch")


def test_the_mix_of_training_is_none_of_evaluation(tmp_path):
    """It said that ImageNet_1K was missing, which the eval folder calls ImageNet-1K, and the words
    that it told to take in its place left that set out, and had training's caps."""
    for name in ("ImageNet-1K", "CIRR"):
        write(tmp_path / name / "test-0.parquet", EVAL)
    with pytest.raises(InputError, match="--subsets mmeb20: the mix of training; leave it out"):
        data.read_tasks(str(tmp_path), subsets="mmeb20")


# -------------------------------------------------------------------- a loss that would say nothing


def test_a_list_whose_targets_are_all_one_is_refused(place):
    """Every target equals the query's own: there is no negative, and the loss is 0."""
    queries = [{**PAIR, "query": {"text": x}} for x in "abc"]
    one = data.read_pairs(jsonl(place, *queries))
    says = "line 1: every target of its list is the same, y: .*; add other pairs, or negatives$"
    with pytest.raises(InputError, match=says):
        checked_digest(one.values())
    queries[1]["target"] = {"text": "z"}
    checked_digest(data.read_pairs(jsonl(place, *queries)).values())
    with_negative = {**PAIR, "negatives": [{"text": "z"}]}
    checked_digest(data.read_pairs(jsonl(place, with_negative)).values())


def test_a_list_whose_queries_are_all_one_is_refused(place):
    """As where the pictures were forgotten: all targets are right for it, and the loss is 0."""
    pairs = [{**PAIR, "target": {"text": str(i)}} for i in range(3)]
    says = f"line 1: every query of its list is the same, <image> x {re.escape(str(place))}.a.png"
    with pytest.raises(InputError, match=says):
        checked_digest(data.read_pairs(jsonl(place, *pairs)).values())
    with pytest.raises(InputError, match="nothing to tell apart"):
        data.read_tasks(jsonl(place, *pairs))
    pairs.append({**pairs[0], "query": {"text": "another, behind two targets"}})
    checked_digest(data.read_pairs(jsonl(place, *pairs)).values())
    pairs[1]["negatives"] = [{"text": "z"}]
    checked_digest(data.read_pairs(jsonl(place, *pairs[:3])).values())


def test_one_such_list_among_others_is_said(tmp_path, capsys):
    """Its pairs have the other lists' targets as negatives."""
    write(tmp_path / "A" / "original-0.parquet", {**TRAIN, "pos_text": ["t", "t"]})
    write(tmp_path / "B" / "original-0.parquet", TRAIN)
    checked_digest(data.read_pairs(str(tmp_path)).values())
    assert "every target of its list is the same" in capsys.readouterr().out
    write(tmp_path / "B" / "original-0.parquet", {**TRAIN, "pos_text": ["u", "u"]})
    checked_digest(data.read_pairs(str(tmp_path)).values())
    assert capsys.readouterr().out.count("every target of its list is the same") == 2


@pytest.mark.parametrize(
    "files, texts, says",
    [
        (["a.png", "b.png"], ["a dog", "a cat"], []),
        (["a.png", "b.png"], ["a dog", "a dog"], ["target .* same, a dog", "query .* same, a dog"]),
        (["a.png", "a.png"], ["a dog", "a cat"], ["query .* same, /", "target .* same, /"]),
        (["a.png", "a.png"], ["a dog", "a dog"], ["target .* same, a dog", "target .* same, /"]),
    ],
)
def test_captions_that_leave_nothing_to_tell_apart_are_said(place, files, texts, says, capsys):
    """One caption for all pictures, one picture for all captions: each way by itself."""
    Image.new("RGB", (32, 32), "blue").save(place / "b.png")
    records = [{"file_name": f, "text": t} for f, t in zip(files, texts, strict=True)]
    jsonl(place, *records, name="metadata.jsonl")
    checked_digest(data.read_pairs(str(place)).values())
    said = capsys.readouterr().out.splitlines()
    equal(
        [bool(re.search(s, line)) for s, line in zip(says, said, strict=True)],
        [True] * len(says),
        said,
    )


def test_a_batch_of_one_is_refused():
    """And the line says why: the flag's own description stands behind it."""
    with pytest.raises(InputError, match=r"--batch 1 must be 2 to .*\(.*; 1 compares nothing\)"):
        contrastive.Config(batch=1, block=1)


# -------------------------------------------------------------------------------------- a long list


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"a": "1"}\n{"a": "2"}\n'),
        ("a.json", b'{"a": "1"}\n{"a": "2"}\n'),
        ("a.json", b'[{"a": "1"}, {"a": "2"}]'),
        ("a.csv", b'a\n1\n2\n'),
    ],
)  # fmt: skip
def test_a_list_begins_as_windows_programs_write_it(tmp_path, mark, content, name):
    """With the mark of UTF-8 or without; and JSON a line may be called .json, too."""
    (tmp_path / name).write_bytes(mark + content)
    found = open_lines(tmp_path / name)
    equal([parse_json(found.line(i)) for i in range(len(found))], [{"a": "1"}, {"a": "2"}], name)


def test_of_a_list_only_the_places_of_its_lines_are_kept(place):
    """20 bytes a line, blank ones are passed over; the digest is that of the lines' bytes, in their
    order."""
    path = place / "long.jsonl"
    line = json.dumps(PAIR).encode()
    path.write_bytes(b"\n".join([line, b"", b"  ", line]))
    found = open_lines(path)
    kept = (found.starts, found.sizes, found.numbers, found.checksums)
    equal(sum(x.itemsize for x in kept), 20, "bytes")
    equal([len(found), found.where(1)], [2, f"{path}, line 4"], "Lines")
    equal(found.line(1), line, "read when asked for")
    equal(found.digest, zlib.crc32(line + b"\n" + line), "of the bytes")
    other = json.dumps({**PAIR, "id": "2"}).encode()
    (place / "one.jsonl").write_bytes(line + b"\n" + other + b"\n")
    (place / "turned.jsonl").write_bytes(other + b"\n" + line + b"\n")
    one, turned = open_lines(place / "one.jsonl"), open_lines(place / "turned.jsonl")
    equal(one.digest == turned.digest, False, "of their order")
    copy = io.BytesIO()
    found.copy([1, 0], copy)
    equal(copy.getvalue(), (line + b"\n") * 2, "each a whole line, the last one too")


def test_a_long_list_is_tried_in_worker_processes_and_the_first_bad_line_is_named(
    place, monkeypatch
):
    """The same line as without workers; lost pictures are counted over all workers."""
    asked = []

    def prefetch(make, jobs, workers):
        asked.append(workers)
        return ahead(make, jobs, workers)

    ahead = first_pass.prefetch
    monkeypatch.setattr(first_pass, "prefetch", prefetch)
    monkeypatch.setattr(first_pass, "FEW", 10)
    monkeypatch.setattr(first_pass, "WINDOW", 5)
    lost = {**PAIR, "query": {"text": "<image>", "image": "gone.png"}}
    path = jsonl(place, *[PAIR] * 12, lost, *[PAIR] * 7, lost)
    with pytest.raises(InputError, match=r"line 13: .*gone.png: no such picture \(and 1 m"):
        checked_digest(data.read_pairs(path).values())
    path = jsonl(place, *[PAIR] * 12, {"query": 1}, *[PAIR] * 7, {"target": 1})
    with pytest.raises(InputError, match='line 13: needs "query" and "target"'):
        data.read_pairs(path)
    data.read_pairs(jsonl(place, *[PAIR] * 10))
    assert asked[0] > 0 and asked[1] > 0 and asked[2] == 0, "a short list needs no processes"


def test_each_example_of_a_long_list_is_tried_by_one_worker(tmp_path, monkeypatch):
    """And by no other one: that every worker tried all of them took twice the time on two cores."""
    monkeypatch.setattr(first_pass, "FEW", 10)
    monkeypatch.setattr(first_pass, "WINDOW", 5)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)

    def read(indices):
        with open(tmp_path / "tried", "ab", buffering=0) as file:
            file.write("".join(f"{i}\n" for i in indices).encode())
        return iter(indices)

    source = Source(images=Images(tmp_path), read=read)
    tries = first_pass.Tries(source, frozenset(), lambda example: ((), ()))
    first_pass.first_pass("list", 58, tries)
    tried = sorted(map(int, (tmp_path / "tried").read_text().split()))
    equal(tried, list(range(58)), "each example")


def test_targets_of_two_parts_are_two_where_one_of_them_is_in_both():
    """A list whose second pair has the first one's target and a negative compares something."""
    one, two = first_pass.Tally(targets=frozenset([1])), first_pass.Tally(targets=frozenset([1, 2]))
    for joined in (one.join(two), two.join(one)):
        equal(joined.targets, {1, 2}, "Tally.join")


def test_one_evaluation_set_at_a_time_is_in_memory(tmp_path):
    """Candidates are made once within a set, and forgotten when the next set is read."""
    for name in "AB":
        write(tmp_path / name / "test-0.parquet", {k: x * 2 for k, x in EVAL.items()})
    first, second = data.read_tasks(str(tmp_path))
    (_, one), (_, two) = first.queries
    assert one[0] is two[0] == Item("t")
    second.queries[0]
    (_, three) = first.queries[0]
    assert three[0] == one[0] and three[0] is not one[0]
    equal(last_loaded.cache_info().currsize, 1, "tables in memory")
    equal(contents_of.cache_info().currsize, 1, "sets whose contents are in memory")
    rows = eval_rows([tmp_path / "A" / "test-0.parquet"], "A", Images(tmp_path))
    assert rows[0][1][0] is rows[1][1][0], "contents_of"


@pytest.mark.parametrize("stage", [pretrain, contrastive, evaluate])
def test_a_bad_list_is_told_before_a_model_is_loaded(stage, tmp_path, monkeypatch):
    """A large one takes minutes."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no JSON\n")
    monkeypatch.setattr(stage, "load_for", lambda *_: 1 / 0)
    out = {} if stage is evaluate else {"out": str(tmp_path / "out")}
    with pytest.raises(InputError, match="bad.jsonl"):
        stage.main(stage.Config(model="toy-random", data=str(bad), **out))


def test_lists_of_nothing_are_lists_of_texts_that_are_not_there(tmp_path):
    """Candidates without a picture: parquet's writers have a type of its own for such a list."""
    paths = pyarrow.array([[None, None]])
    equal(str(paths.type.value_type), "null", "pyarrow")
    write(tmp_path / "A" / "test-0.parquet", {**EVAL, "tgt_img_path": paths})
    (_, candidates) = data.read_tasks(str(tmp_path))[0].queries[0]
    equal([(x.text, x.images) for x in candidates], [("t", ()), ("u", ())], "Layout.kind_of")


def test_a_picture_that_is_nowhere_is_lost_once_however_often_it_is_named(tmp_path):
    """By a query and by a candidate, with other words: not "(and 1 more are missing)"."""
    change = {"qry_text": ["<|image_1|> q"], "qry_img_path": ["A/y.png"]}
    change |= {"tgt_text": [["<|image_1|>", "u"]], "tgt_img_path": [["A/y.png", ""]]}
    write(tmp_path / "A" / "test-0.parquet", {**EVAL, **change})
    with pytest.raises(InputError, match=r"A/y.png: no such picture\. Is"):
        data.read_tasks(str(tmp_path))
