"""Pictures: which files are opened, which formats are decoded, which colours come of them, where
they are looked for, and the hub's zip files."""

import contextlib
import ctypes
import io
import json
import os
import re
import socket
import stat
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from checks import equal, expect
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

import data
from data import Item
from plumbing import images as images_module
from plumbing import zips
from plumbing.errors import InputError, brief
from plumbing.files import open_file, refuse_special
from plumbing.formats import IMAGE
from plumbing.images import Images, ZipImage, decoded_formats, open_image
from plumbing.loader import prefetch
from plumbing.mmeb import MMEB
from plumbing.zips import index_of, open_zip
from tools.check import check
from tools.pictures import find_pictures, say_others

RED = Image.new("RGB", (40, 20), (200, 30, 40))


def encoded(kind, image=RED, **options) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
        "is a URL; save it as a file and": "https://example.org/a.png",
        "no such file": folder / "gone.png",
        "no such file ": f"{folder}/not-at-the-beginning://a.png",
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
    assert len(brief("x" * 5000)) == 200 and brief("two\n  lines") == "two lines"


def test_special_files_as_pictures_are_named_at_once(tmp_path, shared):
    """In the data of a training, `open_image` in the loader's workers; a FIFO is not waited for."""
    for says, path in special_files(tmp_path).items():
        says = says.strip().replace("no such file", "no such picture")
        with pytest.raises(InputError, match=re.escape(says)):
            shared.collate.row(Item(IMAGE, (str(path),)))


def test_special_files_in_a_list_are_named_at_once(tmp_path):
    """What a list of data names: found (or lost), and refused when it is opened."""
    special_files(tmp_path)
    images = Images(tmp_path)
    for name, says in (
        ("pipe.png", "is a pipe"),
        ("folder.png", "is a folder"),
        ("socket.png", "is a socket"),
        ("nowhere.png", "link to gone.png, which is not there"),
        ("loop.png", "leads to itself"),
        ("below.png/a.png", "lies below a file"),
        ("x" * 5000, "longer than a file's name"),
        ("a\0.png", "a character that no file's name can have"),
        ("data:image/png;base64,iVBOR", "is a URL"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            open_image(images.find(name))
        assert len(str(caught.value)) < 500


def test_check_names_every_special_file(tmp_path, capsys):
    """`tools.check` on a list of them: one bad line each, and the good one is good."""
    special_files(tmp_path)
    RED.save(tmp_path / "a.png")
    names = ["pipe.png", "folder.png", "socket.png", "nowhere.png", "loop.png", "a\0.png", "a.png"]
    lines = [{"query": {"image": name}, "target": {"text": "x"}} for name in names]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert check(str(tmp_path / "x.jsonl")).bad == len(names) - 1
    said = capsys.readouterr().out
    assert "pipe.png: is a pipe" in said and "socket.png: is a socket" in said


def test_a_searched_folder_may_hold_anything(tmp_path, capsys):
    """`find_pictures`: only ordinary files of decoded formats; what else looks like a picture is
    left out with its name, which can be printed."""
    special_files(tmp_path)
    not_utf8 = os.fsencode(tmp_path) + b"/\xff.jpg"
    for name in (b"a.PNG", b"b.jpg", b"c.pdf", b"d.mpg", b"e.h5", b"f.eps", b"g.txt", b"k.psd"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"")
    open(not_utf8, "wb").close()
    (tmp_path / "below.png").unlink()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "h.webp").write_bytes(b"")
    assert find_pictures(tmp_path) == ["a.PNG", "b.jpg", os.path.join("sub", "h.webp")]
    said = capsys.readouterr().out
    assert "left out, by their endings: 1 .eps, 1 .h5, 1 .mpg, 1 .pdf, 1 .psd, 1 more\n" in said
    for name in ("pipe.png", "socket.png", "nowhere.png", "loop.png"):
        assert f"left out: {name}: no ordinary file" in said
    assert r"left out: \udcff.jpg: its name is not UTF-8" in said
    for name, says in (
        ("folder.png", "folder.png: no pictures in it"),
        ("a.PNG", "--images .*a.PNG: is no folder; name one"),
        ("pipe.png", "pipe.png: is no folder"),
        ("gone", "gone: no such folder"),
    ):
        with pytest.raises(InputError, match=says):
            find_pictures(tmp_path / name)
    assert capsys.readouterr().out == "", "what is no folder is not left out of one"
    for i in range(8):
        (tmp_path / "sub" / f"{i}.png").mkdir()
        (tmp_path / "sub" / f"link-{i}.png").symlink_to("nowhere")
    find_pictures(tmp_path / "sub")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6 and said[-1] == "left out: 3 more", said


def test_what_is_left_out_is_counted_by_its_ending(tmp_path, capsys):
    """In capitals or not; and of five that are named no other is left."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "d.txt"):
        (tmp_path / name).touch()
    for i in range(5):
        (tmp_path / f"linked {i}").symlink_to(tmp_path)
    equal(find_pictures(str(tmp_path)), ["a.png"], "pictures")
    endings, *links = capsys.readouterr().out.splitlines()
    equal(endings, "left out, by their endings: 2 .heic, 1 .txt", "say_others")
    equal(len(links), 5, f"five by name, and not 0 more: {links}")


def test_the_ending_of_the_most_files_is_said_first(capsys):
    """A phone's pictures, and not a text beside them; of equal counts in the order of letters."""
    counts = {".a": 1, ".b": 1, ".c": 2, ".d": 1, ".e": 1, ".f": 1, ".heic": 1200}
    say_others(counts)
    said = "left out, by their endings: 1,200 .heic, 2 .c, 1 .a, 1 .b, 1 .d, 2 more\n"
    assert capsys.readouterr().out == said


# -------------------------------------------------------------------------------- what is decoded


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_seven_formats_are_decoded_by_their_content(tmp_path, kind):
    """Whatever the file is called. (MPO: a JPEG with a second picture, as phones write it.)"""
    if kind not in (*decoded_formats(), "MPO"):
        pytest.skip(f"this Pillow has no {kind}")
    (tmp_path / "x.txt").write_bytes(encoded(kind))
    color = open_image(tmp_path / "x.txt").getpixel((20, 10))
    assert max(abs(a - b) for a, b in zip(color, (200, 30, 40), strict=True)) < 12


@pytest.mark.filterwarnings("ignore")  # of formats that Pillow will lose
def test_no_other_format_is_decoded_and_no_program_started(tmp_path, started):
    """Each that Pillow can write, as a .jpg; Ghostscript would run EPS, as a PIL image too."""
    Image.init()
    tried = 0
    for kind in sorted({*Image.SAVE} - {*decoded_formats(), "MPO"}):
        for mode in ("RGB", "L", "1", "F"):
            with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
                (tmp_path / "x.jpg").write_bytes(encoded(kind, RED.convert(mode)))
                with pytest.raises(InputError, match=r"x.jpg .*: its content is none of JPEG, PNG"):
                    open_image(tmp_path / "x.jpg")
                tried += 1
    assert tried > 15
    with pytest.raises(InputError, match="EPS is a program"):
        open_image(Image.open(io.BytesIO(encoded("EPS"))))
    assert not started


def test_what_a_decoder_raises_is_the_one_clear_line(tmp_path, monkeypatch):
    """An error of any type, a lack of memory too; a text of any length."""
    (tmp_path / "x.png").write_bytes(encoded("PNG"))
    for error in (struct.error("x" * 10_000), KeyError(1), MemoryError(), AssertionError("a\nb")):

        def load(self, error=error):
            raise error

        monkeypatch.setattr(ImageFile.ImageFile, "load", load)
        with pytest.raises(InputError, match=r"x.png \(\d+ bytes\): not a readable") as caught:
            open_image(tmp_path / "x.png")
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_limits_hold_for_every_format_before_its_pixels_are_decoded(tmp_path, monkeypatch):
    """Too many pixels, a line of pixels, a text that unpacks to 70 MB."""
    monkeypatch.setattr(images_module, "MOST_PIXELS", 700)
    for kind in decoded_formats():
        (tmp_path / "x").write_bytes(encoded(kind))
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("was decoded"))
            with pytest.raises(InputError, match="40 x 20 pixels; at most"):
                open_image(tmp_path / "x")
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 70_000_000, zip=True)
    with pytest.raises(InputError, match="not a readable picture"):
        open_image(io.BytesIO(encoded("PNG", RED.resize((4, 4)), pnginfo=text)))
    with pytest.raises(InputError, match="0 x 3 pixels"):
        open_image(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize(
    ("most", "beyond"),
    [((200, 1), (201, 1)), ((1, 200), (1, 201)), ((10_000, 10_000), (10_000, 10_001)),
     ((1, 1), (0, 5)), ((1, 1), (0, 0))],
)  # fmt: skip
def test_the_limits_of_a_size_are_where_they_are_said_to_be(most, beyond):
    """1e8 pixels, 200:1 lying or standing; something at all."""
    images_module.refuse_size(most)
    with pytest.raises(ValueError, match=f"{beyond[0]} x {beyond[1]} pixels; at most 1e8 and 200"):
        images_module.refuse_size(beyond)


def test_only_the_first_of_many_frames_is_decoded():
    """A GIF and a TIFF of 200 frames."""
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(200)]
    for kind in ("GIF", "TIFF"):
        file = io.BytesIO(encoded(kind, frames[7], save_all=True, append_images=frames))
        assert open_image(file).getpixel((0, 0)) == (7, 0, 0)


