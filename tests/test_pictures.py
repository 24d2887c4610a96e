"""Pictures: which files are opened, which formats are decoded, which colours come of them, where
they are looked for, and the hub's zip files."""

import os
import socket
import stat

import pytest

from plumbing.errors import InputError, brief
from plumbing.files import open_file, refuse_special

# ------------------------------------------------------------------------------------ special files


def special_files(folder) -> dict:
    """{what a message must say: the path of a file that is not an ordinary one}."""
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "below.png").write_bytes(b"")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path has 107 bytes at most
        listener.bind("socket.png")
        os.chdir(here)
    return {
        "is a pipe": folder / "pipe.png",
        "is a folder": folder / "folder.png",
        "is a symbolic link to gone.png, which is not there": folder / "nowhere.png",
        "is a symbolic link that leads to itself": folder / "loop.png",
        "is a socket": folder / "socket.png",
        "is a device": "/dev/zero",
        "lies below a file": folder / "below.png" / "a.png",
        "is longer than a file's name can be": folder / f"{5000 * 'x'}.png",
        "holds a character that no file's name can have": f"{folder}/a\0.png",
        "holds a character that no file's name can have ": f"{folder}/\ud800.png",
        "is a URL; save it as a file": "data:image/png;base64,iVBORw0KGgo=",
        "is a URL; save it as a file ": "https://example.org/a.png",
        "no such file": folder / "gone.png",
    }


def test_no_special_file_is_opened_and_each_is_named(tmp_path):
    """A pipe, a folder, a socket, a device, links that lead nowhere, impossible names, URLs."""
    for says, path in special_files(tmp_path).items():
        with pytest.raises(InputError) as caught:
            refuse_special(path)
        assert says.strip() in str(caught.value), f"got {caught.value}, want {says}"
        assert len(str(caught.value)) < 400, "a name of 5,000 characters is printed in short"


def test_an_ordinary_file_is_opened_through_links_too(tmp_path):
    """The bytes; what may not be read is said."""
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to("a")
    with open_file(tmp_path / "b") as file:
        assert file.read() == b"x"
    (tmp_path / "a").chmod(0)
    if os.geteuid():  # root reads all
        with pytest.raises(InputError, match="a: may not be read by this user"):
            refuse_special(tmp_path / "a")
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0


def test_every_name_can_be_printed():
    """A file's name that is not UTF-8, control characters, half a surrogate pair, many lines."""
    for name in (os.fsdecode(b"\xff.png"), "\ud800.png", "\x1b[31m\0.png", "a\nb.png"):
        brief(name).encode()  # print would raise
        assert brief(name).isprintable() and brief(name).endswith(".png")
    assert len(brief("x" * 5000)) == 200
