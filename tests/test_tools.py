"""The tools: generate against servers that misbehave, check, captions, look, export, merge."""

import base64
import io
import json
import re
import resource
import runpy
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import change, close, equal
from PIL import Image
from safetensors.torch import load_file

import data
import model
from plumbing.config import TrainingFlags
from plumbing.errors import InputError
from plumbing.formats import DESCRIBE, IMAGE, checked_digest
from plumbing.images import open_image
from tools import (
    check,
    compare_logs,
    condense,
    explain,
    export,
    figures,
    lessons,
    look,
    merge,
    mine,
    search,
)
from tools import generate as generator
from toy.world import META_TASK, NUMBERS, Scene, Shapes

HELP = {  # of each command what reads its command line, and a word of its help
    "look": (look.main, "--help"),
    "check": (check.main, "--clean"),
    "generate": (generator.main, "--server"),
    "export": (export.main, "DIR"),
    "merge": (merge.main, "--export"),
    "search": (search.Config.parse, "--query-image"),
    "explain": (explain.main, "--no-compress"),
    "figures": (figures.main, "--model"),
    "compare_logs": (compare_logs.main, "REFERENCE"),
    "mine": (mine.main, "--first"),
    "condense": (condense.Config.parse, "--condense-share"),
    "lessons": (lessons.Config.parse, "--question-first"),
}
QUESTIONS = "how many objects are there?\nwhat is at the top left?\nwhat is at the top right?\n"


def scene(i) -> Scene:
    """The picture of a toy dialogue."""
    (_, (scene,)), *_ = Shapes().dialogue(i)
    return scene


def pictures(folder, n=6):
    """A folder of toy pictures."""
    folder.mkdir()
    for i in range(n):
        scene(i).render().save(folder / f"{i}.png")
    return folder


def generate(*words):
    """The exit status of `python -m tools.generate`."""
    return generator.main([str(word) for word in words])


def checked(*words):
    """The exit status of `python -m tools.check`."""
    return check.main([str(word) for word in words])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------- the interview


def play(talk, *replies):
    """Sends the replies. -> (the chats that were asked, the turns)."""
    asked = [next(talk)]
    try:
        for reply in replies:
            asked.append(list(talk.send(reply)))
    except StopIteration as end:
        return asked, end.value
    raise AssertionError("the interview wants more replies")


def test_an_interview_asks_for_questions_then_answers_them_in_one_conversation():
    """Numbered lines in several spellings; every answer sees the turns before it."""
    talk = generator.interview()
    reply = "Here they are:\n1. What is it?\n 2) Where?\n3: How many?\n"
    asked, turns = play(talk, reply, "a dog", "here", " one ")
    assert turns == [("What is it?", "a dog"), ("Where?", "here"), ("How many?", "one")]
    assert asked[0] == [("user", generator.ASK_FOR_QUESTIONS)]
    chat = [("user", "What is it?"), ("assistant", "a dog"), ("user", "Where?")]
    assert asked[2] == chat, asked[2]


@pytest.mark.parametrize(
    "replies", [["I see a dog."], ["1. a?\n2. b?"], ["1. a?\n2. b?\n3. c?", "x", "  "]]
)
def test_a_reply_of_no_use_is_an_error_and_no_answer(replies):
    """No questions, too few of them, an empty answer."""
    with pytest.raises(InputError):
        play(generator.interview(), *replies)


def test_a_reply_cannot_smuggle_in_a_picture():
    """`<image>` in a question or an answer would ask for a picture that is not there."""
    replies = f"1. a {IMAGE}?\n2. b?\n3. c?", f"x {IMAGE}", "y", "z"
    _, turns = play(generator.interview(), *replies)
    assert IMAGE not in str(turns), turns


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("see <im<image>age> there", "more than|<image>"),
        ("a smile \ud83d", "surrogates not allowed"),
        ("x" * 2**24, "longer than 16 MB"),
    ],
)
def test_what_training_would_refuse_is_no_dialogue(answer, says):
    """Nor would a second run go on after it: OUT is a list that stage 1 reads, line by line."""
    refused = generator.line_of("a.png", [("what?", "a dog"), ("where?", answer)])
    assert isinstance(refused, InputError) and re.search(says, str(refused)), refused
    line = generator.line_of("a.png", [("what?", "a smile \U0001f431")])
    equal(generator.picture_of(line), "a.png", "line_of")


def test_mmebs_mark_is_taken_out_of_a_reply():
    """Training reads it as a picture's place."""
    equal(generator.checked_text("see <|image_1|> there", "answer"), "see  there", "checked_text")