def test_what_is_no_picture_at_all_is_said():
    """A number, bytes, nothing: with what a picture may be."""
    for x in (3, b"\x89PNG", None, ["a.png"]):
        with pytest.raises(InputError, match=f"{type(x).__name__} .*a picture is a path, a PIL"):
            open_image(x)


def test_pillows_remarks_are_not_printed():
    """A picture of odd EXIF, a warning by itself: nothing is heard of it."""
    whole = encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(io.BytesIO(whole)).getexif()
    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()  # pytest's, and ours
        images_module.quiet_pillow()
        assert open_image(io.BytesIO(whole)).size == (40, 20)
    assert not heard


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(Image.core.__file__), "TIFFSetErrorHandler"),
    reason="libtiff is built into this Pillow, and cannot be told to be quiet",
)
def test_what_libtiff_says_of_a_damaged_fax_is_not_printed(capfd):
    """It had a line on stderr, past Python's, for each damaged one of the picture: hundreds."""
    noise = Image.effect_noise((300, 300), 99).convert("1")
    whole = bytearray(encoded("TIFF", noise, compression="group4"))
    for i in range(2_000, len(whole) - 600, 97):
        whole[i] ^= 0x55
    with contextlib.suppress(InputError):
        open_image(io.BytesIO(whole))
    assert not capfd.readouterr().err


# --------------------------------------------------------------------------------- EXIF and colours

# Parts of an EXIF that ImageOps.exif_transpose fails at: (tag, type, count, value).
ODD = {
    "a text for the width": (0x0100, 2, 4, b"abc\0"),
    "a text for the resolution": (0x011A, 2, 4, b"abc\0"),
    "a negative width": (0x0100, 9, 1, struct.pack("<i", -1)),
    "a fraction for the compression": (0x0103, 5, 1, struct.pack("<I", 8)),
}


