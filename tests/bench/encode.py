"""What `Embedder.encode` saves: mixed items one by one, in batches of 32, by sentence-transformers.

    OMP_NUM_THREADS=1 python tests/bench/encode.py [--rounds 3] [--only ours|peer|collating]

A third text of 3-120 words, a third pictures of 4-36 tokens, a third both; the random Qwen2-VL of
3.5 M parameters of step.py. User CPU seconds of one thread, from items to vectors (opening,
resizing and tokenizing included); rounds interleaved, of each row the fastest.

Predicted before measuring: batches of 32 in input order are 50 % padding (the lengths run from 10
to 135 tokens, 55 in the mean); sorted inside windows (of 256 items then) and cut by tokens 10 %:
the model's time falls to 0.6, and with a tenth of the time spent on pictures encode takes 0.63. One
by one: no padding, small matrices, 512 x the fixed costs of a call: 0.9.
Measured (two idle cores, torch 2.13, best of two rounds): one by one 6.53 s (1.12), batches of 32
5.85 s, encode with chunks of 1,024 tokens (a CPU's default) 3.24 s (0.55), 2,048 3.32 s (0.57),
8,192 3.74 s (0.64: it no longer fits into the caches); collating alone 0.33 s.

The peer reads the folder that `tools.merge --export sentence-transformers` has written, and makes
the same vectors (checked first). Its rows are made only where it is installed. It sorts by the
number of characters, and collates each batch by one call of the processor. Measured: docs/speed.md.
"""

import argparse
import random
import resource
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from step import WORDS, build  # which also puts the repository's root on the path

import model
from data import IMAGE, Item
from plumbing.families import load_processor
from plumbing.weights import Settings
from tools.sentence_transformers_folder import save_sentence_transformers

PEER = find_spec("sentence_transformers") is not None


def mixed(n) -> list:
    """n items in a random order: texts, pictures, both (the picture first: as the exported folder
    writes it)."""
    rng, items = random.Random(0), []
    for i in range(n):
        w, h = (16 * rng.randint(2, 6) for _ in range(2))
        picture = Image.frombytes("RGB", (w, h), rng.randbytes(3 * w * h))
        words = " ".join(rng.choices(WORDS.split(), k=rng.randint(3, 120)))
        kinds = (Item(words), Item(IMAGE, (picture,)), Item(IMAGE + words, (picture,)))
        items.append(kinds[i % 3])
    rng.shuffle(items)
    return items


# -------------------------------------------------------------------------------- the contestants


@torch.no_grad()
def fixed(embedder, items, size) -> np.ndarray:
    """Batches of `size` items in input order."""
    z = []
    for i in range(0, len(items), size):
        z.append(embedder(embedder.collate(items[i : i + size])).numpy())
    return np.concatenate(z)


def ways_of_ours(embedder, items) -> dict:
    """{name: a function that embeds all of them}."""
    ways = {"batches of 32, input order": partial(fixed, embedder, items, 32)}
    ways["one by one"] = partial(fixed, embedder, items, 1)
    for budget in (1024, 2048, 8192):
        name = f"encode, chunk_tokens={budget}"
        ways[name] = partial(embedder.encode, items, chunk_tokens=budget)
    return ways


def for_peer(item):
    """An item as sentence-transformers takes it."""
    if not item.images:
        return item.text
    text = item.text.removeprefix(IMAGE)
    return {"image": item.images[0], "text": text} if text else item.images[0]


def peer_of(folder):
    """sentence-transformers' model of an exported folder."""
    from sentence_transformers import SentenceTransformer

    def without_videos(path, **_):
        return load_processor(path, transformers.AutoConfig.from_pretrained(path))

    # Without torchvision a Qwen's AutoProcessor fails, for the sake of its videos.
    with mock.patch("transformers.AutoProcessor.from_pretrained", without_videos):
        return SentenceTransformer(str(folder), device="cpu")


