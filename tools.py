"""The commands of data.py and model.py, which no training needs.

*check* reads a data set as training would, every line and every picture, and says what is bad.
*generate* makes stage 1's dialogues as the paper does: an MLLM asks 3-5 questions about a picture,
then answers them, turn by turn, in one conversation. *merge* folds LoRA into the weights, and makes
folders for sentence-transformers.
"""

import argparse
import base64
import io
import json
import os
import random
import re
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import data
import shapes
from data import IMAGE, InputError, Item, open_image
from shapes import as_conversations

# --------------------------------------------------------------------------------- checking data


def _lists(source, image_root):
    """Yields (file, function that makes its Lazy) for every list of examples in `source`."""
    root, file = Path(source), data._metadata(source)

    def dialogue_or_pair(raw, images):
        talk = isinstance(raw, dict) and "conversations" in raw
        return data._dialogue(raw, images)[:2] if talk else data._pair(raw, images)

    def caption(raw, images):
        path, text = data._caption(raw, images)
        return Item(IMAGE + text, (path,))

    if file or not root.is_dir():
        parse = caption if file else dialogue_or_pair
        yield file or root, partial(data._lines, str(file or root), parse, image_root)
        return
    images = data.Images(image_root or root)
    for path in sorted(root.glob("*/*.parquet")):
        make = data._eval_rows if path.name.startswith("test") else data._train_rows
        yield path, partial(make, path, path.parent.name, images)


def look(x, sizes, texts):
    """Opens the pictures in an example, each file once; notes their sizes and the texts' words."""
    if isinstance(x, str):
        texts.append(len(x.split()))
    elif isinstance(x, Item):
        texts.append(len(x.text.replace(IMAGE, "").split()))
        for picture in x.images:
            if picture not in sizes:
                try:
                    sizes[picture] = open_image(picture).size
                except InputError as e:
                    sizes[picture] = e
            if isinstance(sizes[picture], InputError):
                raise sizes[picture]
    else:
        for part in x:
            look(part, sizes, texts)


def survey(file, rows) -> tuple:
    """-> (indices of the good examples, errors, words of each text, size of each picture)."""
    good, errors, texts, sizes = [], [], [], {}

    def error_of(i):
        try:
            look(rows[i], sizes, texts)
        except InputError as e:
            return f"{e}" if str(e).startswith(f"{file}, ") else f"{file}, example {i + 1}: {e}"

    windows = (range(i, min(i + 4096, len(rows))) for i in range(0, len(rows), 4096))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding lets other threads run
        found = (error for window in windows for error in pool.map(error_of, window))
        for i, error in enumerate(tqdm(found, f"{file}", len(rows), leave=False)):
            (errors if error else good).append(error or i)
    sizes = [s for s in sizes.values() if not isinstance(s, InputError)]
    return good, errors, texts, sorted(sizes, key=lambda s: s[0] * s[1])


def copy_rows(raw, some, out):
    """Writes some of the lines, or of the rows of a table, that a Lazy was read from."""
    if isinstance(raw, list):
        out.write_bytes(b"".join(raw[i][1].rstrip(b"\r\n") + b"\n" for i in some))
    else:
        import pyarrow
        import pyarrow.parquet as pq

        pq.write_table(raw.take(pyarrow.array(some, "int64")), out)


def check(source, image_root=None, clean=None) -> int:
    """Reads every example of `source` (.jsonl; a folder with captions, or in MMEB's layout) and
    opens every picture; prints a report. clean: writes a copy of the list without the bad ones (of
    a folder: of its lists; the pictures stay where they are). -> how many are bad."""
    bad = total = 0
    if not os.path.exists(source):
        raise InputError(f"{source}: no such file or folder")
    for file, make in _lists(source, image_root):
        try:
            rows = make()
        except InputError as e:
            print(f"{file}\n  bad: {e}")
            bad += 1
            continue
        good, errors, texts, sizes = survey(file, rows)
        print(f"{file}\n  examples  {len(rows):,}, {len(errors):,} of them bad")
        if texts:
            middle = f"{min(texts)} to {max(texts)} words, median {statistics.median(texts):g}"
            print(f"  texts     {len(texts):,}: {middle}")
        if sizes:
            least, most = (f"{w} x {h}" for w, h in (sizes[0], sizes[-1]))
            print(f"  pictures  {len(sizes):,}: {least} to {most} pixels")
        for error in errors[:20]:
            print(f"  bad: {error}")
        if len(errors) > 20:
            print(f"  and {len(errors) - 20:,} more")
        if clean:
            out = Path(clean, file.relative_to(source)) if Path(source).is_dir() else Path(clean)
            out = out.with_suffix(".jsonl") if out.suffix == ".csv" else out
            out.parent.mkdir(parents=True, exist_ok=True)
            copy_rows(rows.about["raw"], good, out)
            print(f"  wrote the {len(good):,} good ones to {out}")
        bad, total = bad + len(errors), total + len(rows)
    if not total and not bad:
        raise InputError(f"{source}: nothing to check; a .jsonl, or a folder with lists in it")
    pictures = image_root or (source if Path(source).is_dir() else Path(source).parent)
    print(f"{total:,} examples, {bad:,} bad" + f"; --image-root {pictures}" * bool(clean))
    return bad


