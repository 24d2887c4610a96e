"""The toy world: pictures of coloured shapes, and what MMEB asks of photographs asked of them.

A picture is 64 x 64: four quadrants with at most one object each. Everything is a pure function of
(seed, split, index): nothing is stored, and it is the same on every machine and rank. Shapes sit on
the model's 16-pixel grid: learned several times faster than jittered ones.

Plain tuples, of which data.py makes its Items: a *content* is (text, images), with "<image>" in the
text where each picture goes. `python -m tools.look` draws examples, `python -m tools.export DIR`
writes them as files.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

IMAGE = "<image>"
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
COLORS = {
    "red": "#d62728",
    "green": "#2ca02c",
    "blue": "#1f4fd6",
    "yellow": "#f2c80f",
    "purple": "#8e44ad",
    "orange": "#ff7f0e",
}
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
TINTS = ("#f6e6e6", "#e6f6e6", "#e6e6f6", "#f6f6e0")  # of the places: a tiny model sees where it is
NUMBERS = ("zero", "one", "two", "three", "four")
WORDS = tuple(COLORS) + SHAPES + SIZES + PLACES + NUMBERS[1:]  # the answers of vqa

# Combinations of colour and shape that training never shows, one of each colour.
HELD_OUT = {
    ("red", "cross"),
    ("green", "diamond"),
    ("blue", "triangle"),
    ("yellow", "circle"),
    ("purple", "square"),
    ("orange", "cross"),
}
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
META_TASK = {
    "classify": "Classification",
    "vqa": "VQA",
    "i2t": "Retrieval",
    "t2i": "Retrieval",
    "ground": "Grounding",
}

# ---------------------------------------------------------------------------------------- pictures


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

    def at(self, place) -> str:
        """What stands at a place, as text: "a small red circle" or "nothing"."""
        for o in self.objects:
            if o.place == place:
                return str(o)
        return "nothing"

    def render(self) -> Image.Image:
        """The picture (64 x 64, a quadrant 32 x 32), RGB."""
        image = Image.new("RGB", (64, 64))
        canvas = ImageDraw.Draw(image)
        for place, tint in zip(PLACES, TINTS, strict=True):
            x, y = corner(place)
            canvas.rectangle((x, y, x + 31, y + 31), tint)
        for o in self.objects:
            draw_object(canvas, o)
        if self.view:
            x, y = corner(self.view)
            image = image.crop((x, y, x + 32, y + 32))
        return image


def by_place(objects) -> tuple:
    """Objects in reading order: the order of a scene does not depend on how it was made."""
    return tuple(sorted(objects, key=lambda o: PLACES.index(o.place)))


def corner(place) -> tuple:
    """The upper left pixel (x, y) of a quadrant, of which a picture has two by two."""
    row, column = divmod(PLACES.index(place), 2)
    return 32 * column, 32 * row


def draw_object(canvas, o):
    """An object in its quadrant, a pixel away from the edges; `m` is its middle."""
    side = 32 if o.size == "large" else 16
    x, y = corner(o.place)
    x += 16 * (o.cell % 2)
    y += 16 * (o.cell // 2)
    left, right = x + 1, x + side - 2
    top, bottom = y + 1, y + side - 2
    m = side // 2
    color = COLORS[o.color]
    if o.shape == "circle":
        canvas.ellipse((left, top, right, bottom), color)
    elif o.shape == "square":
        canvas.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color)
    elif o.shape == "triangle":
        canvas.polygon([(x + m, top), (right, bottom), (left, bottom)], color)
    elif o.shape == "diamond":
        canvas.polygon([(x + m, top), (right, y + m), (x + m, bottom), (left, y + m)], color)
    else:  # a cross is two bars
        half = side // 6
        canvas.rectangle((x + m - half, top, x + m + half - 1, bottom), color)
        canvas.rectangle((left, y + m - half, right, y + m + half - 1), color)


# --------------------------------------------------------------------------- what is asked of them


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

    def scene(self, rng, least=1, most=4, choice=SEEN) -> Scene:
        """A scene of `least` to `most` objects; colour-shape combinations are distinct in it, and
        drawn from `choice`."""
        while True:
            names = rng.sample(choice, rng.randint(least, most))
            if self.split == "new":
                names[0] = rng.choice(sorted(HELD_OUT))
            places = rng.sample(PLACES, len(names))
            objects = []
            for (color, shape), place in zip(names, places, strict=True):
                size = rng.choice(SIZES)
                cell = rng.randrange(4)  # drawn for a large one too, which fills its quadrant
                objects.append(Object(size, color, shape, place, cell if size == "small" else 0))
            scene = Scene(by_place(objects))
            # Every 8th description is held out, whichever seed or index it comes from.
            digest = hashlib.blake2b(scene.describe().encode(), digest_size=1).digest()[0]
            held_out = digest % 8 == 0
            if held_out == (self.split != "train"):
                return scene

    def _focus(self, rng, scene):
        """The object that a question is about: in the "new" split the never-seen combination."""
        new = [o for o in scene.objects if (o.color, o.shape) in HELD_OUT]
        return rng.choice(new or scene.objects)

    def _others(self, rng, scene, n):
        """The scene, near misses of it (one attribute changed), then random scenes: n in all."""
        scenes = [scene]
        for _ in range(n // 4):
            old = rng.choice(scene.objects)
            free = [p for p in PLACES if scene.at(p) == "nothing"] or [old.place]
            new = old._replace(size=rng.choice(SIZES), place=rng.choice(free))
            if new.size == "large":
                new = new._replace(cell=0)  # a large one fills its quadrant
            scenes.append(Scene(by_place(new if o is old else o for o in scene.objects)))
        while len(scenes) < n:
            scenes.append(self.scene(rng, 2, 4))
        return scenes

    # ---------------------------------------------------------------------------------- stage 1

    def ask(self, rng, scene, kinds=tuple(ASK), subject=None) -> list:
        """(kind, question, answer) for each of `kinds` that has exactly one right answer here.
        subject: the object that is asked about, else one is drawn for each question."""
        asked = []
        for kind in kinds:
            o = subject or rng.choice(scene.objects)
            names, answer = self._answer(rng, scene, kind, o)
            # Named by its shape alone (or its color), an object must be the only such one.
            named_by = {"color": "shape", "shape": "color"}.get(kind, "name")
            alike = [x for x in scene.objects if getattr(x, named_by) == getattr(o, named_by)]
            if len(alike) == 1:
                question = self._words(rng, ASK[kind]).format(*names)
                asked.append((kind, question, answer))
        return asked

    def _answer(self, rng, scene, kind, o):
        """-> (what a question of this kind names, its answer)."""
        if kind == "count":
            return (), NUMBERS[len(scene.objects)]
        if kind == "describe":
            return (), scene.describe()
        if kind == "at":
            place = rng.choice(PLACES)
            return (place,), scene.at(place)
        if kind == "next":
            side, place = neighbour(rng, o.place)
            return (side, o.name), scene.at(place)
        if kind == "color":
            return (o.shape,), o.color
        if kind == "shape":
            return (f"{o.color} object",), o.shape
        return (o.name,), o.size if kind == "size" else o.place

    def dialogue(self, i, caption=False, texts=0.0) -> tuple:
        """3-5 questions about different things (or one full description) with their answers:
        (content, turns, id). texts: the share of them that are about a description in place of the
        picture."""
        rng = self._rng("dialogue", i)
        scene = self.scene(rng)
        kinds = ["describe"] if caption else rng.sample(list(ASK), len(ASK))
        asked = self.ask(rng, scene, kinds)[: rng.randint(3, 5)]
        turns = tuple((question, answer) for _, question, answer in asked)
        content = (IMAGE, (scene,))
        if texts and self._rng("text", i).random() < texts:
            content = (scene.describe(), ())
        return content, turns, f"shapes-{self.split}-{i}"

    # ------------------------------------------------------------------------ stage 2, evaluation

    def query(self, task, i, candidates=16) -> tuple:
        """(query, candidates), contents all: candidate 0 is right, and no other one is."""
        rng = self._rng(task, i)
        least, most = {"classify": (1, 1), "vqa": (1, 4)}.get(task, (2, 4))
        scene = self.scene(rng, least, most)
        o = self._focus(rng, scene)
        words = self._words(rng, INSTRUCT[task])
        if task == "t2i":
            pictures = one_of_each(self._others(rng, scene, candidates)).values()
            return (words.format(scene.describe()), ()), [(IMAGE, (s,)) for s in pictures]
        if task == "ground":
            words = words.format(o.name)
            pictures = self._crops(rng, scene, o, candidates)
            return (f"{IMAGE} {words}", (scene,)), [(IMAGE, (s,)) for s in pictures]
        if task == "classify":
            texts = self._names(o)
        elif task == "vqa":
            kinds = ("count", "color", "shape", "size", "place")
            _, question, answer = rng.choice(self.ask(rng, scene, kinds, subject=o))
            words = words.format(question)
            texts = [answer] + [word for word in WORDS if word != answer]
        else:  # i2t
            texts = one_of_each(self._others(rng, scene, candidates))
        return (f"{IMAGE} {words}", (scene,)), [(text, ()) for text in texts]

    def _names(self, o):
        """The name of an object, then all the others that there are."""
        combinations = list(SEEN)
        if self.split == "new":  # there the right one is one of these
            combinations += sorted(HELD_OUT)
        names = [f"{color} {shape}" for color, shape in combinations]
        return [o.name] + [name for name in names if name != o.name]

    def _crops(self, rng, scene, o, n):
        """Quadrants: of the object, the rest of its picture, then of others, one each; of these
        never one with the object's name. At most n, all of them different."""
        objects = [o, *scene.objects]
        for other in self._others(rng, scene, n)[1:]:
            objects += [x for x in other.objects if x.name != o.name][:1]
        crops = [Scene((x,), view=x.place) for x in objects]
        return list(dict.fromkeys(crops))[:n]

    def pair(self, task, i) -> tuple:
        """A training pair: (query, (its right candidate,), no hard negatives)."""
        query, candidates = self.query(task, i, candidates=1)
        return query, (candidates[0],), ()


def one_of_each(scenes) -> dict:
    """{description: scene}, of scenes that read alike the first."""
    distinct = {}
    for scene in scenes:
        distinct.setdefault(scene.describe(), scene)
    return distinct


def neighbour(rng, place) -> tuple:
    """A side of a place, and the place there: ("right of", "top right") for "top left"."""
    row, column = place.split()
    if rng.random() < 0.5:
        side = "right" if column == "left" else "left"
        return f"{side} of", f"{row} {side}"
    if row == "bottom":
        return "above", f"top {column}"
    return "below", f"bottom {column}"


def evaluation_sets(seed=0) -> dict:
    """{name: (task, out of distribution?, world)}: each task in distribution, with colour-shape
    combinations ("-new") and with wordings ("-words") that training never shows."""
    sets = {}
    for task in META_TASK:
        sets[task] = (task, False, Shapes("test", seed))
    for task in META_TASK:
        sets[f"{task}-new"] = (task, True, Shapes("new", seed))
    for task in META_TASK:
        sets[f"{task}-words"] = (task, True, Shapes("test", seed, new_words=True))
    return sets
