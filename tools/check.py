"""Reads all of a data set once, as training would, and says what is bad: every line, every picture.

    python -m tools.check talks.jsonl --image-root pictures
    python -m tools.check DIR                        a folder with captions, or in MMEB's layout
    python -m tools.check talks.jsonl --clean good.jsonl

No model is needed. Prints counts, words and sizes, and each bad example with its place. --clean
writes a copy of the list without the bad ones (of a folder: of its lists; the pictures stay where
they are). Exit status 1 where something is bad and --clean was not given.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from plumbing.errors import InputError
from plumbing.formats import (
    IMAGE,
    Content,
    captions_file,
    parse_caption,
    parse_dialogue,
    parse_pair,
    read_lines,
)
from plumbing.images import Images, open_image
from plumbing.mmeb import eval_rows, train_rows
from plumbing.ranks import run_command
from tools.command_line import make_parser

WINDOW = 4096  # examples that wait for a thread at a time
SHOWN = 20  # errors of a list that are printed


def lists_of(source, image_root):
    """Yields (file, function that makes its Lazy) for every list of examples in `source`."""
    root, captions = Path(source), captions_file(source)
    if captions:
        yield captions, partial(read_lines, str(captions), parse_captioned, image_root)
    elif not root.is_dir():
        yield root, partial(read_lines, str(root), parse_dialogue_or_pair, image_root)
    else:
        images = Images(image_root or root)
        # Each file is a list of its own, so that a bad one costs no other.
        for path in sorted(root.glob("*/*.parquet")):
            rows = eval_rows if path.name.startswith("test") else train_rows
            yield path, partial(rows, [path], path.parent.name, images)


def parse_dialogue_or_pair(raw, images) -> tuple:
    """One line of a .jsonl, of either kind."""
    if isinstance(raw, dict) and "conversations" in raw:
        content, turns, _ = parse_dialogue(raw, images)
        return content, turns
    return parse_pair(raw, images)


def parse_captioned(raw, images) -> Content:
    """One line of metadata.jsonl or .csv: a picture with its caption."""
    path, text = parse_caption(raw, images)
    return Content(IMAGE + text, (path,))


class Survey:
    """What is learned of a list by looking at each of its examples."""

    def __init__(self, file, rows):
        self.file, self.rows = file, rows
        self.good, self.errors = [], []  # indices of examples; messages
        self.words = []  # of each text
        self.sizes = {}  # picture -> (width, height), or the InputError that it gave
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding lets other threads run
            bar = tqdm(self.in_order(pool), f"{file}", len(rows), leave=False, disable=None)
            for i, error in enumerate(bar):
                if error:
                    self.errors.append(error)
                else:
                    self.good.append(i)

    def in_order(self, pool):
        """Yields the error of each example, or None. In windows: a pool takes all it is given."""
        for start in range(0, len(self.rows), WINDOW):
            yield from pool.map(self.error_of, range(start, min(start + WINDOW, len(self.rows))))

    def error_of(self, i):
        """What is wrong with an example, and where it stands."""
        try:
            self.look_at(self.rows[i])
        except InputError as e:
            located = str(e).startswith(f"{self.file}, ")
            return f"{e}" if located else f"{self.file}, example {i + 1}: {e}"

    def look_at(self, x):
        """Notes the words of an example, a string, a Content or a tuple of them, and opens its
        pictures, each file once."""
        if isinstance(x, str):
            self.words.append(len(x.split()))
        elif isinstance(x, Content):
            self.words.append(len(x.text.replace(IMAGE, "").split()))
            for picture in x.images:
                self.measure(picture)
        else:
            for part in x:
                self.look_at(part)

    def measure(self, picture):
        """Notes the size of a picture; an InputError, each time, where it cannot be read."""
        # Threads may meet here: the worst is a picture that is opened twice.
        if picture not in self.sizes:
            try:
                self.sizes[picture] = open_image(picture).size
            except InputError as e:
                self.sizes[picture] = e
        if isinstance(self.sizes[picture], InputError):
            raise self.sizes[picture]

    def report(self):
        """Prints it."""
        print(f"{self.file}\n  examples  {len(self.rows):,}, {len(self.errors):,} of them bad")
        if self.words:
            median = f"{statistics.median(self.words):g}"
            spread = f"{min(self.words)} to {max(self.words)} words, median {median}"
            print(f"  texts     {len(self.words):,}: {spread}")
        sizes = [size for size in self.sizes.values() if not isinstance(size, InputError)]
        if sizes:
            sizes.sort(key=lambda size: size[0] * size[1])
            (w0, h0), (w1, h1) = sizes[0], sizes[-1]
            print(f"  pictures  {len(sizes):,}: {w0} x {h0} to {w1} x {h1} pixels")
        for error in self.errors[:SHOWN]:
            print(f"  bad: {error}")
        if len(self.errors) > SHOWN:
            print(f"  and {len(self.errors) - SHOWN:,} more")


def copy_rows(raw, chosen, out):
    """Writes some of the lines, or of the rows of a table, that a Lazy was read from."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(raw, list):  # [(number, line)]: byte for byte as they were
        lines = [raw[i][1].rstrip(b"\r\n") + b"\n" for i in chosen]
        out.write_bytes(b"".join(lines))
    else:
        import pyarrow
        import pyarrow.parquet as pq

        # An empty list of numbers needs its type said.
        pq.write_table(raw.take(pyarrow.array(chosen, "int64")), out)


