"""Makes stage 1's dialogues about your pictures, as the paper does: an MLLM asks 3-5 questions
about a picture, then answers them, turn by turn, in one conversation.

    python -m tools.generate --images DIR --model Qwen/Qwen2.5-VL-7B-Instruct --out talks.jsonl
    python -m tools.generate --images DIR --model NAME --server http://localhost:8000/v1 \\
        --batch 64 --out talks.jsonl
    python -m tools.generate --images DIR --model toy --questions questions.txt --out talks.jsonl

The last one runs here and now: the toy MLLM answers questions that you bring. Each dialogue is
written when it is there, so that a run that was interrupted goes on where it was; what failed three
times is listed in OUT.failed.jsonl, and never becomes training data.
"""

import base64
import io
import json
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from model import add_compression_tokens
from plumbing.errors import InputError
from plumbing.formats import IMAGE, located
from plumbing.images import open_image
from plumbing.ranks import run_command
from plumbing.template import starts_itself, write_prompt
from plumbing.weights import load_adapter, load_mllm, place
from tools.command_line import make_parser
from tools.conversations import as_conversations
from tools.pictures import find_pictures

ATTEMPTS = 3
HOPELESS = 50  # failures without one success: it is not the pictures

ASK_FOR_QUESTIONS = (  # what the paper asks of Qwen2.5-VL, in words of our own
    "Write 3 to 5 specific questions about this picture, each about another thing that is to be "
    "seen: objects and what they look like, the scene, visible text, how things relate. Number "
    "them, one a line, and write nothing else."
)

# --------------------------------------------------------------------------------- the conversation


class CutOff(InputError):
    """A reply that was longer than --max-tokens: half a sentence is no training data."""

    def __init__(self, text):
        super().__init__(f"reply cut off at --max-tokens: {text!r:.80}")


def interview(questions=()):
    """The conversation about one picture (CoMa: questions first, then answers turn by turn), as a
    coroutine: yields the chat so far, [(role, text)], is sent the reply, returns the (question,
    answer) turns. InputError where a reply is of no use."""
    if not questions:
        reply = yield [("user", ASK_FOR_QUESTIONS)]
        # "1. ...", " 2) ..." or "3: ..."; what a model says around its list is left out.
        numbered = re.findall(r"(?m)^\s*\d+\s*[.):]\s*(.*\S)", reply)
        questions = list(dict.fromkeys(numbered))[:5]
        if len(questions) < 3:
            raise InputError(f"wanted 3 to 5 numbered questions, got {reply[:80]!r}")
    chat = []
    for question in questions:
        # Neither may ask for a picture that is not there.
        chat.append(("user", question.replace(IMAGE, "")))
        reply = yield chat
        answer = reply.replace(IMAGE, "").strip()
        if not answer:
            raise InputError(f"no answer to {question!r}")
        chat.append(("assistant", answer))
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


def ask_model(args):
    """-> function([(picture, chat)]) -> replies, of an MLLM in this process, all in a batch."""
    path = place(args.model)
    mllm, processor, has_adapter = load_mllm(path, args.model)
    if has_adapter:  # which may have taught the rows of new tokens
        add_compression_tokens(mllm, processor.tokenizer, 0)
        load_adapter(mllm, path)
    ends = mllm.generation_config.eos_token_id  # one or several
    ends = set(ends) if isinstance(ends, list) else {ends}
    ends.add(processor.tokenizer.eos_token_id)
    mllm = mllm.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    sampling = {"do_sample": False}
    if args.temperature:
        sampling = {"do_sample": True, "temperature": args.temperature}

    def prompt(chat):
        talk = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in chat]
        talk[0]["content"].insert(0, {"type": "image"})
        return write_prompt(processor, talk)

    @torch.no_grad()
    def replies(asked):
        prompts = [prompt(chat) for _, chat in asked]
        inputs = processor(
            text=prompts,
            add_special_tokens=not starts_itself(processor, prompts[0]),
            images=[[picture] for picture, _ in asked],
            padding=True,
            padding_side="left",  # every reply begins in the same column
            return_tensors="pt",
        ).to(mllm.device)
        ids = mllm.generate(**inputs, max_new_tokens=args.max_tokens, **sampling)
        ids = ids[:, inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        # A reply is whole when its end was written; the others are cut off.
        whole = [bool(ends & set(row.tolist())) for row in ids]
        return [text if w else CutOff(text) for text, w in zip(texts, whole, strict=True)]

    return replies


def ask_server(args):
    """-> function([(picture, chat)]) -> replies, of any server that speaks OpenAI's protocol
    (vLLM does); one picture a request."""
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=args.server, api_key=args.api_key, timeout=args.timeout)

    def replies(asked):
        ((picture, chat),) = asked
        jpeg = io.BytesIO()
        picture.save(jpeg, "jpeg", quality=92)
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
        first = [{"type": "image_url", "image_url": {"url": url}}]
        first.append({"type": "text", "text": chat[0][1]})
        talk = [{"role": "user", "content": first}]
        talk += [{"role": role, "content": text} for role, text in chat[1:]]
        choice = client.chat_completion(
            talk, model=args.model, max_tokens=args.max_tokens, temperature=args.temperature
        ).choices[0]
        if choice.finish_reason == "length":
            raise CutOff(choice.message.content)
        return [choice.message.content or ""]

    return replies


