"""The toy world: pictures of coloured shapes, and what MMEB asks of photographs asked of them.

A picture is 64 x 64: four quadrants with at most one object each. Everything is a pure function of
(seed, split, index): nothing is stored, and it is the same on every machine and rank. Shapes sit on
the model's 16-pixel grid: learned several times faster than jittered ones.

`python data.py` draws examples of it, `python data.py export DIR` writes it as files.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from data import IMAGE, Dialogue, Item, Pair, read_tasks

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

    def dialogue(self, i, caption=False, texts=0.0) -> Dialogue:
        """3-5 questions about different things (or one full description) with their answers. texts:
        the share of them that are about a description in place of the picture."""
        rng = self._rng("dialogue", i)
        scene = self.scene(rng)
        turns = self.ask(rng, scene, ["describe"] if caption else rng.sample(list(ASK), len(ASK)))
        turns = tuple((q, a) for _, q, a in turns[: rng.randint(3, 5)])
        item = Item(IMAGE, (scene,))
        if texts and self._rng("text", i).random() < texts:
            item = Item(scene.describe())
        return Dialogue(item, turns, f"shapes-{self.split}-{i}")

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
            new = new._replace(
                cell=o.cell * (new.size == "small")
            )  # a large one fills its quadrant
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


def as_conversations(id, image, turns) -> dict:
    """A dialogue as LLaVA writes it: `data._dialogue`, the other way round."""
    talk = [{"from": who, "value": x} for turn in turns
            for who, x in zip(("human", "gpt"), turn, strict=True)]  # fmt: skip
    talk[0]["value"] = f"{IMAGE}\n" + talk[0]["value"]
    return dict(id=id, image=image, conversations=talk)


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
        lines.append(json.dumps(as_conversations(d.id, write(d.item, ".")[1], d.turns)))
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