def clean_path(source, file, clean) -> Path:
    """Where the copy of a list goes; the lines of a .csv were turned into JSON."""
    out = Path(clean, file.relative_to(source)) if Path(source).is_dir() else Path(clean)
    return out.with_suffix(".jsonl") if out.suffix == ".csv" else out


class Count(NamedTuple):
    """Examples read, and how many of them (or of the files) are bad."""

    total: int
    bad: int


def check_list(file, read, source, clean) -> Count:
    """One list of examples: its report, and its copy without the bad ones."""
    try:
        rows = read()
    except InputError as e:  # the file itself: it counts as one bad example
        print(f"{file}\n  bad: {e}")
        return Count(0, 1)
    survey = Survey(file, rows)
    survey.report()
    if clean:
        out = clean_path(source, file, clean)
        copy_rows(rows.source.raw, survey.good, out)
        print(f"  wrote the {len(survey.good):,} good ones to {out}")
    return Count(len(rows), len(survey.errors))


def check(source, image_root=None, clean=None) -> int:
    """Reads every example of `source` (.jsonl; a folder with captions, or in MMEB's layout) and
    opens every picture; prints a report. clean: where a copy without the bad ones goes. -> how many
    are bad."""
    if not os.path.exists(source):
        raise InputError(f"{source}: no such file or folder")
    counts = [check_list(*x, source, clean) for x in lists_of(source, image_root)]
    total, bad = sum(c.total for c in counts), sum(c.bad for c in counts)
    if not total and not bad:
        raise InputError(f"{source}: nothing to check; a .jsonl, or a folder with lists in it")
    pictures = image_root or (source if Path(source).is_dir() else Path(source).parent)
    hint = f"; --image-root {pictures}" if clean else ""
    print(f"{total:,} examples, {bad:,} bad{hint}")
    return bad


def main(argv):
    """The command line."""
    parser = make_parser("check", __doc__)
    parser.add_argument("data", help="a .jsonl, a folder with captions, or one in MMEB's layout")
    parser.add_argument("--image-root", help="where the pictures are (default: beside the list)")
    parser.add_argument("--clean", metavar="OUT", help="the copy without the bad examples")
    args = parser.parse_args(argv)
    bad = check(args.data, args.image_root, args.clean)
    return 1 if bad and not args.clean else 0


if __name__ == "__main__":
    run_command(main)
