"""MMEB: its 36 sets (VLM2Vec, Table 1), and its folders of parquet files, a local one or the hub's.

Top to bottom: the table - reading rows - whole data sets - finding the sets of a folder."""

import os
import re
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.errors import InputError, brief
from plumbing.first_pass import Known, Place, Tries, all_the_same, first_pass, skip, skipped_in
from plumbing.formats import Content, choose, located, parse_content, sides
from plumbing.hub import fetch
from plumbing.images import Images
from plumbing.lines import Lazy, Lost, Source, attempts
from plumbing.once import once_a_node
from plumbing.parquet import Layout, Table, pyarrow
from plumbing.ranks import say


class Subset(NamedTuple):
    """One set: its name in MMEB-eval, its meta-task, whether it is out of distribution (never
    trained on), and how many rows of MMEB-train's set are used."""

    name: str
    meta_task: str
    ood: bool
    rows: int = 0


IND, OOD = False, True
MMEB = [
    Subset("ImageNet-1K", "Classification", IND, 100_000),
    Subset("N24News", "Classification", IND, 50_000),
    Subset("HatefulMemes", "Classification", IND, 10_000),
    Subset("VOC2007", "Classification", IND, 10_000),
    Subset("SUN397", "Classification", IND, 20_000),
    Subset("Place365", "Classification", OOD),
    Subset("ImageNet-A", "Classification", OOD),
    Subset("ImageNet-R", "Classification", OOD),
    Subset("ObjectNet", "Classification", OOD),
    Subset("Country211", "Classification", OOD),
    Subset("OK-VQA", "VQA", IND, 10_000),
    Subset("A-OKVQA", "VQA", IND, 20_000),
    Subset("DocVQA", "VQA", IND, 40_000),
    Subset("InfographicsVQA", "VQA", IND, 25_000),
    Subset("ChartQA", "VQA", IND, 28_000),
    Subset("Visual7W", "VQA", IND, 70_000),
    Subset("ScienceQA", "VQA", OOD),
    Subset("VizWiz", "VQA", OOD),
    Subset("GQA", "VQA", OOD),
    Subset("TextVQA", "VQA", OOD),
    Subset("VisDial", "Retrieval", IND, 130_000),
    Subset("CIRR", "Retrieval", IND, 30_000),
    Subset("VisualNews_t2i", "Retrieval", IND, 100_000),
    Subset("VisualNews_i2t", "Retrieval", IND, 100_000),
    Subset("MSCOCO_t2i", "Retrieval", IND, 100_000),
    Subset("MSCOCO_i2t", "Retrieval", IND, 120_000),
    Subset("NIGHTS", "Retrieval", IND, 20_000),
    Subset("WebQA", "Retrieval", IND, 20_000),
    Subset("FashionIQ", "Retrieval", OOD),
    Subset("Wiki-SS-NQ", "Retrieval", OOD),
    Subset("OVEN", "Retrieval", OOD),
    Subset("EDIS", "Retrieval", OOD),
    Subset("MSCOCO", "Grounding", IND, 100_000),
    Subset("RefCOCO", "Grounding", OOD),
    Subset("RefCOCO-Matching", "Grounding", OOD),
    Subset("Visual7W-Pointing", "Grounding", OOD),
]
# Trap: one set has another name in MMEB-train.
TRAIN_NAME = {"ImageNet-1K": "ImageNet_1K"}


def training_mix() -> str:
    """What `--subsets mmeb20` stands for: the 20 trained sets with their caps, "A:1000,B:200"."""
    trained = [s for s in MMEB if s.rows]
    return ",".join(f"{TRAIN_NAME.get(s.name, s.name)}:{s.rows}" for s in trained)


def meta_task_of(name) -> tuple:
    """-> (meta-task, out of distribution?) of an evaluation set; a set of one's own is "Other"."""
    for subset in MMEB:
        if subset.name == name:
            return subset.meta_task, subset.ood
    return "Other", False


# ------------------------------------------------------------------------------------ reading rows

TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVES = ("neg_text", "neg_image_path")  # may be missing: CIRR has none
# Of a set that is cut into several files. The hub may write a hash behind it, a browser " (1)".
PART = re.compile(r"-(\d+)-of-(\d+)")
EVAL, EVAL_LISTS = ("qry_text", "qry_img_path"), ("tgt_text", "tgt_img_path")


