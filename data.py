"""Data: from files, or from a toy world, to model inputs.

    python data.py                        look at the toy world: out/shapes.png, examples printed
    python data.py export --out DIR       the toy world as files, in the formats that real data come in
    python data.py check --data DATA      read everything once, report what is bad (--clean OUT drops it)

`Item(text, images)` is the only currency: a piece of text with `<image>` where each picture goes.
A *dialogue* is an Item plus (question, answer) turns (stage 1), a *pair* is a query Item, its right
targets and its hard negatives (stage 2), a *task* is queries, each with candidates (evaluation).

Top to bottom: Item and pictures - the toy world - reading files - Items to model inputs - commands.
"""

import hashlib
import json
import os
import random
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
        with zipfile.ZipFile(self.zip) as archive, archive.open(self.member) as file:
            return open_image(file, f"{self.zip}:{self.member}")


def open_image(ref, name=None) -> Image.Image:
    """The picture as upright 8-bit RGB (of an animation the first frame; what is transparent becomes
    white). `ref`: path, open file, PIL image, or an object with `.render()`. Raises InputError."""
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
    except (OSError, SyntaxError, ValueError, EOFError, zipfile.BadZipFile) as e:
        if isinstance(e, InputError):
            raise
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
        image = Image.new("RGB", (64, 64), "#eeeeee")
        draw = ImageDraw.Draw(image)
        for o in self.objects:
            x, y = 32 * (PLACES.index(o.place) % 2), 32 * (PLACES.index(o.place) // 2)
            side = 32 if o.size == "large" else 16
            if o.size == "small":
                x, y = x + 16 * (o.cell % 2), y + 16 * (o.cell // 2)
            x0, y0, x1, y1, m = x + 1, y + 1, x + side - 2, y + side - 2, side // 2
            if o.shape == "circle":
                draw.ellipse((x0, y0, x1, y1), COLORS[o.color])
            elif o.shape == "cross":
                t = side // 6
                draw.rectangle((x + m - t, y0, x + m + t - 1, y1), COLORS[o.color])
                draw.rectangle((x0, y + m - t, x1, y + m + t - 1), COLORS[o.color])
            else:
                corners = {
                    "square": [(x0, y0), (x1, y0), (x1, y1), (x0, y1)],
                    "triangle": [(x + m, y0), (x1, y1), (x0, y1)],
                    "diamond": [(x + m, y0), (x1, y + m), (x + m, y1), (x0, y + m)],
                }
                draw.polygon(corners[o.shape], COLORS[o.color])
        if self.view:
            x, y = 32 * (PLACES.index(self.view) % 2), 32 * (PLACES.index(self.view) // 2)
            image = image.crop((x, y, x + 32, y + 32))
        return image


class Shapes:
    """The toy world: scenes, dialogues, pairs and queries as pure functions of (seed, split, index).

    split: "train"; "test" (scenes that "train" never shows); "new" (as "test", and the object that
    matters is a colour-shape combination never trained on); `new_words`: held-out wordings."""

    def __init__(self, split="train", seed=0, new_words=False):
        self.split, self.seed, self.new_words = split, seed, new_words

    def _rng(self, *key):
        return random.Random(
            repr((self.seed, self.split, *key))
        )  # a string seeds it everywhere alike

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
            if kind == "color":  # named by its shape: askable only if no other object shares it
                what = (o.shape,) if sum(x.shape == o.shape for x in scene.objects) == 1 else None
            elif kind == "shape":
                what = (f"{o.color} object",)
                what = what if sum(x.color == o.color for x in scene.objects) == 1 else None
            elif kind == "at":
                what = (rng.choice(PLACES),)
            elif kind == "next":
                side, other = _neighbour(rng, o.place)
                what = (side, o.name)
            else:
                what = (o.name,)
            if what:
                answer = {
                    "count": lambda: NUMBERS[len(scene.objects)],
                    "at": lambda: scene.at(what[0]),
                    "next": lambda: scene.at(other),
                    "describe": scene.describe,
                }.get(kind, lambda: getattr(o, kind))()
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
            scenes = self._others(rng, scene, candidates)
            others = {s.describe(): s for s in reversed(scenes)}  # of equal ones the first
            return query, [Item(IMAGE, (s,)) for s in reversed(others.values())]
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
MMEB = {  # name -> (meta-task, out of distribution), the 36 sets in the paper's order
    name: (meta, ood)
    for ood, sets in enumerate((IND, OOD))
    for meta in sets
    for name in sets[meta].split()
}


class Images:
    """Finds the pictures of a data set below `root`, unpacked or in the hub's zip files; a path that
    leaves `root` (`..`, absolute, a symbolic link) is an InputError."""

    def __init__(self, root):
        self.root = Path(root)
        self.zips = {p.stem: p for p in sorted(self.root.glob("images_zip/*.zip"))}

    def find(self, path: str, subset=""):
        """-> a path, or a ZipImage; a picture that is nowhere is found out when it is opened."""
        for base in (self.root / "images", self.root):
            full = os.path.realpath(base / path)
            if not full.startswith(os.path.realpath(base) + os.sep):
                raise InputError(f"the picture {path!r} lies outside of {base}")
            if os.path.exists(full):
                return full
        if subset in self.zips:
            return ZipImage(str(self.zips[subset]), path)
        return str(self.root / path)


def _item(raw, images: Images, subset="") -> Item:
    """An Item from {"text", "image"}, either of which may be missing; `image`: a path or several."""
    if not isinstance(raw, dict) or not (raw.get("text") or raw.get("image")):
        raise InputError('needs {"text": ..., "image": ...}, at least one of them not empty')
    text, paths = raw.get("text") or "", raw.get("image") or []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(text, str) or not all(isinstance(p, str) for p in paths):
        raise InputError('"text" must be a string, "image" a path or a list of paths')
    text = text.replace("<|image_1|>", IMAGE) if text else IMAGE * len(paths)
    if text.count(IMAGE) != len(paths):
        raise InputError(
            f"{text.count(IMAGE)} x {IMAGE} in the text, {len(paths)} in `image`: write {IMAGE} where each "
            "picture goes"
        )
    return Item(text, tuple(images.find(p, subset) for p in paths))


def _dialogue(raw, images) -> Dialogue:
    """LLaVA's layout: {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}."""
    talk = raw.get("conversations") if isinstance(raw, dict) else None
    if not isinstance(talk, list) or not talk or len(talk) % 2:
        raise InputError('"conversations" must be a list of questions and answers in turn')
    for i, turn in enumerate(talk):
        who = ("human", "gpt")[i % 2]
        if not isinstance(turn, dict) or turn.get("from") != who or not turn.get("value"):
            raise InputError(f'conversations[{i}] must have "from": "{who}" and a "value"')
    values = [t["value"] for t in talk]
    # The picture stands before the first question; what is compressed is the picture alone.
    lead = values[0].count(IMAGE)
    item = _item(dict(text=IMAGE * lead, image=raw.get("image")), images)
    values[0] = values[0].replace(IMAGE, "").strip("\n")
    return Dialogue(
        item, tuple(zip(values[::2], values[1::2], strict=True)), str(raw.get("id", ""))
    )


def _pair(raw, images) -> Pair:
    """{"query": {"text", "image"}, "target": {...} or a list of them, "negatives": [{...}]}."""
    if not isinstance(raw, dict) or "query" not in raw or "target" not in raw:
        raise InputError('needs "query" and "target"')
    targets = raw["target"] if isinstance(raw["target"], list) else [raw["target"]]
    if not targets:
        raise InputError('"target" is an empty list')
    groups = ([raw["query"]], targets, raw.get("negatives") or [])
    query, targets, negatives = (tuple(_item(x, images) for x in g) for g in groups)
    return Pair(query[0], targets, negatives)


def _jsonl(path, parse, image_root) -> Lazy:
    """The lines of a JSONL file, parsed when asked for; each is tried once at the start, so that the
    first bad one is named with file, line and field before any training."""
    if not os.path.isfile(path):
        raise InputError(
            f"{path}: no such file. Choose a .jsonl file, a folder in MMEB's layout, `shapes`"
        )
    images = Images(image_root or Path(path).parent)
    with open(path, "rb") as file:
        lines = [(n, line) for n, line in enumerate(file, 1) if line.strip()]

    def get(i):
        n, line = lines[i]
        try:
            return parse(json.loads(line), images)
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}, line {n}: {e}") from None

    for i in tqdm(range(len(lines)), f"reading {path}", leave=False, disable=len(lines) < 50_000):
        get(i)
    if not lines:
        raise InputError(f"{path}: holds no lines")
    return Lazy(len(lines), get)


def _parquet(path, columns):
    """The table of a parquet file, memory-mapped; columns that must be there are checked."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError("reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = pq.read_table(path, memory_map=True)
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not a readable parquet file: {e}") from None
    if missing := sorted(set(columns) - set(table.column_names)):
        raise InputError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(table.column_names)}"
        )
    return table


def _rows(path, columns, parse) -> Lazy:
    """The rows of a parquet file, each parsed when asked for."""
    table = _parquet(path, columns)

    def get(i):
        try:
            return parse(table.slice(i, 1).to_pylist()[0])
        except InputError as e:
            raise InputError(f"{path}, row {i}: {e}") from None

    return Lazy(table.num_rows, get)


def _subsets(source, subsets, pattern) -> dict:
    """{name: (cap or None, parquet file)} of a folder in MMEB's layout; `subsets`: "A:1000,B" or ""."""
    root = Path(source)
    if not root.is_dir():
        raise InputError(
            f"{source}: no such folder; a folder in MMEB's layout holds <subset>/{pattern}"
        )
    have = {p.parent.name: p for p in sorted(root.glob(f"*/{pattern}"))}
    if not have:
        raise InputError(f"{source}: no <subset>/{pattern} in it")
    wanted = (
        [w.partition(":")[::2] for w in subsets.split(",")] if subsets else [(n, "") for n in have]
    )
    for name, cap in wanted:
        if name not in have or not (cap.isdigit() or cap == ""):
            raise InputError(
                f"--subsets {name}{':' * bool(cap)}{cap}: choose from {', '.join(have)}"
            )
    return {name: (int(cap or 0) or None, have[name]) for name, cap in wanted}


def _mmeb_pair(row, images, subset) -> Pair:
    """One row of MMEB-train; "" is an absent field."""

    def part(text, image):
        return _item(dict(text=row.get(text), image=row.get(image)), images, subset)

    negative = row.get("neg_text") or row.get("neg_image_path")
    return Pair(
        part("qry", "qry_image_path"),
        (part("pos_text", "pos_image_path"),),
        (part("neg_text", "neg_image_path"),) if negative else (),
    )


def _mmeb_query(row, images, subset):
    """One row of MMEB-eval: the query and its candidates, the positive first."""
    query = _item(dict(text=row["qry_text"], image=row["qry_img_path"]), images, subset)
    texts, paths = row["tgt_text"], row["tgt_img_path"]
    if not texts or len(texts) != len(paths):
        raise InputError("tgt_text and tgt_img_path must be lists of one length, not empty")
    return query, [
        _item(dict(text=t, image=p), images, subset) for t, p in zip(texts, paths, strict=True)
    ]


def _captions(d: Dialogue) -> Dialogue:
    return d._replace(turns=(("Describe the picture.", d.turns[-1][1]),))


def read_dialogues(source="shapes", image_root=None, seed=0, turns=0, caption=False) -> Sequence:
    """Stage 1's data: a sequence of Dialogues.

    source: "shapes" (10^9 toy dialogues), or a JSONL file in LLaVA's layout. turns > 0 keeps the first
    so many questions (1: single-turn); caption: a description in place of the dialogue (toy world).
    Raises InputError with file, line and field."""
    if source.startswith("shapes"):
        shapes = Shapes(source.partition(":")[2] or "train", seed)
        data = Lazy(10**9, partial(shapes.dialogue, caption=caption))
    elif caption:
        raise InputError(
            "--caption is for --data shapes; of a file give the captions as its answers"
        )
    else:
        data = _jsonl(source, _dialogue, image_root)

    def cut(i):
        d = data[i]
        return d._replace(turns=d.turns[:turns]) if turns else d

    return Lazy(len(data), cut)


def read_pairs(source="shapes", image_root=None, subsets="", seed=0, split="original") -> dict:
    """Stage 2's data: {name: sequence of Pairs}, one entry a data set.

    source: "shapes", a JSONL file of pairs, or a folder in MMEB-train's layout; subsets: names with
    caps, "ImageNet_1K:100000,CIRR"; split: "original" or "diverse_instruction"."""
    if source == "shapes":
        shapes = Shapes("train", seed)
        return {t: Lazy(10**9, partial(shapes.pair, t)) for t in META_TASK}
    if source.endswith(".jsonl"):
        return {Path(source).stem: _jsonl(source, _pair, image_root)}
    images, columns = (
        Images(image_root or source),
        ("qry", "qry_image_path", "pos_text", "pos_image_path"),
    )
    found = {}
    for name, (cap, path) in _subsets(source, subsets, f"{split}-*.parquet").items():
        rows = _rows(path, columns, partial(_mmeb_pair, images=images, subset=name))
        found[name] = Lazy(min(cap or len(rows), len(rows)), rows.get)
    return found


def read_tasks(source="shapes", image_root=None, subsets="", limit=0, seed=0) -> list:
    """Evaluation sets: a list of Tasks. source: "shapes" or a folder in MMEB-eval's layout; limit > 0
    keeps so many queries of each."""
    if source == "shapes":
        kinds = {"": ("test", 0, False), "-new": ("new", 0, True), "-words": ("test", 0, True)}
        tasks = []
        for suffix, (split, _, ood) in kinds.items():
            shapes = Shapes(split, seed, new_words=suffix == "-words")
            for name, meta in META_TASK.items():
                queries = Lazy(limit or 100, partial(shapes.query, name))
                tasks.append(Task(name + suffix, meta, ood, queries))
        return [t for t in tasks if not subsets or t.name in subsets.split(",")]
    images, columns = (
        Images(image_root or source),
        ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path"),
    )
    tasks = []
    for name, (_, path) in _subsets(source, subsets, "test-*.parquet").items():
        rows = _rows(path, columns, partial(_mmeb_query, images=images, subset=name))
        meta, ood = MMEB.get(name, ("Other", True))
        tasks.append(
            Task(name, meta, bool(ood), Lazy(min(limit or len(rows), len(rows)), rows.get))
        )
    return tasks


# --------------------------------------------------------------------------- Items to model inputs

PAD, HEAD, CONTENT, COMPRESS, QUESTION, ANSWER = range(6)  # the role of a token
SUMMARIZE = "\nSummarize above image and text in a few words."  # the official code's prompt
STYLES = {"coma": SUMMARIZE, "chat": "", "vlm2vec": None}  # --prompt: what follows the content


class Collator:
    """Items -> padded model inputs, in one layout for all stages.

        HEAD      user turn opens
        CONTENT   text and pictures, the style's instruction; the assistant's turn opens
        COMPRESS  C_1 ... C_K: the assistant's answer is the code         <- an embedding ends here
        QUESTION  user turn: Q_1; assistant's turn opens                  <- stage 1 goes on
        ANSWER    A_1 and the end-of-turn token; and so on

    With K = 0 there is no code: the content and Q_1 share one user turn (plain instruction tuning).
    processor: a transformers processor (tokenizer + image processor); its tokenizer must know the K
    compression tokens (`compress_ids`). max_length: longer rows lose text from the content's middle."""

    def __init__(self, processor, compress_ids=(), style="chat", max_length=0):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.compress_ids, self.style, self.max_length = list(compress_ids), style, max_length
        self.head, self.mid, self.next, tail, self.picture = self._chat_pieces()
        self.end = tail[:1] or [self.tokenizer.eos_token_id]
        probe = self._segment(Image.new("RGB", (64, 64)))
        self.pad = self.tokenizer.pad_token_id or 0
        self.token_keys = [k for k in probe["tokens"] if k != "input_ids"]

    def _chat_pieces(self):
        """The chat template's own pieces: token ids of what opens a user turn, of what stands between
        question and answer, between answer and question, after the last answer; the image's text."""
        marks = ["\u2460", "\u2461", "\u2462", "\u2463"]
        roles = ("user", "assistant") * 2
        chat = [
            dict(role=r, content=[dict(type="text", text=m)])
            for r, m in zip(roles, marks, strict=True)
        ]
        render = partial(
            self.tokenizer.apply_chat_template,
            chat_template=self.processor.chat_template,
            tokenize=False,
        )
        head, rest = render(chat).split(marks[0])
        mid, rest = rest.split(marks[1])
        following, rest = rest.split(marks[2])
        tail = rest.split(marks[3])[1]
        if following.startswith(tail):  # without the default system prompt, as in the official code
            head = following.removeprefix(tail)
        pieces = [
            self.tokenizer(s, add_special_tokens=False).input_ids
            for s in (head, mid, following, tail)
        ]
        bos = self.tokenizer("").input_ids
        pieces[0] = pieces[0] if pieces[0][: len(bos)] == bos else bos + pieces[0]
        turn = [[dict(type="image")] * n + [dict(type="text", text=marks[0])] for n in (1, 0)]
        one, none = (render([dict(role="user", content=c)]).split(marks[0])[0] for c in turn)
        return *pieces, one[len(os.path.commonprefix([one, none])) :]

    def _segment(self, image):
        """One picture as the processor writes it: {"tokens": {key: (L,)}, "images": {key: (n, ...)}}."""
        out = self.processor(
            text=[self.picture], images=[image], add_special_tokens=False, return_tensors="pt"
        )
        tokens = {
            k: v[0] for k, v in out.items() if k == "input_ids" or k.endswith("token_type_ids")
        }
        images = {k: v for k, v in out.items() if k not in tokens and k != "attention_mask"}
        return dict(tokens=tokens, images=images)

    def _text(self, text):
        """Token ids of a user's text. Trap: a special token spelled out in it must stay text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def row(self, item: Item, turns=()) -> dict:
        """One example, not padded: {"tokens": {key: (L,)}, "images": {key: (n, ...)}, "cut": tokens that
        max_length took away}."""
        texts = item.text.split(IMAGE)
        if len(texts) - 1 != len(item.images):
            raise InputError(
                f"{len(texts) - 1} x {IMAGE}, but {len(item.images)} pictures, in {item}"[:300]
            )
        suffix = STYLES[self.style] if self.compress_ids or not turns else ""
        texts[-1] += suffix + "\n" * bool(turns and not self.compress_ids and item.text)
        segments = [self._segment(open_image(x)) for x in item.images]
        parts = [(self.head, HEAD), (self._text(texts[0]), CONTENT)]
        for segment, text in zip(segments, texts[1:], strict=True):
            parts += [(segment["tokens"], CONTENT), (self._text(text), CONTENT)]
        if self.compress_ids or not turns:
            parts += [(self.mid, CONTENT), (self.compress_ids, COMPRESS)]
        lead = self.next if self.compress_ids else []
        for question, answer in turns:
            parts += [(lead + self._text(question) + self.mid, QUESTION)]
            parts += [(self._text(answer) + self.end, ANSWER)]
            lead = self.next[len(self.end) :]
        return self._join(parts, segments)

    def _join(self, parts, segments):
        tokens = {k: [] for k in ("input_ids", "roles", *self.token_keys)}
        for ids, role in parts:
            piece = (
                ids if isinstance(ids, dict) else {"input_ids": torch.tensor(ids, dtype=torch.long)}
            )
            zeros = torch.zeros_like(piece["input_ids"])
            for k, columns in tokens.items():
                columns.append(zeros + role if k == "roles" else piece.get(k, zeros))
        tokens = {k: torch.cat(v) for k, v in tokens.items()}
        images = {k: [s["images"][k] for s in segments] for s in segments[:1] for k in s["images"]}
        return dict(tokens=tokens, images={k: cat_padded(v) for k, v in images.items()})

    def pad_rows(self, rows, device=None) -> dict:
        """Rows -> inputs, right-padded to the longest: input_ids, attention_mask, roles, ... (B, L) and
        the image tensors of all rows end to end."""
        L = max(len(r["tokens"]["input_ids"]) for r in rows)
        inputs = {}
        for k in rows[0]["tokens"]:
            fill = self.pad if k == "input_ids" else 0
            stack = [F.pad(r["tokens"][k], (0, L - len(r["tokens"][k])), value=fill) for r in rows]
            inputs[k] = torch.stack(stack)  # (B, L)
        inputs["attention_mask"] = (inputs["roles"] != PAD).long()
        for k in {k: 0 for r in rows for k in r["images"]}:
            inputs[k] = cat_padded([r["images"][k] for r in rows if k in r["images"]])
        return {k: v.to(device, non_blocking=True) for k, v in inputs.items()} if device else inputs

    def __call__(self, items, turns=None) -> dict:
        """Items (and the turns of each) -> padded model inputs."""
        turns = turns or [()] * len(items)
        return self.pad_rows([self.row(x, t) for x, t in zip(items, turns, strict=True)])


def cat_padded(tensors) -> torch.Tensor:
    """Tensors end to end along their first axis; the other axes zero-padded to the largest."""
    shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    if all(list(t.shape[1:]) == shape for t in tensors):
        return torch.cat(tensors)
    grow = [
        [p for n, s in zip(shape[::-1], t.shape[:0:-1], strict=True) for p in (0, n - s)]
        for t in tensors
    ]
    return torch.cat([F.pad(t, g) for t, g in zip(tensors, grow, strict=True)])
