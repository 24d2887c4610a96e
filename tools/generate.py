"""Makes stage 1's dialogues about your pictures, as the paper does: an MLLM asks 3-5 questions
about a picture, then answers them, turn by turn, in one conversation.

    python -m tools.generate --images DIR --model Qwen/Qwen2.5-VL-7B-Instruct --out talks.jsonl
    python -m tools.generate --images DIR --model NAME --server http://localhost:8000/v1 \\
        --batch 64 --out talks.jsonl
    python -m tools.generate --images DIR --model toy --questions questions.txt --out talks.jsonl

The last one runs here and now: the toy MLLM answers questions that you bring. Each dialogue is
written when it is there, so that a run that was interrupted goes on where it was; what failed three
times is listed in OUT.failed.jsonl, and never becomes training data. Exit status 1 where nothing
could be made.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import base64
import fcntl
import http.client
import io
import json
import os
import random
import re
import resource
import shlex
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from PIL import Image
from tqdm import tqdm

from model import add_compression_tokens
from plumbing.adapters import load_adapter, origin_of
from plumbing.config import CommandLine, flag
from plumbing.errors import InputError, brief
from plumbing.files import open_file
from plumbing.folders import local_folder, reading
from plumbing.formats import IMAGE, parse_turn, with_marks
from plumbing.images import Images, open_image
from plumbing.lines import MOST, TOO_LONG, parse_json
from plumbing.ranks import run_command
from plumbing.template import starts_itself, write_prompt
from plumbing.weights import Options, load_mllm
from plumbing.writing import (
    append_whole,
    first_record,
    naming_errors,
    refuse_no_list,
    refuse_other,
    refuse_unwritable,
    written,
)
from tools.conversations import as_conversations
from tools.pictures import find_pictures

ATTEMPTS = 3
MOST_FILES = 4096  # open at a time
HOPELESS = 50  # failures without one success: it is not the pictures
LONGEST_REPLY = 10_000_000  # bytes of a server's answer
# What a chat template writes, and no answer: a server with another template lets it through.
TEMPLATE_TOKEN = re.compile(
    r"\s*(<\|[^|\s]{1,40}\|>|</?s>|<(start|end)_of_\w+>|\[/?INST\]|</?think>)"
)


@dataclass
class Config(CommandLine):
    """Flags of the generator."""

    images: str = flag("", "a folder of pictures")
    out: str = flag("", "a .jsonl; it goes on where it was")
    model: str = flag("", "toy, a folder or hub id; with --server its name there")
    server: str = flag("", "OpenAI-compatible, http://host:8000/v1")
    api_key: str = flag("none", "of the server")
    questions: str = flag("", "a file, one a line: 3-5 drawn for a picture")
    batch: int = flag(16, "pictures at a time", least=1, most=1024)
    max_pixels: int = flag(0, "largest picture, pixels; 0: the model's own", least=0)
    max_tokens: int = flag(256, "longest reply", least=1)
    temperature: float = flag(0.7, "of the replies; 0: greedy", least=0, most=10)
    timeout: float = flag(120.0, "seconds to wait for a reply of the server", above=0, most=86_400)
    wait: float = flag(10.0, "seconds before failures are tried again", least=0, most=86_400)
    seed: int = flag(0, "of the sampling", least=0, most=2_147_483_647)


ASK_FOR_QUESTIONS = (  # what the paper asks of Qwen2.5-VL, in words of our own
    "Write 3 to 5 specific questions about this picture, each about another thing that is to be "
    "seen: objects and what they look like, the scene, visible text, how things relate. Number "
    "them, one a line, and write nothing else."
)

# --------------------------------------------------------------------------------- the conversation


class CutOff(InputError):
    """A reply that was longer than --max-tokens: half a sentence is no training data."""

    def __init__(self, text):
        super().__init__(f"reply cut off at --max-tokens: {brief(repr(text), 80)}")


class NotTheServer(InputError):
    """It is the server, the key or the name of the model: no picture will be answered."""


def refuse_template(reply):
    """A reply that begins with a token of a chat template is none of an answer, but a sign that the
    server and the model do not agree about the template."""
    if TEMPLATE_TOKEN.match(reply):
        raise InputError(f"the reply begins with a template's own token: {brief(repr(reply), 80)}")


def mark_in(text) -> str:
    """A picture's mark or a template's token in a text; empty: it has none."""
    if IMAGE in text:
        return IMAGE
    token = TEMPLATE_TOKEN.search(text)
    return token[1] if token else ""


def checked_text(reply, kind) -> str:
    """A question or an answer of a model, which may not ask for a picture that is not there.
    InputError where nothing is left of it."""
    refuse_template(reply)
    text = with_marks(reply).replace(IMAGE, "").strip()
    if not text:
        raise InputError(f"no {kind}")
    return text


def interview(questions=()):
    """The conversation about one picture (CoMa: questions first, then answers turn by turn), as a
    coroutine: yields the chat so far, [(role, text)], is sent the reply, returns the (question,
    answer) turns. InputError where a reply is of no use."""
    if not questions:
        reply = yield [("user", ASK_FOR_QUESTIONS)]
        refuse_template(reply)
        # "1. ...", " 2) ..." or "3: ..."; what a model says around its list is left out.
        numbered = re.findall(r"(?m)^\s*\d+\s*[.):]\s*(.*\S)", reply)
        questions = list(dict.fromkeys(numbered))[:5]
        if len(questions) < 3:
            raise InputError(f"wanted 3 to 5 numbered questions, got {brief(repr(reply), 80)}")
    chat = []
    for question in questions:
        chat.append(("user", checked_text(question, "question")))
        reply = yield chat
        chat.append(("assistant", checked_text(reply, f"answer to {brief(question)!r}")))
    texts = [text for _, text in chat]
    return list(zip(texts[::2], texts[1::2], strict=True))


def converse(replies, talks) -> dict:
    """Interviews, all of them one reply further at a time. talks: {picture file: interview}.
    -> {picture file: turns, or the error: of a picture, a server, a model}."""
    done, chats, pictures = {}, {}, {}
    for file, talk in talks.items():
        try:
            pictures[file], chats[file] = open_image(file), next(talk)
        except InputError as e:
            done[file] = e
    while chats:  # those that wait for a reply
        asked = [(pictures[file], chat) for file, chat in chats.items()]
        try:
            answers = replies(asked)
        except NotTheServer:
            raise
        except Exception as e:  # whatever it is, it costs these pictures and no others
            answers = [e] * len(asked)
        for file, reply in zip(list(chats), answers, strict=True):
            try:
                if isinstance(reply, Exception):
                    raise reply
                chats[file] = talks[file].send(reply)
            except StopIteration as end:
                done[file] = end.value
            except Exception as e:
                done[file] = e
            if file in done:
                del chats[file]
    return done


# ------------------------------------------------------------------------------------- who is asked


def load_asked(cfg) -> tuple:
    """-> (the MLLM that is asked in this process, its processor)."""
    path, options = local_folder(cfg.model), Options(max_pixels=cfg.max_pixels)
    mllm, processor, has_adapter = load_mllm(path, cfg.model, options)
    if has_adapter:  # which may have taught the rows of new tokens
        add_compression_tokens(mllm, processor.tokenizer, 0)
        load_adapter(mllm, path)
    return mllm.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def ask_model(cfg):
    """-> function([(picture, chat)]) -> replies, of an MLLM in this process, all in a batch."""
    mllm, processor = load_asked(cfg)
    with reading(origin_of(mllm).folder, "generation_config.json"):
        replies = replies_of(mllm, processor, cfg)
        replies([(Image.new("RGB", (64, 64)), [("user", "a")])], most=1)  # a trial
    torch.manual_seed(cfg.seed)
    return replies


def replies_of(mllm, processor, cfg):
    """See `ask_model`."""
    read = reply_reader(mllm, processor.tokenizer)
    sampling = {"do_sample": False}
    if cfg.temperature:
        sampling = {"do_sample": True, "temperature": cfg.temperature}

    def prompt(chat):
        talk = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in chat]
        talk[0]["content"].insert(0, {"type": "image"})
        return write_prompt(processor, talk)

    @torch.no_grad()
    def replies(asked, most=cfg.max_tokens):
        prompts = [prompt(chat) for _, chat in asked]
        inputs = processor(
            text=prompts,
            add_special_tokens=not starts_itself(processor, prompts[0]),
            images=[[picture] for picture, _ in asked],
            padding=True,
            padding_side="left",  # every reply begins in the same column
            return_tensors="pt",
        ).to(mllm.device)
        ids = mllm.generate(**inputs, max_new_tokens=most, **sampling)
        return [read(row) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]

    return replies


def reply_reader(mllm, tokenizer):
    """-> function(a reply's ids) -> its text; or the error, where it is cut off, or begins with a
    token of the template."""
    ends = mllm.generation_config.eos_token_id  # one or several
    ends = set(ends) if isinstance(ends, list) else {ends}
    ends.add(tokenizer.eos_token_id)
    added = tokenizer.added_tokens_decoder  # a template's own tokens are among them
    own = {token_id for token_id, token in added.items() if token.special} - ends

    def read(ids):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if ids[0] in own:  # decoding has hidden it
            token = tokenizer.decode(ids[:1])
            return InputError(f"the reply begins with a template's own token: {token}")
        # A reply is whole when its end was written; the others are cut off.
        return text if ends & set(ids) else CutOff(text)

    return read


def allow_files():
    """This process may open as many files as threads need: each request has a socket and a picture,
    and many a shell lets a process have 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MOST_FILES)), hard))


