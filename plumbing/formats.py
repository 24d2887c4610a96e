"""The formats that data come in: lists of dialogues or pairs (JSONL, or a JSON array), and pictures
with captions (MMEB's parquet: mmeb.py). What is read is plain: a piece of content is (text,
images), a pair (query, targets, negatives), a dialogue (content, turns, id); data.py makes its
Items of them. Errors say file, line and field; what no code reads is refused, not dropped.

Top to bottom: the whole of the data - one record - lists - pictures with captions."""

import os
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

from plumbing.combinations import NO_SETS
from plumbing.errors import InputError, brief
from plumbing.files import captions_in, digest_of_all, names_a_list
from plumbing.first_pass import Known, Place, Tries, all_the_same, first_pass, skip, skipped_in
from plumbing.images import Images
from plumbing.lines import ARRAY, SURPLUS, Lazy, Lost, Source, attempts, open_lines, parse_json
from plumbing.once import once_a_node
from plumbing.ranks import say

IMAGE = "<image>"
MARKS = f"{IMAGE} (or MMEB's <|image_1|>)"
DESCRIBE = "Describe the picture."  # instructions where the data are bare captions
FIND_CAPTION = f"{IMAGE} Find a caption of the picture."
FIND_PICTURE = "Find the picture of this caption: "
# What lists say of an example beside it, and what changes nothing.
BESIDE = ("model", "source", "data_source", "dataset", "split", "url", "width", "height", "license")
# Words of another kind of list, and what that is.
ELSEWHERE = {
    "conversations": "a dialogue, which stage 1 reads: pretrain.py",
    "query": "a pair, which stage 2 reads: contrastive.py",
    "messages": 'a chat; pretrain.py reads "conversations" of "from" and "value", as LLaVA has',
    "file_name": "a caption: call the list metadata.jsonl, and give the folder that it is in",
}


def checked_digest(sets) -> int:
    """A number that changes with the data and with their order, so that a run is not resumed with
    others; InputError where training cannot use them, see `refuse_unfit`."""
    refuse_unfit(sets)
    return digest_of_all(len(x) + x.source.digest for x in sets)


def refuse_unfit(sets):
    """InputError, before any training, where data name pictures that are not there, or where a loss
    has nothing to tell apart. Says how many examples are skipped."""
    for examples in sets:
        examples.source.lost.refuse("`python -m tools.check` lists them")
        if skipped := examples.source.skipped:
            say(f"--skip-bad: {len(skipped):,} of {len(examples):,} examples are skipped")
    one_sided = [x.source for x in sets if x.source.same]
    for source in one_sided:
        text = f"{source.where(0)}: {source.same}"
        if len({x.same for x in one_sided}) == 1 and len(one_sided) == len(sets):
            raise InputError(
                f"{text}: there is nothing to tell apart; add other pairs, or negatives"
            )
        say(f"{text}: only other lists have its negatives")


def choose(subsets, names) -> dict:
    """ "A:1000,B" -> {"A": 1000, "B": None}; "" -> all there are. InputError for other names."""
    if not subsets:
        return dict.fromkeys(names)
    chosen = {}
    for word in subsets.split(","):
        name, colon, rows = word.strip().partition(":")
        # Trap: int() takes no more than 4,300 digits, and len() gives no more than 2^63 - 1.
        is_number = rows.isascii() and rows.isdigit() and len(rows) <= 18 and int(rows) > 0
        if name not in names or (colon and not is_number):
            choices = brief(",".join(names))
            raise InputError(f"--subsets {brief(subsets)}: choose name or name:rows of {choices}")
        if name in chosen:
            raise InputError(f"--subsets {brief(subsets)}: {name} stands twice in it")
        chosen[name] = int(rows) if colon else None
    return chosen


# -------------------------------------------------------------------------------------- one record


def refuse_unknown(raw, known):
    """ValueError where a record has a key that no code would read."""
    if unknown := raw.keys() - known:
        if SURPLUS in unknown:
            raise ValueError(f"has {SURPLUS}")
        key = min(unknown)
        close = get_close_matches(key, known, 1, 0.6)
        if not key:  # pandas' index, or a comma at the end of a line
            raise ValueError(
                "a column (a key) has no name, and would be lost; name it, or leave it out"
            )
        hint = f'did you mean "{close[0]}"?' if close else f"it takes {', '.join(known)}"
        raise ValueError(f'unknown key "{brief(key)}", which would be lost; {hint}')