def test_a_picture_that_training_would_not_find_is_refused_before_any_is_asked_about(tmp_path):
    """A link that leads out of the folder: its dialogue could not be trained on."""
    folder = pictures(tmp_path / "p")
    (tmp_path / "elsewhere.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "linked.png").symlink_to("../elsewhere.png")
    flags = ["--images", folder, "--model", "toy", "--out", tmp_path / "d.jsonl", "--wait", 0]
    with pytest.raises(InputError, match="--images .*linked.png is a link that leads out of it"):
        generate(*flags)
    equal((tmp_path / "d.jsonl").exists(), False, "nothing is left of it")


def test_what_a_power_cut_leaves_behind_the_last_line_is_cut_off(tmp_path):
    """A tail of zero bytes, in the place of what was not written."""
    out = tmp_path / "d.jsonl"
    line = generator.line_of("a.png", [("what?", "a dog")])
    for tail in (b"\0" * 99, b'{"id": "b' + b"\0" * 99):
        out.write_bytes(line + tail)
        equal(generator.read_done(out), {"a.png"}, "read_done")
        equal(out.read_bytes(), line, "cut off")


# -------------------------------------------------------------------------- a model in this process


def test_the_toy_mllm_makes_dialogues_that_stage_1_reads(tmp_path, capsys):
    """With a file of questions; resumed; a broken picture is listed."""
    folder, out, asked = pictures(tmp_path / "p"), tmp_path / "d.jsonl", tmp_path / "q.txt"
    (folder / "broken.png").write_bytes(b"no picture")
    asked.write_text(QUESTIONS)
    flags = ["--images", folder, "--model", "toy", "--out", out, "--questions", asked]
    flags += ["--batch", 4, "--temperature", 0, "--wait", 0]
    generate(*flags)
    whole = out.read_bytes()
    talks = data.read_dialogues(str(out), str(folder))
    assert len(talks) == 6 and all(len(d.turns) == 3 for d in talks)
    right = 0
    for d in talks:
        shown = scene(int(d.id.split(".")[0]))
        for question, answer in d.turns:
            places = [p for p in ("top left", "top right") if p in question]
            right += answer == (shown.at(places[0]) if places else NUMBERS[len(shown.objects)])
    assert right >= 14, f"{right} of 18 answers of the toy MLLM are right"
    (failure,) = lines(tmp_path / "d.jsonl.failed.jsonl")
    assert failure["image"] == "broken.png" and "not a readable picture" in failure["error"]
    # Killed in the middle of a line: what was whole stays as it is, the rest is made again.
    first = whole.splitlines(True)
    out.write_bytes(b"".join(first[:3]) + first[3][:20])
    (folder / "broken.png").unlink()
    generate(*flags)
    assert "3 pictures to ask about, 3 are done" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"".join(first[:3]))
    assert sorted(lines(out), key=str) == sorted(map(json.loads, first), key=str)
    assert not (tmp_path / "d.jsonl.failed.jsonl").exists()


def test_a_reply_that_is_cut_off_fails(tmp_path):
    """Half a sentence is no training data."""
    folder, asked = pictures(tmp_path / "p", 2), tmp_path / "q.txt"
    asked.write_text("describe the picture.\nwhat is in the picture?\nhow many objects are there?")
    flags = ["--images", folder, "--model", "toy", "--out", tmp_path / "d.jsonl"]
    status = generate(*flags, "--questions", asked, "--max-tokens", 2, "--wait", 0)
    assert "cut off" in lines(tmp_path / "d.jsonl.failed.jsonl")[0]["error"]
    assert status == 1 and not (tmp_path / "d.jsonl").exists(), "nothing came of it"


@pytest.mark.parametrize(
    "reply", ["<|assistant|> a dog", " <|im_start|>assistant\na dog", "</s>x", "<start_of_turn>a",
              "[INST] a", "<think>a dog?</think> a dog"]
)  # fmt: skip
def test_a_reply_that_begins_with_a_templates_own_token_is_no_answer(reply):
    """The server and the model disagree about the template: that must not be learned."""
    with pytest.raises(InputError, match="begins with a template's own token"):
        play(generator.interview(["a?", "b?", "c?"]), "fine", reply, "fine")
    _, turns = play(generator.interview(["a?", "b?", "c?"]), "a < b", "<b>bold</b>", "<3")
    assert [answer for _, answer in turns] == ["a < b", "<b>bold</b>", "<3"], "negative control"


