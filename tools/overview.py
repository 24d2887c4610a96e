"""The two drawings at the head of the README: what *compress* and *match* do, and one picture of
the toy world with a question, a pair and a task about it. No model is needed, and no record.

The letters are large: what is legible on a page must be so on a phone, at half the width and less.
Units are inches; y grows upwards."""

import math
import random
import sys
import textwrap
from pathlib import Path

if __name__ == "__main__":  # in front of a library that may not be there
    sys.exit("tools/overview.py has no commands: tools/figures.py imports it")

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyArrowPatch, FancyBboxPatch, Rectangle

from tools.drawings import BLACK, BLUE, GREEN, GREY, ORANGE, RED, STYLE, WIDTH, picture_of, save_png
from toy.world import IMAGE, INSTRUCT, Shapes

K = 4  # compression tokens, as many as the toy MLLM has
SHEET = "#f4f4f2"  # behind a panel
WORDS = 13  # points
PIXELS_PER_INCH = 200


def blank(height):
    """A figure of the README's width, whose axes count inches from the lower left corner."""
    fig = Figure((WIDTH, height), layout="none")
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, height), autoscale_on=False)
    ax.axis("off")
    return fig, ax


def box(ax, x, y, width, height, color):
    """A sheet of paper with round corners."""
    sheet = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.09")
    sheet.set(facecolor=color, edgecolor=GREY if color == "white" else "none", zorder=1)
    ax.add_patch(sheet)


def words(ax, x, y, text, **style):
    """Text whose left end, or with ha="center" or "right" another point, is at x."""
    style = {"size": WORDS, "va": "center", "zorder": 3, **style}
    ax.text(x, y, text, **style)


def label(ax, x, y, text):
    """The grey name of what stands below."""
    words(ax, x, y, text, color=GREY, ha="center", size=12.5)


def panel(ax, y, height, title, text):
    """A grey sheet over the whole width, with a title and what it is about."""
    box(ax, 0.1, y, WIDTH - 0.2, height, SHEET)
    top = y + height - 0.26
    words(ax, 0.25, top, title, size=17, weight="bold")
    words(ax, WIDTH - 0.25, top, text, color=GREY, ha="right")


def picture(ax, scene, x, y, side, patches=1):
    """A picture of the toy world; patches: white lines cut it into so many image tokens a side."""
    inside = (x, x + side, y, y + side)
    ax.imshow(scene.render(), extent=inside, interpolation="nearest", aspect="auto", zorder=2)
    for i in range(1, patches):
        offset = side * i / patches
        ax.vlines(x + offset, y, y + side, color="white", lw=1.5, zorder=2)
        ax.hlines(y + offset, x, x + side, color="white", lw=1.5, zorder=2)
    frame(ax, x, y, side, GREY, 1)


def frame(ax, x, y, side, color, width):
    """Around a picture."""
    square = Rectangle((x, y), side, side, fill=False, edgecolor=color, lw=width, zorder=3)
    ax.add_patch(square)


def code(ax, x, y):
    """The K compression tokens, an orange square each, from x on and around y."""
    side = 0.4
    for k in range(K):
        corner = (x + k * side, y - side / 2)
        square = Rectangle(corner, side, side, facecolor=ORANGE, edgecolor=SHEET, lw=2, zorder=2)
        ax.add_patch(square)
        words(ax, x + (k + 0.5) * side, y, f"$C_{k + 1}$", ha="center")


def arrow(ax, start, end, color=BLUE, width=2.5):
    """From start to end, (x, y) each."""
    style = {"color": color, "lw": width, "mutation_scale": 20, "zorder": 2}
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", shrinkA=0, shrinkB=0, **style))


# ------------------------------------------------------------------------------------ the overview


def overview():
    """Compress: the dialogue sees C, never the picture. Match: the mean of C as a unit vector, of a
    query and of its target, and their cosine."""
    (_, (scene,)), turns, _ = Shapes().dialogue(0)
    fig, ax = blank(5.35)
    draw_compress(ax, scene, (turns[2], turns[4]))
    draw_match(ax, scene)
    return fig


def draw_compress(ax, scene, turns):
    """The upper panel: one sequence, and who sees whom in it."""
    panel(ax, 2.85, 2.4, "1  Compress", "answer questions about a picture out of sight")
    y = 3.99  # of the sequence
    label(ax, 0.8, y + 0.63, "picture")
    label(ax, 2.78, y + 0.63, "code C")
    label(ax, 5.98, y + 0.63, "questions and answers")
    picture(ax, scene, 0.3, y - 0.5, 1.0, patches=4)
    code(ax, 1.98, y)
    box(ax, 4.25, y - 0.5, 3.47, 1.0, "white")
    for line, (question, answer) in zip((y + 0.24, y - 0.24), turns, strict=True):
        words(ax, 4.4, line, question)
        words(ax, 7.57, line, answer, weight="bold", color=GREEN, ha="right")
    arrow(ax, (1.38, y), (1.92, y))
    arrow(ax, (3.64, y), (4.18, y))
    # The way past C, which the mask closes.
    top, low = y - 0.55, y - 0.83
    ax.plot((0.8, 0.8, 5.98), (top, low, low), color=RED, lw=2, ls=(0, (4, 2)), zorder=2)
    arrow(ax, (5.98, low), (5.98, top), RED, 2)
    hidden = "\N{MULTIPLICATION X} hidden"
    words(ax, 2.78, low, hidden, color=RED, weight="bold", ha="center", backgroundcolor=SHEET)


