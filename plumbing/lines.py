"""Long lists: a sequence that stores nothing, and the lines of a file, of which only the places are
kept. A million lines cost 20 MB; a line is read from the disk when it is asked for.

Top to bottom: lazy sequences - the lines of a file - .jsonl, .json, .csv."""

import codecs
import csv
import json
import os
import re
import tempfile
import zlib
from array import array
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Callable, Sequence
from typing import NamedTuple

from plumbing.errors import InputError, brief
from plumbing.files import open_file
from plumbing.ranks import FULL

MOST = 16 * 2**20  # bytes of one example; what is longer is no example, and is never parsed
TOO_LONG = f"longer than {MOST // 2**20} MB, which no example is; one example a line"
ARRAY = "One example a line; or all in [ ], in a file that is called .json"
csv.field_size_limit(MOST)  # of a text in a csv; Python's own limit is 128 kB
BLANKS = re.compile(r"[ \t\n\r]*")
BLOCK = 2**20  # bytes, or characters of an array, that are read at a time
# The key of a csv row's fields that have no column; no record has such a key, so it is refused.
SURPLUS = "more fields than the first line names: a text with a comma needs quotes"
NO_TEXT = {  # how a file begins that is no list -> what it is, and the way out
    b"PAR1": "a parquet file; give the folder that holds its subset's, as MMEB's",
    b"\x1f\x8b": "compressed; unpack it",
    b"PK\x03\x04": "a zip file; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed (zstd); unpack it",
    b"\xfd7zXZ": "compressed (xz); unpack it",
    b"BZh": "compressed (bzip2); unpack it",
    b"version https://git-lfs": "a Git LFS pointer, not the list itself; `git lfs pull` fetches it",
    # Trap: UTF-32's mark begins with UTF-16's; so it stands first.
    BOM_UTF32_LE: "UTF-32; save it as UTF-8",
    BOM_UTF32_BE: "UTF-32; save it as UTF-8",
    BOM_UTF16_LE: "UTF-16; save it as UTF-8",
    BOM_UTF16_BE: "UTF-16; save it as UTF-8",
}


class Lost(NamedTuple):
    """Pictures that examples name and that are nowhere: how many, and the first."""

    count: int = 0
    first: str = ""

    def refuse(self, hint=""):
        """InputError where there are some."""
        if self.count:
            others = f" (and {self.count - 1:,} more are missing)" if self.count > 1 else ""
            text = f"{self.first}: no such picture{others}. Is --image-root right?"
            raise InputError(f"{text} {hint}".rstrip())


class Source(NamedTuple):
    """What is known of the file behind a sequence."""

    digest: int = 0  # changes with the file
    raw: object = None  # the lines or the table that it was read from
    images: object = None  # finds the pictures
    where: Callable = str  # index -> "talks.jsonl, line 7"
    read: Callable | None = None  # indices -> yields of each an example or its InputError
    lost: Lost = Lost()
    skipped: frozenset = frozenset()  # indices that --skip-bad lists
    same: str = ""  # why its pairs have no negatives among each other, see `all_the_same`


class Lazy(Sequence):
    """A sequence whose i-th element is `get(i)`, made when it is asked for: nothing is stored."""

    def __init__(self, length: int, get: Callable, source=Source()):  # noqa: B008
        self.length, self.get, self.source = length, get, source

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        where = range(self.length)[i]  # as of a list: slices, and numbers from the end
        return [self.get(k) for k in where] if isinstance(i, slice) else self.get(where)

    def __iter__(self):
        # Trap: by Sequence's own an IndexError of `get` would be taken for the end.
        return map(self.get, range(self.length))

    def map(self, f):
        """The same sequence with f applied to each element, when it is asked for."""
        return Lazy(self.length, lambda i: f(self.get(i)), self.source)

    def about(self, **known):
        """The same sequence, with more known of its source."""
        return Lazy(self.length, self.get, self.source._replace(**known))

    def first(self, n):
        """At most n elements of it; all of them where n is None or 0."""
        return Lazy(min(n or self.length, self.length), self.get, self.source)


def attempts(get, indices):
    """Yields get(i) of each index, or the InputError that it gave."""
    for i in indices:
        try:
            yield get(i)
        except InputError as e:
            yield e