def ask_server(cfg):
    """-> function([(picture, chat)]) -> replies, of any server that speaks OpenAI's protocol
    (vLLM does); one picture a request."""
    allow_files()
    url = cfg.server.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {cfg.api_key}"}

    def replies(asked):
        ((picture, chat),) = asked
        first = [{"type": "image_url", "image_url": {"url": as_url(picture, cfg.max_pixels)}}]
        first.append({"type": "text", "text": chat[0][1]})
        talk = [{"role": "user", "content": first}]
        talk += [{"role": role, "content": text} for role, text in chat[1:]]
        asks = {"model": cfg.model, "messages": talk, "max_tokens": cfg.max_tokens}
        body = json.dumps(asks | {"temperature": cfg.temperature}).encode()
        # The standard library: the hub's client refuses every server under HF_HUB_OFFLINE.
        request = urllib.request.Request(url, body, headers)
        return [read_reply(post(request, cfg))]

    return replies


def post(request, cfg) -> bytes:
    """What the server answers; NotTheServer where it is not there, or knows neither the key nor the
    model."""
    try:
        with urllib.request.urlopen(request, timeout=cfg.timeout) as answer:
            return answer.read(LONGEST_REPLY)
    except urllib.error.HTTPError as e:
        said = brief(e.read(2000).decode("utf-8", "replace"))
        if e.code in (401, 403, 404):  # key, rights, path or model
            raise NotTheServer(f"--server {cfg.server}: {e.code} {e.reason}: {said}") from None
        raise InputError(f"the server says {e.code} {e.reason}: {said}") from None
    except urllib.error.URLError as e:
        if isinstance(e.reason, ConnectionResetError | BrokenPipeError):  # it did answer the call
            raise InputError(f"the server hung up: {brief(e.reason)}") from None
        reason = f"not reached: {brief(e.reason)}; is it running, and the URL right?"
        raise NotTheServer(f"--server {cfg.server}: {reason}") from None
    except (OSError, http.client.HTTPException) as e:
        raise InputError(f"the server's answer broke off: {brief(e) or type(e).__name__}") from None