def find_pictures(folder) -> list:
    """The pictures below a folder, by their names' endings: relative paths, sorted."""
    endings, found = tuple(Image.registered_extensions()), []
    for top, _, names in os.walk(folder, followlinks=False):
        where = os.path.relpath(top, folder)
        found += [os.path.normpath(f"{where}/{n}") for n in names if n.lower().endswith(endings)]
    if not found:
        raise InputError(f"--images {folder}: no such folder, or no pictures in it")
    return sorted(found)


# ------------------------------------------------------------------------------- making dialogues

ASK_FOR_QUESTIONS = (  # what the paper asks of Qwen2.5-VL, in words of our own
    "Write 3 to 5 specific questions about this picture, each about another thing that is to be "
    "seen: objects and what they look like, the scene, visible text, how things relate. Number "
    "them, one a line, and write nothing else."
)


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
        numbered = re.findall(r"(?m)^\s*\d+\s*[.):]\s*(.*\S)", reply)
        questions = list(dict.fromkeys(numbered))[:5]
        if len(questions) < 3:
            raise InputError(f"wanted 3 to 5 numbered questions, got {reply[:80]!r}")
    chat = []
    for question in questions:
        chat.append(("user", question.replace(IMAGE, "")))
        answer = (yield chat).replace(IMAGE, "").strip()
        if not answer:
            raise InputError(f"no answer to {question!r}")
        chat.append(("assistant", answer))
    return [(chat[i][1], chat[i + 1][1]) for i in range(0, len(chat), 2)]


def ask_model(args):
    """-> function([(picture, chat)]) -> replies, of an MLLM in this process, all in a batch."""
    import model

    mllm, processor, _ = model.load_mllm(model.place(args.model), args.model, 0)
    ends = mllm.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), processor.tokenizer.eos_token_id}
    mllm = mllm.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)

    def content(text, first):
        return [dict(type="image")] * first + [dict(type="text", text=text)]

    @torch.no_grad()
    def replies(asked):
        chats = [[dict(role=r, content=content(text, i == 0)) for i, (r, text) in enumerate(c)]
                 for _, c in asked]  # fmt: skip
        texts = [processor.apply_chat_template(c, add_generation_prompt=True) for c in chats]
        how = dict(padding=True, padding_side="left", return_tensors="pt")
        inputs = processor(text=texts, images=[[picture] for picture, _ in asked], **how)
        sample = dict(do_sample=True, temperature=args.temperature) if args.temperature else {}
        sample = sample or dict(do_sample=False)
        made = mllm.generate(**inputs.to(mllm.device), max_new_tokens=args.max_tokens, **sample)
        made = made[:, inputs["input_ids"].shape[1] :]
        said = processor.tokenizer.batch_decode(made, skip_special_tokens=True)
        whole = [bool(ends & set(ids.tolist())) for ids in made]
        return [text if w else CutOff(text) for text, w in zip(said, whole, strict=True)]

    return replies


def ask_server(args):
    """-> function([(picture, chat)]) -> replies, of any server that speaks OpenAI's protocol
    (vLLM does)."""
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=args.server, api_key=args.api_key, timeout=args.timeout)

    def replies(asked):
        ((picture, chat),) = asked
        jpeg = io.BytesIO()
        picture.save(jpeg, "jpeg", quality=92)
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
        first = dict(type="text", text=chat[0][1])
        content = [dict(type="image_url", image_url=dict(url=url)), first]
        chat = [dict(role="user", content=content)] + [dict(role=r, content=t) for r, t in chat[1:]]
        how = dict(max_tokens=args.max_tokens, temperature=args.temperature)
        choice = client.chat_completion(chat, model=args.model, **how).choices[0]
        if choice.finish_reason == "length":
            raise CutOff(choice.message.content)
        return [choice.message.content or ""]

    return replies