def exif_bytes(*entries) -> bytes:
    """EXIF as a camera writes it, little-endian."""
    raw = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    for tag, kind, count, value in sorted(entries):
        raw += struct.pack("<HHI", tag, kind, count) + value
    return raw + b"\0\0\0\0"


@pytest.mark.parametrize("turn", range(1, 10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_exif_says(kind, turn):
    """The pixels are those of Pillow's exif_transpose."""
    noise = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    whole = encoded(kind, Image.fromarray(noise), exif=exif)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(whole))).convert("RGB")
    for ref in (io.BytesIO(whole), Image.open(io.BytesIO(whole))):
        image = open_image(ref)
        assert (image.size, image.tobytes()) == (want.size, want.tobytes())


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "I;16"])
def test_a_picture_of_another_mode_is_turned_too(mode):
    """Its EXIF is read before its pixels become other ones."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded("PNG", Image.new(mode, (40, 20)), exif=exif)
    assert open_image(io.BytesIO(whole)).size == (20, 40)


@pytest.mark.parametrize("what", ODD)
def test_odd_exif_costs_no_picture(what):
    """Only the orientation is read; from a file, and of a PIL image that a user brings."""
    whole = encoded("JPEG", exif=exif_bytes((0x0112, 3, 1, b"\6\0\0\0"), ODD[what]))
    for ref in (io.BytesIO(whole), Image.open(io.BytesIO(whole))):
        assert open_image(ref).size == (20, 40)


@pytest.mark.filterwarnings("ignore")  # pytest hears them all
def test_damaged_exif_is_no_exif():
    """The picture as it stands."""
    for raw in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*"):
        assert open_image(io.BytesIO(encoded("JPEG", exif=raw))).size == (40, 20)
    image = RED.copy()
    image.info["exif"] = 5
    assert open_image(image).size == (40, 20)


@pytest.mark.parametrize(
    ("mode", "want"),
    [
        ("RGB", (200, 30, 40)), ("RGBX", (200, 30, 40)), ("CMYK", (200, 30, 40)),
        ("YCbCr", (200, 30, 40)), ("HSV", (200, 30, 40)), ("LAB", (200, 30, 40)),
        ("P", (200, 30, 40)), ("PA", (200, 30, 40)), ("RGBA", (200, 30, 40)),
        ("RGBa", (200, 30, 40)), ("L", (82, 82, 82)), ("LA", (82, 82, 82)),
        ("La", (82, 82, 82)), ("1", (0, 0, 0)), ("I", (82, 82, 82)),
    ],
)  # fmt: skip
def test_each_mode_keeps_its_colour(mode, want):
    """Dark red, opaque, in every mode that Pillow has; within what the mode itself rounds."""
    image = RED.convert("RGBA") if mode in ("RGBa", "PA") else RED
    image = image.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "PA" else image
    image = image.convert("LA") if mode == "La" else image
    if mode == "P":
        image = RED.quantize(4)
    elif mode == "I":
        image = RED.convert("L")
    color = open_image(image.convert(mode)).getpixel((0, 0))
    assert max(abs(a - b) for a, b in zip(color, want, strict=True)) <= 4, f"{mode}: got {color}"


@pytest.mark.parametrize("mode", ["LAB", "CMYK"])
def test_a_file_of_other_colours_keeps_them(tmp_path, mode):
    """TIFF of each (LAB came out white: its name has an A)."""
    color = open_image(io.BytesIO(encoded("TIFF", RED.convert(mode)))).getpixel((0, 0))
    assert max(abs(a - b) for a, b in zip(color, (200, 30, 40), strict=True)) <= 4


def test_transparent_is_white_in_every_mode():
    """An alpha channel, a palette's transparent entries (one, or bytes for several), a key."""
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    for mode in ("RGBA", "LA", "RGBa", "La"):
        image = clear.convert("LA").convert("La") if mode == "La" else clear.convert(mode)
        assert open_image(image).getpixel((0, 0)) == (255, 255, 255), mode
    assert open_image(clear.quantize()).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image = open_image(io.BytesIO(encoded("PNG", palette, transparency=bytes([0, 255, 128]))))
    assert [image.getpixel((i, 0)) for i in range(3)] == [
        (255, 255, 255), (0, 255, 0), (127, 127, 255)]  # fmt: skip
    for mode, key in (("L", 82), ("RGB", (200, 30, 40))):
        image = open_image(io.BytesIO(encoded("PNG", RED.convert(mode), transparency=key)))
        assert image.getpixel((0, 0)) == (255, 255, 255), mode


@pytest.mark.parametrize("green", [0x5678, 0x0034])
def test_a_key_of_16_bits_is_one_of_the_colours_high_bytes(green):
    """PNG of three colours of 16 bits: Pillow keeps their high bytes, and the key as it was. One of
    the colours may be dark, and its number fit into 8 bits."""

    def chunk(kind, content):
        check = struct.pack(">L", zlib.crc32(kind + content))
        return struct.pack(">L", len(content)) + kind + content + check

    pixels = struct.pack(">6H", 0x1234, green, 0x9ABC, 0x1334, green, 0x9ABC)
    whole = b"\x89PNG\r\n\x1a\n" + b"".join([
        chunk(b"IHDR", struct.pack(">LLBBBBB", 2, 1, 16, 2, 0, 0, 0)),
        chunk(b"tRNS", pixels[:6]), chunk(b"IDAT", zlib.compress(b"\0" + pixels)),
        chunk(b"IEND", b""),
    ])  # fmt: skip
    image = open_image(io.BytesIO(whole))
    assert [image.getpixel((i, 0)) for i in range(2)] == [
        (255, 255, 255), (0x13, green >> 8, 0x9A)]  # fmt: skip


