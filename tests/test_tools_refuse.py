"""What the tools refuse: outputs that are somebody's, questions that are none, places that are no
folder, files that are no command. (Mining: test_mine.py; searching: test_search.py.)"""

import json
import re
import runpy
from pathlib import Path

import pytest
from checks import equal
from PIL import Image

import data
import model
from plumbing.errors import InputError
from tools import check, conversations, export, figures
from tools import generate as generator
from tools.sentence_transformers_folder import save_sentence_transformers

DIALOGUE = conversations.as_conversations("a.png", "a.png", [("what?", "a dog")])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a picture in a folder, and three questions."""
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    Image.new("RGB", (40, 40), "red").save("p/a.png")
    Path("q.txt").write_text("what?\nwhere?\nwhy?\n")
    return tmp_path


def generate(*words):
    """`python -m tools.generate` about the picture, which must end before a model is loaded."""
    return generator.main(["--images", "p", "--model", "toy", "--questions", "q.txt", *words])


@pytest.mark.parametrize("name", ["images", "out", "model"])
def test_what_a_generator_cannot_do_without_is_asked_for_by_its_name(place, name):
    """A server would be asked about each picture by a model without a name."""
    words = ["--images", "p", "--out", "t.jsonl", "--model", "m", "--server", "http://localhost:1"]
    words[words.index(f"--{name}") + 1] = ""
    with pytest.raises(InputError, match=f"--{name} is missing: "):
        generator.main(words)


# ----------------------------------------------------------------------------- where it would go on


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"image": "a.png"}, 'it has no "conversations", a list'),
        ({"image": "a.png", "error": "InputError: x"}, 'it has no "conversations"'),
        ({**DIALOGUE, "image": 5}, 'it has no "image", the path of one'),
        ({**DIALOGUE, "image": ""}, 'it has no "image"'),
        ({**DIALOGUE, "conversations": "talk"}, 'it has no "conversations"'),
        ({**DIALOGUE, "conversations": []}, 'it has no "conversations"'),
        ({**DIALOGUE, "conversations": DIALOGUE["conversations"][:1]}, 'it has no "conversations"'),
        ({**DIALOGUE, "conversations": [1, 2]}, 'conversations[0] must have "from": "human"'),
        ({"query": {"text": "x"}, "target": {"text": "y"}, "image": "a.png"}, 'it has no "conv'),
        (["image"], 'it has no "image"'),
    ],
)
@pytest.mark.parametrize("ending", ["\n", ""])
def test_a_list_of_anything_else_is_no_earlier_run(place, line, says, ending):
    """Its lines counted as done, and dialogues were written behind them."""
    text = json.dumps(DIALOGUE) + "\n" + json.dumps(line) + ending
    Path("out.jsonl").write_text(text)
    says = "--out out.jsonl: line 2 is no dialogue of an earlier run: " + says
    with pytest.raises(InputError, match=re.escape(says)):
        generate("--out", "out.jsonl")
    equal(Path("out.jsonl").read_text(), text, "it stays")


def test_the_list_of_what_failed_is_not_gone_on_with(place):
    """OUT.failed.jsonl, by a slip of the completion key."""
    generator.list_failures({"a.png": "InputError: x"}, Path("out.jsonl.failed.jsonl"))
    with pytest.raises(InputError, match="line 1 is no dialogue of an earlier run"):
        generate("--out", "out.jsonl.failed.jsonl")


def test_a_file_of_ones_own_is_not_replaced_by_the_list_of_what_failed(place):
    """It was removed, whatever it held, where nothing failed."""
    Path("out.jsonl.failed.jsonl").write_text(json.dumps(DIALOGUE) + "\n")
    with pytest.raises(
        InputError, match="out.jsonl.failed.jsonl: is there already, and is no list"
    ):
        generate("--out", "out.jsonl")
    equal(json.loads(Path("out.jsonl.failed.jsonl").read_text()), DIALOGUE, "it stays")


@pytest.mark.parametrize("size", [1, 8, 20, -1, 0])
def test_what_an_earlier_run_wrote_is_done_but_for_a_line_that_was_cut_off(place, size):
    """0: the line is whole; -1: all but its brackets' end. What is added begins a line."""
    out = Path("out.jsonl")
    first, second = (json.dumps({**DIALOGUE, "image": name}) for name in ("a.png", "b.png"))
    out.write_text(f"{first}\n{second[:size] if size else second}")
    equal(generator.read_done(out), {"a.png"} if size else {"a.png", "b.png"}, f"{size}")
    generator.append_whole(out, generator.line_of("c.png", [("what?", "a dog")]), "--out")
    images = [json.loads(line)["image"] for line in out.read_text().splitlines()]
    equal(images, ["a.png", "c.png"] if size else ["a.png", "b.png", "c.png"], f"{size}")


