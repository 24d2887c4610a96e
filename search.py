"""Searching a folder of pictures, by a text, a picture, or both.

    python evaluate.py --images DIR --search "a red circle above a blue square"
    python evaluate.py --images DIR --query-image FILE

The pictures are embedded once; their embeddings are kept beside the folder, under a key of all that
they depend on. Prints the best matches with their cosines, and draws them as one picture.
"""

import hashlib
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import model
from data import IMAGE, InputError, Item, open_image
from evaluate import encode_sharded
from tools import find_pictures


def fingerprint(embedder, *more) -> str:
    """Changes with any bit of the weights, and with all else that an embedding depends on: prompt,
    K, pooling, pixels, library versions. What was indexed under another one is never used."""
    collate, processor = embedder.collate, embedder.processor
    about = [embedder.K, embedder.pooling, embedder.style, collate.max_length, collate.picture]
    about += [collate.head, collate.mid, processor.image_processor.to_json_string()]
    about += [type(processor.image_processor).__name__]  # with torchvision it resizes otherwise
    digest = hashlib.blake2b(repr((about, more, model.versions())).encode(), digest_size=8)
    for name, p in embedder.named_parameters():
        total = 0  # of the bits as numbers, each times an odd one: no single change leaves it
        for i, bits in enumerate(p.detach().flatten().view(torch.int16).split(2**22)):
            odd = torch.arange(len(bits), device=bits.device) * 2 + 1
            total = (total * 31 + int((bits.long() * odd).sum()) + i) % 2**64
        digest.update(f"{name} {tuple(p.shape)} {p.dtype} {total}".encode())
    return digest.hexdigest()


def read_index(store) -> dict:
    """{file|size|time: embedding (D,)} of an index; {} where there is none, or a damaged one."""
    try:
        with np.load(store, allow_pickle=False) as old:
            return dict(zip(old["files"].tolist(), old["z"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def write_index(store, known):
    """Written beside and renamed: a cut-off index is never seen."""
    try:
        with open(f"{store}.part", "wb") as file:
            np.savez(file, files=np.array(list(known)), z=np.array(list(known.values())))
        os.replace(f"{store}.part", store)
    except OSError as e:
        model.say(f"the index is not kept: {e}")


def index_pictures(embedder, cfg) -> tuple:
    """-> (paths below --images, embeddings (n, D)). Only new and changed files are embedded; what
    is done is kept, every 1,024 pictures, but in no more than a twentieth of the time. A file that
    is no readable picture is named."""
    folder, key = Path(cfg.images), fingerprint(embedder, cfg.image_text)
    store = folder.parent / f"{folder.resolve().name}.index-{key}.npz"
    found, old, bad = {}, read_index(store), []
    for path in find_pictures(folder):  # a file is the same while its size and time are
        about = (folder / path).stat()
        found[f"{path}|{about.st_size}|{about.st_mtime_ns}"] = path
    known = {f: old[f] for f in found if f in old}
    new = [f for f in found if f not in known]
    model.say(f"{len(found):,} pictures in {folder}, {len(new):,} of them new or changed")
    written, cost = 0, 0  # when, and the seconds that it took
    for i in range(0, len(new), 1024):
        part = new[i : i + 1024]
        items = [Item(cfg.image_text, (str(folder / found[f]),)) for f in part]
        z = encode_sharded(embedder, items, cfg, f"embedding {i:,} of {len(new):,}", bad)
        known |= {f: v for f, v in zip(part, z, strict=True) if np.isfinite(v).all()}
        due = time.time() - written > 20 * cost or i + 1024 >= len(new)
        if model.rank() == 0 and due:
            t0 = time.time()
            write_index(store, known)
            written, cost = time.time(), time.time() - t0
    for error in bad:
        model.say(f"left out: {error}")
    if not known:
        raise InputError(f"--images {folder}: no readable picture in it")
    return [found[f] for f in known], np.array(list(known.values()))


def search(embedder, cfg):
    """Ranks the pictures of a folder by their cosine with a text, a picture, or both."""
    text = IMAGE * bool(cfg.query_image) + " " * bool(cfg.query_image and cfg.search) + cfg.search
    item = Item(text, (cfg.query_image,) if cfg.query_image else ())
    q = embedder.encode([item], cfg.chunk_tokens)[0]  # (D,)
    paths, z = index_pictures(embedder, cfg)
    scores = z @ q
    best = np.argsort(-scores, kind="stable")[: cfg.top]
    for i in best:
        model.say(f"{scores[i]:7.4f}  {Path(cfg.images, paths[i])}")
    if model.rank() > 0:
        return
    columns, side = min(4, len(best)), 240
    sheet = Image.new("RGB", (columns * side, 30 + -(-len(best) // columns) * (side + 20)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((6, 6), text.replace(IMAGE, cfg.query_image), "black", font_size=15)
    for n, i in enumerate(best):
        x, y = n % columns * side, 30 + n // columns * (side + 20)
        picture = open_image(Path(cfg.images, paths[i]))
        scale = (side - 10) / max(picture.size)  # small ones grow, pixel by pixel
        size = [max(1, round(scale * s)) for s in picture.size]
        sheet.paste(picture.resize(size, Image.BICUBIC if scale < 1 else Image.NEAREST), (x + 5, y))
        draw.text((x + 5, y + side - 8), f"{scores[i]:.3f} {paths[i][-30:]}", "black", font_size=12)
    Path(cfg.search_out).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(cfg.search_out)
    model.say(f"wrote {cfg.search_out}")