def test_a_picture_of_the_users_own_stays_as_it_is():
    """Its key of 16 bits is made one of 8 in a copy."""
    image, key = RED.copy(), (0xC800, 0x1E00, 0x2800)
    image.info["transparency"] = key
    equal(open_image(image).getpixel((0, 0)), (255, 255, 255), "transparent")
    equal(image.info["transparency"], key, "to_rgb")


def test_black_may_be_the_grey_that_is_transparent():
    """The key 0, which is no missing one."""
    grey = Image.fromarray(np.array([[0, 20000]], np.uint16))
    image = open_image(io.BytesIO(encoded("PNG", grey, transparency=0)))
    equal([image.getpixel((i, 0))[0] for i in range(2)], [255, 78], "eight_bits")


def test_whole_numbers_are_of_8_or_of_16_bits():
    """ "I;16" has 16, and so has PNG; mode "I" by its range: 0 to 255 came out black."""
    grey = np.array([[0, 100, 200, 255]])
    for mode, scale in (("I", 1), ("I", 256), ("I;16", 256), ("I;16B", 256), ("I;16L", 256)):
        kind = {"I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")
        image = Image.frombytes(mode, (4, 1), (grey * scale).astype(kind).tobytes())
        got = [open_image(image).getpixel((i, 0))[0] for i in range(4)]
        assert got == grey[0].tolist(), f"{mode} times {scale}: got {got}"
    just = Image.fromarray(np.array([[256, 0]], np.int32))  # which no 8 bits hold
    assert open_image(just).getpixel((0, 0)) == (1, 1, 1)
    dark = Image.fromarray(np.array([[0, 255]], np.uint16))  # known to be 16 bits: it is dark
    assert open_image(io.BytesIO(encoded("PNG", dark))).getpixel((1, 0)) == (0, 0, 0)
    for low, high in ((-1, 70000), (-1, 255), (0, 65536)):
        says = f"its pixels go from {low} to {high}; save it with 8 or 16"
        with pytest.raises(InputError, match=says):
            open_image(Image.fromarray(np.array([[low, high]], np.int32)))
    keyed = encoded(
        "PNG", Image.fromarray(np.array([[40000, 20000]], np.uint16)), transparency=40000
    )
    image = open_image(io.BytesIO(keyed))
    assert [image.getpixel((i, 0))[0] for i in range(2)] == [255, 78]


@pytest.mark.parametrize("bits", [np.uint8, np.uint16])
def test_in_a_tiff_zero_may_be_white(bits):
    """PhotometricInterpretation: Pillow turns a grey of 8 bits, and left one of 16 a negative."""
    grey = np.array([[0, 50, 200, 255]]) * (257 if bits is np.uint16 else 1)
    for photometric, want in ((0, [255, 205, 55, 0]), (1, [0, 50, 200, 255])):
        whole = bytearray(encoded("TIFF", Image.fromarray(grey.astype(bits))))
        at = whole.index(struct.pack("<HHL", 262, 3, 1))  # the tag's entry: one number of 16 bits
        whole[at + 8 : at + 10] = struct.pack("<H", photometric)
        image = open_image(io.BytesIO(whole))
        got = [image.getpixel((i, 0))[0] for i in range(4)]
        assert got == want, f"photometric {photometric}, {bits}: got {got}"


def test_pictures_of_other_palettes_are_other_items():
    """The indices are the same, the colours are not; and the same colours are the same item."""
    keys = []
    for color in ([255, 0, 0], [0, 0, 255]):
        image = Image.new("P", (8, 8), 0)
        image.putpalette(color * 256)
        keys.append(Item(IMAGE, (image,)).key)
        assert keys[-1] == Item(IMAGE, (Image.new("RGB", (8, 8), tuple(color)),)).key
    assert keys[0] != keys[1]
    clear, opaque = Image.new("P", (8, 8), 0), Image.new("P", (8, 8), 0)
    clear.info["transparency"] = 0
    assert Item(IMAGE, (clear,)).key != Item(IMAGE, (opaque,)).key


# ------------------------------------------------------------------------------- where they are


