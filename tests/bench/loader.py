"""What a batch of large pictures costs the rank that receives it, and how much memory it takes; and
how many JPEGs a worker makes into rows.

    OMP_NUM_THREADS=1 python tests/bench/loader.py [--pictures 64] [--workers 8] [--new]
    OMP_NUM_THREADS=1 python tests/bench/loader.py --jpegs 200 [--rounds 3]

A batch is `pictures` rows whose pixels are those of `tokens` image tokens of a Qwen2-VL (28 x 28
pixels, two frames, float32: 19 MB for 1,024 tokens, 1.2 GB a batch of 64). A row is made by
copying noise: here only the way of the pixels to the rank is measured. The rank's step is a sum of
all numbers, and a sleep.
Rows of the table:

    DataLoader, pickled     as it once was: a batch is one pickle in a pipe, two batches a worker
    one block a worker      plumbing/loader.py
    the same, bfloat16      as it is for a GPU

receive: the rank's own CPU milliseconds a batch, from asking to tensors; waits: share of the time
that the rank waits for its batch; memory: peak of the proportional set size (shared pages count
once) of rank and workers, beyond what the rank holds before.

With --jpegs, a race: that many JPEGs of 640 x 480 in batches of 8 through one worker, from files to
tensors in the rank, at the two sizes that --max-pixels leaves them. Pictures per CPU second (user
and system, of rank and worker; the worker's start and end are counted, the library's import is
not), the best of interleaved rounds. The peer is a plain `DataLoader` whose workers call the
transformers processor once a batch, as its users write it; both make the same pixels, which is
checked first.
"""

import argparse
import multiprocessing
import pickle
import random
import resource
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parent.parent.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

import model  # noqa: E402
from data import IMAGE, Collator, Item  # noqa: E402
from plumbing.loader import each, prefetch  # noqa: E402


class Pickled(Dataset):
    """The loader as it was."""

    def __init__(self, make):
        self.make = make

    def __getitem__(self, i):
        return pickle.dumps(tree_map_only(torch.Tensor, torch.Tensor.numpy, self.make(i)), 5)


def pickled(make, indices, workers):
    """Yields make(i), as it was done."""
    loader = DataLoader(
        Pickled(make),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        multiprocessing_context="fork",
    )
    for packed in loader:
        yield tree_map_only(np.ndarray, torch.from_numpy, pickle.loads(packed))


class Measured(NamedTuple):
    """Of one way."""

    receive: float  # CPU milliseconds of the rank a batch
    waits: float  # share of the time
    memory: float  # GiB


def held() -> float:
    """GiB of this process and its children, shared pages once."""
    total = 0
    processes = [child.pid for child in multiprocessing.active_children()]
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has just ended
            processes += (task / "children").read_text().split()
    for process in {"self", *map(str, processes)}:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 2**20


def measure(batches, step) -> Measured:
    """Runs through the batches, with `step` seconds of work for each."""
    peak, over, before = [0.0], threading.Event(), held()

    def watch():
        while not over.wait(0.1):
            peak[0] = max(peak[0], held())

    watcher = threading.Thread(target=watch)
    batch = next(batches)  # the start of the workers is not counted
    watcher.start()
    began, waited, cpu, count = time.time(), 0.0, 0.0, 0
    while batch is not None:
        tree_map_only(torch.Tensor, torch.sum, batch)  # each page is looked at, as in a real step
        time.sleep(step)
        count += 1
        asked = time.time()
        used = resource.getrusage(resource.RUSAGE_THREAD).ru_utime
        used += resource.getrusage(resource.RUSAGE_THREAD).ru_stime
        batch = None  # as a training loop that is done with it
        batch = next(batches, None)
        after = resource.getrusage(resource.RUSAGE_THREAD)
        cpu += after.ru_utime + after.ru_stime - used
        waited += time.time() - asked
    over.set()
    watcher.join()
    return Measured(1000 * cpu / count, waited / (time.time() - began), peak[0] - before)


# ----------------------------------------------------------------------------------- JPEGs, a race