def test_a_model_that_cannot_reply_is_refused_before_the_first_picture(folder, tmp_path):
    """Its generation_config.json is of wrong types: one line, and not a failure a picture."""
    change(folder / "generation_config.json", eos_token_id="x")
    asked = tmp_path / "q.txt"
    asked.write_text(QUESTIONS)
    flags = ["--images", pictures(tmp_path / "p", 1), "--model", folder, "--questions", asked]
    with pytest.raises(InputError, match="another model: generation_config.json "):
        generate(*flags, "--out", tmp_path / "d.jsonl")


def test_a_model_that_writes_a_templates_token_first_makes_no_answer(tmp_path, monkeypatch):
    """In this process too, where decoding would hide the token."""
    folder, asked = pictures(tmp_path / "p", 1), tmp_path / "q.txt"
    asked.write_text(QUESTIONS)
    load = generator.load_mllm

    def load_and_spoil(*args):
        mllm, processor, has_adapter = load(*args)
        first = processor.tokenizer.convert_tokens_to_ids("<|assistant|>")
        make = mllm.generate

        def spoiled(**inputs):
            ids = make(**inputs)
            ids[:, inputs["input_ids"].shape[1]] = first
            return ids

        mllm.generate = spoiled
        return mllm, processor, has_adapter

    monkeypatch.setattr(generator, "load_mllm", load_and_spoil)
    flags = ["--images", folder, "--model", "toy", "--out", tmp_path / "d.jsonl", "--wait", 0]
    assert generate(*flags, "--questions", asked) == 1
    (failure,) = lines(tmp_path / "d.jsonl.failed.jsonl")
    assert "template's own token: <|assistant|>" in failure["error"], failure


def test_a_full_disk_costs_no_dialogue_that_is_there(tmp_path):
    """A line that does not fit is cut off again, and one line says so."""
    out, limit = tmp_path / "d.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    turns = [("what?", "a dog")]
    generator.append_whole(out, generator.line_of("0.png", turns), "--out")
    whole = out.read_bytes()
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else it would end the process
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limit[1]))
        with pytest.raises(InputError, match="--out .*d.jsonl: not written: .*stays as it was"):
            generator.append_whole(out, generator.line_of("1.png", turns), "--out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert out.read_bytes() == whole


def test_a_link_stays_one_where_nothing_came(tmp_path):
    """OUT on another disk: the empty file goes, and not the way to it."""
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "there.jsonl")
    with generator.alone(tmp_path / "out.jsonl"):
        assert (tmp_path / "there.jsonl").exists()
    assert (tmp_path / "out.jsonl").is_symlink() and not (tmp_path / "there.jsonl").exists()