def picture_at(path):
    """A picture, and the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    RED.save(path)
    return path


def found(images, path, subset=""):
    """The size of what is found, or "outside", or "missing"."""
    try:
        place = images.find(path, subset)
        return open_image(place).size
    except InputError as e:
        return "outside" if "lies outside of" in str(e) else "missing"


def test_usual_layouts_are_found(tmp_path):
    """images/SUBSET on another disk, `images` itself, a root that is a link; absolute paths inside
    of it, spelled through the links or not; `.` and `..` that stay inside."""
    root, disk = tmp_path / "root", tmp_path / "disk"
    picture_at(disk / "coco" / "train" / "a.png")
    picture_at(root / "own" / "b.png")
    (root / "images").mkdir()
    (root / "images" / "coco").symlink_to(disk / "coco")
    (tmp_path / "alias").symlink_to(root)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "images").symlink_to(root / "images")
    right = {
        root: ["coco/train/a.png", "images/coco/train/a.png", "own/b.png", "./own//b.png",
               "own/../own/b.png", f"{root}/own/b.png", f"{root}/images/coco/train/a.png",
               f"{disk}/coco/train/a.png"],
        tmp_path / "alias": ["own/b.png", f"{root}/own/b.png", f"{tmp_path}/alias/own/b.png",
                             f"{tmp_path}/alias/images/coco/train/a.png"],
        root / "images": ["coco/train/a.png", f"{root}/images/coco/train/a.png"],
        tmp_path / "second": ["coco/train/a.png"],
    }  # fmt: skip
    for top, paths in right.items():
        images = Images(top)
        for path in paths:
            assert found(images, path) == (40, 20), f"{path} below {top}"
        assert images.lost == []


def test_a_name_as_it_stands_comes_before_images(tmp_path):
    """Where both are there `images/NAME` was taken for NAME, and for an absolute path; and it is
    the way out where NAME itself is not there."""
    for name, width in (("own/b.png", 3), ("b.png", 4), ("images/own/b.png", 5),
                        ("images/b.png", 6), ("images/c.png", 7)):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, 8)).save(tmp_path / name)
    images = Images(tmp_path)
    for name, width in (("own/b.png", 3), ("b.png", 4), ("images/own/b.png", 5),
                        ("images/b.png", 6), ("c.png", 7), ("images/c.png", 7)):  # fmt: skip
        for path in (name, f"./{name}", f"{tmp_path}/{name}"):
            assert found(images, path) == (width, 8), path
    for folder in ("", "images"):  # newer than the lists of the folders
        Image.new("RGB", (8 + len(folder), 8)).save(tmp_path / folder / "new.png")
    assert found(images, "new.png") == (8, 8)


def test_the_hub_caches_own_links_are_followed(tmp_path):
    """Its files are links to blobs/; no other link out of a snapshot is."""
    repo = tmp_path / "hub" / "datasets--org--name"
    picture_at(repo / "blobs" / "ab12.png").rename(repo / "blobs" / "ab12")
    snapshot = repo / "snapshots" / "0123"
    (snapshot / "images" / "A").mkdir(parents=True)
    (snapshot / "images" / "A" / "a.png").symlink_to("../../../../blobs/ab12")
    (snapshot / "images" / "A" / "b.png").symlink_to(picture_at(tmp_path / "secret.png"))
    for root in (snapshot, snapshot / "images"):
        assert found(Images(root), "A/a.png") == (40, 20)
        assert found(Images(root), "A/b.png") == "outside"
    own = tmp_path / "mine" / "snapshots" / "monday"  # a name is no cache
    own.mkdir(parents=True)
    picture_at(tmp_path / "mine" / "blobs" / "s.png")
    (own / "s.png").symlink_to("../../blobs/s.png")
    assert found(Images(own), "s.png") == "outside"


def test_what_leaves_the_root_is_refused(tmp_path):
    """`..`, absolute paths, and links in the data: of files, of folders beside the list, of folders
    below a subset; each also through a path that begins well."""
    root = tmp_path / "root"
    secret = picture_at(tmp_path / "secret" / "s.png")
    picture_at(root / "images" / "A" / "a.png")
    (root / "file.png").symlink_to(secret)
    (root / "images" / "file.png").symlink_to(secret)
    (root / "images" / "A" / "file.png").symlink_to(secret)
    (root / "folder").symlink_to(secret.parent)
    (root / "images" / "A" / "folder").symlink_to(secret.parent)
    images = Images(root)
    for path in (
        "../secret/s.png", "images/../../secret/s.png", "A/../../../secret/s.png",
        "../../etc/passwd", str(secret), "/etc/passwd", f"{root}/../secret/s.png",
        "file.png", "images/file.png",
        "A/file.png", "folder/s.png", "A/folder/s.png", f"{root}/folder/s.png",
        "images/../../nothing/there.png",
    ):  # fmt: skip
        assert found(images, path) == "outside", path
    (root / "dangling.png").symlink_to("images/A/gone.png")
    assert found(Images(root), "dangling.png") == "missing"
    (root / "inner.png").symlink_to("images/A/a.png")  # a link that stays inside
    assert found(Images(root), "inner.png") == (40, 20)


def test_each_of_many_links_is_looked_at(tmp_path):
    """Their hashes are searched, wherever they stand in the folder; a neighbour whose name begins
    like the root's is outside."""
    secret = picture_at(tmp_path / "root-2" / "s.png")
    (tmp_path / "root").mkdir()
    for i in range(40):
        (tmp_path / "root" / f"{i}.png").symlink_to(secret)
    images = Images(tmp_path / "root")
    for i in range(40):
        assert found(images, f"{i}.png") == "outside", i


def test_what_is_lost_is_named_in_brief_and_counted(tmp_path):
    """What is nowhere, what leads nowhere; and what lies outside."""
    (tmp_path / "dangling.png").symlink_to("gone.png")
    images = Images(tmp_path)
    for path in ("x" * 5000, "dangling.png"):
        images.find(path)
    assert [len(str(name)) <= 200 for name in images.lost] == [True, True]
    with pytest.raises(InputError) as caught:
        images.find("../" + "x" * 5000)
    assert len(str(caught.value)) < 200 + len(str(tmp_path)) + 150


def test_a_wrong_root_is_said_once(tmp_path):
    """Before any of its pictures is looked for."""
    with pytest.raises(InputError, match="--image-root .*nowhere: no such folder"):
        Images(tmp_path / "nowhere")


