"""`python -m tools.generate`: its flags reach whoever is asked, failures are asked again, and what
a command said it says again. (Servers that misbehave, the toy MLLM's own answers: test_tools.py;
what is refused: test_tools_refuse.py.)"""

import base64
import io
import json
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checks import equal, expect, toy
from PIL import Image

import model
from plumbing.config import TrainingFlags
from plumbing.errors import InputError
from tools import generate as generator

PICTURE = Image.new("RGB", (64, 64), "red")
QUESTIONS = [f"question {i}?" for i in range(20)]


def config(**flags):
    """What a user says, and "x" where it does not matter here."""
    return generator.Config(**{"images": "x", "out": "x", "model": "m", **flags})


# ----------------------------------------------------------------------------------- the questions


def questions_of(name, seed=0) -> list:
    """The questions that a picture draws."""
    (talk,) = generator.interviews_about([name], QUESTIONS, config(seed=seed)).values()
    chat, asked = next(talk), []
    try:
        while True:
            asked.append(chat[-1][1])
            chat = talk.send("yes")
    except StopIteration:
        return asked


def test_a_picture_draws_its_questions_by_its_name_and_the_seed():
    """Three to five; the same ones when a run goes on, others for another picture, or --seed."""
    drawn = {name: questions_of(name) for name in "abcdefghij"}
    equal({name: questions_of(name) for name in drawn}, drawn, "again")
    equal({len(asked) for asked in drawn.values()}, {3, 4, 5}, "how many")
    equal(len({str(asked) for asked in drawn.values()}), 10, "each picture its own")
    other = {name: questions_of(name, seed=1) for name in drawn}
    equal([name for name in drawn if other[name] == drawn[name]], [], "--seed")


def test_of_a_long_list_the_first_five_that_differ_are_asked():
    """A model that repeats itself, or does not stop."""
    talk = generator.interview()
    next(talk)
    chat = talk.send("".join(f"{i}. {x}?\n" for i, x in enumerate("aabcdefg", 1)))
    asked = []
    with pytest.raises(StopIteration):
        while True:
            asked.append(chat[-1][1])
            chat = talk.send("yes")
    equal(asked, ["a?", "b?", "c?", "d?", "e?"], "interview")


def test_a_list_of_questions_may_begin_with_a_mark_of_its_encoding(tmp_path):
    """As editors on Windows write it: it is no part of the first question."""
    (tmp_path / "q.txt").write_text("what?\nwhere?\nwhy?\n", encoding="utf-8-sig")
    equal(generator.read_questions(tmp_path / "q.txt"), ["what?", "where?", "why?"], "read")


# -------------------------------------------------------------------------- a model in this process


class Spy:
    """The toy's processor, and a model that says nothing but the end: both note what they get."""

    device, generation_config = torch.device("cpu"), SimpleNamespace(eos_token_id=None)

    def __init__(self):
        self.processor, self.calls = toy().processor, []

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, **words):
        self.calls.append(words)
        return self.processor(**words)

    def generate(self, **words):
        self.calls.append(words)
        end = torch.full((len(words["input_ids"]), 1), self.tokenizer.eos_token_id)
        return torch.cat([words["input_ids"], end], 1)


CHATS = [[("user", "a?")], [("user", "a longer one?"), ("assistant", "b"), ("user", "c?")]]


@pytest.mark.parametrize("starts", [False, True])
def test_a_model_is_asked_as_the_flags_say(monkeypatch, starts):
    """Greedily at temperature 0; rows end side by side, where replies begin; a tokenizer's own
    start is not put in front of a template's. A reply whose end is the tokenizer's is whole."""
    monkeypatch.setattr(generator, "starts_itself", lambda *_: starts)
    for temperature, want in ((0.0, (False, None)), (0.3, (True, 0.3))):
        spy = Spy()
        replies = generator.replies_of(spy, spy, config(temperature=temperature, max_tokens=7))
        equal(replies([(PICTURE, chat) for chat in CHATS]), ["", ""], "whole")
        read, asked = spy.calls
        equal(read["add_special_tokens"], not starts, "two starts are one too many")
        equal((asked["do_sample"], asked.get("temperature")), want, "--temperature")
        equal(asked["max_new_tokens"], 7, "--max-tokens")
        equal(asked["attention_mask"][:, -1].tolist(), [1, 1], "padding is on the left")
        expect(not asked["attention_mask"].all(), "no padding", "some", "too easy")


