"""Reads all of a data set once, as training would, and says what is bad: every line, every picture.

    python -m tools.check talks.jsonl --image-root pictures
    python -m tools.check DIR                        a folder with captions, or in MMEB's layout
    python -m tools.check talks.jsonl --clean good.jsonl
    python -m tools.check DIR --list-bad bad.jsonl   what training takes as --skip-bad bad.jsonl

No model is needed. Prints counts, words and sizes, and each bad example with its place. --clean
writes a copy of the list without the bad ones (of a folder: of its lists; the pictures stay where
they are), --list-bad a list of the bad ones, for data that are to stay as they are, and for a run
that goes on. Exit status 1 where something is bad and neither was asked for, and where a list
cannot be read, or has no good example.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import json
import os
import shlex
import statistics
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from plumbing.config import CommandLine, flag, word
from plumbing.errors import InputError, brief
from plumbing.files import CAPTIONS, captions_in
from plumbing.first_pass import Listed, read_listed
from plumbing.folders import read_json
from plumbing.formats import (
    ELSEWHERE,
    IMAGE,
    Content,
    captions_file,
    parse_caption,
    parse_dialogue,
    parse_pair,
    read_lines,
    refuse_folder,
)
from plumbing.images import Images, open_image
from plumbing.lines import no_twins
from plumbing.mmeb import (
    eval_rows,
    not_empty,
    refuse_missing_parts,
    refuse_unreadable_sets,
    train_rows,
)
from plumbing.ranks import run_command
from plumbing.retrieval import SETS
from plumbing.writing import holds_lines, refuse_other, refuse_unwritable, written

WINDOW = 4096  # examples that wait for a thread at a time
SHOWN = 20  # errors of a list that are printed
NOWHERE = "no such picture"  # what open_image says of a path that leads nowhere


def lists_of(source, image_root):
    """Yields (file, function that makes its Lazy) for every list of examples in `source`. A
    folder's lists are those in MMEB's layout, each file one, so that a bad one costs no other."""
    root, captions = Path(source), captions_file(source)
    if captions:
        yield captions, partial(read_lines, str(captions), parse_captioned, image_root)
    elif not root.is_dir():
        yield root, partial(read_list, str(root), image_root)
    else:
        images = Images(image_root or root)
        files = [file for file in sorted(root.glob("*/*.parquet")) if file.name[0] != "."]
        if not files:
            refuse_folder(source)
        refuse_unreadable_sets(root, "Mend that, or take it out")
        for file in files:
            yield file, partial(read_part, file, files, images)


def read_part(file, files, images):
    """One of MMEB's files, of a set that is whole: training reads no other."""
    kind = file.name.partition("-")[0]
    its = [x for x in files if x.parent == file.parent and x.name.startswith(f"{kind}-")]
    refuse_missing_parts(its)
    rows = eval_rows if kind == "test" else train_rows
    return not_empty(rows([file], file.parent.name, images))


def read_list(path, image_root):
    """A list of dialogues or of pairs, all read as its first good line: training takes a list of
    one kind, and the lines of the other one are bad to it."""
    plain = read_lines(path, lambda raw, images: (raw, images), image_root)
    parsers = (parse_talk, parse_pair)
    for i in range(min(len(plain), WINDOW)):
        for parse in parsers:
            with suppress(ValueError, LookupError, TypeError):
                parse(*plain[i])
                return read_lines(path, parse, image_root)
    # None is good: its errors are told as those of the list that it was meant to be.
    is_talk = isinstance(plain[0][0], dict) and "conversations" in plain[0][0]
    return read_lines(path, parse_talk if is_talk else parse_pair, image_root)


def parse_talk(raw, images) -> tuple:
    """One line of stage 1's list."""
    content, turns, _ = parse_dialogue(raw, images)
    return content, turns


def parse_captioned(raw, images) -> Content:
    """One line of metadata.jsonl or .csv: a picture with its caption."""
    path, text = parse_caption(raw, images)
    return Content(IMAGE + text, (path,))


class Survey:
    """What is learned of a list by looking at each of its examples."""

    def __init__(self, file, rows):
        self.file, self.rows = file, rows
        self.good, self.errors = [], {}  # indices of examples; index -> message
        self.words = []  # of each text
        self.sizes = {}  # picture -> (width, height), or the InputError that it gave
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding lets other threads run
            bar = tqdm(self.in_order(pool), f"{file}", len(rows), leave=False, disable=None)
            for i, error in enumerate(bar):
                if error:
                    self.errors[i] = error
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
            where = self.rows.source.where(i)
            return f"{e}" if str(e).startswith(where) else f"{where}: {e}"

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
                refuse_damaged_png(picture)
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
        shown = first_of_each(self.errors.values())
        for error in shown[:SHOWN]:
            print(f"  bad: {error}")
        if len(shown) > SHOWN:
            print(f"  and {len(shown) - SHOWN:,} more")


def refuse_damaged_png(picture):
    """InputError for a PNG with a wrong checksum in it, which Pillow decodes to pixels of noise, or
    without its end. Reads the whole file."""
    if not isinstance(picture, str):  # a zip file has checksums of its own
        return
    try:
        with Image.open(picture, formats=["PNG"]) as image:
            image.verify()
    except UnidentifiedImageError:
        return  # of another format
    except (OSError, SyntaxError, ValueError) as e:
        hint = "training would read what is left of it"
        raise InputError(f"{brief(picture)}: is damaged or cut off: {brief(e)}; {hint}") from None


def first_of_each(errors) -> list:
    """The errors, but of pictures that are nowhere only the first, with how many there are: it is
    one mistake, a wrong --image-root."""
    others = [error for error in errors if NOWHERE not in error]
    lost = [error for error in errors if NOWHERE in error]
    if len(lost) > 1:
        lost = [f"{lost[0]} (so it is with {len(lost) - 1:,} more)"]
    return lost + others