def test_folders_are_listed_once_for_all_look_ups(tmp_path, monkeypatch):
    """The disk is asked once a folder and not for each picture; what is newer is still found."""
    for i in range(30):
        picture_at(tmp_path / f"part{i % 3}" / f"{i}.png")
    top = picture_at(tmp_path / "top.png")
    images, listed = Images(tmp_path), []
    images.find("part0/0.png")

    def scandir(path, ours=os.scandir):
        listed.append(path)
        return ours(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        for name in ("realpath", "exists", "lexists"):
            patch.setattr(os.path, name, lambda *_: pytest.fail("the disk was asked again"))
        for i in range(30):
            assert images.find(f"part{i % 3}/{i}.png") == f"{tmp_path}/part{i % 3}/{i}.png"
        assert images.find("top.png") == images.find("./top.png") == str(top)
    assert len(listed) == 2, "one for each of the other folders"
    picture_at(tmp_path / "part0" / "new.png")
    assert found(images, "part0/new.png") == (40, 20)
    assert found(images, "part0/gone.png") == "missing" and len(images.lost) == 1


# --------------------------------------------------------------------------------- the hub's zips


def zip_of(path, members, method=zipfile.ZIP_DEFLATED, **options):
    """A zip file of {name: content}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method, **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    index_of.cache_clear()
    return str(path)


CONTENTS = {
    "A/a.png": encoded("PNG"),
    "A/ü猫.png": b"x" * 5000,
    "A/empty": b"",
    "b": os.urandom(999),
}


def test_a_damaged_zip_costs_nothing_that_is_unpacked(tmp_path):
    """A download that broke off, a folder of the zip's name: what is not there is told."""
    (tmp_path / "images_zip").mkdir()
    (tmp_path / "images_zip" / "A.zip").write_bytes(b"half")
    (tmp_path / "images.zip").mkdir()
    (tmp_path / "1.png").write_bytes(encoded("PNG"))
    images = Images(tmp_path)
    images.prepare("A")
    equal(found(images, "1.png", "A"), (40, 20), "unpacked")
    equal(images.find("2.png", "B"), str(tmp_path / "2.png"), "a folder is no zip")
    with pytest.raises(InputError, match="A.zip: has no table of members"):
        images.find("2.png", "A")


def test_a_damaged_table_of_a_zip_is_read_once(tmp_path, monkeypatch):
    """Each of a million pictures that are looked up in it would read it anew."""
    path, reads = tmp_path / "a.zip", []
    path.write_bytes(b"half")
    read = zips.read_table

    def count(file):
        reads.append(file)
        return read(file)

    monkeypatch.setattr(zips, "read_table", count)
    for _ in range(3):
        with pytest.raises(InputError, match="a.zip: has no table of members"):
            open_zip(str(path))
    equal(len(reads), 1, "index_of")


def test_a_file_of_more_bytes_than_any_picture_has_is_not_read(tmp_path):
    """Some decoders read all of it first: a WebP with a hole of 1.5 GB took 43 s and 3 GB."""
    path = tmp_path / "a.webp"
    Image.new("RGB", (64, 48)).save(path)
    os.truncate(path, 800_000_000)
    equal(open_image(str(path)).size, (64, 48), "as large as one may be")
    os.truncate(path, 800_000_001)
    with pytest.raises(InputError, match="a.webp .800000001 bytes.: at most 800,000,000 bytes"):
        open_image(str(path))


@pytest.mark.parametrize("packed", [True, False])
def test_a_png_is_not_lost_to_a_long_text_in_it(tmp_path, packed):
    """Screenshots carry their layers, generated pictures their workflow: 2 MB here."""
    about = PngImagePlugin.PngInfo()
    about.add_text("workflow", "x" * 2**21, zip=packed)
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png", pnginfo=about)
    equal(open_image(str(tmp_path / "a.png")).size, (40, 20), "open_image")


def test_in_a_zip_only_its_own_folder_may_be_left_out_of_a_name(tmp_path):
    """Else `B/1.png`, which is not in A.zip, is A's `1.png`: another picture, without a word."""
    tiny = Image.new("RGB", (3, 3))
    own = {"1.png": encoded("PNG"), "images/2.png": encoded("PNG"), "B/3.png": encoded("PNG")}
    zip_of(tmp_path / "images_zip" / "A.zip", own)
    zip_of(tmp_path / "images.zip", {"1.png": encoded("PNG", tiny)})
    images = Images(tmp_path)
    for path in ("1.png", "A/1.png", "images/1.png", "2.png", "images/2.png", "B/3.png"):
        assert found(images, path, "A") == (40, 20), path
    for path in ("B/1.png", "A/B/1.png", "train/1.png", "B/2.png"):
        assert found(images, path, "A") == "missing", path
    for path, want in (("1.png", (3, 3)), ("images/1.png", (3, 3)), ("C/1.png", "missing")):
        assert found(images, path, "C") == want, path  # it has no zip of its own


def test_zips_are_read_as_zipfile_reads_them(tmp_path, monkeypatch):
    """Stored and deflated, with bytes before the zip and a comment after it, with 64-bit numbers,
    with a comment on each member, with another zip in it; of two members of one name the last."""
    path = tmp_path / "x.zip"
    inner = zip_of(tmp_path / "inner.zip", {"other": b"1"})
    for change in ("stored", "deflated", "before", "comment", "wide", "doubled", "noted"):
        if change == "wide":
            monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
            monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
        zip_of(path, CONTENTS, zipfile.ZIP_STORED if change == "stored" else zipfile.ZIP_DEFLATED)
        monkeypatch.undo()
        if change == "before":
            path.write_bytes(b"#!/bin/sh\n" * 50 + path.read_bytes())
        if change in ("comment", "doubled"):
            with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                archive.comment = b"a comment PK" * 9
                if change == "doubled":
                    archive.writestr("b", b"the last one")
        if change == "noted":
            with zipfile.ZipFile(path, "a") as archive:
                for member in archive.infolist():
                    member.comment = b"a note"
                archive.write(inner, "inner.zip")
        index_of.cache_clear()
        index = open_zip(str(path))
        with zipfile.ZipFile(path) as archive:
            for name in CONTENTS:
                assert index.read(name) == archive.read(name), f"{name} of the zip that is {change}"
        assert "c" not in index and len(index.names) >= len(CONTENTS)
        with pytest.raises(InputError, match="x.zip:c: no such member"):
            index.read("c")


def test_other_programs_names_and_fields_are_read(tmp_path):
    """Names in the old code page; 64-bit numbers behind another field, as Info-ZIP writes them."""
    path = tmp_path / "x.zip"
    zip_of(path, {"A/x.png": b"1"})
    path.write_bytes(path.read_bytes().replace(b"A/x.png", b"A/\x81.png"))
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["A/ü.png"]
    assert open_zip(str(path)).read("A/ü.png") == b"1"
    times = struct.pack("<HHLL", 0x5455, 8, 7, 7)
    numbers = zips.wide_numbers(times + struct.pack("<HHQQ", 1, 16, 2**33, 5) + times)
    assert [next(numbers), next(numbers)] == [2**33, 5]
    with pytest.raises(ValueError, match="damaged"):
        next(numbers)


def changed_entry(path, offset, value):
    """Overwrites bytes of the first entry in a zip's table."""
    content = bytearray(open(path, "rb").read())
    at = content.index(b"PK\1\2") + offset
    content[at : at + len(value)] = value
    open(path, "wb").write(content)
    index_of.cache_clear()


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (8, struct.pack("<H", 1), "is encrypted"),
        (8, struct.pack("<H", 0x801), "is encrypted"),
        (46, b"a", "no such member"),
        (10, struct.pack("<H", 14), "is packed by method 14; zip it with deflate"),
        (16, b"\1\2\3\4", r"is damaged \(length or checksum\)"),
        (20, struct.pack("<L", 10**8), "is cut off"),
        (20, struct.pack("<L", 3 * 10**8), "300,000,000 bytes; at most 200,000,000 are read"),
        (24, struct.pack("<L", 3 * 10**8), "300,000,000 bytes; at most 200,000,000 are read"),
        (24, struct.pack("<L", 1000), r"is damaged \(length or checksum\)"),
        (42, struct.pack("<L", 7), "is not where the zip's table says"),
        (42, struct.pack("<L", 10**9), "is cut off"),
    ],
)
def test_hostile_members_are_refused(tmp_path, offset, value, says):
    """Encrypted, of another method, of another checksum, size or place than is said."""
    path = zip_of(tmp_path / "x.zip", {"b.png": b"x" * 5000})
    changed_entry(path, offset, value)
    with pytest.raises(InputError, match=f"x.zip:b.png: {says}.*download the zip file again"):
        open_zip(path).read("b.png")


