"""Data: from files, or from a toy world, to model inputs.

    python data.py                    look at the toy world: examples printed, out/shapes.png
    python data.py export DIR         the toy world as files, in the formats that real data come in

`Item(text, images)` is the only currency: a piece of text with `<image>` where each picture goes.
A *dialogue* is an Item plus (question, answer) turns (stage 1), a *pair* is a query Item, its right
targets and its hard negatives (stage 2), a *task* is queries, each with candidates (evaluation).

Top to bottom: Item and pictures - the toy world - reading files - Items to model inputs - commands.
"""

import hashlib
import itertools
import json
import os
import random
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageOps
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
        pictures = [x.tobytes() if isinstance(x, Image.Image) else repr(x) for x in self.images]
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
    """A sequence whose i-th element is `get(i)`, made when it is asked for: nothing is stored."""

    def __init__(self, length: int, get: Callable):
        self.length, self.get = length, get

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
        except (zipfile.BadZipFile, KeyError) as e:
            raise InputError(f"{self.zip}:{self.member}: {e}; download the zip file again") from e


def open_image(ref, name=None) -> Image.Image:
    """The picture as upright 8-bit RGB (of an animation the first frame; what is transparent
    becomes white). `ref`: path, open file, PIL image, or an object with `.render()`. Raises
    InputError."""
    if hasattr(ref, "render"):
        return ref.render()
    name = name or (ref if isinstance(ref, str | os.PathLike) else "the picture")
    try:
        image = ref if isinstance(ref, Image.Image) else Image.open(ref)
        w, h = image.size
        if w * h > 100_000_000 or max(w, h) > 200 * min(w, h):  # a bomb; a line: no model takes it
            raise InputError(f"{name}: {w} x {h} pixels; at most 1e8 and 200:1 are read. Crop it")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # Trap: 16 bits; convert("RGB") would clip it to white
            image = image.point(lambda v: v / 256).convert("L")
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


# ----------------------------------------------------------------------------------- the toy world
# A picture is 64 x 64: four quadrants with at most one object each. Everything below is a pure
# function of (seed, split, index). Shapes sit on the model's 16-pixel grid: learned several times
# faster than jittered ones.

SHAPES = ("circle", "square", "triangle", "cross", "diamond")
COLORS = dict(red="#d62728", green="#2ca02c", blue="#1f4fd6", yellow="#f2c80f", purple="#8e44ad")
COLORS["orange"] = "#ff7f0e"
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
TINTS = ("#f6e6e6", "#e6f6e6", "#e6e6f6", "#f6f6e0")  # of the places: a tiny model sees where it is
NUMBERS = ("zero", "one", "two", "three", "four")
HELD_OUT = {("red", "cross"), ("green", "diamond"), ("blue", "triangle"), ("yellow", "circle")}
HELD_OUT |= {("purple", "square"), ("orange", "cross")}  # combinations that training never shows
SEEN = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT]

# Wordings: the last of each row is never trained on.
ASK = {
    "count": ("how many objects are there?", "count the objects.", "tell the number of objects."),
    "color": ("what color is the {}?", "name the color of the {}.", "the {} has which color?"),
    "shape": ("what shape is the {}?", "name the shape of the {}.", "the {} has which shape?"),
    "size": ("is the {} small or large?", "what size is the {}?", "the {} has which size?"),
    "place": ("where is the {}?", "name the place of the {}.", "the {} is at which place?"),
    "at": ("what is at the {}?", "name the object at the {}.", "which object is at the {}?"),
    "next": ("what is {} the {}?", "name the object {} the {}.", "which object is {} the {}?"),
    "describe": ("describe the picture.", "what is in the picture?", "tell what the picture is."),
}
INSTRUCT = {
    "classify": ("name the object in the picture.", "which object is it?", "tell the object."),
    "vqa": ("answer the question: {}", "{}", "tell the answer to: {}"),
    "i2t": ("find a caption of the picture.", "which text describes it?", "find what tells of it."),
    "t2i": ("find the picture: {}", "which picture shows {}?", "tell where there is {}."),
    "ground": ("isolate the {}.", "cut out the {}.", "find the part with the {}."),
}
META_TASK = dict(classify="Classification", vqa="VQA", i2t="Retrieval", t2i="Retrieval")
META_TASK["ground"] = "Grounding"
WORDS = tuple(COLORS) + SHAPES + SIZES + PLACES + NUMBERS[1:]  # every one-word answer there is