@lru_cache(1)
def last_loaded(table):
    """The rows of the set that is being evaluated: one set's at a time are in memory."""
    return table.load()


def train_rows(files, subset, images) -> Lazy:
    """Parquet files of MMEB-train, as (query, targets, negatives); "" is an absent field."""
    images.prepare(subset)
    table = Table(files, Layout(TRAIN, maybe=NEGATIVES))
    rows = table.load()

    def content(text, image):
        return parse_content({"text": text, "image": image}, images, subset)

    def side(row, text, image):
        return of_columns(content, (row.get(text), row.get(image)), (text, image))

    def pair(row):
        negatives = ()
        if row.get("neg_text") or row.get("neg_image_path"):
            negatives = (side(row, *NEGATIVES),)
        return side(row, *TRAIN[:2]), (side(row, *TRAIN[2:]),), negatives

    def get(i):
        return located(table.where(i), pair, rows.slice(i, 1).to_pylist()[0])

    def read(indices):  # in turn: a slice at a time is ten times as fast
        first = indices[0]
        plain = rows.slice(first, len(indices)).to_pylist()
        return attempts(lambda i: located(table.where(i), pair, plain[i - first]), indices)

    source = Source(table.digest, table, images, table.where, read)
    return Lazy(len(table), get, source)


def eval_rows(files, subset, images) -> Lazy:
    """Parquet files of MMEB-eval, as (query, candidates), the positive first."""
    images.prepare(subset)
    table = Table(files, Layout(EVAL, EVAL_LISTS))

    def query(row):
        texts, paths = row["tgt_text"], row["tgt_img_path"]
        if not texts or len(texts) != len(paths or ()):
            raise ValueError("tgt_text and tgt_img_path must be lists of one length, not empty")
        content = contents_of(images, subset)
        candidates = []
        for k, pair in enumerate(zip(texts, paths, strict=True)):
            candidates.append(of_columns(content, pair, EVAL_LISTS, k))
        asked = of_columns(content, [row[name] for name in EVAL], EVAL)
        return asked, candidates

    def get(i):
        return located(table.where(i), query, last_loaded(table).slice(i, 1).to_pylist()[0])

    return Lazy(len(table), get, Source(table.digest, table, images, table.where))


def of_columns(content, pair, columns, k=None) -> Content:
    """content(*pair); the ValueError of a bad one says in which columns it stands. k: its place in
    columns of lists."""
    try:
        return content(*pair)
    except ValueError as e:
        place = "" if k is None else f"[{k}]"  # not before: a row has a thousand candidates
        columns = ", ".join(f"{name}{place}" for name in columns)
        raise ValueError(f"{columns}: {e}") from None


@lru_cache(1)
def contents_of(images, subset):
    """(text, path) -> Content, each made once: candidates repeat from row to row. One set's at a
    time are in memory."""

    @lru_cache(None)
    def content(text, path):
        return parse_content({"text": text, "image": path}, images, subset)

    return content


# -------------------------------------------------------------------------------- whole data sets


def train_sets(source, image_root, subsets, split) -> dict:
    """{name: Lazy of (query, targets, negatives)} of a folder in MMEB-train's layout; each row is
    tried once now."""
    root, chosen = find_subsets(source, subsets, f"{split}-*.parquet")
    place = Place.of(image_root)
    images, sets = Images(place.image_root or root), {}
    for name, (cap, files) in chosen.items():
        sets[name] = not_empty(train_rows(files, name, images)).first(cap)
    bad = bad_rows(place, root, {name: rows.source.raw for name, rows in sets.items()})
    tallies = once_a_node(lambda: try_sets(sets, bad))
    for name, rows in sets.items():
        lost, targets, queries = tallies[name]
        same = all_the_same(targets, queries)
        sets[name] = skip(rows.about(lost=lost, same=same, skipped=bad[name]))
    return sets


def try_sets(sets, bad) -> dict:
    """The first pass over each set: {name: Tally}."""
    tallies = {}
    for name, rows in sets.items():
        tries = Tries(rows.source, bad[name], sides)
        tallies[name] = first_pass(name, len(rows), tries)
    return tallies