class Content(NamedTuple):
    """A text with `<image>` where each picture goes, and the pictures."""

    text: str
    images: tuple = ()

    def __str__(self):  # as errors show it
        return " ".join([self.text, *map(str, self.images)])


def with_marks(text) -> str:
    """A text in which MMEB's mark for a picture, too, is `<image>`."""
    return text.replace("<|image_1|>", IMAGE)


CONTENT_FORM = '{"text": ..., "image": ...}, at least one of them not empty'


def parse_content(raw, images, subset="") -> Content:
    """{"text", "image"}, either of which may be missing; `image`: one path or more. ValueError."""
    if not isinstance(raw, dict):
        raise ValueError(f"needs {CONTENT_FORM}, not a {type(raw).__name__}")
    refuse_unknown(raw, ("text", "image"))
    text, paths = raw.get("text"), raw.get("image")
    text = "" if text is None else text
    paths = [] if paths in (None, "") else paths
    if isinstance(paths, str):
        paths = [paths]
    strings = isinstance(paths, list) and all(isinstance(p, str) and p for p in paths)
    if not isinstance(text, str) or not strings:
        raise ValueError('"text" must be a string, "image" a path or a list of paths')
    if not paths and not text.strip():
        raise ValueError(f"needs {CONTENT_FORM}")
    # A picture without a text is the picture alone.
    text = with_marks(text) if text else IMAGE * len(paths)
    if (n := text.count(IMAGE)) != len(paths):
        raise ValueError(f"the text has {n} {IMAGE} for {len(paths)} pictures: one where each goes")
    return Content(text, tuple(images.find(p, subset) for p in paths))


def parse_field(field, raw, images) -> Content:
    """parse_content of a field of a record, which its errors name."""
    try:
        return parse_content(raw, images)
    except ValueError as e:
        raise ValueError(f'"{field}": {e}') from None


def parse_turn(raw, i) -> str:
    """One turn of a dialogue, the i-th -> what is said in it."""
    speaker = "gpt" if i % 2 else "human"
    if not isinstance(raw, dict) or raw.get("from") != speaker:
        text = f'conversations[{i}] must have "from": "{speaker}" and a "value"'
        raise ValueError(f"{text}; human and gpt take turns, and it has {brief(raw, 80)}")
    value = raw.get("value")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'conversations[{i}] must have a "value", a string that is not blank')
    if raw.keys() - {"from", "value"}:
        raise ValueError(f'conversations[{i}] has more than "from" and "value": {brief(list(raw))}')
    value = with_marks(value)
    if i and IMAGE in value:
        raise ValueError(f"conversations[{i}] has {MARKS}; pictures stand in the first turn only")
    if not value.replace(IMAGE, "").strip():
        raise ValueError(f"conversations[{i}] has {IMAGE} alone: no question that is not blank")
    return value


def parse_dialogue(raw, images) -> tuple:
    """LLaVA: {"id", "image", "conversations": [{"from": "human" or "gpt", "value": ...}, ...]}.
    -> (Content, ((question, answer), ...), id). ValueError."""
    refuse_elsewhere(raw, "conversations")
    refuse_unknown(raw, ("id", "image", "conversations", *BESIDE))
    talk = raw.get("conversations")
    values = [parse_turn(turn, i) for i, turn in enumerate(talk)] if isinstance(talk, list) else []
    if not values or len(values) % 2:
        raise ValueError('"conversations" must be a list of questions and answers in turn')
    name = raw.get("id")
    if not isinstance(name, str | int | None):
        raise ValueError(f'"id" must be a string or a number, not {brief(name)}')
    if raw.get("image") in (None, "", []) and IMAGE not in values[0]:
        raise ValueError(f'has no "image", and no {IMAGE} in its first turn: nothing to compress')
    # What is compressed is the picture alone; the rest of the first turn is its question.
    pictures = {"text": IMAGE * values[0].count(IMAGE), "image": raw.get("image")}
    content = parse_content(pictures, images)
    values[0] = values[0].replace(IMAGE, "").strip()
    turns = zip(values[::2], values[1::2], strict=True)
    return content, tuple(turns), str(name or "")