@pytest.mark.parametrize("out", ["out.csv", "out.json", "out"])
def test_dialogues_are_lines_of_json_and_are_called_so(place, out):
    """Of a .csv that holds them pretrain says that it is none."""
    with pytest.raises(InputError, match=f"--out {out}: .*end it with .jsonl"):
        generate("--out", out)
    assert not Path(out).exists()


@pytest.mark.parametrize("name", ["good.csv", "good.json"])
def test_the_copy_of_a_list_is_called_what_it_is(place, name):
    """`tools.check --clean good.csv`: lines of JSON, in good.jsonl."""
    Path("talks.jsonl").write_text(json.dumps(DIALOGUE) + "\n")
    check.main(["talks.jsonl", "--image-root", "p", "--clean", name])
    assert not Path(name).exists()
    equal(len(data.read_dialogues("good.jsonl", "p")), 1, "read by its ending")


# ------------------------------------------------------------------------------------ the questions


@pytest.mark.parametrize(
    ("line", "mark"),
    [
        ("<image>", "<image>"),
        ("<image> <image>", "<image>"),
        ("what is in <image>?", "<image>"),
        ("<|im_end|>", "<|im_end|>"),
        ("what is it?<|im_end|>", "<|im_end|>"),
        ("<|image_1|> what is it?", "<|image_1|>"),
    ],
)
def test_a_question_with_a_mark_is_refused_with_its_line(place, line, mark):
    """The mark was taken out, and a blank question written, which no training reads."""
    Path("q.txt").write_text(f"what?\n\nwhere?\n{line}\nwhy?\n")
    with pytest.raises(InputError, match=re.escape(f"--questions q.txt, line 4: has {mark}, ")):
        generate("--out", "out.jsonl")


@pytest.mark.parametrize("question", ["<image>", "<|im_end|>", "<image> <image>"])
def test_a_question_of_a_model_that_is_only_a_mark_is_none(question):
    """It fails, as an answer of that kind does."""
    talk = generator.interview()
    next(talk)
    with pytest.raises(InputError, match="no question|template's own token"):
        talk.send(f"1. {question}\n2. b?\n3. c?")


# ------------------------------------------------------------------------------- a folder of files


@pytest.mark.parametrize("write", [lambda x: export.main([x]), figures.draw])
@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("", "DIR is empty; name a folder"),
        (" ", "DIR is empty; name a folder"),
        ("q.txt", "DIR q.txt: is no folder; name one"),
        ("gone", "DIR gone: is no folder; name one"),
        ("q.txt/x", "not written"),
    ],
)
def test_what_writes_into_no_folder_is_one_line(place, folder, says, write):
    """Of an empty name export was a traceback, and figures were drawn into the working folder; of a
    file both said "not written: File exists"."""
    Path("gone").symlink_to("nowhere")
    before = sorted(place.rglob("*"))
    with pytest.raises(InputError, match=says):
        write(folder)
    equal(sorted(place.rglob("*")), before, "nothing is written")


@pytest.mark.parametrize("taken", ["captions", "images", "MMEB-train", "pairs.jsonl"])
def test_an_export_that_meets_what_is_in_its_way_is_one_line(place, taken):
    """A file where its folder goes, a folder where its list goes."""
    Path("toy").mkdir()
    Path("toy", export.README).write_text(export.TITLE)
    Path("toy", taken).mkdir() if taken.endswith("l") else Path("toy", taken).write_text("mine")
    with pytest.raises(InputError, match=f"{taken}.*: .*(not written|a folder)"):
        export.main(["toy", "--examples", "1"])


def test_positions_that_sentence_transformers_cannot_make_are_no_export(tmp_path):
    """Its vectors would be others: it asks a Qwen for M-RoPE's, and vlm2vec's are in a row."""
    embedder = model.load("toy-random", prompt="vlm2vec", device="cpu")
    with pytest.raises(InputError, match="has no sequential positions"):
        save_sentence_transformers(embedder, tmp_path / "out")
    equal((tmp_path / "out").exists(), False, "nothing is written")


# ------------------------------------------------------------------------------------- no commands

ROOM = Path(export.__file__).parent
LIBRARY = [
    path.name
    for path in sorted(ROOM.glob("*.py"))
    if not path.name.startswith("__") and "\ndef main(" not in path.read_text()
]


@pytest.mark.parametrize("name", LIBRARY)
def test_a_file_that_is_no_command_says_who_imports_it(name):
    """`python -m tools.pictures` ended without a word, as if it had done something."""
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOM / name), run_name="__main__")
    assert str(end.value).startswith(f"tools/{name} has no commands: "), end.value
    importers = re.findall(r"[\w/]+\.py", str(end.value))[1:]
    assert importers, end.value
    for file in importers:
        text = (ROOM.parent / file).read_text()
        assert re.search(rf"(tools\.|from tools import .*){name[:-3]}\b", text), f"{file}: {name}"
