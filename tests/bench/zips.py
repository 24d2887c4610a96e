"""What a picture in a zip file of 100,000 members costs, and a look-up among 1,000,000 files.

    OMP_NUM_THREADS=1 python tests/bench/zips.py [--members 100000] [--files 1000000] [--repo DIR]
        [--no-training]

Makes the fixture (a zip file of small JPEGs in MMEB's layout, a parquet file that draws from it,
folders of empty files), then measures: the first look-up (it reads the zip's table), the memory
that it leaves and its peak, a picture, contrastive.py's 6 steps of 16 pairs end to end, and a
look-up in folders. Seconds are the process's CPU's, so that a busy machine matters little.
--repo: the code that is measured, another checkout for a comparison.

Predicted before measuring: reading the table 1 s (once, and no longer for every picture); 40 bytes
and a hash a member: 5 MB; a picture 1 ms, most of it Pillow's; end to end 12 s, mostly start-up; a
look-up 3 us.
"""

import argparse
import io
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
FOLDERS = 5  # among which the files of the look-up are shared out


def make_zip(root, members):
    """MMEB-train's layout: images_zip/A.zip, A/original-*.parquet with 1,000 rows."""
    import pyarrow
    import pyarrow.parquet as pq
    from PIL import Image

    rng = random.Random(0)
    Path(root, "images_zip").mkdir(parents=True)
    with zipfile.ZipFile(f"{root}/images_zip/A.zip", "w") as archive:
        for i in range(members):
            if i % 1000 == 0:  # a thousand members share their pixels
                buffer = io.BytesIO()
                Image.frombytes("RGB", (64, 64), rng.randbytes(3 * 64 * 64)).save(buffer, "jpeg")
            archive.writestr(f"A/train/{i:08}.jpg", buffer.getvalue())
    drawn = rng.sample(range(members), min(1000, members))
    table = {
        "qry": ["<|image_1|> What is it?"] * len(drawn),
        "qry_image_path": [f"A/train/{i:08}.jpg" for i in drawn],
        "pos_text": [f"picture {i}" for i in drawn],
        "pos_image_path": [""] * len(drawn),
    }
    Path(root, "A").mkdir()
    pq.write_table(pyarrow.table(table), f"{root}/A/original-00000.parquet")
    return table["qry_image_path"]


def resident() -> float:
    """MB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak() -> float:
    """MB of this process at its most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure_zip(root, paths, repo):
    """Prints the zip's numbers."""
    from plumbing.images import Images, open_image

    images, before, top = Images(root), resident(), peak()
    began = time.process_time()
    open_image(images.find(paths[0], "A"))
    print(f"first picture        {time.process_time() - began:8.2f} s")
    print(f"memory that it leaves{resident() - before:8.1f} MB, at its peak {peak() - top:.1f} MB")
    some = paths[1:11] if repo != str(HERE) else paths[1:]
    began = time.process_time()
    for path in some:
        open_image(images.find(path, "A"))
    print(f"a picture            {(time.process_time() - began) / len(some) * 1e3:8.2f} ms")


def measure_training(root, repo):
    """Prints the cost of 6 steps of contrastive.py, end to end."""
    command = [sys.executable, "contrastive.py", "--data", root, "--steps", "6", "--batch", "16"]
    command += ["--block", "16", "--model", "toy", "--out", f"{root}/out"]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"contrastive.py ended with {done.returncode}: {done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"6 steps of 16 pairs  {time.perf_counter() - began:8.1f} s, CPU {cpu:.1f} s")


def measure_look_ups(root, files, lookups):
    """Prints the cost of Images.find in folders of many files."""
    from plumbing.images import Images

    names = []
    for i in range(files):
        folder = Path(root, f"part{i % FOLDERS}")
        folder.mkdir(exist_ok=True, parents=True) if i < FOLDERS else None
        os.close(os.open(f"{folder}/{i:08}.jpg", os.O_CREAT))
        names.append(f"part{i % FOLDERS}/{i:08}.jpg")
    random.Random(0).shuffle(names)
    names = names[:lookups]
    images, before = Images(root), resident()
    began = time.process_time()
    for name in names:
        images.find(name)
    seconds = time.process_time() - began
    print(f"{len(names):,} look-ups among {files:,} files: {seconds:.1f} s,", end=" ")
    print(f"{seconds / len(names) * 1e6:.1f} us each; {resident() - before:.0f} MB")


def main(args):
    """Makes the fixtures in a folder of their own, measures, prints."""
    sys.path.insert(0, args.repo)
    with tempfile.TemporaryDirectory() as top:
        if args.members:
            measure_zip(f"{top}/data", make_zip(f"{top}/data", args.members), args.repo)
        if args.members and args.training:
            measure_training(f"{top}/data", args.repo)
        if args.files:
            measure_look_ups(f"{top}/files", args.files, args.lookups or args.files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--members", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--lookups", type=int, default=0, help="0: one for each file")
    parser.add_argument("--training", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repo", default=str(HERE))
    main(parser.parse_args())