# ------------------------------------------------------------------------------ the lines of a file


class Lines:
    """The examples of the list `path`, as lines of JSON in an open file: of each where it begins,
    how long it is, its number, its checksum. unit: what it is counted in, "line" or "example"."""

    def __init__(self, path, unit, file, numbered, copy=None):
        """numbered: yields (number, line of JSON). copy: of a list that is no JSONL, a file of our
        own, into which these lines are written, for `file` itself does not hold them; else None."""
        self.path, self.unit = path, unit
        self.file = copy or file
        self.starts, self.sizes, self.numbers = array("q"), array("I"), array("I")
        self.checksums, self.digest = array("I"), 0
        start = 0
        for number, line in numbered:
            if len(line) > MOST:
                raise InputError(f"{path}, {unit} {number}: {TOO_LONG}")
            if copy:
                copy.write(line)
            if not line.isspace():
                self.starts.append(start)
                self.sizes.append(len(line))
                self.numbers.append(number)
                self.checksums.append(zlib.crc32(line))
                self.digest = zlib.crc32(line, self.digest)  # another order is other data
            start += len(line)
        self.file.flush()

    def __len__(self):
        return len(self.starts)

    def where(self, i) -> str:
        """The place of example i, as messages name it."""
        return f"{self.path}, {self.unit} {self.numbers[i]}"

    def copy(self, chosen, file):
        """Writes some of the examples, each a line, byte for byte as it was."""
        for i in chosen:
            file.write(self.line(i).rstrip(b"\r\n") + b"\n")

    def line(self, i) -> bytes:
        """Example i as it stands in the file."""
        # pread: the loader's forked workers share the file, and would share its position.
        line = os.pread(self.file.fileno(), self.sizes[i], self.starts[i])
        if zlib.crc32(line) != self.checksums[i]:
            raise InputError(f"{self.path}: has changed since the command began")
        return line


def open_lines(path) -> Lines:
    """The lines of a .jsonl or .csv file, or the elements of a .json array. InputError."""
    path = str(path)
    hint = "Choose shapes, a .jsonl, a folder"
    file = open_file(path, f"--data {brief(path)}", "list", hint)
    try:
        start = file.read(BLOCK)
        kind = next((NO_TEXT[x] for x in NO_TEXT if start.startswith(x)), None)
        if kind or b"\0" in start:  # which JSON escapes; of UTF-16 every other byte is one
            kind = kind or "no text: it has NUL bytes, as UTF-16 has; save it as UTF-8"
            raise InputError(f"--data {brief(path)}: is {kind}")
        is_array = start.removeprefix(BOM_UTF8).lstrip()[:1] == b"["
        ending = os.path.splitext(path)[1].lower()
        if ending == ".csv":
            lines = Lines(path, "line", file, csv_rows(path), tempfile.TemporaryFile())
        elif ending == ".json" and is_array:
            lines = Lines(path, "example", file, array_elements(path), tempfile.TemporaryFile())
        else:
            file.seek(0)
            read = iter(lambda: file.readline(MOST + 1), b"")
            lines = Lines(path, "line", file, enumerate(read, 1))
    except OSError as e:
        full = e.errno in FULL  # not of a file that is read
        hint = f"; a copy of it is made in {tempfile.gettempdir()} (TMPDIR)" if full else ""
        raise InputError(f"--data {brief(path)}: {brief(e.strerror or e)}{hint}") from None
    if not lines:
        raise InputError(f"--data {path}: holds no lines")
    return lines


def no_twins(members) -> dict:
    """The members of a JSON object. Trap: of two with one name the json module keeps the last."""
    value = dict(members)
    if len(value) < len(members):
        names = [name for name, _ in members]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'"{brief(twin)}" stands twice in one object')
    return value


DECODER = json.JSONDecoder(object_pairs_hook=no_twins)  # made once: json.loads makes one a line
# Of an array: only where each element ends. What is in it is judged when its line is read.
SCANNER = json.JSONDecoder(parse_int=str)  # Trap: int() refuses numbers of 4,300 digits