def tiny() -> model.Embedder:
    """A Qwen2-VL of 0.25 M parameters: nearly all of its time is what a call costs."""
    toy = model.load("toy-random", 4, "mean", "chat", "cpu")
    config = toy.mllm.config
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 176, 2
    text.num_attention_heads, text.num_key_value_heads = 2, 1
    text.layer_types = ["full_attention"] * 2
    vision.hidden_size, vision.embed_dim, vision.depth = 64, 64, 1
    torch.manual_seed(0)
    mllm = transformers.AutoModelForImageTextToText.from_config(config)
    toy.processor.image_processor.size = {"shortest_edge": 32**2, "longest_edge": 96**2}
    return model.Embedder(mllm, toy.processor, Settings(4, "mean", "chat"))


def ways_against_peer(built, folder, items) -> dict:
    """{name: a function that embeds all of them}: both libraries, of one folder."""
    save_sentence_transformers(built, folder)
    peer, embedder = peer_of(folder), model.load(folder, device="cpu").eval()
    inputs = [for_peer(item) for item in items]
    ways = {}
    for size in (32, 8):
        encode = partial(peer.encode, inputs, batch_size=size, show_progress_bar=False)
        ways[f"sentence-transformers, batches of {size}"] = encode
    ways["ours"] = partial(embedder.encode, items)
    return ways


def ways_to_collate(built, folder, items) -> dict:
    """{name: a function that makes model inputs of all of them, 32 at a time}."""
    save_sentence_transformers(built, folder)
    peer, embedder = peer_of(folder), model.load(folder, device="cpu").eval()
    ways = {}
    kinds = {"text": [x for x in items if not x.images], "pictures": [x for x in items if x.images]}
    for kind, some in kinds.items():
        inputs = [for_peer(item) for item in some]
        ways[f"sentence-transformers, {kind}"] = partial(in_batches, peer.preprocess, inputs)
        ways[f"ours, {kind}"] = partial(in_batches, embedder.collate, some)
    return ways


def in_batches(collate, inputs):
    """Calls it for 32 at a time."""
    for i in range(0, len(inputs), 32):
        collate(inputs[i : i + 32])


# ----------------------------------------------------------------------------------------- the race


class Took(NamedTuple):
    """One run."""

    user: float  # CPU seconds
    wall: float


def user_seconds() -> float:
    """Of this process. (os.times counts in hundredths.)"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def race(ways, rounds) -> dict:
    """{name: the Took of each round}; all must make the same vectors."""
    took, first = {name: [] for name in ways}, None
    for number in range(rounds):
        for name, way in ways.items():
            user, wall = user_seconds(), time.time()
            z = way()
            took[name].append(Took(user_seconds() - user, time.time() - wall))
            if number or z is None:
                continue
            first = z if first is None else first
            if np.abs(z - first).max() > 1e-4:
                raise SystemExit(f"{name}: other vectors than {next(iter(ways))}")
    return took


def table(title, took):
    """Each row against the first one and the others of it."""
    print(f"\n{title}; median wall seconds in brackets")
    bases = [(name, min(runs).user) for name, runs in took.items()]
    for name, runs in took.items():
        wall = sorted(run.wall for run in runs)[len(runs) // 2]
        ratios = "".join(f"{min(runs).user / base:>7.2f}" for _, base in bases[:4])
        print(f"{name:<38}{min(runs).user:>7.2f} s ({wall:>6.2f}){ratios}", flush=True)


def main(n, rounds, only):
    torch.set_num_threads(1)
    items = mixed(n)
    if only in ("", "ours"):
        ways = ways_of_ours(build(frozen=False).eval(), items)
        table(f"{n} items, 3.5 M parameters; of batches of 32, ...", race(ways, rounds))
    if not PEER:
        raise SystemExit("sentence-transformers is not installed: no rows of it")
    for name, built in (("3.5 M", build(frozen=False)), ("0.25 M", tiny())):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder, "exported")
            if only in ("", "peer"):
                title = f"{n} items, {name} parameters; ratios to each row in turn"
                table(title, race(ways_against_peer(built, folder, items), rounds))
    if only in ("", "collating"):
        with tempfile.TemporaryDirectory() as folder:
            ways = ways_to_collate(tiny(), Path(folder, "exported"), items)
            table(f"collating {n} items; ratios to each row in turn", race(ways, rounds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=512)
    parser.add_argument("--only", default="", choices=("", "ours", "peer", "collating"))
    args = parser.parse_args()
    main(args.items, args.rounds, args.only)
