"""MMEB: its 36 sets (VLM2Vec, Table 1), and its folders of parquet files, a local one or the hub's.

Top to bottom: the table - reading rows - finding the sets of a folder."""

import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from plumbing.errors import InputError, needs
from plumbing.formats import Lazy, Source, choose, located, parse_content
from plumbing.hub import fetch
from plumbing.images import Images


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


def read_parquet(files, columns, parse) -> Lazy:
    """The rows of a parquet file, or of several in turn, each parsed when asked for."""
    path = files[0] if len(files) == 1 else f"{files[0]} ff."
    with needs("pyarrow", "MMEB's parquet files"):
        import pyarrow.parquet as pq
    try:
        table = pq.read_table([str(f) for f in files], memory_map=True)
        names = table.column_names
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not a readable parquet file: {e}") from None
    for column in columns:  # neg_* may be missing: CIRR has none
        if column not in names:
            raise InputError(f"{path}: no column {column}; it has {', '.join(names)}")

    def get(i):
        return located(f"{path}, row {i}", lambda x: parse(x.to_pylist()[0]), table.slice(i, 1))

    digest = sum(os.path.getsize(f) for f in files)
    return Lazy(table.num_rows, get, Source(digest, (), table))


def train_rows(files, subset, images) -> Lazy:
    """Parquet files of MMEB-train, as (query, targets, negatives); "" is an absent field."""
    images.prepare(subset)

    def pair(row):
        def side(text, image):
            return parse_content({"text": row.get(text), "image": row.get(image)}, images, subset)

        negatives = ()
        if row.get("neg_text") or row.get("neg_image_path"):
            negatives = (side("neg_text", "neg_image_path"),)
        return side("qry", "qry_image_path"), (side("pos_text", "pos_image_path"),), negatives

    return read_parquet(files, ("qry", "qry_image_path", "pos_text", "pos_image_path"), pair)


def eval_rows(files, subset, images) -> Lazy:
    """Parquet files of MMEB-eval, as (query, candidates), the positive first."""
    images.prepare(subset)

    @lru_cache(None)  # candidates repeat from row to row
    def content(text, image):
        return parse_content({"text": text, "image": image}, images, subset)

    def query(row):
        texts, paths = row["tgt_text"], row["tgt_img_path"]
        if not texts or len(texts) != len(paths or ()):
            raise InputError("tgt_text and tgt_img_path must be lists of one length, not empty")
        candidates = [content(text, path) for text, path in zip(texts, paths, strict=True)]
        return content(row["qry_text"], row["qry_img_path"]), candidates

    return read_parquet(files, ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path"), query)


def train_sets(source, image_root, subsets, split) -> dict:
    """{name: Lazy of (query, targets, negatives)} of a folder in MMEB-train's layout."""
    root, chosen = find_subsets(source, subsets, f"{split}-*.parquet")
    images, sets = Images(image_root or root), {}
    for name, (cap, files) in chosen.items():
        sets[name] = train_rows(files, name, images).first(cap)
    return sets


def eval_sets(source, image_root, subsets) -> dict:
    """{name: Lazy of (query, candidates)} of a folder in MMEB-eval's layout."""
    root, chosen = find_subsets(source, subsets, "test-*.parquet")
    images, sets = Images(image_root or root), {}
    for name, (cap, files) in chosen.items():
        sets[name] = eval_rows(files, name, images).first(cap)
    return sets


# --------------------------------------------------------------------------- the sets of a folder


def find_subsets(source, subsets, pattern) -> tuple:
    """-> (folder, {name: (rows to use or None, parquet files)}) of a data set in MMEB's layout, a
    local folder or a hub id. subsets: "A:1000,B", "mmeb20", or "" for all there are."""
    if subsets == "mmeb20":
        subsets = training_mix()
    root = Path(source)
    if not root.is_dir():
        names = [word.partition(":")[0] for word in subsets.split(",") if word] or ["*"]
        pictures = [f"images_zip/{name}.zip" for name in names] + ["images.zip"]
        root = Path(fetch(source, "dataset", pictures, [f"{name}/{pattern}" for name in names]))
    files_of = {}
    for path in sorted(root.glob(f"*/{pattern}")):  # a large set may be cut into several files
        files_of.setdefault(path.parent.name, []).append(path)
    if not files_of:
        raise InputError(f"--data {source}: no <subset>/{pattern} in it, as MMEB has")
    chosen = choose(subsets, files_of)
    return root, {name: (rows, files_of[name]) for name, rows in chosen.items()}