def test_a_damaged_member_is_refused(tmp_path):
    """One that stands under another name than the table says; bytes that deflate cannot have
    written."""
    path = zip_of(tmp_path / "x.zip", {"b.png": b"1"})
    content = open(path, "rb").read()
    open(path, "wb").write(content.replace(b"b.png", b"c.png", 1))
    index_of.cache_clear()
    with pytest.raises(InputError, match="x.zip:b.png: is not where the zip's table says"):
        open_zip(path).read("b.png")
    path = zip_of(tmp_path / "x.zip", {"b.png": os.urandom(99) * 50})
    content = bytearray(open(path, "rb").read())
    content[35] = 0xFF  # the packed content's first byte: no kind of block begins so
    open(path, "wb").write(content)
    index_of.cache_clear()
    with pytest.raises(InputError, match="x.zip:b.png: .*invalid block type; download"):
        open_zip(path).read("b.png")


def test_a_member_is_unpacked_no_further_than_its_table_says(tmp_path):
    """A megabyte that says it has ten bytes: eleven are unpacked."""
    path = zip_of(tmp_path / "x.zip", {"b.png": b"x" * 10**6})
    changed_entry(path, 24, struct.pack("<L", 10))
    tracemalloc.start()
    with pytest.raises(InputError, match="is damaged"):
        open_zip(path).read("b.png")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 500_000


def test_what_is_no_zip_is_said(tmp_path, monkeypatch):
    """Text, an empty file, a zip that was cut off or damaged, a table of absurd size, a pipe."""
    whole = open(zip_of(tmp_path / "whole.zip", CONTENTS), "rb").read()
    for name, content in (("a", b"hello"), ("b", b""), ("c", whole[:-30]), ("d", whole[-60:])):
        (tmp_path / f"{name}.zip").write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.zip: .*download the zip file again"):
            open_zip(str(tmp_path / f"{name}.zip"))
    (tmp_path / "f.zip").write_bytes(whole[:-10] + struct.pack("<LLH", 10, 0, 0))
    with pytest.raises(InputError, match="f.zip: .*download the zip file again"):
        open_zip(str(tmp_path / "f.zip"))
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    wide = open(zip_of(tmp_path / "wide.zip", CONTENTS), "rb").read()
    (tmp_path / "e.zip").write_bytes(wide.replace(b"PK\6\6", b"PK\6\5"))
    with pytest.raises(InputError, match="e.zip: has a damaged table of members"):
        open_zip(str(tmp_path / "e.zip"))
    monkeypatch.setattr(zips, "MOST_TABLE", 100)  # bytes
    with pytest.raises(InputError, match="whole.zip: has a table of .* bytes that begins at"):
        open_zip(str(tmp_path / "whole.zip"))
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(InputError, match="pipe.zip: is a pipe"):
        open_zip(str(tmp_path / "pipe.zip"))