def test_each_question_stands_behind_its_own_picture():
    """Two of a batch: an answer about the other's picture would be learned."""
    spy, pictures = Spy(), [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    replies = generator.replies_of(spy, spy, config(temperature=0.0))
    replies(list(zip(pictures, CHATS, strict=True)))
    read, _ = spy.calls
    equal(read["images"], [[picture] for picture in pictures], "of each chat its own")
    for text, chat in zip(read["text"], CHATS, strict=True):
        before = text.partition(chat[0][1])[0]
        expect("<|image_pad|>" in before, text, "the picture, then the question", "prompt")


def test_each_of_a_models_ends_ends_a_reply():
    """Qwen has two, beside its tokenizer's; what stands behind one is padding."""
    tokenizer = toy().processor.tokenizer
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} - {tokenizer.eos_token_id}
    first, second, other = sorted(special)[:3]
    ends = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[first, second]))
    read = generator.reply_reader(ends, tokenizer)
    (dog,) = tokenizer("dog", add_special_tokens=False)["input_ids"][:1]
    for tail in ([first], [second], [tokenizer.eos_token_id], [second, other, other]):
        expect(isinstance(read([dog, *tail]), str), tail, "a whole reply", "reply_reader")
    expect(isinstance(read([dog, other]), generator.CutOff), other, "cut off", "no end")


def test_an_added_token_that_is_a_word_may_begin_a_reply():
    """Qwen has some, as <tool_call>, which decoding leaves in the text: none of a template."""
    added = {5: SimpleNamespace(special=False), 6: SimpleNamespace(special=True)}
    tokenizer = SimpleNamespace(added_tokens_decoder=added, eos_token_id=1)
    tokenizer.decode = lambda ids, **_: f"text of {ids}"
    read = generator.reply_reader(Spy(), tokenizer)
    equal(read([5, 1]), "text of [5, 1]", "reply_reader")
    expect(isinstance(read([6, 1]), InputError), read([6, 1]), "an error", "a template's own")


def test_a_model_draws_by_the_seed(monkeypatch):
    """Set when it is there, whatever was drawn before."""
    spy = Spy()
    monkeypatch.setattr(generator, "load_asked", lambda args: (spy, spy))
    monkeypatch.setattr(generator, "origin_of", lambda mllm: SimpleNamespace(folder="x"))
    for seed in (5, 6):
        generator.ask_model(config(seed=seed))
        equal(torch.initial_seed(), seed, "torch.manual_seed")


def test_a_model_is_loaded_with_its_adapter_and_the_size_of_pictures(tmp_path, monkeypatch):
    """What a stage has trained answers, and not what is under it; and without dropout."""
    embedder = model.load("toy-random", 4, device="cpu")
    model.choose_trained(embedder, TrainingFlags(model="toy-random", lora_rank=2))
    for name, p in embedder.named_parameters():
        if "lora_B" in name:  # it starts as zero
            torch.nn.init.constant_(p, 0.5)
    model.save(embedder, tmp_path / "adapter")
    options, load = [], generator.load_mllm
    monkeypatch.setattr(generator, "load_mllm", lambda *x: options.append(x[2]) or load(*x))
    args = config(model=str(tmp_path / "adapter"), max_pixels=4096)
    mllm, _ = generator.load_asked(args)
    found = [p for name, p in mllm.named_parameters() if "lora_B" in name]
    expect(
        found and all((p == 0.5).all() for p in found), len(found), "the adapter's", "load_asked"
    )
    equal([name for name, part in mllm.named_modules() if part.training], [], "evaluation mode")
    equal(options[0].max_pixels, 4096, "--max-pixels")


# ------------------------------------------------------------------------------- a server elsewhere