def bad_rows(place, root, tables) -> dict:
    """{name of a set: the indices of its rows that --skip-bad lists}."""
    known, spans = {}, {}
    for name, table in tables.items():
        for k, file in enumerate(table.files):
            path = Path(file).relative_to(root).as_posix()
            known[path] = Known(table.digests[k], table.starts[k + 1] - table.starts[k])
            spans[path] = (name, table.starts[k])
    others = {path.relative_to(root).as_posix() for path in root.glob("*/*.parquet")}
    bad = {name: set() for name in tables}
    for path, rows in skipped_in(place, known, others).items():
        name, start = spans[path]
        bad[name].update(start + i for i in rows)
    return {name: frozenset(rows) for name, rows in bad.items()}


def not_empty(rows) -> Lazy:
    """InputError where a set has no rows."""
    if not len(rows):
        raise InputError(f"{rows.source.raw.files[0]}: holds no rows")
    return rows


def eval_sets(source, image_root, subsets, limit) -> dict:
    """{name: Lazy of (query, candidates)} of a folder in MMEB-eval's layout; limit > 0: at most so
    many of each. Their pictures are looked up now."""
    if subsets == "mmeb20":  # its caps are training's, and MMEB-eval spells one name otherwise
        way_out = "leave it out, and all sets that are there are evaluated; or name some"
        raise InputError(f"--subsets mmeb20: the mix of training; {way_out}")
    root, chosen = find_subsets(source, subsets, "test-*.parquet")
    images, sets = Images(Place.of(image_root).image_root or root), {}
    for name, (cap, files) in chosen.items():
        sets[name] = not_empty(eval_rows(files, name, images)).first(cap).first(limit)
    once_a_node(lambda: look_at_sets(sets, images))
    return sets


def look_at_sets(sets, images):
    """InputError where a row of the evaluation sets is bad, or a picture nowhere: known before
    hours of scoring. No picture is opened."""
    for name, rows in sets.items():
        look_at_rows(rows, contents_of(images, name))
    lost = list(dict.fromkeys(images.lost))
    Lost(len(lost), *lost[:1]).refuse()


def look_at_rows(rows, content):
    """Parses the queries of a set, and its candidates; these repeat from row to row, and a distinct
    one is parsed once: arrow finds the distinct among millions. content: see contents_of."""
    table = rows.source.raw.load().slice(0, len(rows))
    counts = [pyarrow().compute.list_value_length(table[name]).to_pylist() for name in EVAL_LISTS]
    for i, (texts, paths) in enumerate(zip(*counts, strict=True)):
        if not texts or texts != paths:
            rows.get(i)  # raises what is wrong with it
    if alone := counts[0].count(1):
        text = f"{alone:,} of {len(table):,} queries have a single candidate"
        say(f"{rows.source.raw.files[0]}: {text}, and can only be right")

    queries = zip(*(table[name].to_pylist() for name in EVAL), strict=True)
    for i, pair in chain(enumerate(queries), distinct_candidates(table, counts[0])):
        try:
            located(rows.source.where(i), lambda x: content(*x), pair)
        except InputError:
            rows.get(i)  # the same, and says of which column
            raise


def distinct_candidates(table, counts):
    """Yields (the first row that has it, (text, path)) of the distinct candidates of a table."""
    columns = [pyarrow().compute.list_flatten(table[name]) for name in EVAL_LISTS]
    flat = pyarrow().table([*columns, np.arange(len(table)).repeat(counts)], [*EVAL_LISTS, "row"])
    distinct = flat.group_by(list(EVAL_LISTS)).aggregate([("row", "min")]).sort_by("row_min")
    texts, paths, rows = (distinct[name].to_pylist() for name in (*EVAL_LISTS, "row_min"))
    yield from zip(rows, zip(texts, paths, strict=True), strict=True)


# --------------------------------------------------------------------------- the sets of a folder


