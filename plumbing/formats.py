"""The formats that data come in: JSONL, and pictures with captions (MMEB's parquet: mmeb.py). What
is read is plain: a piece of content is (text, images), a pair (query, targets, negatives), a
dialogue (content, turns, id); data.py makes its Items of them. Errors say file, line and field.

Top to bottom: lazy sequences - one record - lines - pictures with captions."""

import csv
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from plumbing.errors import InputError
from plumbing.images import Images

IMAGE = "<image>"
DESCRIBE = "Describe the picture."  # instructions where the data are bare captions
FIND_CAPTION = f"{IMAGE} Find a caption of the picture."
FIND_PICTURE = "Find the picture of this caption: "


class Source(NamedTuple):
    """What is known of the file behind a sequence: a number that changes with it, the pictures that
    it names and that are not there, and the lines or the table that it was read from."""

    digest: int = 0
    lost: Sequence = ()
    raw: object = None


class Lazy(Sequence):
    """A sequence whose i-th element is `get(i)`, made when it is asked for: nothing is stored."""

    def __init__(self, length: int, get: Callable, source=Source()):  # noqa: B008
        self.length, self.get, self.source = length, get, source

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(i)
        return self.get(i)

    def map(self, f):
        """The same sequence with f applied to each element, when it is asked for."""
        return Lazy(self.length, lambda i: f(self.get(i)), self.source)

    def first(self, n):
        """At most n elements of it; all of them where n is None or 0."""
        return Lazy(min(n or self.length, self.length), self.get, self.source)


def digest_of(sets) -> int:
    """Refuses data that name pictures which are not there (MMEB's rows are read when they are
    drawn), before any training. -> a number that changes with the data (of parquet files, with
    their sizes), so that a run is not resumed with others."""
    for examples in sets:
        if lost := examples.source.lost:
            others = f" (and {len(lost) - 1} more are missing)" if len(lost) > 1 else ""
            hint = "Is --image-root right? `python -m tools.check` lists them"
            raise InputError(f"{lost[0]}: no such picture{others}. {hint}")
    return sum(len(x) + x.source.digest for x in sets) % 2**32


def choose(subsets, names) -> dict:
    """ "A:1000,B" -> {"A": 1000, "B": None}; "" -> all there are. InputError for other names."""
    if not subsets:
        return {name: None for name in names}
    chosen = {}
    for word in subsets.split(","):
        name, _, rows = word.partition(":")
        if name not in names or (rows and not (rows.isdigit() and int(rows))):
            choices = ",".join(names)
            raise InputError(f"--subsets {name}:{rows}: choose name or name:rows of {choices}")
        chosen[name] = int(rows) if rows else None
    return chosen


# -------------------------------------------------------------------------------------- one record


class Content(NamedTuple):
    """A text with `<image>` where each picture goes, and the pictures."""

    text: str
    images: tuple = ()


def parse_content(raw, images, subset="") -> Content:
    """{"text", "image"}, either of which may be missing; `image`: one path or more."""
    if not isinstance(raw, dict) or not (raw.get("text") or raw.get("image")):
        raise InputError('needs {"text": ..., "image": ...}, at least one of them not empty')
    text, paths = raw.get("text") or "", raw.get("image") or []
    if isinstance(paths, str):
        paths = [paths]
    strings = isinstance(paths, list) and all(isinstance(p, str) for p in paths)
    if not isinstance(text, str) or not strings:
        raise InputError('"text" must be a string, "image" a path or a list of paths')
    # MMEB's mark; a picture without a text is the picture alone.
    text = text.replace("<|image_1|>", IMAGE) if text else IMAGE * len(paths)
    if (n := text.count(IMAGE)) != len(paths):
        raise InputError(f"the text has {n} {IMAGE} for {len(paths)} pictures: one where each goes")
    return Content(text, tuple(images.find(p, subset) for p in paths))


def parse_dialogue(raw, images) -> tuple:
    """LLaVA: {"id", "image", "conversations": [{"from": "human" or "gpt", "value": ...}, ...]}.
    -> (Content, ((question, answer), ...), id)."""
    talk = raw.get("conversations") if isinstance(raw, dict) else None
    if not isinstance(talk, list) or not talk or len(talk) % 2:
        raise InputError('"conversations" must be a list of questions and answers in turn')
    for i, turn in enumerate(talk):
        speaker = "gpt" if i % 2 else "human"
        value = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(value, str) or not value or turn.get("from") != speaker:
            raise InputError(f'conversations[{i}] must have "from": "{speaker}" and a "value"')
    values = [turn["value"] for turn in talk]
    # What is compressed is the picture alone; the rest of the first turn is its question.
    pictures = {"text": IMAGE * values[0].count(IMAGE), "image": raw.get("image")}
    content = parse_content(pictures, images)
    values[0] = values[0].replace(IMAGE, "").strip("\n")
    turns = zip(values[::2], values[1::2], strict=True)
    return content, tuple(turns), str(raw.get("id") or "")