def test_a_server_is_asked_as_the_flags_say(monkeypatch):
    """Model, key, length and temperature; and it is waited for as long as --timeout says."""
    seen = []
    answer = {"choices": [{"message": {"content": "red"}, "finish_reason": "stop"}]}

    def urlopen(request, timeout):
        seen.append((request, timeout))
        return io.BytesIO(json.dumps(answer).encode())

    monkeypatch.setattr(generator.urllib.request, "urlopen", urlopen)
    flags = dict(server="http://h/v1/", api_key="secret", timeout=3.5)
    args = config(**flags, max_tokens=7, temperature=0.3)
    equal(generator.ask_server(args)([(PICTURE, CHATS[1])]), ["red"], "the reply")
    ((request, timeout),) = seen
    equal((request.full_url, timeout), ("http://h/v1/chat/completions", 3.5), "--server")
    equal(request.get_header("Authorization"), "Bearer secret", "--api-key")
    equal(request.get_header("Content-type"), "application/json", "or vLLM refuses it")
    body = json.loads(request.data)
    asked = {key: body[key] for key in ("model", "max_tokens", "temperature")}
    equal(asked, {"model": "m", "max_tokens": 7, "temperature": 0.3}, "in the body")
    equal([x["role"] for x in body["messages"]], ["user", "assistant", "user"], "all of the chat")
    (picture, question), *others = (x["content"] for x in body["messages"])
    equal((picture["type"], question["type"]), ("image_url", "text"), "the picture in front")
    equal([question["text"], *others], ["a longer one?", "b", "c?"], "in its order")


def test_an_answer_without_a_word_is_an_empty_one():
    """`null`, as a server has it whose model said nothing: it costs a picture, and names why."""
    answer = {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}
    equal(generator.read_reply(json.dumps(answer)), "", "generate.read_reply")


@pytest.mark.parametrize("server", ["http://h/v1", "https://h:8000/v1"])
def test_a_server_may_be_behind_either_kind_of_url(server):
    """One's own, or one that is paid for."""
    generator.refuse_no_url(server, "key")


@pytest.mark.parametrize("key", ["schl\u00fcssel", "two\nlines", "del\x7f"])
def test_a_key_that_no_header_can_hold_is_refused(key):
    """As one that was copied with the end of its line: each request would fail by itself."""
    with pytest.raises(InputError, match="--api-key .*: printable ASCII is wanted") as error:
        generator.refuse_no_url("http://h/v1", key)
    expect(str(error.value).isprintable(), str(error.value), "one line", "brief")


