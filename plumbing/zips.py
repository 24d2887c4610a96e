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
HEADER = struct.Struct("<4s22xHH")  # what stands before a member: mark, lengths of name and extra
IS_ENCRYPTED, IS_UTF8 = 0x1, 0x800  # flags of a member
MEMBER = np.dtype(
    [
        ("at", "i8"),
        ("packed", "i8"),
        ("size", "i8"),
        ("crc", "u4"),
        ("method", "u2"),
        ("flags", "u2"),
    ]
)


@lru_cache(64)
def open_zip(path) -> "ZipIndex":
    """The index of a zip file. Made before the loader's workers are forked, it is theirs, too."""
    return ZipIndex(path)


class ZipIndex:
    """Where the members of a zip file stand, at 40 bytes each: 100,000 `zipfile.ZipInfo`s would be
    60 MB in every process. `name in index`; `index.read(name)` -> bytes."""

    def __init__(self, path):
        self.path = path
        # pread: processes and threads share one open file, and none of them moves another's place.
        self.file = open_file(path, kind="zip file")
        try:
            with zipfile.ZipFile(self.file) as archive:
                infos = {info.filename: info for info in archive.infolist()}  # the last one counts
        except Exception as e:  # damaged tables raise anything, down to struct.error
            raise InputError(f"{path}: {brief(e)}; download the zip file again") from None
        names = np.fromiter(map(hash, infos), np.int64, len(infos))
        members = [
            (x.header_offset, x.compress_size, x.file_size, x.CRC, x.compress_type, x.flag_bits)
            for x in infos.values()
        ]
        order = names.argsort()
        self.names = names[order]  # of two names with one hash the wrong one is found out by `read`
        self.members = np.array(members, MEMBER)[order]

    def find(self, name) -> int:
        """The member's place in the tables, or -1."""
        i = int(self.names.searchsorted(hash(name)))
        return i if i < len(self.names) and self.names[i] == hash(name) else -1

    def __contains__(self, name):
        return self.find(name) >= 0

    def read(self, name) -> bytes:
        """The member's content, its length and checksum verified, or an InputError."""
        try:
            return self.unpack(name)
        except (ValueError, OSError, zlib.error, struct.error) as e:
            text = f"{self.path}:{brief(name)}: {brief(e)}"
            raise InputError(f"{text}; download the zip file again") from None

    def unpack(self, name) -> bytes:
        """`read`, with the errors as they come."""
        i = self.find(name)
        if i < 0:
            raise ValueError("no such member")
        at, packed_size, size, crc, method, flags = self.members[i].item()
        if max(packed_size, size) > MOST_BYTES:
            raise ValueError(f"{max(packed_size, size):,} bytes; at most {MOST_BYTES:,} are read")
        if flags & IS_ENCRYPTED:
            raise ValueError("is encrypted")
        mark, name_length, extra_length = HEADER.unpack(self.bytes_at(at, HEADER.size))
        its_name = self.bytes_at(at + HEADER.size, name_length)
        is_right = its_name.decode("utf-8" if flags & IS_UTF8 else "cp437") == name
        if mark != b"PK\3\4" or not is_right:
            raise ValueError("is not where the zip's table says")
        content = self.bytes_at(at + HEADER.size + name_length + extra_length, packed_size)
        if method == zipfile.ZIP_DEFLATED:
            # One byte too many is asked for, and no more: whatever the table says of its size.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        elif method != zipfile.ZIP_STORED:
            raise ValueError(f"is packed by method {method}; zip it with deflate")
        if len(content) != size or zlib.crc32(content) != crc:
            raise ValueError("is damaged (length or checksum)")
        return content

    def bytes_at(self, start, count) -> bytes:
        """`count` bytes of the file."""
        content = os.pread(self.file.fileno(), count, start)
        if len(content) != count:
            raise ValueError("is cut off")
        return content
