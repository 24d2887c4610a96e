"""Parquet files: whether their columns are what a layout asks for, and their rows.

Top to bottom: reading at all - columns - the files of one set as one table."""

import os
from bisect import bisect_right
from contextlib import contextmanager
from typing import NamedTuple

from plumbing.errors import InputError, brief, needs
from plumbing.files import digest_of_all, digest_of_content, refuse_special


def pyarrow():
    """The library, which only MMEB needs."""
    with needs("pyarrow", "MMEB's parquet files"):
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet  # noqa: F401
    return pyarrow


@contextmanager
def readable(file):
    """Around the reading of a parquet file: what is none is an InputError."""
    refuse_special(file, kind="list")
    try:
        yield
    except (OSError, TypeError, ValueError, NotImplementedError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{file}: not a readable parquet file: {brief(e)}") from None


class Layout(NamedTuple):
    """The columns of one kind of table: those it must have, of texts and of lists of texts, and
    those it may have."""

    texts: tuple
    lists: tuple = ()
    maybe: tuple = ()

    def kind_of(self, name, arrow_type) -> str:
        """What a column holds: "text", "list", or another type's name."""
        types = pyarrow().types
        # A column in which nothing stands has the type null, and means so.
        if types.is_null(arrow_type):
            return "nothing" if name in self.lists else "text"
        is_list = types.is_list(arrow_type) or types.is_large_list(arrow_type)
        inner = arrow_type.value_type if is_list else arrow_type
        if types.is_dictionary(inner):
            inner = inner.value_type
        if str(inner) not in ("string", "large_string", "string_view", "null"):
            return str(arrow_type)
        return "list" if is_list else "text"

    def check(self, file, schema):
        """InputError where a column is missing, or of another type, or would be lost. -> {name:
        kind} of the columns to read."""
        known = (*self.texts, *self.lists, *self.maybe)
        for name in known:
            count = schema.names.count(name)
            if count > 1 or (count == 0 and name not in self.maybe):
                columns = "several columns" if count else "no column"
                there = brief(", ".join(schema.names))
                raise InputError(f"{file}: {columns} {name}; it has {there}")
        stems = tuple(name[:3] for name in known)
        for name in schema.names:
            if name not in known and name.startswith(stems):
                hint = f"it takes {', '.join(known)}"
                raise InputError(f"{file}: column {brief(name)} would be lost; {hint}")
        kinds = {}
        for name in known:
            if name in schema.names:
                kinds[name] = self.kind_of(name, schema.field(name).type)
                want = "list" if name in self.lists else "text"
                if kinds[name] != want:
                    texts = "lists of texts" if want == "list" else "texts"
                    raise InputError(f"{file}: column {name} must hold {texts}, not {kinds[name]}")
        return kinds


def refuse_bad_text(file, part):
    """InputError with the first row of a table that has a text which is not UTF-8: arrow reads it,
    and fails at it when it is drawn, hours later."""
    try:
        part.validate(full=True)
        return
    except pyarrow().ArrowInvalid as e:
        where, reason = str(file), e
    for i in range(len(part)):
        try:
            part.slice(i, 1).to_pylist()
        except UnicodeDecodeError:
            where, reason = f"{file}, row {i + 1}", "a text in it is not UTF-8"
            break
    raise InputError(f"{where}: {brief(reason)}")


def stamp_of(file) -> tuple:
    """What changes when a file is written anew: its size and the time of its last change."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


class Table:
    """The rows of the parquet files of one set, in turn. What is known at once: how many they are,
    and that the files agree; `load` reads them."""

    def __init__(self, files, layout):
        self.files = tuple(map(str, files))
        self.kinds = None  # of the columns, see Layout.check: the first file's, and so of all
        self.digests = []  # of each file
        self.starts = [0]  # the first row of each file, and the one behind the last
        self.stamps = []  # of each file, see `stamp_of`
        for file in self.files:
            with readable(file):
                self.stamps.append(stamp_of(file))
                self.digests.append(digest_of_content(file))
                parquet = pyarrow().parquet.ParquetFile(file)
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
            kinds = layout.check(file, schema)
            if self.kinds not in (None, kinds):
                differ = ", ".join(sorted(kinds.keys() ^ self.kinds.keys()))
                raise InputError(f"{file}: has other columns than {self.files[0]}: {differ}")
            self.kinds = kinds
            self.starts.append(self.starts[-1] + rows)

    @property
    def digest(self) -> int:
        """A number that changes with any of the files and with their order; of one its own."""
        return digest_of_all(self.digests)

    def __len__(self):
        return self.starts[-1]

    def where(self, i) -> str:
        """The place of row i, as messages name it."""
        k = bisect_right(self.starts, i) - 1
        return f"{self.files[k]}, row {i + 1 - self.starts[k]}"

    def refuse_changed(self):
        """InputError where a file is not the one that was looked at when the command began."""
        for file, stamp, digest in zip(self.files, self.stamps, self.digests, strict=True):
            with readable(file):
                if stamp_of(file) != stamp and digest_of_content(file) != digest:
                    raise InputError(f"{file}: has changed since the command began")

    def load(self):
        """All rows, as pyarrow has them."""
        self.refuse_changed()
        pa, parts = pyarrow(), []
        types = {"text": pa.large_string(), "list": pa.large_list(pa.large_string())}
        schema = pa.schema([(name, types[kind]) for name, kind in self.kinds.items()])
        for file in self.files:
            with readable(file):
                part = pa.parquet.read_table(file, columns=schema.names, memory_map=True)
                # Trap: of one set's files each may hold its texts in another way, and a column
                # without any value has no type at all.
                parts.append(part.select(schema.names).cast(schema))
            refuse_bad_text(file, parts[-1])
        return pa.concat_tables(parts)

    def copy(self, chosen, file):
        """Writes some of the rows."""
        self.refuse_changed()
        pa = pyarrow()
        indices = pa.array(chosen, "int64")  # of an empty list arrow would not know the type
        with readable(self.files[0]):
            tables = [pa.parquet.read_table(path) for path in self.files]
            whole = pa.concat_tables(tables)
        pa.parquet.write_table(whole.take(indices), file)
