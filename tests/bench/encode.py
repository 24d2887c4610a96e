"""What `Embedder.encode` saves: 512 mixed items against one by one, and against batches of 32.

    OMP_NUM_THREADS=1 python tests/bench/encode.py [--rounds 3]

A third text of 3-120 words, a third pictures of 4-36 tokens, a third both; the random Qwen2-VL of
3.5 M parameters of step.py. User CPU seconds of one thread, from items to vectors (opening,
resizing and tokenizing included); rounds interleaved, of each row the fastest.

Predicted before measuring: batches of 32 in input order are 50 % padding (the lengths run from 10
to 135 tokens, 55 in the mean); sorted inside windows of 256 items and cut by tokens 10 %: the
model's time falls to 0.6, and with a tenth of the time spent on pictures encode takes 0.63. One by
one: no padding, small matrices, 512 x the fixed costs of a call: 0.9.
Measured (two idle cores, torch 2.13, best of three rounds): one by one 5.33 s (0.95), batches of 32
5.60 s, encode with chunks of 1,024 tokens (a CPU's default) 3.28 s (0.59), 2,048 3.35 s (0.60),
8,192 3.96 s (0.71: it no longer fits into the caches); collating alone 0.33 s.
"""

import argparse
import os
import random
import time
from functools import partial

import torch
from PIL import Image
from step import WORDS, build  # which also puts the repository's root on the path

from data import IMAGE, Item


def mixed(n) -> list:
    """n items in a random order: texts, pictures, both."""
    rng, items = random.Random(0), []
    for i in range(n):
        w, h = (16 * rng.randint(2, 6) for _ in range(2))
        picture = Image.frombytes("RGB", (w, h), rng.randbytes(3 * w * h))
        words = " ".join(rng.choices(WORDS.split(), k=rng.randint(3, 120)))
        kinds = (Item(words), Item(IMAGE, (picture,)), Item(words + IMAGE, (picture,)))
        items.append(kinds[i % 3])
    rng.shuffle(items)
    return items


@torch.no_grad()
def fixed(embedder, items, size) -> torch.Tensor:
    """Batches of `size` items in input order."""
    z = []
    for i in range(0, len(items), size):
        z.append(embedder(embedder.collate(items[i : i + size])))
    return torch.cat(z)


def ways_to_encode(embedder, items) -> dict:
    """{name: a function that embeds all of them}; the last one only collates."""

    def ours(budget):
        return torch.from_numpy(embedder.encode(items, chunk_tokens=budget))

    ways = {"one by one": partial(fixed, embedder, items, 1)}
    ways["batches of 32, input order"] = partial(fixed, embedder, items, 32)
    for budget in (1024, 2048, 8192):
        ways[f"encode, chunk_tokens={budget}"] = partial(ours, budget)
    ways["(collating alone)"] = lambda: [embedder.collate.row(x) for x in items]
    return ways


def main(n, rounds):
    torch.set_num_threads(1)
    embedder, items = build(frozen=False).eval(), mixed(n)
    ways = ways_to_encode(embedder, items)
    want, seconds = fixed(embedder, items, 1), {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            user, wall = os.times().user, time.time()
            z = way()
            seconds[name].append((os.times().user - user, time.time() - wall))
            if isinstance(z, torch.Tensor) and (z - want).abs().max() > 1e-5:
                raise SystemExit(f"{name}: other vectors than one by one")
    base = min(seconds["batches of 32, input order"])[0]
    print(f"{n} items, median wall seconds in brackets")
    for name, s in seconds.items():
        best, wall = min(s)[0], sorted(w for _, w in s)[len(s) // 2]
        print(f"{name:<28}{best:>7.2f} s ({wall:>6.2f}){best / base:>7.2f} of batches of 32")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=512)
    args = parser.parse_args()
    main(args.items, args.rounds)