def parse_json(line):
    """One line of JSON; ValueError."""
    try:
        value = DECODER.decode(line.removeprefix(BOM_UTF8).decode())
    except json.JSONDecodeError as e:
        first, hint = line.lstrip()[:1], ""
        if line.strip() == b"{" or first == b"[":
            hint = f". {ARRAY}"
        elif first != b"{":
            hint = ". An example is an object, {...}, or a row of a .csv file"
        if b"\r" in line.strip():
            hint = ". Its lines end in CR alone, as old Macs wrote them; save it with LF"
        raise ValueError(f"not JSON: {e.msg}, column {e.colno}{hint}") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8: byte {e.start + 1} is 0x{line[e.start]:02x}") from None
    # Trap: half a surrogate pair is good JSON, and no text.
    if b"\\ud" in line or b"\\uD" in line:
        json.dumps(value, ensure_ascii=False).encode()
    return value


# -------------------------------------------------------------------- other lists, as lines of JSON


def csv_rows(path):
    """Yields (line number, the row as a line of JSON) of a csv file."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        # strict: else an open quote swallows the rest. Trap: a blank before a quote makes it text.
        reader = csv.DictReader(file, restkey=SURPLUS, strict=True, skipinitialspace=True)
        try:
            names = reader.fieldnames or []
            if len(names) == 1 and re.search(r"[;\t]", names[0]):  # where "," is in numbers
                text = "its columns are separated by semicolons or tabs; save it with commas"
                raise InputError(f"{path}, line 1: {text}")
            if len(set(names)) < len(names):
                raise InputError(f"{path}: two columns of its first line have one name")
            for row in reader:
                yield reader.line_num, json.dumps(row).encode() + b"\n"
        except UnicodeDecodeError:
            raise InputError(f"{path}, {first_bad_byte(path)}") from None
        except csv.Error as e:
            hint = f"is each quote closed, and no text longer than {MOST // 2**20} MB?"
            raise InputError(f"{path}, after line {reader.line_num}: {e}; {hint}") from None


def first_bad_byte(path) -> str:
    """Where in a file the first byte is that is not UTF-8. (Who decodes it reads ahead by blocks,
    and can only say how far he was.)"""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with open(path, "rb") as file:
        while block := file.readline(BLOCK):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as e:
                return f"line {line}: not UTF-8: 0x{e.object[e.start]:02x}; save it as UTF-8"
            line += block.endswith(b"\n")
    return f"line {line}: not UTF-8: cut off within a character"


class Blocks:
    """A long text that is read a block at a time: `text` from `at` on is what is next."""

    def __init__(self, file):
        self.file, self.text, self.at = file, "", 0

    def more(self) -> bool:
        """Reads another block; False at the end of the file."""
        block = self.file.read(BLOCK)
        self.text, self.at = self.text[self.at :] + block, 0
        return bool(block)

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            self.at = BLANKS.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self) -> str:
        """The same, and `at` moves behind it."""
        character = self.peek()
        self.at += 1
        return character

    def value(self) -> str:
        """The text of the next JSON value, behind any blanks; JSONDecodeError."""
        self.peek()
        while True:
            try:
                _, end = SCANNER.raw_decode(self.text, self.at)
                text, self.at = self.text[self.at : end], end
                return text
            except json.JSONDecodeError:  # perhaps it is only cut off by the block's end
                if len(self.text) - self.at > MOST:
                    raise ValueError(TOO_LONG) from None
                if not self.more():
                    raise


def array_elements(path):
    """Yields (number, the element as a line of JSON) of a file that is one array, as LLaVA's lists
    are; one element at a time is in memory."""
    with open(path, encoding="utf-8-sig") as file:
        blocks, number = Blocks(file), 0
        try:
            blocks.take()  # the "["
            ended = blocks.peek() == "]"
            while not ended:
                number += 1
                # Line ends may stand between its words, never in them: there they are escaped.
                text = blocks.value().replace("\r", " ").replace("\n", " ")
                yield number, text.encode() + b"\n"
                separator = blocks.take()
                if separator not in (",", "]"):
                    raise ValueError('no "," or "]" after it')
                ended = separator == "]"
            if number and blocks.peek():
                raise ValueError("something stands after the array's end")
        except UnicodeDecodeError:
            raise InputError(f"{path}, {first_bad_byte(path)}") from None
        except (ValueError, RecursionError) as e:
            reason = getattr(e, "msg", e)
            raise InputError(f"{path}, example {number}: not JSON: {reason}") from None
