"""Data: from files, or from a toy world, to model inputs.

    python data.py                    look at the toy world: examples printed, out/shapes.png
    python data.py export DIR         the toy world as files, in the formats that real data come in
    python data.py check DATA         read all of it once: counts, lengths, sizes, what is bad
    python data.py generate --images DIR --model Qwen/Qwen2.5-VL-7B-Instruct --out dialogues.jsonl

`Item(text, images)` is the only currency: a piece of text with `<image>` where each picture goes.
A *dialogue* is an Item plus (question, answer) turns (stage 1), a *pair* is a query Item, its right
targets and its hard negatives (stage 2), a *task* is queries, each with candidates (evaluation).

Top to bottom: Item and pictures - reading files - Items to model inputs. The toy world is in
shapes.py, the commands' work in tools.py.
"""

import csv
import hashlib
import importlib
import itertools
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, lru_cache, partial, reduce
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.utils import enable_progress_bars
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

IMAGE = "<image>"


class InputError(ValueError):
    """Something that the user can put right; the message says where it is and the way out."""


# ------------------------------------------------------------------------------ items and pictures


@dataclass(frozen=True)
class Item:
    """A text with `<image>` where each picture goes. `images`: paths, PIL images, or objects with a
    `.render()`; they are opened late, in the loader's workers."""

    text: str = ""
    images: tuple = ()

    @staticmethod
    def of(x) -> "Item":
        """An Item from what a user has: an Item, a string, a PIL image, or the path of a picture
        (a `pathlib.Path`: a string is always text)."""
        if isinstance(x, Item):
            return x
        return Item(x) if isinstance(x, str) else Item(IMAGE, (x,))

    @cached_property
    def key(self) -> int:
        """63 bits that are equal for Items of equal content, on every rank and machine."""
        pictures = [(x.mode, x.size, x.tobytes()) if isinstance(x, Image.Image) else repr(x)
                    for x in self.images]  # fmt: skip
        digest = hashlib.blake2b(repr((self.text, pictures)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


class Dialogue(NamedTuple):
    """One stage-1 example: what is compressed, and the (question, answer) turns asked of it."""

    item: Item
    turns: tuple
    id: str = ""


class Pair(NamedTuple):
    """One stage-2 example: a query, its right targets (one or more), its hard negatives."""

    query: Item
    targets: tuple
    negatives: tuple = ()


class Task(NamedTuple):
    """One evaluation set. `queries[i]` is (query, candidates); candidate 0 is the right one."""

    name: str
    meta_task: str
    ood: bool
    queries: Sequence


class Lazy(Sequence):
    """A sequence whose i-th element is `get(i)`, made when it is asked for: nothing is stored.
    about: of what was read from a file: digest, a number that changes with it; lost, pictures that
    are not there; raw, the lines or the table that it was read from."""

    def __init__(self, length: int, get: Callable, about: dict | None = None):
        self.length, self.get, self.about = length, get, about or {}

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(i)
        return self.get(i)


class ZipImage(NamedTuple):
    """A picture inside a zip file: the hub's `images_zip/*.zip` are read without unpacking."""

    zip: str
    member: str

    def render(self):
        try:
            with zipfile.ZipFile(self.zip) as archive, archive.open(self.member) as file:
                return open_image(file, f"{self.zip}:{self.member}")
        except (zipfile.BadZipFile, KeyError, OSError, RuntimeError, zlib.error) as e:
            raise InputError(f"{self.zip}:{self.member}: {e}; download the zip file again") from e


def open_image(ref, name=None) -> Image.Image:
    """The picture as upright 8-bit RGB (an animation's first frame; transparent becomes white), or
    an InputError. `ref`: path, open file, PIL image, or an object with `.render()`."""
    if hasattr(ref, "render"):
        return ref.render()
    name = name or (ref if isinstance(ref, str | os.PathLike) else "the picture")
    try:
        image = ref if isinstance(ref, Image.Image) else Image.open(ref)
        w, h = image.size
        if w * h > 100_000_000 or max(w, h) > 200 * min(w, h):  # a bomb; a line: no model takes it
            raise InputError(f"{name}: {w} x {h} pixels; at most 1e8 and 200:1 are read. Crop it")
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":  # Trap: convert("RGB") takes 0 to 1 for black
            raise ValueError("its pixels are floats, of no known range; save it with 8 bits")
        if image.mode.startswith("I"):  # Trap: 16 bits; convert("RGB") would clip it to white
            image = image.convert("I").point(lambda v: v / 256).convert("L")
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{name}: no such picture. Is --image-root right?") from None
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        size = os.path.getsize(ref) if isinstance(ref, str | os.PathLike) else "?"
        raise InputError(f"{name} ({size} bytes): not a readable picture: {e}") from None


# ----------------------------------------------------------------------------------- reading files

IND = dict(  # subset:rows of both papers' training mix
    Classification="ImageNet-1K:100000 N24News:50000 HatefulMemes:10000 VOC2007:10000 SUN397:20000",
    VQA="OK-VQA:10000 A-OKVQA:20000 DocVQA:40000 InfographicsVQA:25000 ChartQA:28000 "
    "Visual7W:70000",
    Retrieval="VisDial:130000 CIRR:30000 VisualNews_t2i:100000 VisualNews_i2t:100000 "
    "MSCOCO_t2i:100000 MSCOCO_i2t:120000 NIGHTS:20000 WebQA:20000",
    Grounding="MSCOCO:100000",
)
OOD = dict(
    Classification="Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    VQA="ScienceQA VizWiz GQA TextVQA",
    Retrieval="FashionIQ Wiki-SS-NQ OVEN EDIS",
    Grounding="RefCOCO RefCOCO-Matching Visual7W-Pointing",
)
MMEB = {n.partition(":")[0]: (m, ood)
        for ood, s in ((False, IND), (True, OOD)) for m in s for n in s[m].split()}  # fmt: skip
MMEB20 = " ".join(IND.values()).replace(" ", ",").replace("ImageNet-1K", "ImageNet_1K")  # in train
DESCRIBE = "Describe the picture."  # instructions where the data are bare captions
FIND_CAPTION = f"{IMAGE} Find a caption of the picture."
FIND_PICTURE = "Find the picture of this caption: "


class Images:
    """Finds the pictures of a data set below `root`, unpacked or in the hub's zip files; a path
    that leaves `root` (`..`, absolute, through a symbolic link) is an InputError."""

    def __init__(self, root):
        self.root, self.lost = Path(root), []
        zips = [*self.root.glob("images_zip/*.zip"), *self.root.glob("images.zip")]
        self.zips = {p.stem: str(p) for p in zips}

    def find(self, path: str, subset=""):
        """-> a path or a ZipImage. What is nowhere is reported when it is opened."""
        for base in (self.root / "images", self.root):
            top, full = (os.path.realpath(p) for p in (base, base / path))
            if not full.startswith(os.path.join(top, "")) and self.root.exists():
                raise InputError(f"the picture {path!r} lies outside of {base}")
            if os.path.exists(full):
                return full
        archive = self.zips.get(subset) or self.zips.get("images")
        names = _zip_names(archive) if archive else ()
        found = [n for n in (path, "images/" + path, path.partition("/")[2]) if n in names]
        if not found:
            self.lost.append(str(self.root / path))
        return ZipImage(archive, found[0]) if found else str(self.root / path)


@lru_cache(64)
def _zip_names(path):
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        raise InputError(f"{path}: {e}; download the zip file again") from e


def _item(raw, images: Images, subset="") -> Item:
    """An Item from {"text", "image"}, either of which may be missing; `image`: one path or more."""
    if not isinstance(raw, dict) or not (raw.get("text") or raw.get("image")):
        raise InputError('needs {"text": ..., "image": ...}, at least one of them not empty')
    text, paths = raw.get("text") or "", raw.get("image") or []
    paths = [paths] if isinstance(paths, str) else paths
    strings = isinstance(paths, list) and all(isinstance(p, str) for p in paths)
    if not isinstance(text, str) or not strings:
        raise InputError('"text" must be a string, "image" a path or a list of paths')
    text = text.replace("<|image_1|>", IMAGE) if text else IMAGE * len(paths)
    if (n := text.count(IMAGE)) != len(paths):
        raise InputError(f"the text has {n} {IMAGE} for {len(paths)} pictures: one where each goes")
    return Item(text, tuple(images.find(p, subset) for p in paths))


def _dialogue(raw, images) -> Dialogue:
    """LLaVA: {"id", "image", "conversations": [{"from": "human" or "gpt", "value": ...}, ...]}."""
    talk = raw.get("conversations") if isinstance(raw, dict) else None
    if not isinstance(talk, list) or not talk or len(talk) % 2:
        raise InputError('"conversations" must be a list of questions and answers in turn')
    for i, turn in enumerate(talk):
        who, value = ("human", "gpt")[i % 2], turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(value, str) or not value or turn.get("from") != who:
            raise InputError(f'conversations[{i}] must have "from": "{who}" and a "value"')
    values = [t["value"] for t in talk]
    # What is compressed is the picture alone; the rest of the first turn is its question.
    item = _item(dict(text=IMAGE * values[0].count(IMAGE), image=raw.get("image")), images)
    values[0] = values[0].replace(IMAGE, "").strip("\n")
    turns = zip(values[::2], values[1::2], strict=True)
    return Dialogue(item, tuple(turns), str(raw.get("id") or ""))


def _pair(raw, images) -> Pair:
    """{"query": {"text", "image"}, "target": {...} or a list of them, "negatives": [{...}]}."""
    if not isinstance(raw, dict) or not raw.get("query") or not raw.get("target"):
        raise InputError('needs "query" and "target"')
    several = raw["target"] if isinstance(raw["target"], list) else [raw["target"]]
    groups = ([raw["query"]], several, raw.get("negatives") or [])
    query, targets, negatives = (tuple(_item(x, images) for x in g) for g in groups)
    return Pair(query[0], targets, negatives)


def _caption(raw, images) -> tuple:
    """One line of metadata.jsonl or .csv: {"file_name", "text"} -> (path, caption)."""
    for field in ("file_name", "text"):
        if not isinstance(raw, dict) or not isinstance(raw.get(field), str) or not raw[field]:
            raise InputError(f'needs "{field}", a string that is not empty')
    return images.find(raw["file_name"]), raw["text"]


def _train_rows(path, subset, images) -> Lazy:
    """A parquet file of MMEB-train, as Pairs; "" is an absent field."""

    def pair(row):
        def part(name, image):
            return _item(dict(text=row.get(name), image=row.get(image)), images, subset)

        negative = row.get("neg_text") or row.get("neg_image_path")
        negatives = (part("neg_text", "neg_image_path"),) if negative else ()
        return Pair(part("qry", "qry_image_path"), (part("pos_text", "pos_image_path"),), negatives)

    return _parquet(path, ("qry", "qry_image_path", "pos_text", "pos_image_path"), pair)


def _eval_rows(path, subset, images) -> Lazy:
    """A parquet file of MMEB-eval, as (query, candidates), the positive first."""
    # Candidates repeat from row to row: each becomes an Item once.
    item = lru_cache(None)(lambda text, image: _item(dict(text=text, image=image), images, subset))

    def query(row):
        texts, paths = row["tgt_text"], row["tgt_img_path"]
        if not texts or len(texts) != len(paths or ()):
            raise InputError("tgt_text and tgt_img_path must be lists of one length, not empty")
        candidates = [item(t, p) for t, p in zip(texts, paths, strict=True)]
        return item(row["qry_text"], row["qry_img_path"]), candidates

    return _parquet(path, ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path"), query)


def _located(where, parse, raw):
    """parse(raw), with errors that say where."""
    try:
        return parse(raw)
    except (LookupError, RecursionError, TypeError, ValueError) as e:
        raise InputError(f"{where}: {e}") from None


def _json(line):
    """One line of JSON. Trap: half a surrogate pair is good JSON, and no text."""
    found = json.loads(line)
    if b"\\ud" in line or b"\\uD" in line:
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _lines(path, parse, image_root) -> Lazy:
    """The lines of a .jsonl or .csv file, each parsed when asked for."""
    if not os.path.isfile(path):
        raise InputError(f"--data {path}: no such file; choose shapes, a .jsonl, a folder")
    images = Images(image_root or Path(path).parent)
    if str(path).endswith(".csv"):
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)  # else an open quote swallows the rest
            try:
                lines = [(reader.line_num, json.dumps(row).encode() + b"\n") for row in reader]
            except (csv.Error, UnicodeDecodeError) as e:
                raise InputError(f"{path}, after line {reader.line_num}: {e}") from None
    else:
        with open(path, "rb") as file:
            lines = [(n, line) for n, line in enumerate(file, 1) if line.strip()]
    if not lines:
        raise InputError(f"--data {path}: holds no lines")

    def get(i):
        n, line = lines[i]
        return _located(f"{path}, line {n}", lambda x: parse(_json(x), images), line)

    digest = reduce(lambda crc, line: zlib.crc32(line[1], crc), lines, 0)
    return Lazy(len(lines), get, dict(raw=lines, digest=digest, lost=images.lost))


def _valid(path, parse, image_root) -> Lazy:
    """`_lines`, each tried once now: the first bad one is named before any training."""
    lines = _lines(path, parse, image_root)
    for i in tqdm(range(len(lines)), f"reading {path}", leave=False, disable=len(lines) < 50_000):
        lines[i]
    return lines


def _metadata(folder):
    """metadata.jsonl or metadata.csv of a folder of pictures with captions, or None."""
    files = (Path(folder, f"metadata.{e}") for e in ("jsonl", "csv"))
    return next(filter(Path.exists, files), None)


def _parquet(path, columns, parse) -> Lazy:
    """The rows of a parquet file, or of several in turn, each parsed when asked for."""
    files = path if isinstance(path, list) else [path]
    path = files[0] if len(files) == 1 else f"{files[0]} ff."
    try:
        import pyarrow.parquet as pq

        table = pq.read_table(list(map(str, files)), memory_map=True)
        names = table.column_names
    except ImportError:
        raise InputError("MMEB's parquet files need pyarrow: pip install pyarrow") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not a readable parquet file: {e}") from None
    if missing := [c for c in columns if c not in names]:
        raise InputError(f"{path}: no column {missing[0]}; it has {', '.join(names)}")

    def get(i):
        return _located(f"{path}, row {i}", lambda x: parse(x.to_pylist()[0]), table.slice(i, 1))

    return Lazy(table.num_rows, get, dict(raw=table, digest=sum(map(os.path.getsize, files))))


def _subsets(source, subsets, pattern) -> tuple:
    """-> (folder, {name: (rows to use or None, parquet files)}) of a data set in MMEB's layout, a
    local folder or a hub id. subsets: "A:1000,B", "mmeb20", or "" for all there are."""
    subsets = MMEB20 if subsets == "mmeb20" else subsets
    root = Path(source)
    if not root.is_dir():
        names = [w.partition(":")[0] for w in subsets.split(",") if w] or ["*"]
        pictures = [*(f"images_zip/{n}.zip" for n in names), "images.zip"]
        root = Path(fetch(source, "dataset", pictures, [f"{n}/{pattern}" for n in names]))
    have = {}
    for path in sorted(root.glob(f"*/{pattern}")):  # a large set may be cut into several files
        have.setdefault(path.parent.name, []).append(path)
    if not have:
        raise InputError(f"--data {source}: no <subset>/{pattern} in it, as MMEB has")
    return root, {name: (rows, have[name]) for name, rows in _choose(subsets, have).items()}


def _choose(subsets, have) -> dict:
    """ "A:1000,B" -> {"A": 1000, "B": None}; "" -> all there are. InputError for other names."""
    wanted = [w.partition(":")[::2] for w in subsets.split(",")] if subsets else []
    for name, rows in wanted:
        if name not in have or not (rows == "" or rows.isdigit() and int(rows)):
            names = ",".join(have)
            raise InputError(f"--subsets {name}:{rows}: choose name or name:rows of {names}")
    return {name: int(rows or 0) or None for name, rows in wanted or [(n, "") for n in have]}


def fetch(name, kind, wanted, need) -> str:
    """The folder of a hub id, with its files that fit the patterns `wanted` and `need`; of `need`
    each must find some. Says their size first, fetches no whole file twice, and goes by the cache
    where there is no network. kind: "dataset", or "model": without subfolders."""
    data = kind == "dataset"
    flag, choices = ("--data", "shapes, a .jsonl") if data else ("--model", "toy")
    if name.count("/") != 1 or name[0] in "./":
        raise InputError(f"{flag} {name}: no such folder; choose {choices}, a folder, or a hub id")
    page = f"{constants.ENDPOINT}/{'datasets/' * data}{name}"
    how = dict(repo_type=kind, allow_patterns=[*need, *wanted])
    get = partial(snapshot_download, name, ignore_patterns=None if data else "*/*", **how)
    try:
        with suppress(errors.DryRunError):  # no network, or no such id: get() tells them apart
            files = get(dry_run=True)
            if lost := [p for p in need if not any(fnmatch(f.filename, p) for f in files)]:
                like, there = lost[0].split("/")[-1], HfApi().list_repo_files(name, repo_type=kind)
                has = sorted({f.split("/")[0] for f in there if fnmatch(f, f"*/{like}")})
                raise ValueError(f"no {lost[0]} in it; it has {','.join(has) or 'none'}")
            size = sum(f.file_size or 0 for f in files if f.will_download)
            if os.environ.get("RANK", "0") == "0":
                print(f"{name}: {size / 1e9:.2f} GB to download" if size else f"{name}: all here")
                if size:  # Trap: model.py switches these bars off, with those of transformers
                    enable_progress_bars()
        return get()
    except errors.GatedRepoError:
        why = f"gated: accept its terms at {page}, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = f"no such folder, and not at {page}; if it is private, `hf auth login`"
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as e:
        if type(e) is errors.LocalEntryNotFoundError:  # its cause says more
            e = e.__cause__ or e
        why = f"no folder, and not fetched from {page}: {' '.join(str(e).split()):.500}"
    raise InputError(f"{flag} {name}: {why}")


def read_dialogues(
    source="shapes", image_root=None, seed=0, turns=0, caption=False, texts=0.0
) -> Sequence:
    """Stage 1's data: a sequence of Dialogues.

    source: "shapes" (10^9 toy dialogues), a JSONL file in LLaVA's layout, or a folder of pictures
    with captions (metadata.jsonl or .csv). turns > 0: so many questions of each (1: single-turn).
    caption, texts (toy world): a description as the answer; the share of dialogues that are about
    a description, in place of the picture. Raises InputError with file, line and field."""
    if source == "shapes":
        data = Lazy(
            10**9, partial(toy().Shapes("train", seed).dialogue, caption=caption, texts=texts)
        )
    elif caption or texts:
        raise InputError("--caption and --texts go with --data shapes; a file brings its own")
    elif file := _metadata(source):
        captions = _valid(str(file), _caption, image_root)

        def describe(i):
            path, text = captions[i]
            return Dialogue(Item(IMAGE, (path,)), ((DESCRIBE, text),), f"{file}:{i + 1}")

        data = Lazy(len(captions), describe, captions.about)
    else:
        data = _valid(source, _dialogue, image_root)

    def dialogue(i):
        d = data[i]
        return d._replace(turns=d.turns[: turns or None], id=d.id or f"{source}[{i}]")

    return Lazy(len(data), dialogue, data.about)


def ready(sets) -> int:
    """Refuses data that name pictures which are not there (MMEB's rows are read when they are
    drawn), before any training. -> a number that changes with the data (of parquet files, with
    their sizes), so that a run is not resumed with others."""
    for examples in sets:
        if lost := examples.about.get("lost"):
            more = f" (and {len(lost) - 1} more are missing)" * (len(lost) > 1)
            hint = "Is --image-root right? `python data.py check` lists them"
            raise InputError(f"{lost[0]}: no such picture{more}. {hint}")
    return sum(len(x) + x.about.get("digest", 0) for x in sets) % 2**32


def read_pairs(source="shapes", image_root=None, subsets="", seed=0, split="original") -> dict:
    """Stage 2's data: {name: sequence of Pairs}, one entry a data set.

    source: "shapes", a JSONL file of pairs, a folder of pictures with captions (metadata.jsonl or
    .csv: two sets, picture -> captions and caption -> picture), a folder or hub id in MMEB-train's
    layout. subsets: names with caps, "ImageNet_1K:100000,CIRR", or "mmeb20". split: "original" or
    "diverse_instruction"."""
    if source == "shapes":
        caps = _choose(subsets, toy().META_TASK)
        return {
            t: Lazy(n or 10**9, partial(toy().Shapes(seed=seed).pair, t)) for t, n in caps.items()
        }
    file = _metadata(source)
    if subsets and (file or source.endswith(".jsonl")):
        raise InputError(f"--subsets {subsets}: chooses sets of MMEB or shapes; {source} is none")
    if source.endswith(".jsonl"):
        return {Path(source).stem: _valid(source, _pair, image_root)}
    if file:
        captions, of = _lines(str(file), _caption, image_root), {}
        for path, text in captions:
            of.setdefault(path, []).append(text)
        paths, name = list(of), Path(source).name

        def i2t(i):
            return Pair(Item(FIND_CAPTION, (paths[i],)), tuple(map(Item, of[paths[i]])))

        def t2i(i):
            path, text = captions[i]
            return Pair(Item(FIND_PICTURE + text), (Item(IMAGE, (path,)),))

        sets = {"i2t": Lazy(len(paths), i2t, captions.about), "t2i": Lazy(len(captions), t2i)}
        return {f"{name}_{way}": pairs for way, pairs in sets.items()}
    root, found = _subsets(source, subsets, f"{split}-*.parquet")
    images = Images(image_root or root)
    for name, (cap, path) in found.items():
        rows = _train_rows(path, name, images)
        found[name] = Lazy(min(cap or len(rows), len(rows)), rows.get, rows.about)
    return found


def read_tasks(source="shapes", image_root=None, subsets="", limit=0, seed=0) -> list:
    """Evaluation sets: a list of Tasks. source: "shapes" (5 tasks, each in distribution, with
    combinations and with wordings never trained on), a folder or hub id in MMEB-eval's layout.
    limit > 0: so many queries of each."""
    if source == "shapes":
        metas, tasks = toy().META_TASK, []
        names = [n + end for end in ("", "-new", "-words") for n in metas]
        for name, cap in _choose(subsets, names).items():
            task, _, way = name.partition("-")
            world = toy().Shapes("new" if way == "new" else "test", seed, way == "words")
            queries = Lazy(min(cap or 10**9, limit or 100), partial(world.query, task))
            tasks.append(Task(name, metas[task], bool(way), queries))
        return tasks
    root, found = _subsets(source, subsets, "test-*.parquet")
    images, tasks = Images(image_root or root), []
    for name, (cap, path) in found.items():
        rows = _eval_rows(path, name, images)
        n = min(limit or len(rows), cap or len(rows), len(rows))
        tasks.append(Task(name, *MMEB.get(name, ("Other", False)), Lazy(n, rows.get)))
    return tasks


# --------------------------------------------------------------------------- Items to model inputs

PAD, HEAD, CONTENT, COMPRESS, QUESTION, ANSWER = range(6)  # the role of a token
SUMMARIZE = "\nSummarize above image and text in a few words."  # the official code's prompt
STYLES = {"coma": SUMMARIZE, "chat": "", "vlm2vec": ""}  # --prompt: what follows the content


class Collator:
    """Items -> padded model inputs, in one layout for all stages; the roles of its tokens:

        HEAD      a user turn opens
        CONTENT   text and pictures, the style's instruction; the assistant's turn opens
        COMPRESS  C_1 ... C_K: the assistant's answer is the code         <- an embedding ends here
        QUESTION  a user turn: Q_1; the assistant's turn opens            <- stage 1 goes on
        ANSWER    A_1 and the end-of-turn token; and so on

    With K = 0 there is no code: content and Q_1 share one user turn (plain instruction tuning).
    Style "vlm2vec": the text as it stands, no template, no code.

    processor: of transformers (tokenizer, image processor); compress_ids: the K tokens' ids;
    max_length: longer rows lose text from the content's middle, or their last turns; 0: none do."""

    def __init__(self, processor, compress_ids=(), style="chat", max_length=0):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.compress_ids, self.style, self.max_length = list(compress_ids), style, max_length
        self.head, self.mid, self.next, self.picture = ([], ""), ("", []), ([], ""), ""
        self.end = []
        if style == "vlm2vec":
            self.picture = processor.image_token
        else:
            self._read_chat_template()
        self.pad = self.tokenizer.pad_token_id or 0
        probe = self._segment(Image.new("RGB", (64, 64)))["tokens"]
        self.token_keys = ("input_ids", "roles", *(k for k in probe if k != "input_ids"))

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _text(self, text, before="", after=""):
        """Token ids of a user's text, with what the template writes around it. Traps: the three are
        tokenized as one, as other programs would ("." and a newline may be one token); a special
        token spelled out in the text must stay text. -> (ids of before, text, after)."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InputError(f"no text, but half a surrogate pair in it: {e}") from None
        how = dict(add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        found = self.tokenizer(before + text + after, **how)
        ids, a, b = ([], [], []), len(before), len(before) + len(text)
        for i, (start, end) in zip(found.input_ids, found.offset_mapping, strict=True):
            ids[0 if end <= a else 2 if start >= b else 1].append(i)
        return ids

    def _split(self, text, last):
        """Template text cut behind its last special token, or before its first: ids and text."""
        special = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        at = [m.span() for m in re.finditer("|".join(map(re.escape, special)), text)]
        if last:
            cut = at[-1][1] if at else 0
            return self._ids(text[:cut]), text[cut:]
        cut = at[0][0] if at else len(text)
        return text[:cut], self._ids(text[cut:])

    def _read_chat_template(self):
        """What the chat template writes before, between and after two questions and answers, as
        ids, and around a picture, as text: found by rendering marks and splitting there."""

        def render(*turns):
            roles = itertools.cycle(("user", "assistant"))
            chat = [dict(role=r, content=c) for r, c in zip(roles, turns, strict=False)]
            template = self.processor.chat_template or self.tokenizer.chat_template
            return self.tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)

        if not (self.processor.chat_template or self.tokenizer.chat_template):
            raise InputError("the model has no chat template; take its instruction-tuned version")
        text = dict(type="text", text="\u2460")
        head, mid, following, _, tail = render(*[[text]] * 4).split("\u2460")
        if following.startswith(tail):  # no default system prompt, as in the official code
            head = following.removeprefix(tail)
        ids, plain = self._split(head, last=True)
        bos = self.tokenizer("").input_ids
        self.head = (ids if ids[: len(bos)] == bos else bos + ids, plain)
        self.mid, self.next = self._split(mid, last=False), self._split(following, last=True)
        self.end = self._ids(tail)[:1] or [self.tokenizer.eos_token_id]
        one, none = (render([dict(type="image")] * n + [text]).split("\u2460")[0] for n in (1, 0))
        self.picture = one[len(os.path.commonprefix([one, none])) :]

    def _segment(self, image):
        """A picture as the processor writes it: tokens {key: (L,)}, images {key: (n, ...)}."""
        if self.style == "vlm2vec" and min(image.size) < 28:
            image = image.resize((56, 56))
        arguments = dict(text=[self.picture], images=[image], add_special_tokens=False)
        found = self.processor(**arguments, return_tensors="pt")
        found.pop("attention_mask", None)
        tokens = {k: found.pop(k)[0] for k in list(found) if k == "input_ids" or "type_ids" in k}
        return dict(tokens=tokens, images=dict(found))

    def row(self, item: Item, turns=()) -> dict:
        """One example, not padded: {"tokens": {key: (L,)}, "images": {key: (n, ...)}, "cut": how
        many tokens max_length cost it}."""
        texts = item.text.split(IMAGE)
        if len(texts) - 1 != len(item.images):
            found = f"{len(texts) - 1} {IMAGE} for {len(item.images)} pictures"
            raise InputError(f"{found} in {item!s:.200}: one where each goes")
        segments = [self._segment(open_image(x)) for x in item.images]
        code = bool(self.compress_ids) or not turns
        (head, before), (after, mid) = self.head, self.mid
        parts, own = [(head, HEAD)], []  # own: where the text is the user's
        for i, text in enumerate(texts):
            own.append(len(parts) + 1)
            end = (STYLES[self.style] + after) * (code and i == len(segments))
            ids = self._text(text, before * (i == 0), end)
            parts += [(ids[0], HEAD), (ids[1], CONTENT), (ids[2], CONTENT)]
            parts += [(s["tokens"], CONTENT) for s in segments[i : i + 1]]
        if code:
            parts += [(mid, CONTENT), (self.compress_ids, COMPRESS)]
        lead, before = self.next if code else ([], "\n")
        for question, answer in turns:
            ids = self._text(question, before, after)
            parts += [(lead + ids[0] + ids[1] + ids[2] + mid, QUESTION)]
            parts += [(self._text(answer)[1] + self.end, ANSWER)]
            lead, before = self.next[0][len(self.end) :], self.next[1]
        cut = self._shorten(parts, own, len(turns))
        tokens = {k: [] for k in self.token_keys}
        for ids, role in parts:
            piece = ids if isinstance(ids, dict) else dict(input_ids=torch.tensor(ids).long())
            zeros = torch.zeros_like(piece["input_ids"])
            for k, columns in tokens.items():
                columns.append(zeros + role if k == "roles" else piece.get(k, zeros))
        tokens = {k: torch.cat(v) for k, v in tokens.items()}
        if not len(tokens["input_ids"]):
            raise InputError(f"nothing to embed in {item}: text and picture are empty")
        images = {k: [s["images"][k] for s in segments] for s in segments[:1] for k in s["images"]}
        return dict(tokens=tokens, images={k: cat_padded(v) for k, v in images.items()}, cut=cut)

    def _shorten(self, parts, own, turns) -> int:
        """Makes a row fit max_length, in place: its last turns go, but the first, then text from
        the middle of the content's longest piece; never a picture's tokens or the code."""

        def size():
            return sum(len(p["input_ids"] if isinstance(p, dict) else p) for p, _ in parts)

        before = size()
        while self.max_length and size() > self.max_length:
            if turns > 1:
                del parts[-2:]
                turns -= 1
                continue
            longest = max(own, key=lambda i: len(parts[i][0]))
            ids, over = parts[longest][0], size() - self.max_length
            if not ids:
                over = f"{over} tokens too many without any text"
                raise InputError(f"--max-length {self.max_length}: {over}; lower --max-pixels")
            over = min(over, len(ids))
            keep = (len(ids) - over + 1) // 2
            parts[longest] = (ids[:keep] + ids[keep + over :], CONTENT)
        return before - size()

    def pad_rows(self, rows, device=None) -> dict:
        """Rows -> inputs, right-padded to the longest: input_ids, attention_mask, roles, ... (B,
        L), and the image tensors of all rows end to end."""
        inputs = {}
        for k in self.token_keys:
            pad = self.pad if k == "input_ids" else 0
            inputs[k] = pad_sequence([r["tokens"][k] for r in rows], True, pad)  # (B, L)
        inputs["attention_mask"] = (inputs["roles"] != PAD).long()
        for k in dict.fromkeys(k for r in rows for k in r["images"]):
            inputs[k] = cat_padded([r["images"][k] for r in rows if k in r["images"]])
        return {k: v.to(device, non_blocking=True) for k, v in inputs.items()} if device else inputs

    def __call__(self, items, turns=None) -> dict:
        """Items (and the turns of each) -> padded model inputs."""
        pairs = zip(items, turns or [()] * len(items), strict=True)
        return self.pad_rows([self.row(x, t) for x, t in pairs])


def cat_padded(tensors) -> torch.Tensor:
    """Tensors end to end along their first axis; the other axes zero-padded to the largest."""
    size = [max(s) for s in zip(*(t.shape[1:] for t in tensors), strict=True)]
    out = tensors[0].new_zeros(sum(map(len, tensors)), *size)
    at = 0
    for t in tensors:
        out[(slice(at, at + len(t)), *(slice(n) for n in t.shape[1:]))] = t
        at += len(t)
    return out


def toy():
    """shapes.py, imported late: it is made of the Items of this file."""
    return importlib.import_module("shapes")


def __getattr__(name):
    """`data.Shapes` is the toy world's."""
    if name == "Shapes":
        return toy().Shapes
    raise AttributeError(f"data has no {name}")


if __name__ == "__main__":
    import tools  # which imports this file by its name: one InputError, one Item

    tools.run(tools.data_commands)
