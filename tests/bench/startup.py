"""What the first pass over a long list costs a rank: seconds and memory, before training begins.

    OMP_NUM_THREADS=1 python tests/bench/startup.py [--lines 1000000] [--repo DIR] [--keep FOLDER]

Makes the fixture (a .jsonl of pairs, a picture each: empty files in 100 folders; the same pairs as
parquet files in MMEB's layout), then reads it as contrastive.py does, in a process of its own: the
imports, the pass, the digest. Prints wall and CPU seconds with those of the worker processes, and
what the rank's resident memory grew by, at its end and at most. --repo: the code that is measured,
another checkout for a comparison; --keep: the fixture's folder, made once.

Predicted before measuring, 1,000,000 lines on two cores: 2 s for the offsets, then 12 us a line
(JSON 5, the checks 4, a look-up 3) in two workers: 8 s in all; 16 MB for the offsets.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
FOLDERS = 100
CHILD = """
import resource, sys, time
import data
from plumbing.formats import checked_digest

def resident():
    with open("/proc/self/status") as file:
        return {line.split()[0]: int(line.split()[1]) / 1024 for line in file if "kB" in line}

def cpu():
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in spent)

before, began, spent = resident(), time.time(), cpu()
pairs = data.read_pairs(sys.argv[1])
digest = checked_digest(pairs.values())
after = resident()
print(f"{sum(map(len, pairs.values())):,} pairs: {time.time() - began:.1f} s, "
      f"{cpu() - spent:.1f} s of CPU, {after['VmRSS:'] - before['VmRSS:']:.0f} MB more, "
      f"{after['VmHWM:'] - before['VmRSS:']:.0f} MB at most")
first = next(iter(pairs.values()))
began = time.time()
for i in range(1000):
    first[i * len(first) // 1000]
print(f"  a pair drawn at random: {(time.time() - began) * 1e3:.0f} us")
"""


def path_of(i) -> str:
    """The picture of pair i."""
    return f"{i % FOLDERS:02}/{i:07}.jpg"


def make_list(root, lines):
    """The pairs, and empty files as their pictures: only their names are looked up."""
    for k in range(FOLDERS):
        (root / f"{k:02}").mkdir()
    with open(root / "pairs.jsonl", "w") as file:
        for i in range(lines):
            (root / path_of(i)).touch()
            query = {"text": f"<image> Find the caption of picture {i}.", "image": path_of(i)}
            record = {"query": query, "target": {"text": f"a caption, the {i}th, with a few words"}}
            file.write(json.dumps(record) + "\n")


def make_table(root, lines):
    """The same pairs in MMEB-train's layout, whose pictures are those of the list."""
    import pyarrow
    import pyarrow.parquet as pq

    (root / "mmeb" / "A").mkdir(parents=True)
    (root / "mmeb" / "images").symlink_to(root)
    columns = {
        "qry": [f"<|image_1|> Find the caption of picture {i}." for i in range(lines)],
        "qry_image_path": [path_of(i) for i in range(lines)],
        "pos_text": [f"a caption, the {i}th, with a few words" for i in range(lines)],
        "pos_image_path": [""] * lines,
    }
    pq.write_table(pyarrow.table(columns), root / "mmeb" / "A" / "original-0.parquet")


def main():
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--repo", default=HERE)
    parser.add_argument("--keep")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(args.keep or folder).absolute()
        if not (root / "mmeb").exists():
            root.mkdir(parents=True, exist_ok=True)
            make_list(root, args.lines)
            make_table(root, args.lines)
        for name in ("pairs.jsonl", "mmeb"):
            print(name, flush=True)
            subprocess.run([sys.executable, "-c", CHILD, root / name], cwd=args.repo, check=True)


if __name__ == "__main__":
    main()
