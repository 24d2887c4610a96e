"""Seconds of a first and of a second search of 10,000 pictures, after the model is loaded.

    python tests/bench/search.py [--pictures 10000]

Predicted before measuring: 10,000 pictures of four image tokens each at 400 a second: 25 s; then
listing and asking for 10,000 sizes and times 0.1 s, reading 5 MB of vectors and one product 0.05 s.
Measured on two cores (torch 2.13, the toy MLLM, D = 128), tests beside it: 25.9 s, then 0.28 s.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from PIL import Image  # noqa: E402

import model  # noqa: E402
from tools import search  # noqa: E402


def main(n):
    """Draws n pictures of one colour each, searches them twice, prints a table."""
    embedder, seconds = model.load("toy", device="cpu"), []
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top, "pictures")
        folder.mkdir()
        for i in range(n):
            Image.new("RGB", (32, 32), (i % 256, i // 256, 0)).save(folder / f"{i}.png")
        cfg = search.Config(images=str(folder), text="two", top=1, out=f"{top}/x.png")
        for _ in range(2):
            began = time.time()
            search.search(embedder, cfg)
            seconds.append(time.time() - began)
    print(f"{n:,} pictures: first search {seconds[0]:.2f} s, second {seconds[1]:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=10_000)
    main(parser.parse_args().pictures)
