"""Examples of the toy world: printed, and drawn on one sheet.

    python -m tools.look

Six pictures with their dialogues, then of each task a query with its right candidate and, where
candidates are texts, two of the wrong ones. Writes out/shapes.png.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
from dataclasses import dataclass

from PIL import Image, ImageDraw

from plumbing.config import CommandLine
from plumbing.ranks import run_command
from plumbing.writing import refuse_unwritable, written
from toy.world import META_TASK, Shapes

HEIGHT = 140  # pixels of an example on the sheet


def examples() -> list:
    """[(scenes, lines of text)]."""
    shapes, rows = Shapes(), []
    for i in range(6):
        (_, scenes), turns, _ = shapes.dialogue(i)
        rows.append((scenes, [f"{question}  ->  {answer}" for question, answer in turns]))
    for task, meta_task in META_TASK.items():
        (text, scenes), candidates = shapes.query(task, 0)
        lines = [f"{task} ({meta_task}): {text}"]
        (right, right_scenes), *wrong = candidates
        if not right_scenes:  # candidates that are pictures say nothing in words
            lines.append(f"right: {right}")
            lines += [f"wrong: {text}" for text, _ in wrong[:2]]
        rows.append((scenes + right_scenes, lines))
    return rows


def look(path="out/shapes.png"):
    """Prints the examples, and saves the sheet."""
    refuse_unwritable(path, "the sheet")
    rows = examples()
    sheet = Image.new("RGB", (1500, HEIGHT * len(rows)), "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (scenes, lines) in enumerate(rows):
        y = HEIGHT * i
        for j, scene in enumerate(scenes):
            # Every pixel becomes a square of four: nothing is smoothed away.
            picture = scene.render().resize((128, 128), Image.Resampling.NEAREST)
            sheet.paste(picture, (6 + 134 * j, y + 6))
        words = "\n".join(line[:190] for line in lines)
        canvas.text((280, y + 10), words, "black", font_size=15)
        print(words, end="\n\n")
    with written(path, "the sheet") as part:
        sheet.save(part)
    print(f"wrote {path}")


@dataclass
class Config(CommandLine):
    """No flags."""


def main(argv):
    """The command line."""
    Config.parse(argv)
    look()


if __name__ == "__main__":
    run_command(main)