def read_reply(answer) -> str:
    """The text of a chat completion; InputError where there is none."""
    try:
        choice = json.loads(answer)["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        raise InputError(
            f"the server's answer is no chat completion: {brief(repr(answer), 80)}"
        ) from None
    if not isinstance(text, str | None):
        raise InputError(f"the server's answer is no text: {brief(repr(text), 80)}")
    if finish == "length":
        raise CutOff(text)
    return text or ""


def as_url(picture, max_pixels) -> str:
    """A picture as a data: URL, made smaller where it has more than max_pixels (0: never)."""
    w, h = picture.size
    if 0 < max_pixels < w * h:
        scale = (max_pixels / (w * h)) ** 0.5
        picture = picture.resize((max(1, int(w * scale)), max(1, int(h * scale))))
    jpeg = io.BytesIO()
    picture.save(jpeg, "jpeg", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def refuse_no_url(server, api_key):
    """InputError where --server is no address that could be asked, or the key cannot be sent."""
    if not (api_key.isascii() and api_key.isprintable()):
        raise InputError(f"--api-key {brief(ascii(api_key), 20)}: printable ASCII is wanted")
    try:
        parts = urlsplit(server)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or not server.isascii() or not server.isprintable() or " " in server:
        raise InputError(f"--server {brief(server)}: no URL; http://localhost:8000/v1 is one")


# --------------------------------------------------------------------------------- all the pictures


def read_questions(path) -> list:
    """The questions of --questions, one a line; none where the flag is empty."""
    if not path:
        return []
    try:
        with open_file(path, f"--questions {brief(path)}", "list of questions") as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        reason = f"{brief(e)}; a text file (UTF-8) is wanted"
        raise InputError(f"--questions {brief(path)}: {reason}") from None
    questions = []
    # Trap: to str.splitlines a line ends at ten characters, as at the one of a soft break in Word.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if mark := mark_in(line):
            reason = f"has {mark}, which is no text of a question; take it out"
            raise InputError(f"--questions {brief(path)}, line {number}: {reason}")
        if line.strip():
            questions.append(line.strip())
    questions = list(dict.fromkeys(questions))  # else a dialogue may ask the same twice
    if len(questions) < 3:
        raise InputError(f"--questions {path}: a file of at least 3 different ones, one a line")
    return questions


def refuse_outside(names, folder):
    """InputError where training would not take a picture for one of the folder's, as a link that
    leads out of it."""
    images = Images(folder)
    for name in names:
        try:
            images.find(name)
        except InputError:
            text = f"{brief(name)} is a link that leads out of it, which training would refuse"
            hint = "give the folder that the pictures are in"
            raise InputError(f"--images {brief(folder)}: {text}; {hint}") from None


def interviews_about(names, questions, cfg) -> dict:
    """{picture file: interview}; each picture draws 3-5 of the questions, if there are any."""
    talks = {}
    for name in names:
        rng = random.Random(f"{cfg.seed}/{name}")  # the same ones when a run goes on
        some = rng.sample(questions, min(len(questions), rng.randint(3, 5)))
        talks[str(Path(cfg.images, name))] = interview(some)
    return talks


def ask_once(names, questions, replies, cfg, pool):
    """Yields (name, its line of OUT or the error) of each picture, as they come."""
    size = 1 if cfg.server else cfg.batch  # a server answers one request for one picture
    running = []
    for i in range(0, len(names), size):
        talks = interviews_about(names[i : i + size], questions, cfg)
        running.append(pool.submit(converse, replies, talks))
    for part in as_completed(running):
        for path, outcome in part.result().items():
            name = os.path.relpath(path, cfg.images)
            is_error = isinstance(outcome, Exception)
            yield name, outcome if is_error else line_of(name, outcome)


def ask_until_done(names, questions, replies, cfg, bar) -> dict:
    """Asks about all pictures, and up to twice again about those that failed; writes each dialogue
    when it is there. -> {picture: error} of what failed three times."""
    errors, any_made = {}, False  # Trap: not by bar.n, which stays as it is in a log file
    # A server is asked about many pictures at once, a thread for each; a model in batches.
    pool = ThreadPoolExecutor(cfg.batch if cfg.server else 1)
    try:
        for attempt in range(ATTEMPTS):
            if names:
                time.sleep(attempt * cfg.wait)
            errors = {}
            for name, outcome in ask_once(names, questions, replies, cfg, pool):
                if not isinstance(outcome, Exception):
                    append_whole(cfg.out, outcome, "--out")
                    any_made = True
                    bar.update()
                    continue
                errors[name] = f"{type(outcome).__name__}: {brief(outcome)}"
                if len(errors) == HOPELESS and not any_made:
                    raise InputError(f"{HOPELESS} pictures failed, none succeeded: {errors[name]}")
            names = sorted(errors)
    finally:
        pool.shutdown(cancel_futures=True)
    return errors


def line_of(name, turns):
    """A dialogue as a line of OUT. An InputError in its place where training would refuse it: two
    halves of a mark may have met in it, half a character been cut off, a book been written."""
    try:
        line = json.dumps(as_conversations(name, name, turns), ensure_ascii=False).encode()
        picture_of(line)
    except ValueError as e:
        return InputError(f"a dialogue that training would refuse: {brief(e)}")
    return line + b"\n" if len(line) < MOST else InputError(TOO_LONG)


def list_failures(errors, path):
    """Writes OUT.failed.jsonl, or removes that of an earlier run."""
    if not errors:
        path.unlink(missing_ok=True)
    else:
        lines = []
        for name, error in sorted(errors.items()):
            lines.append(json.dumps({"image": name, "error": error}) + "\n")
        with written(path, "--out") as part:
            part.write_text("".join(lines))
        print(f"{len(errors)} failed three times, see {path}; the same command tries them again")


def picture_of(line) -> str:
    """The picture of a line of OUT; ValueError for any other line."""
    raw = parse_json(line)
    if not isinstance(raw, dict) or not isinstance(raw.get("image"), str) or not raw["image"]:
        raise ValueError('it has no "image", the path of one')
    talk = raw.get("conversations")
    if not isinstance(talk, list) or not talk or len(talk) % 2:
        raise ValueError('it has no "conversations", a list of questions and answers in turn')
    for i, turn in enumerate(talk):
        parse_turn(turn, i)
    return raw["image"]


def holds_failures(path) -> bool:
    """Whether a file begins as OUT.failed.jsonl does."""
    return set(first_record(path) or ()) == {"image", "error"}


def read_done(out) -> set:
    """The pictures that an earlier run has made dialogues of. Its last line is removed where it was
    cut off: that dialogue is made again. InputError for a file of anything else, which stays."""
    done, size = set(), 0  # size: bytes of the lines that are whole
    if not out.exists():
        return done
    with open_file(out, f"--out {brief(out)}", "list") as file:
        lines = file.readlines()
    for number, line in enumerate(lines, 1):
        try:
            done.add(picture_of(line))
        except (ValueError, RecursionError) as e:
            if is_cut_off(line):
                os.truncate(out, size)
                return done
            text = f"line {number} is no dialogue of an earlier run: {brief(e)}; take another file"
            raise InputError(f"--out {brief(out)}: {text}") from None
        size += len(line)
    if lines and not lines[-1].endswith(b"\n"):  # whole but for its end
        append_whole(out, b"\n", "--out")
    return done


def is_cut_off(line) -> bool:
    """Whether a line is the beginning of one that a run writes, and no more."""
    line = line.rstrip(b"\0")  # what a power cut may leave of the bytes that were not written
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        start = b'{"id": "'
        return not line.endswith(b"\n") and line[: len(start)] == start[: len(line)]
    return False


@contextmanager
def alone(out):
    """No other process writes OUT meanwhile: both would ask about the same pictures."""
    with naming_errors(out, "--out"):
        file = open(out, "ab")
    with file:
        try:
            # Trap: not lockf. It would give up the lock as soon as any file of OUT is closed.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_at(out, file):
                raise BlockingIOError  # the other one ended this very moment, and removed it
        except BlockingIOError:
            text = "another tools.generate writes it; wait for that one, or take another file"
            raise InputError(f"--out {brief(out)}: {text}") from None
        try:
            yield
        finally:
            if is_at(out, file) and not os.fstat(file.fileno()).st_size:  # nothing came of it
                os.unlink(os.path.realpath(out))  # a link stays one


def is_at(path, file) -> bool:
    """Whether an open file is still the one at `path`."""
    with suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


def generate(cfg) -> int:
    """Dialogues about the pictures of a folder, each written when it is there. -> the exit status:
    1 where there was something to ask about, and nothing came of it."""
    for name in ("images", "out", "model"):
        if not getattr(cfg, name):
            raise InputError(
                f"--{name} is missing: --images DIR --out FILE --model NAME are needed"
            )
    # 1. Refuse, before any work, what cannot be asked or written.
    if cfg.server:
        refuse_no_url(cfg.server, cfg.api_key)
    failed = Path(f"{cfg.out}.failed.jsonl")
    for path in (cfg.out, failed):
        refuse_unwritable(path, "--out", [cfg.questions])
    refuse_no_list(cfg.out, "--out")
    refuse_other(failed, "--out", holds_failures, "list of what failed")
    with alone(cfg.out):
        return generate_missing(cfg, failed)


def generate_missing(cfg, failed) -> int:
    """Dialogues about the pictures that OUT has none of. -> as `generate`."""
    # 2. What is left to do after an earlier run, and who is asked.
    done = read_done(Path(cfg.out))
    questions = read_questions(cfg.questions)
    names = [name for name in find_pictures(cfg.images) if name not in done]
    refuse_outside(names, cfg.images)
    print(f"{len(names):,} pictures to ask about, {len(done):,} are done")
    replies = ask_server(cfg) if cfg.server else ask_model(cfg)

    # 3. Ask, and write down what failed.
    total = len(names) + len(done)
    start = len(done)
    with tqdm(total=total, initial=start, unit="img", desc="dialogues", disable=None) as bar:
        errors = ask_until_done(names, questions, replies, cfg, bar)
    list_failures(errors, failed)
    if names and len(errors) == len(names):
        return 1
    data, root = map(shlex.quote, (cfg.out, cfg.images))  # a path may have blanks
    print(f"wrote {cfg.out}: python pretrain.py --data {data} --image-root {root}")
    return 0


def main(argv):
    """The command line."""
    return generate(Config.parse(argv))


if __name__ == "__main__":
    run_command(main)
