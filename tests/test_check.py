"""`python -m tools.check`: what its report counts, which status ends it, where it finds pictures.
(What is bad in real lists, and their clean copies: test_tools.py; --list-bad: test_skip_bad.py.)"""

import json
import zipfile

import pyarrow
import pyarrow.parquet as pq
import pytest
from checks import equal, expect
from PIL import Image

from plumbing.errors import InputError
from plumbing.images import open_image
from tools import check


def listed(path, *pairs) -> str:
    """A list of pairs: of each the query's text and its picture, if it has one."""
    lines = []
    for text, *pictures in pairs:
        lines.append(json.dumps({"query": {"text": text, "image": pictures}, "target": TARGET}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


TARGET = {"text": "one two three four"}


# --------------------------------------------------------------------------------------- the report


def test_the_report_counts_words_and_sorts_pictures_by_their_pixels(tmp_path, capsys):
    """A picture's mark is no word; 50 x 4 is less than 10 x 30."""
    for name, size in (("a", (10, 30)), ("b", (20, 20)), ("c", (50, 4))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    pairs = [("<image> x", "a.png"), ("<image>", "b.png"), ("<image> x y z a b", "c.png")]
    equal(check.main([listed(tmp_path / "p.jsonl", *pairs)]), 0, "all are good")
    said = capsys.readouterr().out
    expect("  texts     6: 0 to 5 words, median 4\n" in said, said, "0, 1, 5 and three times 4", "")
    expect("  pictures  3: 50 x 4 to 20 x 20 pixels\n" in said, said, "200 to 400 pixels", "report")


def test_the_words_of_captions_and_of_turns_are_counted(tmp_path, capsys):
    """A caption; of a dialogue what stands beside the picture, and each question and answer."""
    Image.new("RGB", (10, 30)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one two three"}\n')
    equal(check.main([str(tmp_path)]), 0, "a good caption")
    said = capsys.readouterr().out
    expect("  texts     1: 3 to 3 words, median 3\n" in said, said, "three", "parse_captioned")
    turns = [("human", "<image>\nwhat is it?"), ("gpt", "a dog")]
    talk = [{"from": who, "value": text} for who, text in turns]
    (tmp_path / "d.jsonl").write_text(json.dumps({"image": "a.png", "conversations": talk}) + "\n")
    equal(check.main([str(tmp_path / "d.jsonl")]), 0, "a good dialogue")
    said = capsys.readouterr().out
    expect("  texts     3: 0 to 3 words, median 2\n" in said, said, "0, 3, 2", "parse_talk")


def test_twenty_errors_are_shown_and_the_others_counted(tmp_path, capsys):
    """Of pictures that are nowhere one, in front: it may be the cause of all of them."""
    path = tmp_path / "p.jsonl"
    good = listed(path, *[("<image>", f"{i}.png") for i in range(5)], ("x",))
    path.write_text("{\n" * 22 + path.read_text())
    equal(check.main([good]), 1, "27 are bad")
    said = capsys.readouterr().out.splitlines()
    bad = [line for line in said if line.startswith("  bad: ")]
    equal(len(bad), 20, "shown")
    expect(bad[0].endswith("(so it is with 4 more)"), bad[0], "the lost pictures", "first_of_each")
    expect("  and 3 more" in said, said, "22 and 1, of which 20 are shown", "report")
    expect("28 examples, 27 bad" in said, said, "all of them", "check")


def test_of_twenty_errors_no_other_is_left(tmp_path, capsys):
    """As many as are shown."""
    path = tmp_path / "p.jsonl"
    good = listed(path, ("x",))
    path.write_text("{\n" * 20 + path.read_text())
    check.main([good])
    said = capsys.readouterr().out
    equal((said.count("  bad: "), said.count(" more")), (20, 0), f"all of them: {said}")


def test_of_one_lost_picture_no_other_is_said_to_be_lost(tmp_path, capsys):
    """ "So it is with 0 more" would say nothing."""
    equal(check.main([listed(tmp_path / "p.jsonl", ("<image>", "a.png"), ("x",))]), 1, "one is bad")
    said = capsys.readouterr().out
    expect("a.png: no such picture" in said and "more" not in said, said, "once", "first_of_each")


def test_a_list_without_a_good_line_is_told_as_what_it_was_meant_to_be(tmp_path, capsys):
    """Dialogues that all have one mistake are no pairs."""
    talk = {"image": "a.png", "video": "x", "conversations": [{"from": "human", "value": "q"}]}
    for record, says in ((talk, 'unknown key "video"'), ({"query": "a"}, 'needs "query" and')):
        path = tmp_path / "p.jsonl"
        path.write_text(json.dumps(record) + "\n")
        equal(check.main([str(path)]), 1, "bad")
        said = capsys.readouterr().out
        expect(f"line 1: {says}" in said, said, says, "check.read_list")
    path.write_text("[1]\n{\n")
    equal(check.main([str(path)]), 1, "no object at all")


def test_a_table_without_rows_and_a_folder_of_tables_are_said_to_be_so(tmp_path, capsys):
    """As training says it: one set of the folder alone, or a set with nothing in it."""
    (tmp_path / "set").mkdir()
    rows = dict.fromkeys(("qry", "qry_image_path", "pos_text", "pos_image_path"), [])
    schema = pyarrow.schema([(name, pyarrow.string()) for name in rows])
    pq.write_table(pyarrow.table(rows, schema), tmp_path / "set" / "original-0.parquet")
    equal(check.main([str(tmp_path)]), 1, "none is good")
    said = capsys.readouterr().out
    expect("  bad: " in said and "original-0.parquet: holds no rows" in said, said, "why", "")
    with pytest.raises(InputError, match="one subset of MMEB; .* check read the folder that holds"):
        check.main([str(tmp_path / "set")])


def test_the_place_of_a_bad_line_is_said_once(tmp_path, capsys):
    """Most errors bring it with them; one of a picture does not."""
    path = listed(tmp_path / "p.jsonl", ("a",))
    (tmp_path / "p.jsonl").write_text((tmp_path / "p.jsonl").read_text() + "{broken\n")
    equal(check.main([path]), 1, "the second is bad")
    said = capsys.readouterr().out
    equal(said.count(f"{path}, line 2"), 1, said)


def test_a_broken_picture_is_an_error_of_each_example_that_shows_it(tmp_path):
    """It is opened once; a copy that kept the second of them would end a training."""
    (tmp_path / "a.png").write_bytes(b"no picture")
    path = listed(tmp_path / "p.jsonl", ("<image>", "a.png"), ("<image> x", "a.png"), ("y",))
    survey = check.Survey(path, check.read_list(path, None))
    equal((sorted(survey.errors), survey.good), ([0, 1], [2]), "both")
    for _ in range(2):
        with pytest.raises(InputError, match="not a readable picture"):
            survey.measure(str(tmp_path / "a.png"))


def test_each_picture_of_an_example_is_opened(tmp_path):
    """Of an example with two, the last one too."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    path = listed(tmp_path / "p.jsonl", ("<image> <image>", "a.png", "b.png"), ("y",))
    survey = check.Survey(path, check.read_list(path, None))
    equal((sorted(survey.errors), survey.good), ([0], [1]), "Survey.look_at")


def test_a_picture_in_a_zip_file_is_opened_there(tmp_path, capsys):
    """One of the hub's: it is no PNG of a path, whose checksums are looked at again."""
    mmeb(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    (tmp_path / "a.png").unlink()
    equal(check.main([str(tmp_path)]), 0, "it is good")
    said = capsys.readouterr().out
    expect("  pictures  1: 32 x 32 to" in said, said, "its size", "refuse_damaged_png")


def test_a_png_that_is_damaged_in_the_middle_is_bad(tmp_path, capsys):
    """It has checksums, which Pillow does not look at when it decodes: what unpacks to some pixels
    was read as good. Here the checksum of the pixels is wrong. Other formats have none."""
    noise = Image.effect_noise((60, 60), 99)
    for name in ("a.png", "b.png", "c.jpg"):
        noise.save(tmp_path / name)
    content = bytearray((tmp_path / "b.png").read_bytes())
    content[-13] ^= 1  # the checksum's last byte; the last piece, IEND, has 12 bytes
    (tmp_path / "b.png").write_bytes(content)
    open_image(tmp_path / "b.png")  # without an error
    path = listed(
        tmp_path / "p.jsonl", *[("<image>", name) for name in ("a.png", "b.png", "c.jpg")]
    )
    equal(check.main([path]), 1, "one is bad")
    said = capsys.readouterr().out
    expect(
        "line 2: " in said and "b.png: is damaged or cut off: " in said, said, "its line", "measure"
    )
    expect("3 examples, 1 bad" in said, said, "and the others are good", "refuse_damaged_png")


def test_a_long_list_is_read_to_its_last_line(tmp_path, monkeypatch):
    """In windows; here of two lines, of which the last one is not full."""
    monkeypatch.setattr(check, "WINDOW", 2)
    for n in (4, 5):
        path = tmp_path / f"{n}.jsonl"
        listed(path, *[("x",)] * n)
        path.write_text(path.read_text().rsplit("\n", 2)[0] + "\n{\n")
        count = check.check(str(path))
        equal((count.total, count.bad), (n, 1), f"the last of {n} lines")


# --------------------------------------------------------------------------------------- the status


GOOD, BAD, USELESS = check.Count(3, 0), check.Count(3, 1), check.Count(0, 1, useless=True)


@pytest.mark.parametrize(
    ("count", "flags", "status"),
    [
        (GOOD, [], 0),
        (BAD, [], 1),
        (BAD, ["--clean", "c"], 0),
        (BAD, ["--list-bad", "l"], 0),
        (USELESS, ["--clean", "c"], 1),
        (USELESS, ["--list-bad", "l"], 1),
    ],
)
def test_the_status_is_1_where_something_is_bad_and_nothing_is_done_about_it(
    monkeypatch, count, flags, status
):
    """Or where a list is of no use, whatever is asked for."""
    monkeypatch.setattr(check, "check", lambda *_: count)
    equal(check.main(["data", *flags]), status, "main")


@pytest.mark.parametrize("flag", ["--clean", "--list-bad"])
def test_an_output_without_a_name_is_refused(tmp_path, flag):
    """`--clean "$GOOD"`, where the script has not set GOOD: status 0, and nothing was written."""
    path = listed(tmp_path / "p.jsonl", ("x",), ("<image>", "lost.png"))
    with pytest.raises(InputError, match=f"{flag} is empty; give the path of a file"):
        check.main([path, flag, ""])


def test_of_several_lists_all_count_and_one_of_no_use_is_enough(tmp_path, monkeypatch, capsys):
    """As where a folder holds a file that is cut off."""

    def cut_off():
        raise InputError("cut off")

    lists = [("cut", cut_off), *[(name, None) for name in "ab"]]
    of_list = check.check_list
    counts = {"a": check.Count(3, 2), "b": check.Count(5, 0)}
    monkeypatch.setattr(check, "lists_of", lambda *_: lists)
    monkeypatch.setattr(check, "refuse_outputs", lambda *_: None)
    monkeypatch.setattr(check, "check_list", lambda file, *x: counts.get(file) or of_list(file, *x))
    equal(check.check(str(tmp_path)), check.Count(8, 3, useless=True), "of all together")
    expect("8 examples, 3 bad\n" in capsys.readouterr().out, "", "the last line", "check")


# --------------------------------------------------------------------------------- where it looks


def captions(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')


def mmeb(folder):
    (folder / "birds").mkdir()
    row = dict(qry="", qry_image_path="a.png", pos_text="x", pos_image_path="")
    table = pyarrow.table({name: [text] for name, text in row.items()})
    pq.write_table(table, folder / "birds" / "original-0.parquet")


def test_a_bad_one_of_a_csv_or_an_array_is_one_bad_example(tmp_path, capsys):
    """A comma that lacks its quotes, a key that stands twice, a number of 5,000 digits: the copy
    has all others."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    rows = ["file_name,text", "a.png,one", "a.png,two, and a half", "a.png,three"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    equal(check.main([str(tmp_path), "--clean", str(tmp_path / "c")]), 0, "a clean copy")
    copy = (tmp_path / "c" / "metadata.jsonl").read_text().splitlines()
    equal([json.loads(line)["text"] for line in copy], ["one", "three"], "its captions")
    assert "metadata.csv, line 3: has more fields than" in capsys.readouterr().out
    pairs = [json.dumps({"query": {"text": x}, "target": TARGET}, indent=1) for x in "abcd"]
    pairs[1] = pairs[1].replace('"target"', '"query": {"text": "x"}, "target"')
    pairs[2] = pairs[2].replace('"target"', f'"id": {"9" * 5000}, "target"')
    (tmp_path / "p.json").write_text("[" + ",\r\n".join(pairs) + "]")
    clean = tmp_path / "p.jsonl"
    equal(check.main([str(tmp_path / "p.json"), "--clean", str(clean)]), 0, "a clean copy")
    queries = [json.loads(line)["query"]["text"] for line in clean.read_text().splitlines()]
    equal(queries, ["a", "d"], "its queries")
    said = capsys.readouterr().out
    assert 'p.json, example 2: "query" stands twice' in said, said
    assert "p.json, example 3: " in said and "4 examples, 2 bad" in said, said


def test_what_training_refuses_of_a_folder_is_bad(tmp_path, capsys):
    """A set of which a part is missing, one that is a link to nowhere; a file that macOS leaves
    beside another is none of them."""
    mmeb(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    whole = tmp_path / "birds" / "original-0.parquet"
    (tmp_path / "birds" / "._original-0.parquet").write_bytes(b"macOS")
    equal(check.main([str(tmp_path)]), 0, "one example, and it is good")
    whole.rename(whole.with_name("original-00001-of-00002.parquet"))
    equal(check.main([str(tmp_path)]), 1, "a part is missing")
    said = capsys.readouterr().out
    assert "birds: holds original-00001-of-00002.parquet, no whole set" in said, said
    (tmp_path / "fish").symlink_to("nowhere")
    with pytest.raises(InputError, match="fish: is a symbolic link to nowhere"):
        check.main([str(tmp_path)])


def test_one_set_for_both_is_two_lists(tmp_path):
    """Rows for training and for evaluation, side by side: each in parts of its own."""
    mmeb(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    plain = tmp_path / "birds" / "original-0.parquet"
    plain.rename(plain.with_name("original-00000-of-00001.parquet"))
    row = dict(qry_text=["q"], qry_img_path=[""], tgt_text=[["t", "u"]], tgt_img_path=[["", ""]])
    pq.write_table(pyarrow.table(row), tmp_path / "birds" / "test-00000-of-00001.parquet")
    equal(check.main([str(tmp_path)]), 0, "both are whole")


def test_a_damaged_sets_json_is_told_before_anything_is_read(tmp_path, capsys):
    """Its kinds belong into the copy."""
    mmeb(tmp_path)
    (tmp_path / "sets.json").write_text('{"birds": {}, "birds": {}}')
    with pytest.raises(InputError, match='sets.json: .*"birds" stands twice'):
        check.main([str(tmp_path), "--clean", str(tmp_path / "clean")])
    equal(capsys.readouterr().out, "", "nothing is read")


def test_a_clean_copy_makes_no_second_list_of_captions(tmp_path):
    """Of a folder with metadata.csv the copy is metadata.jsonl; beside the first no command would
    read either."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,red\n")
    with pytest.raises(InputError, match=r"metadata.csv is beside it.*take another"):
        check.check(str(tmp_path), outputs=check.Outputs(clean=str(tmp_path)))
    equal(sorted(x.name for x in tmp_path.iterdir()), ["a.png", "metadata.csv"], "as it was")


def test_a_clean_copy_of_captions_is_made_anew(tmp_path):
    """The same command once more: the list of captions in its place is the copy itself."""
    for name in ("data", "copy"):
        (tmp_path / name).mkdir()
    captions(tmp_path / "data")
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "a.png")
    for time in ("first", "second"):
        words = [str(tmp_path / "data"), "--clean", str(tmp_path / "copy")]
        equal(check.main(words), 0, time)
    equal([x.name for x in (tmp_path / "copy").iterdir()], ["metadata.jsonl"], "the copy")


def test_the_copy_s_pictures_are_said_to_be_beside_the_list_or_in_the_folder(tmp_path, capsys):
    """Where no --image-root was given."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    path = listed(tmp_path / "p.jsonl", ("<image>", "a.png"))
    captions(tmp_path)
    for data, copy in ((path, "c.jsonl"), (str(tmp_path), "c")):
        equal(check.main([data, "--clean", str(tmp_path / copy)]), 0, data)
        said = capsys.readouterr().out
        expect(f"0 bad; --image-root {tmp_path}\n" in said, said, tmp_path, "what reads the copy")


@pytest.mark.parametrize("make", [captions, mmeb])
def test_pictures_may_lie_elsewhere(tmp_path, make, capsys):
    """--image-root, of a folder too; the copy is read with the same one, as a shell takes it."""
    data, pictures = tmp_path / "data", tmp_path / "my pictures"
    data.mkdir(), pictures.mkdir()
    make(data)
    Image.new("RGB", (32, 32)).save(pictures / "a.png")
    equal(check.main([str(data)]), 1, "it is not in the folder")
    words = [str(data), "--image-root", str(pictures)]
    equal(check.main(words), 0, "it is there")
    equal(check.main([*words, "--clean", str(tmp_path / "c")]), 0, "it is there")
    said = capsys.readouterr().out
    expect(f"0 bad; --image-root '{pictures}'\n" in said, said, pictures, "what reads the copy")