@pytest.mark.parametrize(
    ("soft", "hard", "most"), [(9, 10**6, 4096), (9, 50, 50), (5000, 6000, 5000)]
)
def test_as_many_files_may_be_open_as_threads_need(monkeypatch, soft, hard, most):
    """--batch 1024 has a socket and a picture each, where a shell allows 1,024."""
    limits = []
    monkeypatch.setattr(generator.resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(generator.resource, "setrlimit", lambda _, x: limits.append(x))
    generator.ask_server(config(server="http://h/v1"))
    equal(limits, [(most, hard)], "RLIMIT_NOFILE")


@pytest.mark.parametrize("code", [401, 403, 404, 429, 500])
def test_a_key_or_a_name_that_is_wrong_ends_the_run_and_other_trouble_does_not(monkeypatch, code):
    """Of the first three no picture will be answered; the others may be over in a moment. A proxy
    says why in an encoding of its own."""

    def refused(*_, **__):
        raise urllib.error.HTTPError("u", code, "why", {}, io.BytesIO(b"\xe9chec, because"))

    monkeypatch.setattr(generator.urllib.request, "urlopen", refused)
    with pytest.raises(InputError, match="because") as error:
        generator.post(None, config(server="http://h/v1"))
    equal(isinstance(error.value, generator.NotTheServer), code in (401, 403, 404), f"{code}")


# ------------------------------------------------------------------------------- all the pictures


def failing(monkeypatch, bad, asked):
    """Whoever is asked about pictures fails at those of `bad`; asked: a list of what was asked."""

    def ask_once(names, *_):
        asked.append(names)
        for name in names:
            line = generator.line_of(name, [("what?", "a dog")])
            yield name, InputError("trouble") if name in bad else line

    monkeypatch.setattr(generator, "ask_once", ask_once)
    return SimpleNamespace(update=lambda: None)


def test_what_failed_alone_is_asked_again_twice_after_longer_and_longer_waits(
    tmp_path, monkeypatch
):
    """And each dialogue is written once."""
    asked, slept = [], []
    bar = failing(monkeypatch, {"b.png"}, asked)
    monkeypatch.setattr(generator.time, "sleep", slept.append)
    args = config(out=str(tmp_path / "d.jsonl"), wait=5.0)
    errors = generator.ask_until_done(["a.png", "b.png"], [], None, args, bar)
    equal(errors, {"b.png": "InputError: trouble"}, "what failed three times")
    equal(asked, [["a.png", "b.png"], ["b.png"], ["b.png"]], "three attempts")
    equal([x for x in slept if x], [5.0, 10.0], "--wait")
    equal(len((tmp_path / "d.jsonl").read_text().splitlines()), 1, "lines")


def test_where_nothing_failed_nothing_is_waited_for(tmp_path, monkeypatch):
    """Half a minute, by default, behind a run that is done."""
    slept = []
    bar = failing(monkeypatch, set(), [])
    monkeypatch.setattr(generator.time, "sleep", slept.append)
    args = config(out=str(tmp_path / "d.jsonl"), wait=5.0)
    equal(generator.ask_until_done(["a.png", "b.png"], [], None, args, bar), {}, "no failure")
    equal([x for x in slept if x], [], "--wait")


@pytest.mark.parametrize(("server", "sizes", "threads"), [("", [2, 2, 1], 1), ("s", [1] * 5, 2)])
def test_a_model_answers_batches_in_turn_and_a_server_several_requests_at_once(
    tmp_path, monkeypatch, server, sizes, threads
):
    """--batch 2, five pictures: a batch is one call of the model, and two at once would need twice
    its memory; of a server a request is about one picture."""
    names = [f"{i}.png" for i in range(5)]
    for name in names:
        PICTURE.save(tmp_path / name)
    asked, pools, pool = [], [], generator.ThreadPoolExecutor

    def replies(part):
        asked.append(len(part))
        return ["yes"] * len(part)

    monkeypatch.setattr(generator, "ThreadPoolExecutor", lambda n: pools.append(n) or pool(n))
    flags = dict(images=str(tmp_path), out=str(tmp_path / "d.jsonl"), batch=2, server=server)
    bar = SimpleNamespace(update=lambda: None)
    errors = generator.ask_until_done(names, QUESTIONS[:3], replies, config(**flags), bar)
    equal((errors, pools), ({}, [threads]), "threads")
    equal(sorted(asked, reverse=True), [size for size in sizes for _ in range(3)], "three turns")


def test_a_dialogue_names_its_picture_by_the_path_below_the_folder(tmp_path):
    """Of two subfolders with a picture of the same name each has its own."""
    names = ["a/x.png", "b/x.png", "b/broken.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PICTURE.save(tmp_path / name)
    (tmp_path / "b/broken.png").write_bytes(b"")
    flags = config(images=str(tmp_path), server="http://h/v1")
    with ThreadPoolExecutor(1) as pool:
        asked = dict(generator.ask_once(names, QUESTIONS, lambda x: ["yes"] * len(x), flags, pool))
    equal(sorted(asked), sorted(names), "what failed, too, is named so")
    for name in names[:2]:
        equal(generator.picture_of(asked[name]), name, "its line")


def test_a_list_of_questions_behind_a_templates_token_is_none():
    """The server and the model do not agree about the template, though the list reads well."""
    talk = generator.interview()
    next(talk)
    with pytest.raises(InputError, match="begins with a template's own token"):
        talk.send("<|assistant|>\n1. what?\n2. where?\n3. why?")


@pytest.mark.parametrize(
    "token", ["<s>", "</s>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<think>",
              "</think>", "<|im_end|>"]
)  # fmt: skip
def test_a_reply_may_not_begin_with_the_token_of_any_template(token):
    """One that opens something or one that closes it, behind blanks too."""
    for reply in (f"{token}a dog", f" \n{token} a dog"):
        with pytest.raises(InputError, match="begins with a template's own token"):
            generator.refuse_template(reply)
    generator.refuse_template(f"a dog {token}")


def test_fifty_failures_without_a_success_end_the_run(tmp_path, monkeypatch):
    """It is not the pictures; after a success it may be, on a terminal and in a log file, where the
    bar counts nothing."""
    names = [f"{i:02}.png" for i in range(60)]
    monkeypatch.setattr(generator.time, "sleep", lambda _: None)
    args = config(out=str(tmp_path / "d.jsonl"))
    with pytest.raises(InputError, match="50 pictures failed, none succeeded"):
        bar = failing(monkeypatch, set(names), [])
        generator.ask_until_done(names, [], None, args, bar)
    failing(monkeypatch, set(names[1:]), [])
    for disable in (False, True):
        bar = generator.tqdm(total=60, file=io.StringIO(), disable=disable)
        equal(len(generator.ask_until_done(names, [], None, args, bar)), 59, "all are tried")


@pytest.mark.parametrize(("bad", "status"), [(set(), 0), ({"0.png"}, 0), ({"0.png", "1.png"}, 1)])
def test_the_status_says_whether_anything_came_of_it(tmp_path, monkeypatch, capsys, bad, status):
    """Some that failed are listed; only where all did the command has failed. What trains on the
    dialogues is said, with the pictures' folder, as a shell takes it."""
    tmp_path /= "my pictures"
    tmp_path.mkdir()
    failing(monkeypatch, bad, [])
    monkeypatch.setattr(generator, "ask_model", lambda args: None)
    for i in range(2):
        PICTURE.save(tmp_path / f"{i}.png")
    words = ["--images", str(tmp_path), "--model", "toy", "--out", str(tmp_path / "d.jsonl")]
    equal(generator.main([*words, "--wait", "0"]), status, "the exit status")
    equal((tmp_path / "d.jsonl.failed.jsonl").exists(), bool(bad), "the list of failures")
    said = capsys.readouterr().out
    command = f"python pretrain.py --data '{tmp_path}/d.jsonl' --image-root '{tmp_path}'\n"
    equal(f"wrote {tmp_path}/d.jsonl: {command}" in said, status == 0, said)
    equal(f"{len(bad)} failed three times, see {tmp_path}/d.jsonl.f" in said, bool(bad), said)


def test_the_bar_begins_where_an_earlier_run_ended(tmp_path, monkeypatch):
    """Of all pictures, those among them that are done."""
    failing(monkeypatch, set(), [])
    bars, tqdm = [], generator.tqdm

    def bar(**words):
        bars.append((words["initial"], words["total"]))
        return tqdm(**words)

    monkeypatch.setattr(generator, "tqdm", bar)
    monkeypatch.setattr(generator, "ask_model", lambda args: None)
    words = ["--images", str(tmp_path), "--model", "toy", "--out", str(tmp_path / "d.jsonl")]
    for name in ("a.png", "b.png"):
        PICTURE.save(tmp_path / name)
        equal(generator.main([*words, "--wait", "0"]), 0, name)
    equal(bars, [(0, 1), (1, 2)], "tqdm")


def test_a_server_that_refuses_is_not_asked_about_all_the_other_pictures(tmp_path, monkeypatch):
    """They wait for a thread already: with a wrong key each would be asked about, for nothing."""
    for i in range(40):
        PICTURE.save(tmp_path / f"{i:02}.png")
    asked = []

    def refused(request):
        asked.append(request)
        generator.time.sleep(0.05)
        raise generator.NotTheServer("401")

    monkeypatch.setattr(generator, "ask_server", lambda args: refused)
    words = ["--images", str(tmp_path), "--model", "m", "--out", str(tmp_path / "d.jsonl")]
    with pytest.raises(InputError, match="401"):
        generator.main([*words, "--server", "http://h/v1", "--batch", "1"])
    expect(len(asked) < 30, len(asked), "a few of 40", "pool.shutdown")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), BrokenPipeError(32, "pipe")])