def test_a_zip_may_end_in_the_longest_comment_there_is(tmp_path):
    """65,535 bytes; the end of its table stands in front of it."""
    path = zip_of(tmp_path / "x.zip", CONTENTS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"x" * 0xFFFF
    equal(open_zip(path).read("A/a.png"), CONTENTS["A/a.png"], "zips.read_table")


@pytest.mark.parametrize("name", ["A/a.png", "images/A/a.png"])
@pytest.mark.parametrize("place", ["images_zip/A.zip", "images_zip/images.zip", "images.zip"])
def test_there_is_a_zip_for_each_subset_or_one_for_all(tmp_path, place, name):
    """In either place; its members may lie in a folder `images`."""
    path = zip_of(tmp_path / place, {name: b""})
    equal(Images(tmp_path).find("A/a.png", "A"), ZipImage(path, name), "Images.find")


def test_a_zip_is_indexed_with_its_subset(tmp_path, monkeypatch):
    """Before any picture is looked for: of a node's ranks only one tries the rows, and the others
    fork workers, too."""
    for subset in ("A", "B"):
        zip_of(tmp_path / "images_zip" / f"{subset}.zip", {f"{subset}/a.png": encoded("PNG")})
    images = Images(tmp_path)
    for subset in ("A", "B"):
        images.prepare(subset)
    monkeypatch.setattr(zips, "read_table", lambda file: pytest.fail("the table is read too late"))
    for subset in ("A", "B"):
        assert found(images, f"{subset}/a.png", subset) == (40, 20)


def test_all_of_mmebs_zips_stay_indexed():
    """Each set has its own: where one were forgotten, each picture would have its table read."""
    most = index_of.cache_info().maxsize
    expect(most >= len(MMEB), most, len(MMEB), "zips.index_of: lru_cache")


def test_a_zip_is_indexed_once_and_before_the_workers_are_forked(tmp_path, monkeypatch):
    """MMEB's reader indexes it; then threads and forked processes read side by side, from one open
    file, and nobody reads the table again. 100,000 members: about 5 MB."""
    contents = {
        f"A/{i}.png": encoded("PNG", Image.new("RGB", (8, 8), (i, 0, 0))) for i in range(200)
    }
    zip_of(tmp_path / "images_zip" / "A.zip", contents)
    (tmp_path / "A").mkdir()
    table = {"qry": ["<|image_1|>"], "qry_image_path": ["A/1.png"], "pos_text": ["x"]}
    table["pos_image_path"] = [""]
    pq.write_table(pyarrow.table(table), tmp_path / "A" / "original-0.parquet")
    data.read_pairs(str(tmp_path))  # no row of it is drawn
    monkeypatch.setattr(zips, "read_table", lambda file: pytest.fail("the table was read again"))
    images = Images(tmp_path)

    def reds(_):
        return [open_image(images.find(f"A/{i}.png", "A")).getpixel((0, 0))[0] for i in range(200)]

    assert list(prefetch(reds, range(4), workers=2)) == [list(range(200))] * 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reds, range(8))) == [list(range(200))] * 8
    index = open_zip(str(tmp_path / "images_zip" / "A.zip"))
    assert (index.members.nbytes + index.names.nbytes) / 200 < 60, "bytes a member"


def test_a_picture_that_was_added_again_is_the_new_one_in_a_zip_of_many(tmp_path):
    """Of two members of one name the last, as every reader of zips has it. (Of a few members even
    a sort that is not stable leaves the order.)"""
    names = [f"{i}.png" for i in range(200)]
    path = zip_of(tmp_path / "x.zip", dict.fromkeys(names, b"old"))
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            archive.writestr(name, b"new")
    index = open_zip(path)
    equal({index.read(name) for name in names}, {b"new"}, "ZipIndex.members: stable")


def test_a_member_whose_name_is_no_text_costs_no_other_one(tmp_path):
    """It says that it is UTF-8, and is not: nobody can ask for it."""
    path = tmp_path / "x.zip"
    zip_of(path, {"\u00e9.png": b"1", "b.png": b"2"})
    path.write_bytes(path.read_bytes().replace(b"\xc3\xa9.png", b"\xff\xa9.png"))
    index_of.cache_clear()
    equal(open_zip(str(path)).read("b.png"), b"2", "zips.decode_name")


def test_a_link_to_a_folder_is_not_followed(tmp_path, capsys):
    """It may lead back: every picture would be found forty times. It is named."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "again").symlink_to(".")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "other").symlink_to("..")
    equal(find_pictures(tmp_path), ["a.png"], "find_pictures")
    left_out = "left out: again: a link to a folder\nleft out: below/other: a link to a folder\n"
    equal(capsys.readouterr().out, left_out, "find_pictures")


def test_of_two_zips_the_subsets_own_is_indexed_ahead(tmp_path, monkeypatch):
    """It is the one that its pictures are looked for in."""
    (tmp_path / "images_zip").mkdir()
    for name in ("images.zip", "images_zip/a.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("x.png", b"")
    opened = []
    monkeypatch.setattr(images_module, "open_zip", opened.append)
    for subset in ("a", "b"):
        Images(tmp_path).prepare(subset)
    equal(opened, [str(tmp_path / "images_zip/a.zip"), str(tmp_path / "images.zip")], "prepare")


def test_a_name_as_it_stands_comes_before_images_in_a_zip_too(tmp_path):
    """As in folders: MMEB's own names begin with the set's."""
    path = zip_of(tmp_path / "images.zip", {"images/A/a.png": b"", "A/a.png": b""})
    equal(Images(tmp_path).find("A/a.png", "A"), ZipImage(path, "A/a.png"), "names_in_zip")


def test_a_whole_path_below_a_root_that_is_a_link_is_found_in_a_zip(tmp_path):
    """By the link's name, and by that of the folder behind it."""
    zip_of(tmp_path / "real" / "images.zip", {"A/a.png": b""})
    (tmp_path / "link").symlink_to("real")
    path = str(tmp_path / "link" / "images.zip")
    for root in ("link", "real"):
        name = str(tmp_path / root / "A" / "a.png")
        equal(Images(tmp_path / "link").find(name, "A"), ZipImage(path, "A/a.png"), root)
