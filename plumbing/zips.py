"""The hub's zip files: indexed once, then any member is read in milliseconds, by any process."""

import os
import struct
import zipfile
import zlib
from functools import lru_cache

import numpy as np

from plumbing.errors import InputError, brief
from plumbing.files import open_file

MOST_BYTES = 200_000_000  # of one member, packed or not: beyond it is no picture but a bomb
MOST_TABLE = 2_000_000_000  # bytes of the table of members: 20 million of them
IS_ENCRYPTED, IS_UTF8 = 0x1, 0x800  # flags of a member
WIDE = 0xFFFFFFFF  # "too large for 32 bits": the extra field has the number
# Parts of a zip file (PKWARE's APPNOTE, 4.3): marks, lengths and numbers; x: what nobody needs.
HEADER = struct.Struct("<4s22xHH")  # before a member: mark, lengths of name and extra
ENTRY = struct.Struct("<4s4xHH4xLLLHHH8xL")  # one member in the table: see `read_entries`
END = struct.Struct("<4s8xLLH")  # of the file: mark, length and start of the table, of a comment
END_64 = struct.Struct("<4s36xQQ")  # mark, length and start of the table
LOCATOR_64 = 20  # bytes between END_64 and END, beginning with PK 6 7
# A member as we keep it.
ROW = struct.Struct("<qqqqLHH")
MEMBER = np.dtype(
    [("name", "<i8"), ("at", "<i8"), ("packed", "<i8"), ("size", "<i8"), ("crc", "<u4")]
    + [("method", "<u2"), ("flags", "<u2")]
)


def open_zip(path) -> "ZipIndex":
    """The index of a zip file, or an InputError. Made before the loader's workers are forked, it is
    theirs, too."""
    index = index_of(path)
    if isinstance(index, InputError):
        raise InputError(str(index))
    return index


@lru_cache(64)
def index_of(path):
    """The index of a zip file, or its InputError: a damaged table, too, is read once."""
    try:
        return ZipIndex(path)
    except InputError as e:
        return e


def read_at(file, start, count) -> bytes:
    """`count` bytes of a file. pread: processes and threads share one open file, and none of them
    moves another's place in it."""
    content = os.pread(file.fileno(), count, start) if start >= 0 else b""
    if len(content) != count:
        raise ValueError("is cut off")
    return content


def read_table(file) -> tuple:
    """-> (the table of members, how many bytes stand before the zip file's own first one)."""
    length = os.fstat(file.fileno()).st_size
    tail = read_at(file, max(0, length - END.size - 0xFFFF), min(length, END.size + 0xFFFF))
    i = tail.rfind(b"PK\5\6")
    if i < 0 or len(tail) < i + END.size:
        raise ValueError("has no table of members: no zip file, or not a whole one")
    end = length - len(tail) + i
    _, size, start, _ = END.unpack_from(tail, i)
    if tail[max(0, i - LOCATOR_64) : i].startswith(b"PK\6\7"):
        end -= LOCATOR_64 + END_64.size
        mark, size, start = END_64.unpack(read_at(file, end, END_64.size))
        if mark != b"PK\6\6":
            raise ValueError("has a damaged table of members")
    if size > MOST_TABLE or start > end - size:
        raise ValueError(f"has a table of {size:,} bytes that begins at {start:,}: damaged")
    return read_at(file, end - size, size), end - size - start


def read_entries(table, shift):
    """Yields each member of the table as a ROW's bytes."""
    at = 0
    while at < len(table):
        entry = ENTRY.unpack_from(table, at)
        mark, flags, method, crc, packed, size, name_length, extra_length, comment, start = entry
        if mark != b"PK\1\2":
            raise ValueError("has a damaged table of members")
        at += ENTRY.size
        name = decode_name(table[at : at + name_length], flags)
        at += name_length
        if WIDE in (packed, size, start):
            numbers = wide_numbers(table[at : at + extra_length])
            # In this order, and only of the fields that are marked as too wide.
            size = next(numbers) if size == WIDE else size
            packed = next(numbers) if packed == WIDE else packed
            start = next(numbers) if start == WIDE else start
        at += extra_length + comment
        yield ROW.pack(hash(name), start + shift, packed, size, crc, method, flags)


def wide_numbers(extra):
    """Yields the 64-bit numbers of a member's extra field; ValueError where one is missing."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            for i in range(at + 4, at + 4 + length // 8 * 8, 8):
                yield struct.unpack_from("<Q", extra, i)[0]
        at += 4 + length
    raise ValueError("has a damaged table of members")


def decode_name(name, flags) -> str:
    """A member's name; what is not of its encoding is no one's name."""
    return name.decode("utf-8" if flags & IS_UTF8 else "cp437", "replace")


class ZipIndex:
    """Where the members of a zip file stand, at 48 bytes each: in `zipfile.ZipFile` 100,000 of them
    are 83 MB and 1.9 seconds, in every process. `name in index`; `index.read(name)` -> bytes."""

    def __init__(self, path):
        self.path = path
        self.file = open_file(path, kind="zip file")
        try:
            rows = b"".join(read_entries(*read_table(self.file)))
        except (ValueError, OSError, OverflowError, struct.error) as e:
            raise InputError(f"{path}: {brief(e)}; download the zip file again") from None
        members = np.frombuffer(rows, MEMBER)
        self.members = members[members["name"].argsort(kind="stable")]
        self.names = self.members["name"].copy()  # in one piece, to be searched

    def find(self, name) -> int:
        """The member's place in the tables, or -1; of several of one name the last."""
        i = int(self.names.searchsorted(hash(name), "right")) - 1
        return i if i >= 0 and self.names[i] == hash(name) else -1

    def __contains__(self, name):
        return self.find(name) >= 0

    def read(self, name) -> bytes:
        """The member's content, its length and checksum verified, or an InputError."""
        try:
            return self.unpack(name)
        except (ValueError, OSError, OverflowError, zlib.error, struct.error) as e:
            text = f"{self.path}:{brief(name)}: {brief(e)}"
            raise InputError(f"{text}; download the zip file again, or unpack it") from None

    def unpack(self, name) -> bytes:
        """`read`, with the errors as they come."""
        i = self.find(name)
        if i < 0:
            raise ValueError("no such member")
        _, at, packed, size, crc, method, flags = self.members[i].item()
        if max(packed, size) > MOST_BYTES:
            raise ValueError(f"{max(packed, size):,} bytes; at most {MOST_BYTES:,} are read")
        if flags & IS_ENCRYPTED:
            raise ValueError("is encrypted")
        mark, name_length, extra_length = HEADER.unpack(read_at(self.file, at, HEADER.size))
        at += HEADER.size
        its_name = read_at(self.file, at, name_length) if mark == b"PK\3\4" else b""
        if decode_name(its_name, flags) != name:  # of two with one hash the wrong one, too
            raise ValueError("is not where the zip's table says")
        content = read_at(self.file, at + name_length + extra_length, packed)
        if method == zipfile.ZIP_DEFLATED:
            # One byte too many is asked for, and no more: whatever the table says of its size.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        elif method != zipfile.ZIP_STORED:
            raise ValueError(f"is packed by method {method}; zip it with deflate")
        if len(content) != size or zlib.crc32(content) != crc:
            raise ValueError("is damaged (length or checksum)")
        return content