def parse_pair(raw, images) -> tuple:
    """{"query": {"text", "image"}, "target": {...} or a list of them, "negatives": [{...}]}.
    -> (query, targets, negatives), all Contents. ValueError."""
    refuse_elsewhere(raw, "query")
    if not raw.get("query") or not raw.get("target"):
        raise ValueError('needs "query" and "target"')
    refuse_unknown(raw, ("query", "target", "negatives", "id", *BESIDE))
    query = parse_field("query", raw["query"], images)
    targets, negatives = raw["target"], raw.get("negatives")
    if not isinstance(targets, list):
        targets = (parse_field("target", targets, images),)
    else:
        targets = parse_list("target", targets, images)
    if not isinstance(negatives, list | None):
        raise ValueError(f'"negatives" must be a list, not a {type(negatives).__name__}')
    negatives = parse_list("negatives", negatives or [], images)
    if both := set(targets).intersection(negatives):
        i = min(map(negatives.index, both))
        raise ValueError(f"negatives[{i}] is a target, too, and would not be compared with it")
    # Equal ones count once: a target that stands twice has no more weight.
    return query, tuple(dict.fromkeys(targets)), tuple(dict.fromkeys(negatives))


def parse_list(field, raw, images) -> tuple:
    """The Contents of a field that is a list."""
    return tuple(parse_field(f"{field}[{i}]", x, images) for i, x in enumerate(raw))


def parse_caption(raw, images) -> tuple:
    """One line of metadata.jsonl or .csv: {"file_name", "text"} -> (path, caption). ValueError."""
    refuse_elsewhere(raw, "file_name")
    for field in ("file_name", "text"):
        value = raw.get(field)
        if not isinstance(value, str) or not value.strip():
            has = f"it has {brief(', '.join(map(repr, raw)), 60)}"
            raise ValueError(f'needs "{field}", a string that is not empty; {has}')
    refuse_unknown(raw, ("file_name", "text", "id", *BESIDE))
    if IMAGE in with_marks(raw["text"]):
        raise ValueError(f'"text" has {MARKS}, where a picture would go: a caption has none in it')
    return images.find(raw["file_name"]), raw["text"]


def refuse_elsewhere(raw, own):
    """ValueError where a record is no object, or one of another kind of list, for another stage."""
    if not isinstance(raw, dict):
        hint = f". {ARRAY}" if isinstance(raw, list) else ""
        raise ValueError(f"needs an object {{...}}, not a {type(raw).__name__}{hint}")
    if own not in raw:
        for word, kind in ELSEWHERE.items():
            if word in raw:
                raise ValueError(f"this is {kind}")


def located(where, parse, raw):
    """parse(raw), with errors that say where."""
    try:
        return parse(raw)
    except (LookupError, RecursionError, TypeError, ValueError) as e:
        raise InputError(f"{where}: {e}") from None


# ------------------------------------------------------------------------------------------- lists


def is_list(source) -> bool:
    """Whether data are one list: a file, or a folder with captions; else they are sets of MMEB."""
    return names_a_list(source) or captions_file(source) is not None


def read_lines(path, parse, image_root) -> Lazy:
    """The examples of a .jsonl, .json or .csv file, each parsed when asked for: parse(raw, images).
    None of them is tried."""
    lines = open_lines(path)
    images = Images(Place.of(image_root).image_root or Path(path).parent)

    def get(i):
        return located(lines.where(i), lambda x: parse(parse_json(x), images), lines.line(i))

    source = Source(lines.digest, lines, images, lines.where, partial(attempts, get))
    return Lazy(len(lines), get, source)


def read_tried_lines(path, parse, image_root, sides=lambda example: ((), ())) -> Lazy:
    """`read_lines`, each tried once now: the first bad one is named before any training, unless
    --skip-bad lists it. What is skipped is known of the sequence, and still in it: see `skip`."""
    lines, name = read_lines(path, parse, image_root), Path(path).name
    known = {name: Known(lines.source.digest, len(lines))}
    bad = frozenset(skipped_in(Place.of(image_root), known)[name])
    tries = Tries(lines.source, bad, sides)
    lost, targets, queries = once_a_node(lambda: first_pass(path, len(lines), tries))
    return lines.about(lost=lost, same=all_the_same(targets, queries), skipped=bad)