def clean_path(source, file, clean) -> Path:
    """Where the copy of a list goes: lines of JSON, which no .csv or .json may be called."""
    out = Path(clean, file.relative_to(source)) if Path(source).is_dir() else Path(clean)
    endings = {file.suffix.lower(), out.suffix.lower()}
    return out.with_suffix(".jsonl") if endings & {".csv", ".json"} else out


class Outputs(NamedTuple):
    """What is written: the copy without the bad examples, the list of them; None: not asked for."""

    clean: str | None = None
    list_bad: str | None = None


class Count(NamedTuple):
    """Examples read, how many of them (or of the files) are bad, the bad ones as --skip-bad takes
    them, and whether the list is of no use: it cannot be read, or has no good example."""

    total: int
    bad: int
    listed: tuple = ()
    useless: bool = False


def check_list(file, read, source, clean) -> Count:
    """One list of examples: its report, and its copy without the bad ones."""
    try:
        rows = read()
    except InputError as e:  # the file itself: it counts as one bad example
        print(f"{file}\n  bad: {e}")
        return Count(0, 1, useless=True)
    survey = Survey(file, rows)
    survey.report()
    if clean and survey.good:
        out = clean_path(source, file, clean)
        with written(out, "--clean") as part, open(part, "wb") as copy:
            rows.source.raw.copy(survey.good, copy)
        print(f"  wrote the {len(survey.good):,} good ones to {out}")
    elif clean:
        print("  none is good: no copy of it")
    name = file.relative_to(source).as_posix() if Path(source).is_dir() else file.name
    digest = rows.source.digest
    listed = tuple(Listed(name, digest, i + 1, brief(e)) for i, e in survey.errors.items())
    return Count(len(rows), len(survey.errors), listed, useless=not survey.good)


def refuse_outputs(source, lists, outputs):
    """InputError, before any work, where a file cannot be written, or is one of the data."""
    for name, path in (("--clean", outputs.clean), ("--list-bad", outputs.list_bad)):
        if path is not None and not str(path).strip():  # of a script whose variable is not set
            raise InputError(f"{name} is empty; give the path of a file")
    taken = [file for file, _ in lists]
    if outputs.clean:
        read_json(source, SETS, no_twins)  # refuses a damaged one
        for file, _ in lists:
            out = clean_path(source, file, outputs.clean)
            refuse_unwritable(out, "--clean", [file])
            if out.suffix != ".parquet":
                is_list = partial(holds_lines, keys=ELSEWHERE)
                refuse_other(out, "--clean", is_list, "list of examples")
            refuse_second_list(out)
            taken.append(out)
    if outputs.list_bad:
        refuse_unwritable(outputs.list_bad, "--list-bad", taken)
        refuse_other(outputs.list_bad, "--list-bad", read_listed, "list of bad examples")


def refuse_second_list(out):
    """InputError where other captions would lie beside these: a folder has one list of them."""
    others = [name for name in captions_in(out.parent) if name != out.name]
    if out.name in CAPTIONS and others:
        text = f"{others[0]} is beside it, and a folder has one list of captions"
        raise InputError(f"--clean {brief(out)}: {text}; take another")


def check(source, image_root=None, outputs=Outputs()) -> Count:  # noqa: B008
    """Reads every example of `source` (a list; a folder with captions, or in MMEB's layout) and
    opens every picture; prints a report. -> of all lists together."""
    if not os.path.lexists(source):
        raise InputError(f"{brief(source)}: no such file or folder")
    lists = list(lists_of(source, image_root))
    refuse_outputs(source, lists, outputs)
    counts = [check_list(*x, source, outputs.clean) for x in lists]
    total, bad = sum(c.total for c in counts), sum(c.bad for c in counts)
    if outputs.clean:
        copy_sets(source, outputs.clean)
    if outputs.list_bad:
        listed = [x for count in counts for x in count.listed]
        with written(outputs.list_bad, "--list-bad") as part:
            lines = [json.dumps(x._asdict()) + "\n" for x in listed]
            part.write_text("".join(lines))
        print(f"wrote {outputs.list_bad}: {len(listed):,} bad examples, for --skip-bad")
    pictures = image_root or (source if Path(source).is_dir() else Path(source).parent)
    hint = f"; --image-root {shlex.quote(str(pictures))}" if outputs.clean else ""
    print(f"{total:,} examples, {bad:,} bad{hint}")
    return Count(total, bad, useless=any(c.useless for c in counts))


def copy_sets(source, clean):
    """sets.json of a folder in MMEB's layout, for those of its sets that have a copy."""
    sets = {}
    for name, kind in read_json(source, SETS, no_twins).items():
        if os.path.isdir(os.path.join(clean, name)):
            sets[name] = kind
    if sets:
        with written(Path(clean, SETS), "--clean") as part:
            part.write_text(json.dumps(sets, indent=1) + "\n")


@dataclass
class Config(CommandLine):
    """Flags of the check."""

    data: str = word("a list, a folder with captions, or one in MMEB's layout", "DATA")
    image_root: str | None = flag(None, "where the pictures are (default: beside the list)")
    clean: str | None = flag(None, "the copy without the bad examples")
    list_bad: str | None = flag(None, "a file for the bad ones, for --skip-bad")


def main(argv):
    """The command line."""
    cfg = Config.parse(argv)
    outputs = Outputs(cfg.clean, cfg.list_bad)
    count = check(cfg.data, cfg.image_root, outputs)
    return 1 if count.useless or (count.bad and outputs == Outputs()) else 0


if __name__ == "__main__":
    run_command(main)