def find_subsets(source, subsets, pattern) -> tuple:
    """-> (folder, {name: (rows to use or None, parquet files)}) of a data set in MMEB's layout, a
    local folder or a hub id. subsets: "A:1000,B", "mmeb20", or "" for all there are."""
    root = Path(source)
    words = training_mix() if subsets == "mmeb20" else subsets
    if not os.path.isdir(source):
        names = [word.partition(":")[0].strip() for word in words.split(",") if word] or ["*"]
        pictures = [f"images_zip/{name}.zip" for name in names] + ["images.zip"]
        root = Path(fetch(source, "dataset", pictures, [f"{name}/{pattern}" for name in names]))
    elif not subsets:
        refuse_unreadable_sets(root)
    files_of = {}
    for path in sorted(root.glob(f"*/{pattern}")):  # a large set may be cut into several files
        files_of.setdefault(path.parent.name, []).append(path)
    if not files_of:
        raise InputError(f"--data {brief(source)}: no <subset>/{pattern} in it{what_else(root)}")
    if subsets == "mmeb20":
        refuse_part_of_mix(source, files_of)
    if not subsets and os.path.isdir(source):
        say_left_out(root, files_of, pattern)
    chosen = choose(words, files_of)
    for name in chosen:
        refuse_missing_parts(files_of[name])
    return root, {name: (rows, files_of[name]) for name, rows in chosen.items()}


def refuse_unreadable_sets(root, hint="Mend that, or name the sets to read: --subsets A,B"):
    """InputError where a folder that may be a set cannot be looked into: it would be left out."""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        reason = ""
        if entry.is_symlink() and not os.path.exists(entry.path):
            reason = f"a symbolic link to {brief(os.readlink(entry.path))}, which is not there"
        elif entry.is_dir() and not os.access(entry.path, os.R_OK | os.X_OK):
            reason = "a folder that may not be read by this user (permissions)"
        if reason:
            raise InputError(f"{brief(entry.path)}: is {reason}. {hint}")


def say_left_out(root, files_of, pattern):
    """A line about the sets that have tables and none of the kind that is read: of --split's other
    kind, of the other stage, or called in another way."""
    there = {path.parent.name for path in root.glob("*/*.parquet")}
    if others := sorted(there - files_of.keys()):
        say(f"{brief(root)}: left out for want of {pattern}: {brief(', '.join(others))}")


def refuse_missing_parts(files):
    """InputError where of a set in several files, as test-00000-of-00003.parquet, some are not
    there: its scores, or its share of the training, would be those of a part."""
    matches = [PART.search(file.name) for file in files]
    if not any(matches):  # called in a user's own way
        return
    # Of a file without numbers beside them nobody knows whose rows it holds, perhaps the same.
    parts = [(int(match[1]), int(match[2])) if match else None for match in matches]
    if parts != [(i, len(files)) for i in range(len(files))]:
        names = ", ".join(file.name for file in files)
        hint = "copy what is missing, and remove what is of another version"
        raise InputError(f"{files[0].parent}: holds {brief(names)}, no whole set: {hint}")


def what_else(root) -> str:
    """Of a folder that lacks a stage's lists: what it holds, and what takes that."""
    files = {path.name for path in root.glob("*/*.parquet")}
    if any(name.startswith("test-") for name in files):
        return "; its test-*.parquet are for evaluate.py"
    if any(name.startswith(("original-", "diverse_instruction-")) for name in files):
        return "; its lists are for training: contrastive.py, with --split as they are called"
    if any(root.glob("*.parquet")):
        return "; it is one subset itself: give the folder that holds it"
    if lists := sorted([*root.glob("*.jsonl"), *root.glob("*.json")]):
        return f"; if you mean its lists, name one: {brief(lists[0])}"
    if captions := sorted(root.glob("*/metadata.[jc]s*")):
        return f"; if you mean pictures with captions, give {brief(captions[0].parent)}"
    return ", as MMEB has"


def refuse_part_of_mix(source, files_of):
    """InputError where some of the 20 sets are not there, with the words for those that are."""
    words = training_mix().split(",")
    present = [word for word in words if word.partition(":")[0] in files_of]
    if len(present) < len(words):
        others = ", ".join(w.partition(":")[0] for w in words if w not in present)
        way = f"--subsets {','.join(present)}" if present else "their names"
        text = f"--subsets mmeb20: of its 20 sets {brief(source)} lacks {brief(others)}"
        raise InputError(f"{text}. Take those that are there: {way}")