def test_a_server_that_hangs_up_is_asked_again(monkeypatch, error):
    """It did answer the call: one picture failed, and not the run."""

    def hang_up(*_, **__):
        raise urllib.error.URLError(error)

    monkeypatch.setattr(generator.urllib.request, "urlopen", hang_up)
    with pytest.raises(InputError, match="hung up") as caught:
        generator.post(None, config(server="http://h/v1"))
    equal(isinstance(caught.value, generator.NotTheServer), False, "generate.post")


def test_no_more_of_an_answer_is_read_than_an_answer_has(monkeypatch):
    """A server that never stops would fill the memory."""
    asked = []
    answer = io.BytesIO()
    answer.read = lambda size=-1: asked.append(size) or b""
    monkeypatch.setattr(generator.urllib.request, "urlopen", lambda *_, **__: answer)
    generator.post(None, config(server="http://h/v1"))
    equal(asked, [generator.LONGEST_REPLY], "bytes")


def test_a_line_of_blanks_is_no_question(tmp_path):
    """Each picture that drew it would fail three times."""
    (tmp_path / "q.txt").write_text("what?\n \n\nwhere?\n\t\nwhy?\n")
    equal(generator.read_questions(tmp_path / "q.txt"), ["what?", "where?", "why?"], "three")
    (tmp_path / "q.txt").write_text("what?\nwhy?\nwhat?\n what? \n")
    with pytest.raises(InputError, match="at least 3 different ones"):
        generator.read_questions(tmp_path / "q.txt")