class Object(NamedTuple):
    """One object: "a large red circle" at a place; `cell`: a small one's corner of its quadrant."""

    size: str
    color: str
    shape: str
    place: str
    cell: int

    @property
    def name(self):
        return f"{self.color} {self.shape}"

    def __str__(self):
        return f"a {self.size} {self.name}"


@dataclass(frozen=True)
class Scene:
    """One to four objects, and what of them is seen: everything, or one quadrant (`view`)."""

    objects: tuple
    view: str | None = None

    def describe(self) -> str:
        """The full description; two scenes with the same description answer everything alike."""
        return " and ".join(f"{o} at the {o.place}" for o in self.objects)

    def at(self, place):
        """What stands at a place, as text: "a small red circle" or "nothing"."""
        return next((str(o) for o in self.objects if o.place == place), "nothing")

    def render(self) -> Image.Image:
        """The picture (64 x 64, a quadrant 32 x 32), RGB."""
        image = Image.new("RGB", (64, 64))
        draw = ImageDraw.Draw(image)
        for i, tint in enumerate(TINTS):
            x, y = 32 * (i % 2), 32 * (i // 2)
            draw.rectangle((x, y, x + 31, y + 31), tint)
        for o in self.objects:
            row, column = divmod(PLACES.index(o.place), 2)
            side = 32 if o.size == "large" else 16
            x, y = 32 * column + 16 * (o.cell % 2), 32 * row + 16 * (o.cell // 2)
            x0, y0, x1, y1, m, t = x + 1, y + 1, x + side - 2, y + side - 2, side // 2, side // 6
            bars = [(x + m - t, y0, x + m + t - 1, y1), (x0, y + m - t, x1, y + m + t - 1)]
            corners = {
                "square": [(x0, y0), (x1, y0), (x1, y1), (x0, y1)],
                "triangle": [(x + m, y0), (x1, y1), (x0, y1)],
                "diamond": [(x + m, y0), (x1, y + m), (x + m, y1), (x0, y + m)],
            }
            if o.shape == "circle":
                draw.ellipse((x0, y0, x1, y1), COLORS[o.color])
            elif o.shape == "cross":
                for bar in bars:
                    draw.rectangle(bar, COLORS[o.color])
            else:
                draw.polygon(corners[o.shape], COLORS[o.color])
        if self.view:
            row, column = divmod(PLACES.index(self.view), 2)
            image = image.crop((32 * column, 32 * row, 32 * column + 32, 32 * row + 32))
        return image


class Shapes:
    """The toy world: scenes, dialogues, pairs and queries as pure functions of (seed, split,
    index).

    split: "train"; "test" (scenes that "train" never shows); "new" (as "test", and the object that
    matters is a colour-shape combination never trained on); `new_words`: held-out wordings."""

    def __init__(self, split="train", seed=0, new_words=False):
        self.split, self.seed, self.new_words = split, seed, new_words

    def _rng(self, *key):
        return random.Random(repr((self.seed, self.split, *key)))  # a string: alike everywhere

    def _words(self, rng, choices):
        return choices[-1] if self.new_words else rng.choice(choices[:-1])

    def scene(self, rng, least=1, most=4) -> Scene:
        """A scene of `least` to `most` objects; colour-shape combinations are distinct in it."""
        while True:
            names = rng.sample(SEEN, rng.randint(least, most))
            if self.split == "new":
                names[0] = rng.choice(sorted(HELD_OUT))
            places = rng.sample(PLACES, len(names))
            objects = [
                Object(size := rng.choice(SIZES), c, s, p, rng.randrange(4) * (size == "small"))
                for (c, s), p in zip(names, places, strict=True)
            ]
            scene = Scene(tuple(sorted(objects, key=lambda o: PLACES.index(o.place))))
            digest = hashlib.blake2b(scene.describe().encode(), digest_size=1).digest()[0]
            if (digest % 8 == 0) == (self.split != "train"):  # every 8th description is held out
                return scene

    def _focus(self, rng, scene):
        """The object that a question is about: in the "new" split the never-seen combination."""
        new = [o for o in scene.objects if (o.color, o.shape) in HELD_OUT]
        return rng.choice(new or scene.objects)

    def ask(self, rng, scene, kinds=tuple(ASK), about=None) -> list:
        """(kind, question, answer) for each of `kinds` that has exactly one right answer here."""
        found = []
        for kind in kinds:
            o = about or rng.choice(scene.objects)
            what, answer = (o.name,), getattr(o, kind, None)
            if kind == "color":
                what = (o.shape,)
            elif kind == "shape":
                what = (f"{o.color} object",)
            elif kind == "at":
                what = (rng.choice(PLACES),)
                answer = scene.at(what[0])
            elif kind == "next":
                side, place = _neighbour(rng, o.place)
                what, answer = (side, o.name), scene.at(place)
            elif kind in ("count", "describe"):
                answer = NUMBERS[len(scene.objects)] if kind == "count" else scene.describe()
            # Named by its shape alone (or its color), an object must be the only such one.
            named_by = dict(color="shape", shape="color").get(kind, "name")
            if sum(getattr(x, named_by) == getattr(o, named_by) for x in scene.objects) == 1:
                found.append((kind, self._words(rng, ASK[kind]).format(*what), answer))
        return found

    def dialogue(self, i, caption=False) -> Dialogue:
        """3-5 questions about different things (or one full description) with their answers."""
        rng = self._rng("dialogue", i)
        scene = self.scene(rng)
        turns = self.ask(rng, scene, ["describe"] if caption else rng.sample(list(ASK), len(ASK)))
        turns = tuple((q, a) for _, q, a in turns[: rng.randint(3, 5)])
        return Dialogue(Item(IMAGE, (scene,)), turns, f"shapes-{self.split}-{i}")

    def query(self, task, i, candidates=16):
        """(query Item, candidates): candidate 0 is right, and no other one is."""
        rng = self._rng(task, i)
        scene = self.scene(rng, *{"classify": (1, 1), "vqa": (1, 4)}.get(task, (2, 4)))
        o = self._focus(rng, scene)
        words = self._words(rng, INSTRUCT[task])
        picture, show = (scene,), IMAGE + " "
        if task == "classify":
            names = SEEN + (sorted(HELD_OUT) if self.split == "new" else [])
            texts = [o.name] + [n for c, s in names if (n := f"{c} {s}") != o.name]
        elif task == "vqa":
            kinds = ("count", "color", "shape", "size", "place")
            _, question, answer = rng.choice(self.ask(rng, scene, kinds, about=o))
            words, texts = words.format(question), [answer] + [w for w in WORDS if w != answer]
        elif task == "i2t":
            texts = list(dict.fromkeys(s.describe() for s in self._others(rng, scene, candidates)))
        elif task == "t2i":
            query = Item(words.format(scene.describe()))
            others = {}  # of scenes that read alike the first
            for s in self._others(rng, scene, candidates):
                others.setdefault(s.describe(), s)
            return query, [Item(IMAGE, (s,)) for s in others.values()]
        else:  # grounding: crops of the same picture first, then of others; never the named object
            seen = [o, *scene.objects]
            for s in self._others(rng, scene, candidates)[1:]:
                seen += [x for x in s.objects if x.name != o.name][:1]
            crops = list(dict.fromkeys(Scene((x,), view=x.place) for x in seen))[:candidates]
            return Item(show + words.format(o.name), picture), [Item(IMAGE, (c,)) for c in crops]
        return Item(show + words, picture), [Item(t) for t in texts]

    def _others(self, rng, scene, n):
        """The scene, near misses of it (one attribute changed), then random scenes: n in all."""
        scenes = [scene]
        for _ in range(n // 4):
            o = rng.choice(scene.objects)
            free = [p for p in PLACES if scene.at(p) == "nothing"] or [o.place]
            new = o._replace(size=rng.choice(SIZES), place=rng.choice(free))
            rest = [new if x is o else x for x in scene.objects]
            scenes.append(Scene(tuple(sorted(rest, key=lambda x: PLACES.index(x.place)))))
        return scenes + [self.scene(rng, 2, 4) for _ in range(n - len(scenes))]

    def pair(self, task, i) -> Pair:
        """A training pair: the query and its right candidate."""
        query, candidates = self.query(task, i, candidates=1)
        return Pair(query, (candidates[0],))


def _neighbour(rng, place):
    """A side of a place, and the place there: ("right of", "top right") for "top left"."""
    row, column = place.split()
    if rng.random() < 0.5:
        side = "right" if column == "left" else "left"
        return f"{side} of", f"{row} {side}"
    return ("above", f"top {column}") if row == "bottom" else ("below", f"bottom {column}")


# ----------------------------------------------------------------------------------- reading files

IND = dict(
    Classification="ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
    VQA="OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
    Retrieval="VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
    Grounding="MSCOCO",
)
OOD = dict(
    Classification="Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    VQA="ScienceQA VizWiz GQA TextVQA",
    Retrieval="FashionIQ Wiki-SS-NQ OVEN EDIS",
    Grounding="RefCOCO RefCOCO-Matching Visual7W-Pointing",
)
MMEB = {n: (m, ood) for ood, s in ((False, IND), (True, OOD)) for m in s for n in s[m].split()}
MMEB20 = (  # both papers' training mix: subset:rows
    "ImageNet_1K:100000,N24News:50000,HatefulMemes:10000,VOC2007:10000,SUN397:20000,OK-VQA:10000,"
    "A-OKVQA:20000,DocVQA:40000,InfographicsVQA:25000,ChartQA:28000,Visual7W:70000,VisDial:130000,"
    "CIRR:30000,VisualNews_t2i:100000,VisualNews_i2t:100000,MSCOCO_t2i:100000,MSCOCO_i2t:120000,"
    "NIGHTS:20000,WebQA:20000,MSCOCO:100000"
)


class Images:
    """Finds the pictures of a data set below `root`, unpacked or in the hub's zip files; a path
    that leaves `root` (`..`, absolute, through a symbolic link) is an InputError."""

    def __init__(self, root):
        self.root = Path(root)
        zips = [*self.root.glob("images_zip/*.zip"), *self.root.glob("images.zip")]
        self.zips = {p.stem: str(p) for p in zips}

    def find(self, path: str, subset=""):
        """-> a path or a ZipImage. What is nowhere is reported when it is opened."""
        for base in (self.root / "images", self.root):
            top, full = (os.path.realpath(p) for p in (base, base / path))
            if not full.startswith(top + os.sep) and self.root.exists():
                raise InputError(f"the picture {path!r} lies outside of {base}")
            if os.path.exists(full):
                return full
        archive = self.zips.get(subset) or self.zips.get("images")
        names = _zip_names(archive) if archive else ()
        found = [n for n in (path, "images/" + path, path.partition("/")[2]) if n in names]
        return ZipImage(archive, found[0]) if found else str(self.root / path)


@lru_cache(64)
def _zip_names(path):
    with zipfile.ZipFile(path) as archive:
        return frozenset(archive.namelist())


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
    turns = zip(
        [values[0].replace(IMAGE, "").strip("\n"), *values[2::2]], values[1::2], strict=True
    )
    return Dialogue(item, tuple(turns), str(raw.get("id", "")))


def _pair(raw, images) -> Pair:
    """{"query": {"text", "image"}, "target": {...} or a list of them, "negatives": [{...}]}."""
    if not isinstance(raw, dict) or not raw.get("query") or not raw.get("target"):
        raise InputError('needs "query" and "target"')
    several = raw["target"] if isinstance(raw["target"], list) else [raw["target"]]
    groups = ([raw["query"]], several, raw.get("negatives") or [])
    query, targets, negatives = (tuple(_item(x, images) for x in g) for g in groups)
    return Pair(query[0], targets, negatives)


def _mmeb_pair(row, images, subset) -> Pair:
    """One row of MMEB-train; "" is an absent field."""

    def part(name, image):
        return _item(dict(text=row.get(name), image=row.get(image)), images, subset)

    negative = row.get("neg_text") or row.get("neg_image_path")
    negatives = (part("neg_text", "neg_image_path"),) if negative else ()
    return Pair(part("qry", "qry_image_path"), (part("pos_text", "pos_image_path"),), negatives)


def _mmeb_query(row, item):
    """One row of MMEB-eval: the query and its candidates, the positive first."""
    texts, paths = row["tgt_text"], row["tgt_img_path"]
    if not texts or len(texts) != len(paths):
        raise InputError("tgt_text and tgt_img_path must be lists of one length, not empty")
    candidates = [item(t, p) for t, p in zip(texts, paths, strict=True)]
    return item(row["qry_text"], row["qry_img_path"]), candidates


def _located(where, parse, raw):
    """parse(raw), with errors that say where."""
    try:
        return parse(raw)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: {e}") from None


def _jsonl(path, parse, image_root) -> Lazy:
    """The lines of a JSONL file, parsed when asked for; each is tried once now, so that the first
    bad one is named, with file, line and field, before any training."""
    if not os.path.isfile(path):
        raise InputError(f"--data {path}: no such file; choose shapes, a .jsonl, a folder")
    images = Images(image_root or Path(path).parent)
    with open(path, "rb") as file:
        lines = [(n, line) for n, line in enumerate(file, 1) if line.strip()]

    def get(i):
        n, line = lines[i]
        return _located(f"{path}, line {n}", lambda x: parse(json.loads(x), images), line)

    for i in tqdm(range(len(lines)), f"reading {path}", leave=False, disable=len(lines) < 50_000):
        get(i)
    if not lines:
        raise InputError(f"--data {path}: holds no lines")
    return Lazy(len(lines), get)


def _parquet(path, columns, parse) -> Lazy:
    """The rows of a parquet file, memory-mapped, each parsed when asked for."""
    try:
        import pyarrow.parquet as pq

        table = pq.read_table(path, memory_map=True)
    except ImportError:
        raise InputError("MMEB's parquet files need pyarrow: pip install pyarrow") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not a readable parquet file: {e}") from None
    if missing := [c for c in columns if c not in table.column_names]:
        raise InputError(f"{path}: no column {missing[0]}; it has {', '.join(table.column_names)}")

    def get(i):
        return _located(f"{path}, row {i}", lambda x: parse(x.to_pylist()[0]), table.slice(i, 1))

    return Lazy(table.num_rows, get)


def _subsets(source, subsets, pattern) -> tuple:
    """-> (folder, {name: (rows to use or None, parquet file)}) of a data set in MMEB's layout, from
    a local folder or a hub id. subsets: "A:1000,B", "mmeb20", or "" for all there are."""
    subsets = MMEB20 if subsets == "mmeb20" else subsets
    wanted = [w.partition(":")[::2] for w in subsets.split(",")] if subsets else []
    root = Path(source)
    if not root.is_dir():
        root = _download(source, [name for name, _ in wanted], pattern)
    have = {p.parent.name: p for p in sorted(root.glob(f"*/{pattern}"))}
    if not have:
        raise InputError(f"--data {source}: no <subset>/{pattern} in it, as MMEB has")
    for name, cap in wanted:
        if name not in have or not (cap.isdigit() or cap == ""):
            raise InputError(
                f"--subsets {name}:{cap}: choose name or name:rows of {','.join(have)}"
            )
    wanted = wanted or [(name, "") for name in have]
    return root, {name: (int(cap or 0) or None, have[name]) for name, cap in wanted}


def _download(source, names, pattern) -> Path:
    """What `names` need of a data set on the hub, resumable, nothing twice; its size is said
    first."""
    if source.count("/") != 1 or source[0] in "./":
        raise InputError(f"--data {source}: no such folder; or a .jsonl, or a hub id")
    from huggingface_hub import snapshot_download

    wanted = [f"{n}/{pattern}" for n in names or ["*"]] + [f"images_zip/{n}.zip" for n in names]
    wanted.append("images.zip")
    get = partial(snapshot_download, source, repo_type="dataset", allow_patterns=wanted)
    try:
        size = sum(f.file_size for f in get(dry_run=True) if f.will_download)
        print(f"downloading {size / 1e9:.2f} GB of {source}" if size else f"{source}: already here")
        return Path(get())
    except (OSError, ValueError) as e:
        raise InputError(f"--data {source}: neither a folder nor on the hub: {e!s:.200}") from None


def read_dialogues(source="shapes", image_root=None, seed=0, turns=0, caption=False) -> Sequence:
    """Stage 1's data: a sequence of Dialogues.

    source: "shapes" (10^9 toy dialogues), or a JSONL file in LLaVA's layout. turns > 0: so many
    questions of each (1: single-turn). caption: a description instead (toy world). Raises
    InputError with file, line and field."""
    if source == "shapes":
        data = Lazy(10**9, partial(Shapes("train", seed).dialogue, caption=caption))
    elif caption:
        raise InputError("--caption goes with --data shapes; a file brings its own captions")
    else:
        data = _jsonl(source, _dialogue, image_root)
    return Lazy(len(data), lambda i: data[i]._replace(turns=data[i].turns[: turns or None]))


def read_pairs(source="shapes", image_root=None, subsets="", seed=0, split="original") -> dict:
    """Stage 2's data: {name: sequence of Pairs}, one entry a data set.

    source: "shapes", a JSONL file of pairs, a folder or hub id in MMEB-train's layout. subsets:
    names with caps, "ImageNet_1K:100000,CIRR", or "mmeb20". split: "original" or
    "diverse_instruction"."""
    if source == "shapes":
        return {t: Lazy(10**9, partial(Shapes("train", seed).pair, t)) for t in META_TASK}
    if source.endswith(".jsonl"):
        return {Path(source).stem: _jsonl(source, _pair, image_root)}
    root, found = _subsets(source, subsets, f"{split}-*.parquet")
    images, columns = Images(image_root or root), ("qry", "qry_image_path", "pos_text")
    for name, (cap, path) in found.items():
        parse = partial(_mmeb_pair, images=images, subset=name)
        rows = _parquet(path, (*columns, "pos_image_path"), parse)
        found[name] = Lazy(min(cap or len(rows), len(rows)), rows.get)
    return found


def read_tasks(source="shapes", image_root=None, subsets="", limit=0, seed=0) -> list:
    """Evaluation sets: a list of Tasks. source: "shapes" (5 tasks, each in distribution, with
    combinations and with wordings never trained on), a folder or hub id in MMEB-eval's layout.
    limit > 0: so many queries of each."""
    if source == "shapes":
        tasks = []
        for suffix in ("", "-new", "-words"):
            shapes = Shapes("new" if suffix == "-new" else "test", seed, suffix == "-words")
            for name, meta in META_TASK.items():
                queries = Lazy(limit or 100, partial(shapes.query, name))
                tasks.append(Task(name + suffix, meta, suffix != "", queries))
        names = subsets.split(",") if subsets else [t.name for t in tasks]
        if unknown := set(names) - {t.name for t in tasks}:
            names = ",".join(t.name for t in tasks)
            raise InputError(f"--subsets {min(unknown)}: choose of {names}")
        return [t for t in tasks if t.name in names]
    root, found = _subsets(source, subsets, "test-*.parquet")
    images, columns = Images(image_root or root), ("qry_text", "qry_img_path", "tgt_text")
    tasks = []
    for name, (cap, path) in found.items():
        # Candidates repeat from row to row: each becomes an Item once.
        make = partial(lambda text, image, name: _item(dict(text=text, image=image), images, name))
        item = lru_cache(None)(partial(make, name=name))
        rows = _parquet(path, (*columns, "tgt_img_path"), partial(_mmeb_query, item=item))
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
        self.head, self.mid, self.next, self.end, self.picture = [], [], [], [], ""
        if style == "vlm2vec":
            self.picture = processor.image_token
        else:
            self._read_chat_template()
        self.pad = self.tokenizer.pad_token_id or 0
        probe = self._segment(Image.new("RGB", (64, 64)))["tokens"]
        self.token_keys = ("input_ids", "roles", *(k for k in probe if k != "input_ids"))

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _text(self, text):
        """Token ids of a user's text. Trap: a special token spelled out in it must stay text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _read_chat_template(self):
        """What the model's chat template writes before, between and after two questions and
        answers, as token ids, and around a picture, as text: found by rendering marks and splitting
        there."""

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
        ids = self._ids(head)
        bos = self.tokenizer("").input_ids
        self.head = ids if ids[: len(bos)] == bos else bos + ids
        self.mid, self.next = self._ids(mid), self._ids(following)
        self.end = self._ids(tail)[:1] or [self.tokenizer.eos_token_id]
        one, none = (render([dict(type="image")] * n + [text]).split("\u2460")[0] for n in (1, 0))
        self.picture = one[len(os.path.commonprefix([one, none])) :]

    def _segment(self, image):
        """A picture as the processor writes it: {"tokens": {key: (L,)}, "images": {key: (n,
        ...)}}."""
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
        parts = [(self.head, HEAD), (self._text(texts[0]), CONTENT)]
        for segment, text in zip(segments, texts[1:], strict=True):
            parts += [(segment["tokens"], CONTENT), (self._text(text), CONTENT)]
        if code:
            parts += [(self._ids(STYLES[self.style]) + self.mid, CONTENT)]
            parts += [(self.compress_ids, COMPRESS)]
        lead = self.next if code else self._ids("\n")
        for question, answer in turns:
            parts += [(lead + self._text(question) + self.mid, QUESTION)]
            parts += [(self._text(answer) + self.end, ANSWER)]
            lead = self.next[len(self.end) :]
        cut = self._shorten(parts, len(turns))
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

    def _shorten(self, parts, turns) -> int:
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
            last = len(parts) - 2 * turns - 2 * (bool(self.compress_ids) or not turns)
            texts = [i for i in range(1, last) if not isinstance(parts[i][0], dict)]
            longest = max(texts, key=lambda i: len(parts[i][0]))
            ids, over = parts[longest][0], size() - self.max_length
            if over > len(ids):
                over = f"{size()} tokens, {over} too many, and only {len(ids)} of them text"
                raise InputError(f"--max-length {self.max_length}: {over}; lower --max-pixels")
            keep = (len(ids) - over + 1) // 2
            parts[longest] = (ids[:keep] + ids[keep + over :], CONTENT)
        return before - size()

    def pad_rows(self, rows, device=None) -> dict:
        """Rows -> inputs, right-padded to the longest: input_ids, attention_mask, roles, ... (B,
        L), and the image tensors of all rows end to end."""
        L = max(len(r["tokens"]["input_ids"]) for r in rows)
        inputs = {}
        for k in self.token_keys:
            inputs[k] = torch.full((len(rows), L), self.pad if k == "input_ids" else 0)  # (B, L)
            for i, r in enumerate(rows):
                inputs[k][i, : len(r["tokens"][k])] = r["tokens"][k]
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


# ---------------------------------------------------------------------------------------- commands


def show(path="out/shapes.png"):
    """Examples of the toy world on one sheet: pictures with their dialogues, pairs of each task."""
    shapes, rows = Shapes(), []
    for d in map(shapes.dialogue, range(6)):
        rows.append((d.item.images, [f"{q}  ->  {a}" for q, a in d.turns]))
    for task, meta in META_TASK.items():
        query, (right, *wrong) = shapes.query(task, 0)
        texts = [f"{task} ({meta}): {query.text}"]
        texts += [f"right: {right.text}"] + [f"wrong: {w.text}" for w in wrong[:2]]
        rows.append((query.images + right.images, texts[: 1 if right.images else 4]))
    sheet = Image.new("RGB", (1500, 140 * len(rows)), "white")
    for i, (pictures, texts) in enumerate(rows):
        for j, picture in enumerate(x.render() for x in pictures):
            sheet.paste(picture.resize((128, 128), 0), (6 + 134 * j, 6 + 140 * i))
        words = "\n".join(t[:190] for t in texts)
        ImageDraw.Draw(sheet).text((280, 10 + 140 * i), words, "black", font_size=15)
        print(words, end="\n\n")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"wrote {path}")


def export(out, n=100):
    """The toy world as files: dialogues.jsonl (LLaVA's layout), MMEB-train/ and MMEB-eval/ (parquet
    and PNG), n examples each; they read back to the same examples."""
    import pyarrow
    import pyarrow.parquet as pq

    def write(item, root):
        """Saves the item's pictures. -> (text as MMEB writes it, path or "")."""
        name = f"shapes/{item.key:016x}.png" if item.images else ""
        if name:
            (Path(out, root, "images", name)).parent.mkdir(parents=True, exist_ok=True)
            item.images[0].render().save(Path(out, root, "images", name))
        return item.text.replace(IMAGE, "<|image_1|>"), name

    def table(rows, columns, path):
        Path(out, path).parent.mkdir(parents=True, exist_ok=True)
        columns = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
        pq.write_table(pyarrow.table(columns), Path(out, path))

    lines, train = [], Shapes()
    for i in range(n):
        d = train.dialogue(i)
        talk = [dict(zip(("from", "value"), p, strict=True)) for q, a in d.turns
                for p in (("human", q), ("gpt", a))]  # fmt: skip
        talk[0]["value"] = f"{IMAGE}\n" + talk[0]["value"]
        lines.append(json.dumps(dict(id=d.id, image=write(d.item, ".")[1], conversations=talk)))
    Path(out, "dialogues.jsonl").write_text("\n".join(lines) + "\n")
    for t in META_TASK:
        rows = [[f for x in (p.query, p.targets[0]) for f in write(x, "MMEB-train")]
                for p in (train.pair(t, i) for i in range(n))]  # fmt: skip
        columns = ("qry", "qry_image_path", "pos_text", "pos_image_path")
        table(rows, columns, f"MMEB-train/{t}/original-00000-of-00001.parquet")
    for task in read_tasks(limit=n):
        rows = []
        for query, candidates in task.queries:
            targets = [write(x, "MMEB-eval") for x in candidates]
            rows.append([*write(query, "MMEB-eval"), *map(list, zip(*targets, strict=True))])
        columns = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
        table(rows, columns, f"MMEB-eval/{task.name}/test-00000-of-00001.parquet")
    print(f"wrote {out}/dialogues.jsonl, MMEB-train, MMEB-eval: {n} examples of each kind")


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            show()
        case ["export", folder]:
            export(folder)
        case _:
            sys.exit(__doc__)