@pytest.mark.parametrize(
    "notes", [b"my notes", b"my notes\n", b'{"a": 1}\n', b"[1]\n", b"\x89PNG\n"]
)
def test_a_file_of_something_else_is_no_earlier_run(tmp_path, notes):
    """It is said, and stays as it is; what has no end of line was cut off once, to nothing."""
    (tmp_path / "x").write_bytes(notes)
    with pytest.raises(InputError, match="--out .*line 1 is no dialogue of an earlier run"):
        generator.read_done(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == notes


# ------------------------------------------------------------------------------- a server elsewhere


class Server(ThreadingHTTPServer):
    """Speaks OpenAI's protocol, more or less. `trouble[picture's red pixel count]`: a list of what
    goes wrong with the next requests about that picture."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.seen, self.at_once, self.most = {}, [], 0, 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first = body["messages"][0]["content"]
        picture = base64.b64decode(first[0]["image_url"]["url"].partition(",")[2])
        width = Image.open(io.BytesIO(picture)).width
        with server.lock:
            server.seen.append((width, body))
            server.at_once += 1
            server.most = max(server.most, server.at_once)
            trouble = server.trouble.get(width) or [""]
            what = trouble[0] if trouble[0] == "always 500" else trouble.pop(0)
        time.sleep(0.02)
        with server.lock:
            server.at_once -= 1
        asked = first[1]["text"] == generator.ASK_FOR_QUESTIONS
        text = "1. What?\n2. Where?\n3. Why?" if asked else f"answer {len(body['messages']) // 2}"
        if what.endswith("500"):
            return self.send_error(500, "planted")
        if what == "timeout":
            time.sleep(2)
        message = dict(role="assistant", content=dict(empty="").get(what, text))
        finish = "length" if what == "long" else "stop"
        choice = dict(index=0, finish_reason=finish, message=message)
        answer = dict(id="1", object="chat.completion", created=1, model="m", choices=[choice])
        answer = b"{}{" if what == "garbage" else json.dumps(answer).encode()
        try:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer[:10] if what == "cut" else answer)
            self.close_connection = True
        except OSError:
            pass


@pytest.fixture
def server():
    """On this machine: it must be asked although HF_HUB_OFFLINE is set, see conftest.py."""
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_that_misbehaves_costs_a_retry_and_what_always_fails_is_listed(tmp_path, server):
    """Errors, time-outs, cut connections, garbage, empty and cut-off replies; many at once; a
    second run asks only for what is missing."""
    folder, out = tmp_path / "p", tmp_path / "d.jsonl"
    folder.mkdir()
    for w in range(30, 42):  # the width tells the server which picture it is
        Image.new("RGB", (w, 32), "red").save(folder / f"{w}.png")
    planted = ["500", "timeout", "cut", "garbage", "empty", "long"]
    server.trouble = {30 + i: [what] for i, what in enumerate(planted)} | {41: ["always 500"]}
    flags = ["--images", folder, "--model", "m", "--out", out, "--server", server.url]
    generate(*flags, "--timeout", 1, "--wait", 0, "--batch", 6)
    written = {line["id"]: line for line in lines(out)}
    assert sorted(written) == [f"{w}.png" for w in range(30, 41)], sorted(written)
    for line in written.values():
        talk = [t["value"] for t in line["conversations"]]
        want = [f"{IMAGE}\nWhat?", "answer 0", "Where?", "answer 1", "Why?", "answer 2"]
        assert talk == want, talk
    (failure,) = lines(tmp_path / "d.jsonl.failed.jsonl")
    assert failure["image"] == "41.png" and "500" in failure["error"], failure
    assert sum(w == 41 for w, _ in server.seen) == 3, "three attempts"
    assert 2 <= server.most <= 6, f"{server.most} requests at once, of 6 allowed"
    assert server.seen[0][1]["model"] == "m"
    server.seen.clear(), server.trouble.clear()
    generate(*flags, "--wait", 0)
    assert {w for w, _ in server.seen} == {41} and len(lines(out)) == 12


@pytest.mark.parametrize(
    "address",
    [
        "localhost:8000",
        "ftp://x/v1",
        "http://",
        "http://a b/",
        "http://h:99999/v1",
        "http://h:0/v1",
        "http://\u732b/",
    ],
)
def test_a_server_that_is_no_url_is_refused(tmp_path, address):
    """Before any picture is looked for."""
    flags = ["--images", tmp_path / "no", "--model", "m", "--out", tmp_path / "d.jsonl"]
    with pytest.raises(InputError, match="no URL; http://localhost:8000/v1 is one"):
        generate(*flags, "--server", address)


def test_a_server_that_is_not_there_ends_the_run_at_the_first_connection(tmp_path, capsys):
    """Not after 50 pictures, three times each."""
    folder = pictures(tmp_path / "p", 3)
    flags = ["--images", folder, "--model", "m", "--out", tmp_path / "d.jsonl"]
    with pytest.raises(InputError, match="--server .*not reached.*is it running"):
        generate(*flags, "--server", "http://127.0.0.1:9/v1", "--batch", 1, "--wait", 600)
    assert "wrote" not in capsys.readouterr().out
    assert not list(tmp_path.glob("d.jsonl*")), "nothing was made"


@pytest.mark.parametrize("what", ["nothing", "404", "not text"])
def test_a_server_that_answers_with_nothing_ends_with_status_1(tmp_path, capsys, what, monkeypatch):
    """An empty answer, an unknown model, an answer of another kind."""
    answers = {
        "nothing": b"",
        "not text": b'{"choices": [{"message": {"content": [1]}}]}',
        "404": b'{"error": "no such model"}',
    }

    class Odd(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(404 if what == "404" else 200)
            self.end_headers()
            self.wfile.write(answers[what])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = pictures(tmp_path / "p", 2)
    flags = ["--images", folder, "--model", "m", "--out", tmp_path / "d.jsonl", "--wait", 0]
    flags += ["--server", f"http://127.0.0.1:{server.server_port}/v1"]
    try:
        if what == "404":
            with pytest.raises(InputError, match="404 Not Found: .*no such model"):
                generate(*flags)
        else:
            assert generate(*flags) == 1
            assert "the server's answer is no" in str(lines(tmp_path / "d.jsonl.failed.jsonl"))
    finally:
        server.shutdown()
        server.server_close()
    assert "wrote" not in capsys.readouterr().out


def test_pictures_are_sent_with_no_more_than_max_pixels(tmp_path, server):
    """--max-pixels, for a server: the width tells which size arrived."""
    folder = tmp_path / "p"
    folder.mkdir()
    Image.new("RGB", (400, 100)).save(folder / "a.png")
    flags = ["--images", folder, "--model", "m", "--out", tmp_path / "d.jsonl"]
    assert generate(*flags, "--server", server.url, "--max-pixels", 10_000) == 0
    assert {width for width, _ in server.seen} == {200}, "200 x 50"


# ------------------------------------------------------------------------------------ checking data


def test_check_names_what_is_bad_and_clean_leaves_it_out(tmp_path, capsys):
    """A JSONL with a broken line, a lost picture, a truncated one; the copy reads through."""
    export.export(str(tmp_path), n=4)
    talks = tmp_path / "dialogues.jsonl"
    good = talks.read_text().splitlines()
    first = json.loads(good[0])["image"]
    (tmp_path / "images" / first).write_bytes(b"")
    talks.write_text(
        "\n".join([*good, "{broken", json.dumps(dict(json.loads(good[1]), image="no.png"))])
    )
    assert checked(talks) == 1
    said = capsys.readouterr().out
    assert "examples  6, 3 of them bad" in said, said
    assert f"{talks}, line 5: " in said and "no.png: no such picture" in said
    assert f"{talks}, line 1: {tmp_path}" in said and "(0 bytes): not a readable picture" in said
    assert "pictures  3: 64 x 64 to 64 x 64 pixels" in said and "words, median" in said
    clean = tmp_path / "clean" / "d.jsonl"
    assert checked(talks, "--clean", clean) == 0
    assert clean.read_text().splitlines() == good[1:]
    assert checked(clean, "--image-root", tmp_path) == 0
    assert len(data.read_dialogues(str(clean), str(tmp_path))) == 3


def test_check_reads_a_list_as_training_does_all_of_one_kind(tmp_path, capsys):
    """By its first good line, whatever stands before that: a dialogue among pairs is bad, and a
    pair among dialogues."""
    export.export(str(tmp_path), n=1)
    talk = (tmp_path / "dialogues.jsonl").read_text().strip()
    pair = '{"query": {"text": "a"}, "target": {"text": "b"}}'
    for name, lines in (("pairs", ["{}", pair, talk]), ("talks", ["{}", talk, pair])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        assert checked(tmp_path / f"{name}.jsonl") == 1
        said = capsys.readouterr().out
        assert "line 3" in said and "line 2" not in said and "3, 2 of them bad" in said, said


def test_check_reads_folders_in_mmebs_layout(tmp_path, capsys):
    """Every subset's lists; one bad picture costs each row that shows it; a cut-off file is bad."""
    export.export(str(tmp_path), n=4)
    train, evals = tmp_path / "MMEB-train", tmp_path / "MMEB-eval"
    assert checked(train) == 0
    assert checked(evals) == 0
    assert "20 examples, 0 bad" in capsys.readouterr().out
    lost = data.read_pairs(str(train))["classify"][2].query.images[0]
    open(lost, "wb").close()
    cut = next(train.glob("vqa/*.parquet"))
    cut.write_bytes(cut.read_bytes()[:300])
    assert checked(train) == 1
    said = capsys.readouterr().out
    assert "not a readable parquet file" in said and ", row 3: " in said, said
    checked(train, "--clean", tmp_path / "clean")
    read = data.read_pairs(str(tmp_path / "clean"), str(train))
    assert sorted(read) == ["classify", "ground", "i2t", "t2i"] and len(read["classify"]) == 3


def test_check_never_writes_over_its_source(tmp_path):
    """Under any of its names: the file's, a link's, a folder's; nor does --list-bad."""
    export.export(str(tmp_path), n=2)
    talks, train = tmp_path / "dialogues.jsonl", tmp_path / "MMEB-train"
    (tmp_path / "link.jsonl").symlink_to(talks)
    before = talks.read_bytes()
    for words in (
        (talks, "--clean", talks),
        (talks, "--clean", tmp_path / "link.jsonl"),
        (train, "--clean", train),
        (talks, "--list-bad", talks),
        (talks, "--clean", tmp_path / "x", "--list-bad", tmp_path / "x"),
    ):
        with pytest.raises(InputError, match="would be written over"):
            checked(*words)
    assert talks.read_bytes() == before


def test_a_copy_that_cannot_be_written_is_one_line_and_costs_nothing(tmp_path, monkeypatch):
    """A full disk while it is written: the copy of before stays whole, no part of a new one."""
    export.export(str(tmp_path), n=2)
    clean = tmp_path / "c" / "good.jsonl"
    checked(tmp_path / "dialogues.jsonl", "--clean", clean)
    before = clean.read_bytes()

    def full(lines, chosen, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plumbing.lines.Lines.copy", full)
    with pytest.raises(InputError, match="--clean .*good.jsonl: not written: No space left"):
        checked(tmp_path / "dialogues.jsonl", "--clean", clean)
    assert clean.read_bytes() == before and [p.name for p in (tmp_path / "c").iterdir()] == [
        "good.jsonl"
    ]
    with pytest.raises(InputError, match="--list-bad .*: not written"):
        checked(tmp_path / "dialogues.jsonl", "--list-bad", clean / "below" / "x.jsonl")


def test_one_wrong_root_is_said_once(tmp_path, capsys):
    """With how many pictures are not there, and not twenty times."""
    export.export(str(tmp_path), n=8)
    (tmp_path / "empty").mkdir()
    assert checked(tmp_path / "dialogues.jsonl", "--image-root", tmp_path / "empty") == 1
    said = capsys.readouterr().out
    assert said.count("no such picture") == 1 and "(so it is with 7 more)" in said, said


def test_check_of_nothing_is_an_error(tmp_path):
    with pytest.raises(InputError, match="a folder without metadata.jsonl or metadata.csv"):
        checked(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        checked(tmp_path / "x.jsonl")


# --------------------------------------------------------------------- pictures with captions


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_folder_of_pictures_with_captions_trains_both_stages(tmp_path, ending, capsys):
    """metadata.jsonl or .csv: dialogues of one turn; pairs both ways, also several of a picture."""
    folder = pictures(tmp_path / "birds", 3)
    rows = [
        ("0.png", 'a "red" bird,\nit sings'),
        ("1.png", "two"),
        ("0.png", "caf\u00e9"),
        ("2.png", "x"),
    ]
    if ending == "csv":
        text = "file_name,text\n" + "".join(
            '{},"{}"\n'.format(f, t.replace('"', '""')) for f, t in rows
        )
    else:
        text = "".join(json.dumps(dict(file_name=f, text=t)) + "\n" for f, t in rows)
    (folder / f"metadata.{ending}").write_text(text, encoding="utf-8")
    talks = data.read_dialogues(str(folder))
    assert [d.turns for d in talks] == [((DESCRIBE, t),) for _, t in rows]
    pairs = data.read_pairs(str(folder))
    assert {k: len(v) for k, v in pairs.items()} == {"birds_i2t": 3, "birds_t2i": 4}
    assert [t.text for t in pairs["birds_i2t"][0].targets] == [rows[0][1], rows[2][1]]
    last = pairs["birds_t2i"][3]
    assert last.query.text.endswith("x") and str(last.targets[0].images[0]).endswith("2.png")
    (folder / "1.png").unlink()
    with pytest.raises(InputError, match=r"1.png: no such picture\. "):  # one, and counted once
        checked_digest(data.read_pairs(str(folder)).values())
    assert checked(folder, "--clean", tmp_path / "c") == 0
    assert "4, 1 of them bad" in capsys.readouterr().out
    assert [d.turns[0][1] for d in data.read_dialogues(str(tmp_path / "c"), str(folder))] == [
        t for f, t in rows if f != "1.png"
    ]
    bad = text.replace("2.png", "")
    (folder / f"metadata.{ending}").write_text(bad, encoding="utf-8")
    with pytest.raises(InputError, match=rf'metadata.{ending}, line \d: needs "file_name"'):
        data.read_pairs(str(folder))


def test_a_damaged_csv_is_an_error_and_no_other_caption(tmp_path):
    """An open quote would swallow the rows after it; bytes that are no UTF-8 would be replaced."""
    for rows, says in (
        (b'0.png,"a bird\n1.png,two\n', "after line 1: unexpected end of data; is each quote"),
        (b"0.png,caf\xe9\n", "line 2: not UTF-8: 0xe9"),
    ):
        (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n" + rows)
        with pytest.raises(InputError, match=f"metadata.csv, {says}"):
            data.read_pairs(str(tmp_path))


def test_check_writes_no_copy_of_a_list_of_which_nothing_is_good(tmp_path, capsys):
    """Training would refuse a list without examples; so the status is 1."""
    export.export(tmp_path / "toy", 2)
    for picture in (tmp_path / "toy").rglob("*.png"):
        picture.unlink()
    assert checked(tmp_path / "toy" / "MMEB-train", "--clean", tmp_path / "c") == 1
    assert "none is good" in capsys.readouterr().out
    assert not list((tmp_path / "c").rglob("*.parquet"))


# ----------------------------------------------------------------------------------------- merging


def test_merge_leaves_a_plain_folder_of_the_same_embeddings(tmp_path, capsys, monkeypatch):
    """Of a LoRA run: no adapter, the same vectors; what is no model is one clear line."""
    embedder = model.load("toy-random", 4, device="cpu")
    cfg = TrainingFlags(model="toy-random", lora_rank=2)
    model.choose_trained(embedder, cfg)
    for name, p in embedder.named_parameters():
        if "lora_B" in name:  # it starts as zero, and would change nothing
            torch.nn.init.normal_(p, std=0.1)
    model.save(embedder.eval(), tmp_path / "in")
    cards = []
    monkeypatch.setattr(merge.card, "write", lambda folder, source: cards.append((folder, source)))
    merge.main([str(tmp_path / "in"), str(tmp_path / "out")])
    equal(cards, [(str(tmp_path / "out"), str(tmp_path / "in"))], "OUT's card tells of IN's run")
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out
    assert (tmp_path / "in" / "adapter_config.json").exists()
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    texts = ["a red circle.", "what is it?"]
    merged = model.load(tmp_path / "out", device="cpu").encode(texts)
    close(merged, embedder.encode(texts), "merged and unmerged", 1e-4)
    plain = model.load("toy-random", 4, device="cpu").encode(texts)
    assert abs(merged - plain).max() > 1e-3, "negative control: the adapter does something"
    with pytest.raises(InputError, match="^--model .*no such folder"):
        merge.main([str(tmp_path / "nothing"), "x"])


def test_merge_keeps_the_number_type_of_the_model_under_the_adapter(tmp_path):
    """A CPU works in float32; written so, a folder would be twice as large as its base."""
    base = model.load("toy-random", 4, device="cpu")
    base.mllm.to(torch.bfloat16)
    model.save(base, tmp_path / "base")
    embedder = model.load(tmp_path / "base", device="cpu")
    model.choose_trained(embedder, TrainingFlags(model=str(tmp_path / "base"), lora_rank=2))
    model.save(embedder, tmp_path / "adapter")
    merge.main([str(tmp_path / "adapter"), str(tmp_path / "out")])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}, "tools.merge"


# --------------------------------------------------------------------------- the commands as such


def test_look_prints_and_draws_examples(tmp_path, monkeypatch, capsys):
    """Six dialogues and a query of each task; a sheet that is not blank."""
    monkeypatch.chdir(tmp_path)
    look.main([])
    said = capsys.readouterr().out
    for task, meta_task in META_TASK.items():
        assert f"{task} ({meta_task}): " in said, said
    _, turns, _ = Shapes().dialogue(0)
    assert all(f"{question}  ->  {answer}" in said for question, answer in turns), said
    sheet = np.asarray(Image.open("out/shapes.png").convert("L"))
    assert sheet.shape == (11 * 140, 1500) and 0.01 < (sheet < 200).mean() < 0.9


@pytest.mark.parametrize("name", HELP)
def test_each_command_explains_itself_shortly(name, capsys):
    """--help says how it is run, with an example, and names its flags; an unknown one ends it."""
    read, word = HELP[name]
    with pytest.raises(SystemExit) as end:
        read(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and f"    python -m tools.{name}" in said and word in said, said
    pages = 3 if name in ("condense", "lessons") else 1  # all flags of a stage
    assert len(said.splitlines()) <= 66 * pages, f"{pages} page(s)"
    with pytest.raises(SystemExit) as end:
        read(["--unknown"])
    assert end.value.code == 2


def test_every_command_is_here(monkeypatch, capsys):
    """A file in tools/ with a command line has its help tested above, and no other has; `python -m
    tools` lists them all, each with what it does."""
    room = Path(look.__file__).parent
    files = {path.stem for path in room.glob("*.py") if path.stem.isidentifier()} - {"__main__"}
    commands = {name for name in files if "\ndef main(" in (room / f"{name}.py").read_text()}
    assert commands == set(HELP), commands ^ set(HELP)
    monkeypatch.setattr(sys, "argv", ["tools"])
    runpy.run_path(str(room / "__main__.py"), run_name="__main__")
    listed = dict(re.findall(r"^    (\w+) +(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    assert set(listed) == commands and all(len(text) > 20 for text in listed.values()), listed
    assert all(text.endswith((".", ":")) for text in listed.values()), "whole sentences"
    monkeypatch.setattr(sys, "argv", ["tools", "-h"])
    runpy.run_path(str(room / "__main__.py"), run_name="__main__")
    assert "    search " in capsys.readouterr().out, "asked for, too"
    monkeypatch.setattr(sys, "argv", ["tools", "serch"])
    with pytest.raises(SystemExit, match="no command in serch\n"):
        runpy.run_path(str(room / "__main__.py"), run_name="__main__")


# ---------------------------------------------------------------------------------------- exporting


def test_export_writes_every_format_and_they_read_back(tmp_path, capsys):
    """Dialogues, pairs, captions twice, MMEB's two layouts: the toy world's own examples. An
    evaluation set keeps its meta-task."""
    export.main([str(tmp_path / "toy"), "--examples", "3"])
    top = str(tmp_path / "toy")
    talks, toy = data.read_dialogues(f"{top}/dialogues.jsonl"), data.read_dialogues()
    assert [talks[i].turns for i in range(3)] == [toy[i].turns for i in range(3)]
    (pairs,) = data.read_pairs(f"{top}/pairs.jsonl").values()
    sets = data.read_pairs()
    want = [sets[task][i].query.text for i in range(3) for task in sets]
    assert [pair.query.text for pair in pairs] == want
    for folder in ("captions", "captions-csv"):
        captions = data.read_dialogues(f"{top}/{folder}")
        assert [d.turns[0][1] for d in captions] == [scene(i).describe() for i in range(3)]
        first = 2 if folder == "captions-csv" else 1  # a csv's first line names its columns
        assert captions[0].id.endswith(f", line {first}"), "as errors name it"
        assert len(data.read_pairs(f"{top}/{folder}")) == 2
    assert {len(x) for x in data.read_pairs(f"{top}/MMEB-train").values()} == {3}
    kinds = {(t.name, t.meta_task, t.ood) for t in data.read_tasks(f"{top}/MMEB-eval")}
    assert kinds == {(t.name, t.meta_task, t.ood) for t in data.read_tasks()}
    for file in ("MMEB-train", "MMEB-eval", "captions", "captions-csv", "pairs.jsonl"):
        assert checked(f"{top}/{file}") == 0, file


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"a": {"meta_task": "Cooking"}}',
                                  '{"a": {"meta_task": "VQA", "odd": true}}',
                                  '{"a": {"meta_task": "VQA", "ood": "no"}}'])  # fmt: skip
def test_what_sets_json_may_not_say_is_one_line(tmp_path, text):
    """The meta-tasks of one's own sets: of MMEB's four, or Other. The set is there."""
    (tmp_path / "a").mkdir()
    (tmp_path / "sets.json").write_text(text)
    with pytest.raises(InputError, match="sets.json: "):
        data.read_tasks(str(tmp_path))


def test_export_into_a_place_that_is_none_is_one_line(tmp_path):
    """Below a file."""
    (tmp_path / "file").write_text("whole")
    with pytest.raises(InputError, match="not written"):
        export.main([str(tmp_path / "file" / "x")])
    assert (tmp_path / "file").read_text() == "whole"


def as_seen(item) -> tuple:
    """An Item's text, and the pixels of its pictures."""
    return item.text, [open_image(picture).tobytes() for picture in item.images]


def test_what_is_exported_is_the_toy_worlds_own_to_the_pixel(tmp_path):
    """Queries, targets and candidates, each in its own place, each with its own picture."""
    top = str(tmp_path / "toy")
    export.main([top, "--examples", "3"])
    toy, sets = data.read_pairs(), data.read_pairs(f"{top}/MMEB-train")
    (pairs,) = data.read_pairs(f"{top}/pairs.jsonl").values()
    for n, task in enumerate(toy):
        for i in range(3):
            want = [as_seen(x) for x in (toy[task][i].query, *toy[task][i].targets)]
            for pair in (sets[task][i], pairs[len(toy) * i + n]):
                got = [as_seen(x) for x in (pair.query, *pair.targets)]
                assert got == want, (task, i)
    tasks = {task.name: task for task in data.read_tasks(f"{top}/MMEB-eval")}
    for task in data.read_tasks(limit=3):
        for ours, theirs in zip(tasks[task.name].queries, task.queries, strict=True):
            got, want = ([as_seen(x) for x in (query, *rest)] for query, rest in (ours, theirs))
            assert got == want, task.name
    talks, dialogues = data.read_dialogues(f"{top}/dialogues.jsonl"), data.read_dialogues()
    for i in range(3):
        assert as_seen(talks[i].item) == as_seen(dialogues[i].item), i
        for folder in ("captions", "captions-csv"):
            (picture,) = data.read_dialogues(f"{top}/{folder}")[i].item.images
            assert open_image(picture).tobytes() == scene(i).render().tobytes(), folder