def write_jpegs(folder, n) -> list:
    """n photograph-like JPEGs of 640 x 480: blurred noise and a little grain. -> their paths."""
    rng, paths = random.Random(0), []
    for i in range(n):
        coarse = Image.frombytes("RGB", (40, 30), rng.randbytes(3600)).resize((640, 480))
        grain = Image.frombytes("RGB", (640, 480), rng.randbytes(921600))
        photograph = Image.blend(coarse, grain.filter(ImageFilter.GaussianBlur(1)), 0.2)
        paths.append(Path(folder, f"{i}.jpg"))
        photograph.save(paths[-1], quality=90)
    return paths


def by_the_peer(processor, marker, paths):
    """Yields batches of a plain DataLoader, one call of the processor for each."""

    def collate(some):
        pictures = []
        for path in some:
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
        text = [marker] * len(pictures)
        return processor(text=text, images=pictures, padding=True, return_tensors="pt")

    return DataLoader(
        paths, batch_size=8, collate_fn=collate, num_workers=1, multiprocessing_context="fork"
    )


def by_ours(collate, paths):
    """Yields batches of our loader."""

    def make(first):
        items = [Item(IMAGE, (str(path),)) for path in paths[first : first + 8]]
        return each(collate.row, items)

    for rows in prefetch(make, range(0, len(paths), 8), 1):
        yield collate.pad_rows(rows)


def cpu_seconds() -> float:
    """Of this process, and of its children that have ended; user and system."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(kind) for kind in kinds]
    return sum(x.ru_utime + x.ru_stime for x in used)


def race(ways, pictures, rounds):
    """Prints a row for each way."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            before = cpu_seconds()
            for _batch in way():
                pass
            seconds[name].append(cpu_seconds() - before)
    for name, spent in seconds.items():
        each_picture = 1000 * min(spent) / pictures
        rate = pictures / min(spent)
        print(f"| {name} | {rate:.1f} | {each_picture:.1f} |", flush=True)


def race_jpegs(n, rounds):
    """Both sizes, with patches of 14 x 14 as Qwen2-VL has them."""
    processor = model.load("toy-random", 4, "mean", "chat", "cpu").processor
    processor.image_processor.patch_size = 14
    ids = processor.tokenizer.convert_tokens_to_ids(model.compression_tokens(4))
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(folder, n)
        for most in (28816, 28 * 28 * 1280):  # pixels
            processor.image_processor.size = {"shortest_edge": 28**2, "longest_edge": most}
            collate = Collator(processor, ids)
            ways = {
                "DataLoader, the processor": lambda: by_the_peer(
                    processor, collate.template.picture, paths
                ),
                "ours": lambda collate=collate: by_ours(collate, paths),
            }
            firsts = [next(iter(way()))["pixel_values"] for way in ways.values()]
            if not torch.equal(*firsts):
                raise SystemExit("they make other pixels")
            print(f"\n{n} pictures of {len(firsts[0]) // 32} tokens")
            print("| way | pictures / CPU s | CPU ms a picture |\n|---|---|---|")
            race(ways, n, rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--step", type=float, default=10.0, help="seconds")
    parser.add_argument("--new", action="store_true", help="without the pickled way (20 GB)")
    parser.add_argument("--jpegs", type=int, default=0, help="race so many pictures instead")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.jpegs:
        race_jpegs(args.jpegs, args.rounds)
        return
    noise = torch.rand(4 * args.tokens, 1176)  # a token is 2 x 2 patches of 14 x 14, 3 colours, 2

    def make(i):
        return each(lambda x: {"pixel_values": noise + i, "grid": torch.tensor([x])}, range(n))

    n, gpu = args.pictures, torch.device("cuda")
    indices = range(args.batches)
    ways = {
        "DataLoader, pickled": lambda: pickled(make, indices, args.workers),
        "one block a worker": lambda: prefetch(make, indices, args.workers),
        "the same, bfloat16": lambda: prefetch(make, indices, args.workers, gpu),
    }
    print(f"a batch: {n * noise.nbytes / 2**30:.2f} GiB of float32 pixels; a step: {args.step} s")
    print("| way | receive, ms of the rank's CPU | waits | memory, GiB |\n|---|---|---|---|")
    for name, batches in list(ways.items())[args.new :]:
        m = measure(batches(), args.step)
        print(f"| {name} | {m.receive:,.0f} | {m.waits:.0%} | {m.memory:.1f} |", flush=True)


if __name__ == "__main__":
    main()