def draw_match(ax, scene):
    """The lower panel: a query and its target, each with its code, and their cosine."""
    panel(ax, 0.1, 2.65, "2  Match", "a query next to its own target, far from others")
    query, target = 1.66, 0.59  # heights of the two sequences
    label(ax, 1.7, query + 0.53, "query")
    box(ax, 0.3, query - 0.38, 2.8, 0.76, "white")
    picture(ax, scene, 0.36, query - 0.32, 0.64)
    words(ax, 1.12, query, textwrap.fill(INSTRUCT["i2t"][0], 18))
    label(ax, 1.7, target + 0.53, "target")
    box(ax, 0.3, target - 0.38, 2.8, 0.76, "white")
    words(ax, 0.4, target, textwrap.fill(scene.describe(), 32), size=11.5)
    for y, name, color in ((query, "q", BLUE), (target, "t", GREEN)):
        arrow(ax, (3.13, y), (3.4, y))
        code(ax, 3.45, y)
        arrow(ax, (5.1, y), (5.5, y), color)
        words(ax, 5.58, y, f"${name}$", size=16, color=color)
    label(ax, 5.28, query + 0.53, "mean")
    label(ax, 6.95, query + 0.53, "cosine")
    draw_angle(ax, 6.15, 0.3)


def draw_angle(ax, x, y):
    """Unit vectors from (x, y): the query's, its target's, and two that are no targets of it."""
    length = 1.35
    spokes = ((86, GREY, ""), (8, GREY, ""), (56, BLUE, "$q$"), (38, GREEN, "$t$"))
    for degrees, color, name in spokes:
        along, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        end = (x + length * along, y + length * up)
        arrow(ax, (x, y), end, color, 1.2 if color == GREY else 2.5)
        words(ax, end[0] + 0.05, end[1] + 0.08, name, size=16, color=color)
    label(ax, x + 1.15, y + 0.4, "others")
    ax.add_patch(Arc((x, y), 1.6, 1.6, theta1=38, theta2=56, color=BLACK, lw=1.5))


# ------------------------------------------------------------------------------------- the example


def example():
    """One picture, and what is made of it: a question (stage 1), a pair (stage 2), a task with its
    candidates (evaluation). What is right is green."""
    shapes = Shapes("test")
    (task, (scene,)), candidates = shapes.query("ground", 2)
    crops = [crop for _, (crop,) in candidates]  # the right one first
    subject = crops[0].objects[0]  # what is to be cut out
    ((_, question, answer),) = shapes.ask(random.Random(0), scene, ("color",), subject)
    fig, ax = blank(3.55)
    box(ax, 0.1, 0.1, WIDTH - 0.2, 3.35, SHEET)
    picture(ax, scene, 0.3, 0.58, 2.4)
    left, right = 2.95, WIDTH - 0.28
    for y, name, stage in (
        (3.2, "a question", "stage 1"),
        (2.47, "a pair", "stage 2"),
        (1.32, "a task", "evaluation"),
    ):
        words(ax, left, y, name, weight="bold")
        words(ax, right, y, stage, color=GREY, ha="right")
    words(ax, left, 2.9, question)
    words(ax, right, 2.9, answer, color=GREEN, weight="bold", ha="right")
    words(ax, left, 2.17, INSTRUCT["i2t"][0])
    words(ax, left, 1.79, textwrap.fill(scene.describe(), 46), color=GREEN, size=12.5)
    words(ax, left, 1.02, task.replace(IMAGE, "").strip())
    side, shown = 0.58, [*crops[1:4], crops[0], *crops[4:7]]
    for i, crop in enumerate(shown):
        x = left + i * (right - left - side) / (len(shown) - 1)
        picture(ax, crop, x, 0.22, side)
        if crop == crops[0]:
            frame(ax, x, 0.22, side, GREEN, 4)
    return fig


FIGURES = {"overview": overview, "example": example}


def draw(folder) -> list:
    """Draws both into a folder. -> the files."""
    files = []
    for name, figure in FIGURES.items():
        path = Path(folder, f"{name}.png")
        with rc_context(STYLE):
            picture = picture_of(figure(), colors=64, dpi=PIXELS_PER_INCH)
        save_png(picture, path)
        files.append(path)
        print(f"wrote {path}")
    return files
