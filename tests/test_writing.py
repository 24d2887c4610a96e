"""Files that a command writes: whole or not at all, under the name that was given, and nothing
beside them."""

import os
import resource
from functools import partial

import pytest
from checks import equal, expect

from plumbing import files, writing
from plumbing.errors import InputError
from plumbing.writing import append_whole, refuse_unwritable, written


def test_a_file_is_there_when_all_of_it_is(tmp_path):
    """In a folder that is made for it; while it is written it has another name, and its ending."""
    path = tmp_path / "new" / "folder" / "scores.json"
    with written(path, "--json") as part:
        part.write_text("half")
        equal((path.exists(), part.suffix), (False, ".json"), "part_of")
    equal((path.read_text(), os.listdir(path.parent)), ("half", ["scores.json"]), "os.replace")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_where_writing_fails(tmp_path, error):
    """And no half of the new one beside it."""
    path = tmp_path / "scores.json"
    path.write_text("old")
    with pytest.raises((InputError, KeyboardInterrupt)) as caught:
        with written(path, "--json") as part:
            part.write_text("half")
            raise error
    if isinstance(error, OSError):
        says = f"--json {path}: not written: No space left on device. What was there stays as it"
        assert says in str(caught.value)
    equal((path.read_text(), os.listdir(tmp_path)), ("old", ["scores.json"]), "written")


def test_a_link_stays_a_link(tmp_path):
    """To a file on another disk: that one is written."""
    (tmp_path / "disk").mkdir()
    file, link = tmp_path / "disk" / "real.json", tmp_path / "link.json"
    link.symlink_to(file)
    with written(link, "--json") as part:
        equal(part.parent, file.parent, "part_of: from disk to disk nothing can be renamed")
        part.write_text("new")
    assert link.is_symlink()
    equal((file.read_text(), os.listdir(file.parent)), ("new", ["real.json"]), "os.path.realpath")


def test_what_cannot_be_written_is_refused_by_the_flag_s_name(tmp_path):
    """A folder, a device or a pipe, below a file, nothing; and a try leaves nothing."""
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path, "a folder; give the path of a file"),
        (tmp_path / "pipe", r"no ordinary file \(a device or a pipe\); give the path"),
        ("/dev/null", r"no ordinary file \(a device or a pipe\); give the path"),
        (tmp_path / "file" / "below", "not written: (Not a directory|File exists)"),
        ("", "an empty name; give the path"),
    ):
        with pytest.raises(InputError, match=f"--json .*: {says}"):
            refuse_unwritable(path, "--json")
    refuse_unwritable(tmp_path / "new" / "file.json", "--json")
    equal(os.listdir(tmp_path / "new"), [], "what was tried is removed")


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    """Where the file may grow by less than a line; later lines follow the last whole one."""
    path = tmp_path / "log.jsonl"
    append_whole(path, b"first\n", "the log")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 4):
        resource.setrlimit(resource.RLIMIT_FSIZE, (6 + room, limits[1]))
        try:
            with pytest.raises(InputError, match="the log .*log.jsonl: not written: "):
                append_whole(path, b"second\n", "the log")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        equal(path.read_bytes(), b"first\n", f"room for {room} bytes")
    append_whole(path, b"third\n", "the log")
    equal(path.read_bytes(), b"first\nthird\n", "append_whole")


def test_two_commands_that_write_into_one_folder_have_each_a_part_of_their_own(tmp_path):
    """Into one they would write both at once, and what is renamed would be of either. Two processes
    may have the same number: in two containers."""
    parts = [writing.part_of(tmp_path / "scores.json", "--json") for _ in range(2)]
    expect(parts[0] != parts[1], parts, "two names", "writing.part_of")
    equal({part.parent for part in parts}, {tmp_path}, "beside the file: renamed, not copied")
    equal([writing.is_part(part.name) for part in parts], [True, True], "is_part")
    equal([writing.is_part(x) for x in ("a.part.png", f"a{parts[0].name}")], [False] * 2, "is_part")


def test_an_error_of_what_is_read_keeps_its_own_words(tmp_path):
    """It says nothing of where the file is written."""
    with pytest.raises(InputError, match="^list.jsonl: has become shorter$"):
        with written(tmp_path / "clean.jsonl", "--clean"):
            raise InputError("list.jsonl: has become shorter")


def test_a_list_is_called_jsonl_in_letters_of_any_size():
    """As those who read it take it; by another ending it would be read as something else."""
    for path in ("talks.jsonl", "TALKS.JSONL", ""):
        writing.refuse_no_list(path, "--out")
    for path in ("talks.json", "talks", "talks.jsonl.csv"):
        with pytest.raises(InputError, match=f"--out {path}: a list, one example a line"):
            writing.refuse_no_list(path, "--out")


def test_a_file_of_nothing_but_brackets_is_no_list(tmp_path):
    """It is refused, as any other file of a person's is, and not a stack trace."""
    (tmp_path / "deep.jsonl").write_bytes(b'{"a": ' * 100_000)
    equal(writing.holds_lines(tmp_path / "deep.jsonl", ("a",)), False, "writing.holds_lines")


def test_a_file_that_may_not_be_read_stays(tmp_path, monkeypatch):
    """Another user's, in a folder that both write into: one line, and not a stack trace."""
    (tmp_path / "a.jsonl").write_text("{}\n")

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "open", refused, raising=False)
    with pytest.raises(InputError, match="--out .*a.jsonl: is there already, and is no list of"):
        is_list = partial(writing.holds_lines, keys=("query",))
        writing.refuse_other(tmp_path / "a.jsonl", "--out", is_list, "list of pairs")


@pytest.mark.parametrize(
    ("line", "is_ours"),
    [
        ('{"query": 1}', True),
        ('{"conversations": [], "id": 1}', False),
        ("{}", False),
        ('["query"]', False),
        ("7", False),
        ('"query"', False),
    ],
)
def test_a_list_begins_with_an_object_of_its_kind(tmp_path, line, is_ours):
    """A list of another kind, a number, a string or an array is not written over."""
    (tmp_path / "a.jsonl").write_text(f"{line}\n")
    equal(writing.holds_lines(tmp_path / "a.jsonl", ("query",)), is_ours, "writing.holds_lines")