def parse_pair(raw, images) -> tuple:
    """{"query": {"text", "image"}, "target": {...} or a list of them, "negatives": [{...}]}.
    -> (query, targets, negatives), all Contents."""
    if not isinstance(raw, dict) or not raw.get("query") or not raw.get("target"):
        raise InputError('needs "query" and "target"')
    several = raw["target"] if isinstance(raw["target"], list) else [raw["target"]]
    query = parse_content(raw["query"], images)
    targets = tuple(parse_content(x, images) for x in several)
    negatives = tuple(parse_content(x, images) for x in raw.get("negatives") or [])
    return query, targets, negatives


def parse_caption(raw, images) -> tuple:
    """One line of metadata.jsonl or .csv: {"file_name", "text"} -> (path, caption)."""
    for field in ("file_name", "text"):
        if not isinstance(raw, dict) or not isinstance(raw.get(field), str) or not raw[field]:
            raise InputError(f'needs "{field}", a string that is not empty')
    return images.find(raw["file_name"]), raw["text"]


def located(where, parse, raw):
    """parse(raw), with errors that say where."""
    try:
        return parse(raw)
    except (LookupError, RecursionError, TypeError, ValueError) as e:
        raise InputError(f"{where}: {e}") from None


# ------------------------------------------------------------------------------------------- lines


def parse_json(line):
    """One line of JSON. Trap: half a surrogate pair is good JSON, and no text."""
    value = json.loads(line)
    if b"\\ud" in line or b"\\uD" in line:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def csv_lines(path) -> list:
    """[(line number, the row as a line of JSON)] of a csv file."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)  # else an open quote swallows the rest
        try:
            return [(reader.line_num, json.dumps(row).encode() + b"\n") for row in reader]
        except (csv.Error, UnicodeDecodeError) as e:
            raise InputError(f"{path}, after line {reader.line_num}: {e}") from None


def read_lines(path, parse, image_root) -> Lazy:
    """The lines of a .jsonl or .csv file, each parsed when asked for: parse(raw, images)."""
    if not os.path.isfile(path):
        raise InputError(f"--data {path}: no such file; choose shapes, a .jsonl, a folder")
    images = Images(image_root or Path(path).parent)
    if str(path).endswith(".csv"):
        lines = csv_lines(path)
    else:
        with open(path, "rb") as file:
            # Bytes, parsed when drawn: a million lines of JSON would be gigabytes of objects.
            lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    if not lines:
        raise InputError(f"--data {path}: holds no lines")
    digest = 0  # of the bytes: another order is other data
    for _, line in lines:
        digest = zlib.crc32(line, digest)

    def get(i):
        number, line = lines[i]
        return located(f"{path}, line {number}", lambda x: parse(parse_json(x), images), line)

    return Lazy(len(lines), get, Source(digest, images.lost, lines))


def read_valid_lines(path, parse, image_root) -> Lazy:
    """`read_lines`, each tried once now: the first bad one is named before any training."""
    lines = read_lines(path, parse, image_root)
    short = len(lines) < 50_000
    for i in tqdm(range(len(lines)), f"reading {path}", leave=False, disable=short or None):
        lines[i]
    return lines


def read_dialogues(source, image_root) -> Lazy:
    """(content, turns, id) of a JSONL file in LLaVA's layout, or of a folder with captions."""
    if captions_file(source):
        return caption_dialogues(captions_file(source), image_root)
    return read_valid_lines(source, parse_dialogue, image_root)


def read_pair_sets(source, image_root) -> dict:
    """{name: Lazy of (query, targets, negatives)} of a JSONL file, or of a folder with captions."""
    if source.endswith(".jsonl"):
        return {Path(source).stem: read_valid_lines(source, parse_pair, image_root)}
    return caption_pairs(captions_file(source), image_root)


# -------------------------------------------------------------------------- pictures with captions


def captions_file(folder):
    """metadata.jsonl or metadata.csv of a folder of pictures with captions, or None."""
    for name in ("metadata.jsonl", "metadata.csv"):
        if Path(folder, name).exists():
            return Path(folder, name)
    return None


def caption_dialogues(file, image_root) -> Lazy:
    """Pictures with captions as dialogues of one turn: describe the picture."""
    captions = read_valid_lines(str(file), parse_caption, image_root)

    def dialogue(i):
        path, text = captions[i]
        return Content(IMAGE, (path,)), ((DESCRIBE, text),), f"{file}:{i + 1}"

    return Lazy(len(captions), dialogue, captions.source)


def caption_pairs(file, image_root) -> dict:
    """Pictures with captions as two sets of pairs: picture -> all of its captions ("i2t"), and
    caption -> picture ("t2i")."""
    captions = read_lines(str(file), parse_caption, image_root)
    texts_of = {}  # a picture's captions are all right, and no negatives of each other
    for path, text in captions:
        texts_of.setdefault(path, []).append(text)
    paths = list(texts_of)

    def picture_to_text(i):
        targets = tuple(Content(text) for text in texts_of[paths[i]])
        return Content(FIND_CAPTION, (paths[i],)), targets, ()

    def text_to_picture(i):
        path, text = captions[i]
        return Content(FIND_PICTURE + text), (Content(IMAGE, (path,)),), ()

    name = Path(file).parent.name
    return {
        f"{name}_i2t": Lazy(len(paths), picture_to_text, captions.source),
        f"{name}_t2i": Lazy(len(captions), text_to_picture),  # the same file: it counts once
    }