def converse(replies, talks) -> dict:
    """Interviews, all of them one reply further at a time. talks: {picture file: interview}.
    -> {picture file: turns, or the error: of a picture, a server, a model}."""
    done, waiting, pictures = {}, {}, {}
    for file, talk in talks.items():
        try:
            pictures[file], waiting[file] = open_image(file), next(talk)
        except InputError as e:
            done[file] = e
    while waiting:
        asked = [(pictures[file], chat) for file, chat in waiting.items()]
        try:
            said = replies(asked)
        except Exception as e:  # whatever it is, it costs these pictures and no others
            said = [e] * len(asked)
        for file, reply in zip(list(waiting), said, strict=True):
            try:
                if isinstance(reply, Exception):
                    raise reply
                waiting[file] = talks[file].send(reply)
            except StopIteration as end:
                done[file] = end.value
            except Exception as e:
                done[file] = e
            if file in done:
                del waiting[file]
    return done


def generate(args):
    """Dialogues about the pictures of a folder. Each is written when it is there, so that a run
    that was interrupted goes on where it was; what failed three times is listed beside, and never
    becomes training data."""
    out, failed = Path(args.out), Path(f"{args.out}.failed.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    old = out.read_bytes() if out.exists() else b""
    old = old[: old.rfind(b"\n") + 1]  # a line that was cut off is made again
    done = {data._located(f"{out}, line {n}", lambda x: json.loads(x)["image"], line)
            for n, line in enumerate(old.splitlines(), 1)}  # fmt: skip
    questions = []
    if args.questions:
        text = Path(args.questions).read_text() if os.path.isfile(args.questions) else ""
        questions = [q for q in map(str.strip, text.splitlines()) if q]
        if len(questions) < 3:
            raise InputError(f"--questions {args.questions}: a file of at least 3, one a line")
    todo = [f for f in find_pictures(args.images) if f not in done]
    print(f"{len(todo):,} pictures to ask about, {len(done):,} are done")
    replies = (ask_server if args.server else ask_model)(args)
    # A server is asked about many pictures at once, a thread for each; a model in batches.
    size, threads = (1, args.batch) if args.server else (args.batch, 1)

    def talk(name):
        rng = random.Random(f"{args.seed}/{name}")
        some = rng.sample(questions, min(len(questions), rng.randint(3, 5)))
        return str(Path(args.images, name)), interview(some)

    out.write_bytes(old)
    bar = tqdm(total=len(todo) + len(done), initial=len(done), unit="img", desc="dialogues")
    pool, errors = ThreadPoolExecutor(threads), {}
    try:
        for attempt in range(3):
            time.sleep(attempt * args.wait if todo else 0)
            parts = [dict(map(talk, todo[i : i + size])) for i in range(0, len(todo), size)]
            running, errors = [pool.submit(converse, replies, part) for part in parts], {}
            for path, turns in (x for r in as_completed(running) for x in r.result().items()):
                name = os.path.relpath(path, args.images)
                if isinstance(turns, Exception):
                    errors[name] = f"{type(turns).__name__}: {turns!s:.200}"
                    if len(errors) == 50 and bar.n == len(done):
                        raise InputError(f"50 pictures failed and none did not: {errors[name]}")
                else:
                    line = json.dumps(as_conversations(name, name, turns), ensure_ascii=False)
                    with open(out, "a", encoding="utf-8") as file:
                        file.write(line + "\n")
                    bar.update()
            todo = sorted(errors)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    failed.unlink(missing_ok=True)
    if errors:
        lines = (json.dumps(dict(image=f, error=e)) + "\n" for f, e in sorted(errors.items()))
        failed.write_text("".join(lines))
        print(f"{len(errors)} failed three times, see {failed}; the same command tries them again")
    print(f"wrote {out}: python pretrain.py --data {out} --image-root {args.images}")


# ------------------------------------------------------------------------ for sentence-transformers

TEMPLATE = """{%% set head, picture, end = %s, %s, %s %%}{{ head }}{%% for m in messages %%}\
{%% if m.content is string %%}{{ m.content }}{%% else %%}{%% for part in m.content %%}\
{%% if part.type == "image" %%}{{ picture }}{%% else %%}{{ part.text }}{%% endif %%}{%% endfor %%}\
{%% endif %%}{%% endfor %%}{{ end }}"""


def export_sentence_transformers(embedder, path):
    """Saves what `SentenceTransformer(path)` needs to make the same vectors: its modules (for mean
    pooling a small one of ours), and a chat template that writes what our collator does."""
    import model

    collate, tokenizer = embedder.collate, embedder.processor.tokenizer
    if embedder.style == "vlm2vec" and hasattr(embedder.mllm.model, "get_rope_index"):
        raise InputError("sentence-transformers has no sequential positions, as vlm2vec needs")
    (ids, before), (after, mid) = collate.head, collate.mid
    texts = [tokenizer.decode(ids) + before, collate.picture]
    texts.append(data.STYLES[embedder.style] + after + tokenizer.decode(mid + collate.compress_ids))
    template = TEMPLATE % tuple(json.dumps(x, ensure_ascii=False) for x in texts)
    embedder.processor.chat_template = tokenizer.chat_template = template
    tokenizer.padding_side = "right"  # Trap: without position ids, padding in front moves all
    model.save(embedder, path)
    pooling, own = ("sentence_transformers.models.Pooling", dict(pooling_mode="lasttoken"))
    own["word_embedding_dimension"] = embedder.mllm.get_input_embeddings().weight.shape[1]
    if embedder.pooling == "mean":
        pooling, own = "compression_pooling.CompressionPooling", dict(K=embedder.K)
        shutil.copy(Path(__file__).parent / "assets" / "compression_pooling.py", path)
    kinds = {"": "sentence_transformers.models.Transformer", "1_Pooling": pooling}
    kinds["2_Normalize"] = "sentence_transformers.models.Normalize"
    modules = [dict(idx=i, name=str(i), path=p, type=k) for i, (p, k) in enumerate(kinds.items())]
    call = dict(method="forward", method_output_name="last_hidden_state")
    ways = dict(text=call, image=call, message=dict(call, format="structured"))
    transformer = dict(modality_config=ways, module_output_name="token_embeddings")
    files = {"modules.json": modules, "sentence_bert_config.json": transformer}
    files |= {"1_Pooling/config.json": own, "2_Normalize/config.json": {}}
    for name, about in files.items():
        Path(path, name).parent.mkdir(exist_ok=True)
        Path(path, name).write_text(json.dumps(about, indent=1))


# ---------------------------------------------------------------------------------------- commands


def data_commands(argv):
    """python data.py ..."""
    parser = argparse.ArgumentParser("data.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="show | export | check | generate")
    commands.add_parser("show", help="examples of the toy world (the default)")
    add = commands.add_parser("export", help="the toy world as files").add_argument
    add("out")
    add = commands.add_parser("check", help="read all data once, and say what is bad").add_argument
    add("data", help="a .jsonl, a folder with captions, or a folder in MMEB's layout")
    add("--image-root", help="where the pictures are (default: beside the list)")
    add("--clean", metavar="OUT", help="write a copy of the list without the bad examples")
    how = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    about = "make dialogues about pictures, as the paper does"
    add = commands.add_parser("generate", help=about, **how).add_argument
    add("--images", required=True, help="a folder of pictures")
    add("--out", required=True, help="a .jsonl; it goes on where it was")
    add("--model", required=True, help="toy, a folder or hub id; with --server its name there")
    add("--server", default="", help="URL of an OpenAI-compatible server, http://host:8000/v1")
    add("--api-key", default="none", help="of the server")
    add("--questions", default="", help="a file of questions, one a line: 3-5 drawn for a picture")
    add("--batch", type=int, default=16, help="pictures at a time")
    add("--max-tokens", type=int, default=256, help="longest reply")
    add("--temperature", type=float, default=0.7, help="of the replies; 0: greedy")
    add("--timeout", type=float, default=120, help="seconds to wait for a reply of the server")
    add("--wait", type=float, default=10, help="seconds before failures are tried again")
    add("--seed", type=int, default=0, help="of the sampling")
    args = parser.parse_args(argv)
    match args.command:
        case "export":
            shapes.export(args.out)
        case "check":
            return int(check(args.data, args.image_root, args.clean) > 0 and not args.clean)
        case "generate":
            generate(args)
        case _:
            shapes.show()


def model_commands(argv):
    """python model.py ..."""
    import model

    parser = argparse.ArgumentParser("model.py", description="Folds a LoRA adapter into its model.")
    parser.add_argument("command", choices=["merge"])
    parser.add_argument("source", help="a folder that a stage wrote")
    parser.add_argument("target", help="the new folder, which plain transformers loads")
    parser.add_argument("--export", choices=["sentence-transformers"], help="and this library too")
    args = parser.parse_args(argv)
    embedder = model.merge(model.load(args.source, device="cpu"))
    (export_sentence_transformers if args.export else model.save)(embedder, args.target)
    print(f"wrote {args.target}")


def run(commands):
    """The commands of a script, with an InputError as one clear line and exit status 1."""
    try:
        sys.exit(commands(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