def read_dialogues(source, image_root) -> Lazy:
    """(content, turns, id) of a list in LLaVA's layout, or of a folder with captions."""
    if captions_file(source):
        return caption_dialogues(captions_file(source), image_root)
    refuse_folder(source)
    return skip(read_tried_lines(source, parse_dialogue, image_root))


def refuse_subsets(source, subsets):
    """InputError where --subsets would choose of a list, which has none."""
    if subsets:
        raise InputError(f"--subsets {subsets}: {NO_SETS.format(data=source)}")


def read_pair_sets(source, image_root) -> dict:
    """{name: Lazy of (query, targets, negatives)} of a list, or of a folder with captions."""
    if captions_file(source):
        return caption_pairs(captions_file(source), image_root)
    refuse_folder(source)
    return {Path(source).stem: skip(read_tried_lines(source, parse_pair, image_root, sides))}


def sides(pair) -> tuple:
    """A pair as `Tries` wants it: its targets, and its query, both with the negatives."""
    query, targets, negatives = pair
    return (*targets, *negatives), (query, *negatives)


def refuse_folder(source):
    """InputError where a folder stands in the place of a list, with what the folder is."""
    if not os.path.isdir(source):
        return
    lists = sorted([*Path(source).glob("*.jsonl"), *Path(source).glob("*.json")])
    text = "a folder without metadata.jsonl or metadata.csv"
    if any(Path(source).glob("*/*.parquet")):
        text = "in MMEB's layout; stage 2 reads its original-*.parquet and evaluate.py its "
        text += "test-*.parquet, while stage 1 takes a list of dialogues"
    elif any(Path(source).glob("*.parquet")):
        text = "one subset of MMEB; stage 2, evaluate.py and check read the folder that holds it, "
        text += "while stage 1 takes a list of dialogues"
    elif lists:
        text += f"; name the list itself: {brief(lists[0])}"
    raise InputError(f"--data {brief(source)}: is {text}")


# -------------------------------------------------------------------------- pictures with captions


def captions_file(folder):
    """metadata.jsonl or metadata.csv of a folder of pictures with captions, or None."""
    names = captions_in(folder)
    if len(names) > 1:
        raise InputError(f"{brief(folder)}: holds {' and '.join(names)}; remove one of them")
    return Path(folder, names[0]) if names else None


def caption_dialogues(file, image_root) -> Lazy:
    """Pictures with captions as dialogues of one turn: describe the picture."""
    captions = read_tried_lines(str(file), parse_caption, image_root)

    def dialogue(i):
        path, text = captions[i]
        return Content(IMAGE, (path,)), ((DESCRIBE, text),), captions.source.where(i)

    return skip(Lazy(len(captions), dialogue, captions.source))


def caption_pairs(file, image_root) -> dict:
    """Pictures with captions as two sets of pairs: picture -> all of its captions ("i2t"), and
    caption -> picture ("t2i")."""
    captions = read_tried_lines(str(file), parse_caption, image_root)
    bad = captions.source.skipped
    texts_of = {}  # a picture's captions are all right, and no negatives of each other
    for i, caption in enumerate(captions.source.read(range(len(captions)))):
        if isinstance(caption, InputError):  # --skip-bad lists it
            continue
        path, text = caption
        its_texts = texts_of.setdefault(path, [])
        if i not in bad:
            its_texts.append(text)
    paths = list(texts_of)

    def picture_to_text(i):
        targets = tuple(Content(text) for text in dict.fromkeys(texts_of[paths[i]]))
        return Content(FIND_CAPTION, (paths[i],)), targets, ()

    def text_to_picture(i):
        path, text = captions[i]
        return Content(FIND_PICTURE + text), (Content(IMAGE, (path,)),), ()

    pictures = Lazy(len(paths), picture_to_text, captions.source)
    words = Lazy(len(captions), text_to_picture, captions.source)
    texts = set().union(*texts_of.values())
    without = frozenset(i for i, path in enumerate(paths) if not texts_of[path])
    name = Path(file).parent.name
    return {
        f"{name}_i2t": skip(pictures.about(skipped=without, same=all_the_same(texts, paths))),
        # The same file: it counts once.
        f"{name}_t2i": skip(words.about(digest=0, lost=Lost(), same=all_the_same(paths, texts))),
    }