def test_questions_in_another_encoding_are_one_line(tmp_path):
    """As an old editor writes them, and no traceback."""
    (tmp_path / "q.txt").write_bytes(
        "what?\nwhere?\nde quelle taille, \u00e9norme?\n".encode("latin-1")
    )
    with pytest.raises(InputError, match=r"--questions .*q.txt: .*a text file \(UTF-8\) is wanted"):
        generator.read_questions(tmp_path / "q.txt")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_question_may_hold_what_ends_a_line_elsewhere(tmp_path, end):
    """A soft break, as Word and PowerPoint write it, made two questions of one: each half was asked
    of its own."""
    lines = ["what\vis it?", "where\u2028is it?", "", "is\x85it\fred?"]
    (tmp_path / "q.txt").write_bytes(end.join(lines).encode())
    equal(generator.read_questions(tmp_path / "q.txt"), [x for x in lines if x], "three")


@pytest.mark.parametrize(("most", "size"), [(0, (60, 40)), (2400, (60, 40)), (600, (30, 20))])
def test_a_small_picture_is_sent_to_the_server_as_it_is(most, size):
    """--max-pixels makes large ones smaller, and none larger."""
    for picture, want in ((Image.new("RGB", (60, 40)), size), (Image.new("RGB", (6, 4)), (6, 4))):
        _, content = generator.as_url(picture, most).split(",")
        equal(Image.open(io.BytesIO(base64.b64decode(content))).size, want, "as_url")


def test_a_narrow_picture_keeps_a_pixel_of_its_width():
    """4,000 to 1, made smaller: none would be no picture."""
    _, content = generator.as_url(Image.new("RGB", (4000, 1)), 1000).split(",")
    equal(Image.open(io.BytesIO(base64.b64decode(content))).size, (2000, 1), "as_url")


def test_a_picture_is_sent_to_the_server_as_it_looks():
    """A JPEG of fine noise: some numbers off, and nothing that would be seen."""
    noise = np.random.default_rng(0).normal(128, 40, (64, 64)).clip(0, 255).astype(np.uint8)
    kind, content = generator.as_url(Image.fromarray(noise).convert("RGB"), 0).split(",")
    equal(kind, "data:image/jpeg;base64", "what it is")
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("L"), float)
    expect(abs(sent - noise).mean() < 6, abs(sent - noise).mean(), "below 6", "as_url: quality")
