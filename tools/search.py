"""Searches a folder of pictures, by a text, a picture, or both.

    python -m tools.search --images DIR --text "a red circle above a blue square"
    python -m tools.search --images DIR --query-image FILE
    torchrun --nproc-per-node 8 -m tools.search --images DIR --text "a dog" --model out/contrastive

The pictures are embedded once; their embeddings are kept beside the folder, under a key of all that
they depend on. Prints the best matches with their cosines, and draws them as one picture.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw

import model
from data import Item
from evaluate import encode_over_ranks
from plumbing import ranks
from plumbing.agreement import by_rank_0, join, on_rank_0
from plumbing.checkpoint import refuse_replaced, same_model
from plumbing.config import ModelFlags, flag
from plumbing.errors import InputError, brief
from plumbing.files import open_file, refuse_special
from plumbing.formats import IMAGE, with_marks
from plumbing.images import FORMATS, open_image
from plumbing.inputs import row_of
from plumbing.lines import attempts
from plumbing.log import versions
from plumbing.weights import trained_model
from plumbing.writing import refuse_unwritable, written
from tools.pictures import find_pictures

SHEET = "nanoCoMa: tools.search"  # in the EXIF of the pictures that it makes
WINDOW = 1024  # pictures that are embedded between two looks at the clock
SIDE, HEAD, CAPTION = 240, 30, 20  # pixels of the sheet: a cell, above all, below each picture


@dataclass
class Config(ModelFlags):
    """Flags of a search."""

    model: str = flag("", "empty: out/contrastive, else out/pretrain, else toy")
    images: str = flag("", "the folder to search; its index is kept beside it")
    text: str = flag("", "rank its pictures by this text")
    query_image: str = flag("", "or by this picture, or by both together")
    workers: int = flag(1, "loader processes of a rank", least=0, most=256)
    dim: int = flag(0, "numbers of an embedding that count (Matryoshka); 0: all", least=0)
    image_text: str = flag("<image>", "the instruction that the pictures are embedded with")
    top: int = flag(8, "results", least=1, most=1000)
    out: str = flag("out/search.png", "the picture of the results")


# ---------------------------------------------------------------------------------------- the index


def fingerprint(embedder, image_text=IMAGE) -> str:
    """Changes with any bit of the weights, and with all else that an embedding depends on: prompt,
    K, pooling, pixels, library versions. What was indexed under another one is never used."""
    collate, template = embedder.collate, embedder.collate.template
    image_processor = embedder.processor.image_processor
    settings = [
        embedder.K,
        embedder.pooling,
        embedder.style,
        embedder.dim,
        collate.max_length,
        embedder.device.type,  # a GPU computes in bfloat16
        embedder.mllm.config._attn_implementation,
        template,
        embedder.mllm.config.to_dict() | {"_name_or_path": ""},  # a folder may be moved
        flags_of(embedder.adapter),
        embedder.processor.tokenizer.backend_tokenizer.to_str(),
        image_processor.to_json_string(),
        type(image_processor).__name__,  # with torchvision it resizes otherwise
    ]
    digest = hashlib.blake2b(repr((settings, (image_text,), versions())).encode(), digest_size=8)
    for name, p in embedder.named_parameters():
        total = weight_sum(p)
        digest.update(f"{name} {tuple(p.shape)} {p.dtype} {total}".encode())
    return digest.hexdigest()


def flags_of(adapter) -> str:
    """All that peft notes of an adapter, but where its base lies. Sets in order: repr has none."""
    flags = adapter.active_peft_config.to_dict() if adapter else {}
    flags.pop("base_model_name_or_path", None)
    return json.dumps(flags, sort_keys=True, default=lambda x: sorted(x, key=str))


def weight_sum(p) -> int:
    """The bits of a parameter as numbers, each times an odd one: no single change leaves the sum.
    Where the weights are, and without a copy of them all: a hash would have to read them byte by
    byte."""
    total = 0
    for i, bits in enumerate(p.detach().flatten().view(torch.int16).split(2**22)):
        odd = torch.arange(len(bits), device=bits.device) * 2 + 1
        total = (total * 31 + int((bits.long() * odd).sum()) + i) % 2**64
    return total


def read_index(store, D) -> dict:
    """{file|size|time|inode: embedding (D,)} of an index; {} where there is none, or a damaged one.
    Rows that are no embedding, of unit length, are left out."""
    try:
        with open_file(store) as file, np.load(file, allow_pickle=False) as old:
            files, z = json.loads(old["files"].tobytes()), old["z"]  # (n, D)
        if z.shape != (len(files), D) or z.dtype != np.float32:
            return {}
        is_unit = abs(np.linalg.norm(z, axis=1) - 1) < 1e-3  # no NaN is
        return {f: v for f, v, good in zip(files, z, is_unit, strict=True) if good}
    except Exception:  # whatever is damaged is no index, and is made again
        return {}


def write_index(store, known):
    """Written beside and renamed: a cut-off index is never seen."""
    try:
        with written(store, "the index") as part, open(part, "wb") as file:
            # Trap: an array of texts gives each of them the room of the longest.
            files = np.frombuffer(json.dumps(list(known)).encode(), np.uint8)
            np.savez(file, files=files, z=np.array(list(known.values())))
    except InputError as e:  # it is a convenience: the search goes on
        ranks.say(str(e))


def list_files(folder, out, errors) -> dict:
    """{path|size|time|inode: path below the folder}: a picture is the same while these four are.
    `out`, the picture that a search draws, is none of them; what is not there goes to errors."""
    paths = {}
    for path in find_pictures(folder):
        if os.path.realpath(folder / path) == os.path.realpath(out):
            continue
        try:
            stat = (folder / path).stat()
        except OSError as e:
            errors.append(f"{brief(folder / path)}: {e.strerror}")
        else:
            # The inode, too: two files of one size and time, as a zip has, may change their names.
            paths[f"{path}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"] = path
    return paths


def index_path(folder, key) -> Path:
    """Beside the folder, also where that is "." or "..": an index in it would be searched."""
    real = folder.resolve()
    return real.parent / f"{real.name}.index-{key}.npz"


def embed_pictures(embedder, items, cfg, progress, errors) -> np.ndarray:
    """Embeddings (n, D) of Items, of all ranks together. What could not be read, and what has no
    finite embedding, is NaN, and goes to errors."""
    z = encode_over_ranks(embedder, items, cfg, progress, errors)
    for i in np.flatnonzero(~np.isfinite(z).all(1)):
        with suppress(InputError):  # it has no row, and is in errors
            row_of(embedder, items, i)
            errors.append(f"{brief(items[i].images[0])}: its embedding is not finite")
    return z


class Seldom:
    """A call that is left out where all of them would take more than a twentieth of the time."""

    def __init__(self, call):
        self.call = call
        self.ended, self.cost = 0.0, 0.0  # the last one: when, and how many seconds it took

    def __call__(self, at_once):
        if at_once or time.monotonic() - self.ended > 20 * self.cost:
            began = time.monotonic()
            self.call()
            self.ended = time.monotonic()
            self.cost = self.ended - began


def index_pictures(embedder, cfg) -> tuple:
    """-> (paths below --images, embeddings (n, D)). Only new and changed files are embedded, and
    the index is written as it grows. A file that is no readable picture is named."""
    folder = Path(cfg.images)
    store = index_path(folder, fingerprint(embedder, cfg.image_text))
    errors = []  # of what is left out
    # Rank 0's, for all: a picture may come in between, and an index lie on its disk alone.
    paths = by_rank_0(lambda: list_files(folder, cfg.out, errors))
    old = by_rank_0(lambda: read_index(store, embedder.dim))
    known = {file: old[file] for file in paths if file in old}
    new = [file for file in paths if file not in known]
    ranks.say(f"{len(paths):,} pictures in {folder}, {len(new):,} of them new or changed")
    write = Seldom(partial(write_index, store, known))
    for i in range(0, len(new), WINDOW):
        part = new[i : i + WINDOW]
        items = [Item(cfg.image_text, (str(folder / paths[file]),)) for file in part]
        progress = f"embedding {i:,} of {len(new):,}"
        z = embed_pictures(embedder, items, cfg, progress, errors)
        for file, vector in zip(part, z, strict=True):
            if np.isfinite(vector).all():
                known[file] = vector
        if ranks.rank() == 0 and known:
            write(at_once=i + WINDOW >= len(new))
    for error in errors:
        ranks.say(f"left out: {error}")
    if not known:
        raise InputError(f"--images {folder}: none of its pictures could be embedded")
    return [paths[file] for file in known], np.array(list(known.values()))


# --------------------------------------------------------------------------------------- the search


def query_of(cfg) -> Item:
    """What is searched for: text, picture, or "<image> text"."""
    if not cfg.query_image:
        return Item(cfg.text)
    return Item(f"{IMAGE} {cfg.text}" if cfg.text else IMAGE, (cfg.query_image,))


def title_of(query, cfg) -> str:
    """A query in one line."""
    return brief(query.text.replace(IMAGE, cfg.query_image))


def draw_sheet(title, pictures, captions) -> Image.Image:
    """The pictures that were found, four in a row, with a line under each."""
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)  # rounded up
    height = HEAD + rows * (SIDE + CAPTION)
    sheet = Image.new("RGB", (columns * SIDE, height), "white")
    canvas = ImageDraw.Draw(sheet)
    canvas.text((6, 6), title, "black", font_size=15)
    for n, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(n, columns)
        x, y = column * SIDE, HEAD + row * (SIDE + CAPTION)
        scale = (SIDE - 10) / max(picture.size)
        size = [max(1, round(scale * side)) for side in picture.size]
        # Small ones grow pixel by pixel: smoothed, a toy picture would be a blur.
        method = Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST
        sheet.paste(picture.resize(size, method), (x + 5, y))
        canvas.text((x + 5, y + SIDE - 8), caption, "black", font_size=12)
    return sheet


def search(embedder, cfg):
    """Ranks the pictures of a folder by their cosine with a text, a picture, or both."""
    query = query_of(cfg)
    q = embedder.encode([query], cfg.chunk_tokens)[0]  # (D,)
    if not np.isfinite(q).all():
        text = f"{title_of(query, cfg)!r}: its embedding by --model {brief(cfg.model)}"
        raise InputError(f"{text} is not finite; take another model, or another query")
    paths, z = index_pictures(embedder, cfg)
    scores = z @ q
    best = np.argsort(-scores, kind="stable")[: cfg.top]
    for i in best:
        ranks.say(f"{scores[i]:7.4f}  {brief(Path(cfg.images, paths[i]))}")
    if ranks.rank() > 0:
        return
    pictures, captions = [], []
    opened = attempts(lambda i: open_image(Path(cfg.images, paths[i])), best)
    for i, picture in zip(best, opened, strict=True):
        if isinstance(picture, InputError):  # it was there when it was indexed
            ranks.say(f"not drawn: {picture}")
        else:
            pictures.append(picture)
            captions.append(f"{scores[i]:.3f} {brief(paths[i][-30:])}")
    if not pictures:
        raise InputError(f"--images {cfg.images}: nothing of what was found can be opened any more")
    title = title_of(query, cfg)
    with written(cfg.out, "--out") as part:
        mark = Image.Exif()
        mark[ExifTags.Base.Software] = SHEET
        try:
            draw_sheet(title, pictures, captions).save(part, exif=mark)
        except ValueError as e:  # a WebP is at most 16,383 pixels high
            raise InputError(f"--out {brief(cfg.out)}: {e}; end it with .png") from None
    ranks.say(f"wrote {cfg.out}")


def refuse_photograph(cfg):
    """InputError where --out is one of the pictures that are searched, and no sheet of ours."""
    out = os.path.realpath(cfg.out)
    if os.path.isfile(out) and out.startswith(os.path.join(os.path.realpath(cfg.images), "")):
        with suppress(Exception), Image.open(out) as image:  # whatever is damaged is no sheet
            if image.getexif().get(ExifTags.Base.Software) == SHEET:
                return
        text = f"is a file of {brief(cfg.images)}, and would be lost; take another name"
        raise InputError(f"--out {brief(cfg.out)}: {text}")


def refuse_place(cfg):
    """InputError where the results cannot be drawn to --out."""
    refuse_unwritable(cfg.out, "--out", [cfg.query_image])
    refuse_photograph(cfg)


def refuse_no_search(cfg):
    """InputError, before anything is loaded, where there is nothing to search for or in."""
    if not cfg.images or not (cfg.text.strip() or cfg.query_image):
        raise InputError("a search needs --images DIR, and --text TEXT or --query-image FILE")
    if IMAGE in with_marks(cfg.text):
        way_out = "--query-image FILE puts a picture in front of the text, without a mark"
        raise InputError(f"--text {brief(cfg.text)!r} has {IMAGE}: {way_out}")
    if cfg.image_text.count(IMAGE) != 1:
        text = f"has {cfg.image_text.count(IMAGE)} {IMAGE}; one is wanted, where each picture goes"
        raise InputError(f"--image-text {brief(cfg.image_text)!r} {text}")
    if cfg.query_image:
        refuse_special(cfg.query_image, f"--query-image {brief(cfg.query_image)}", "picture")
    kind = Image.registered_extensions().get(Path(cfg.out).suffix.lower())
    if kind not in FORMATS or kind not in Image.SAVE:
        raise InputError(f"--out {brief(cfg.out)}: no kind of picture; end it with .png")
    on_rank_0(lambda: refuse_place(cfg))
    find_pictures(cfg.images, quiet=True)  # they are listed, and what is left out, further on


def main(cfg):
    """A search, from flags to the drawn results."""
    device = join(cfg)
    refuse_no_search(cfg)
    cfg.model = cfg.model or trained_model()
    digest = same_model(cfg.model)
    embedder = model.load_for(cfg, device)
    refuse_replaced(cfg.model, digest)
    ranks.say(f"searching with {cfg.model}")
    search(embedder, cfg)


if __name__ == "__main__":
    ranks.run(main, Config)