# --------------------------------------------------------------------------------- all the pictures


def read_questions(path) -> list:
    """The questions of --questions, one a line; none where the flag is empty."""
    if not path:
        return []
    text = Path(path).read_text() if os.path.isfile(path) else ""
    questions = [line.strip() for line in text.splitlines() if line.strip()]
    if len(questions) < 3:
        raise InputError(f"--questions {path}: a file of at least 3, one a line")
    return questions


def interviews_about(names, questions, args) -> dict:
    """{picture file: interview}; each picture draws 3-5 of the questions, if there are any."""
    talks = {}
    for name in names:
        rng = random.Random(f"{args.seed}/{name}")  # the same ones when a run goes on
        some = rng.sample(questions, min(len(questions), rng.randint(3, 5)))
        talks[str(Path(args.images, name))] = interview(some)
    return talks


def ask_once(names, questions, replies, args, pool):
    """Yields (name, turns or the error) of each picture, as they come."""
    size = 1 if args.server else args.batch  # a server answers one request for one picture
    running = []
    for i in range(0, len(names), size):
        talks = interviews_about(names[i : i + size], questions, args)
        running.append(pool.submit(converse, replies, talks))
    for part in as_completed(running):
        for path, outcome in part.result().items():
            yield os.path.relpath(path, args.images), outcome


def ask_until_done(names, questions, replies, args, bar) -> dict:
    """Asks about all pictures, and up to twice again about those that failed; writes each dialogue
    when it is there. -> {picture: error} of what failed three times."""
    errors, before = {}, bar.n
    # A server is asked about many pictures at once, a thread for each; a model in batches.
    pool = ThreadPoolExecutor(args.batch if args.server else 1)
    try:
        for attempt in range(ATTEMPTS):
            if names:
                time.sleep(attempt * args.wait)
            errors = {}
            for name, outcome in ask_once(names, questions, replies, args, pool):
                if not isinstance(outcome, Exception):
                    append_dialogue(args.out, name, outcome)
                    bar.update()
                    continue
                errors[name] = f"{type(outcome).__name__}: {outcome!s:.200}"
                if len(errors) == HOPELESS and bar.n == before:
                    raise InputError(f"{HOPELESS} pictures failed and none did not: {errors[name]}")
            names = sorted(errors)
    finally:
        pool.shutdown(cancel_futures=True)
    return errors


def append_dialogue(path, name, turns):
    """One more line of OUT."""
    line = json.dumps(as_conversations(name, name, turns), ensure_ascii=False)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def list_failures(errors, path):
    """Writes OUT.failed.jsonl, or removes that of an earlier run."""
    path.unlink(missing_ok=True)
    if errors:
        lines = []
        for name, error in sorted(errors.items()):
            lines.append(json.dumps({"image": name, "error": error}) + "\n")
        path.write_text("".join(lines))
        print(f"{len(errors)} failed three times, see {path}; the same command tries them again")


def generate(args):
    """Dialogues about the pictures of a folder, each written when it is there."""
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # 1. What an earlier run has done.
    old = out.read_bytes() if out.exists() else b""
    old = old[: old.rfind(b"\n") + 1]  # a line that was cut off is made again
    done = set()
    for number, line in enumerate(old.splitlines(), 1):
        done.add(located(f"{out}, line {number}", lambda x: json.loads(x)["image"], line))

    # 2. What is left to do, and who is asked.
    questions = read_questions(args.questions)
    names = [name for name in find_pictures(args.images) if name not in done]
    print(f"{len(names):,} pictures to ask about, {len(done):,} are done")
    replies = ask_server(args) if args.server else ask_model(args)

    # 3. Ask, and write down what failed.
    out.write_bytes(old)
    total = len(names) + len(done)
    with tqdm(total=total, initial=len(done), unit="img", desc="dialogues") as bar:
        errors = ask_until_done(names, questions, replies, args, bar)
    list_failures(errors, Path(f"{out}.failed.jsonl"))
    print(f"wrote {out}: python pretrain.py --data {out} --image-root {args.images}")


def main(argv):
    """The command line."""
    parser = make_parser("generate", __doc__)
    add = parser.add_argument
    add("--images", metavar="DIR", required=True, help="a folder of pictures")
    add("--out", metavar="FILE", required=True, help="a .jsonl; it goes on where it was")
    add("--model", required=True, help="toy, a folder or hub id; with --server its name there")
    add("--server", metavar="URL", default="", help="OpenAI-compatible, http://host:8000/v1")
    add("--api-key", metavar="KEY", default="none", help="of the server")
    add("--questions", metavar="FILE", default="", help="one a line: 3-5 drawn for a picture")

    def number(name, default, text):
        text = f"{text} (default: {default})"
        add(name, type=type(default), default=default, help=text, metavar="N")

    number("--batch", 16, "pictures at a time")
    number("--max-tokens", 256, "longest reply")
    number("--temperature", 0.7, "of the replies; 0: greedy")
    number("--timeout", 120.0, "seconds to wait for a reply of the server")
    number("--wait", 10.0, "seconds before failures are tried again")
    number("--seed", 0, "of the sampling")
    generate(parser.parse_args(argv))


if __name__ == "__main__":
    run_command(main)
