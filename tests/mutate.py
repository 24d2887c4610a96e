"""Plants one-line mistakes in our code, one at a time, and runs the tests that should notice.

    python tests/mutate.py                     all of tests/mutations.py; prints the survivors
    python tests/mutate.py model plumbing/optim    those of some files
    python tests/mutate.py --only 3,17         by number, as printed
    python tests/mutate.py --list              the list, and the functions that no mistake is in

Run by hand (a mistake costs about 15 seconds of a core); the suite only checks that the list fits
the code (test_mutations.py). Each mistake is planted in a copy of the files, so that a run that is
stopped leaves nothing behind. Exit status 1 where less than 95 % were noticed."""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parent.parent
FIVE = ("data.py", "model.py", "pretrain.py", "contrastive.py", "evaluate.py")
ENOUGH = 0.95  # share of the mistakes that the tests must notice
SECONDS = 300  # a mistake that makes a test hang is noticed, too


# --------------------------------------------------------------------------------------- the list


def covered_files() -> list:
    """The files in which every function has a mistake: the five and plumbing/, as paths."""
    return [*FIVE, *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "plumbing").glob("*.py"))]


def functions_of(file) -> list:
    """[(name, first line, last line)] of a file's functions and methods, outermost ones only."""
    functions = []

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                functions.append((prefix + child.name, child.lineno, child.end_lineno))
            elif isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(Path(ROOT, file).read_text()), "")
    return functions


def line_of(mutation) -> int:
    """The line that a mistake begins in; ValueError unless its text stands there exactly once."""
    text = Path(ROOT, mutation.file).read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} has {text.count(mutation.old)} times: {mutation.old}")
    return text[: text.index(mutation.old)].count("\n") + 1


def untouched() -> list:
    """The functions, "file: name", that no mistake is in."""
    names = []
    for file in covered_files():
        lines = [line_of(m) for m in MUTATIONS if m.file == file]
        for name, first, last in functions_of(file):
            if not any(first <= line <= last for line in lines):
                names.append(f"{file}: {name}")
    return names


# --------------------------------------------------------------------------------------- planting


def copy_of_the_house(folder):
    """The files that git knows, in a folder; the data beside the checkout by a link."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.splitlines():
        if Path(ROOT, name).is_file():
            target = Path(folder, "house", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    if (ROOT.parent / "shared").exists():
        Path(folder, "shared").symlink_to((ROOT.parent / "shared").resolve())
    return Path(folder, "house")


def passes(house, tests) -> bool:
    """Whether these tests pass in a copy of the house. tests: words for pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p"]
    command += ["no:xdist", *tests.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    log = open(house / "pytest.log", "w")
    process = subprocess.Popen(
        command, cwd=house, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    with log:
        try:
            return process.wait(SECONDS) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            end_group(process)


def end_group(process):
    """Ends a test run with all that it started."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass
    process.wait()


def survives(house, mutation) -> bool:
    """Plants one mistake, runs its tests, and takes it out again."""
    path = house / mutation.file
    text = path.read_text()
    try:
        path.write_text(text.replace(mutation.old, mutation.new))
        return passes(house, mutation.tests)
    finally:
        path.write_text(text)


def run(chosen, jobs) -> list:
    """Plants the chosen mistakes, {number: Mutation}, in `jobs` copies side by side. -> the
    survivors' numbers."""
    survivors, free = [], Queue()

    def one(number):
        house, began = free.get(), time.time()
        lived = survives(house, chosen[number])
        free.put(house)
        verdict = "SURVIVED" if lived else "noticed"
        print(f"{verdict:<9} {time.time() - began:4.0f} s  {title(number)}", flush=True)
        if lived:
            survivors.append(number)

    with tempfile.TemporaryDirectory() as folder:
        for i in range(jobs):
            free.put(copy_of_the_house(Path(folder, str(i))))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, chosen))
    return sorted(survivors)


# -------------------------------------------------------------------------------------- the command


def title(number) -> str:
    """One mistake, in a line."""
    m = MUTATIONS[number]
    old, new = " ".join(m.old.split()), " ".join(m.new.split())
    return f"{number:>3} {m.file}:{line_of(m)}  {old}  ->  {new or 'nothing'}   [{m.tests}]"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="model, plumbing/optim ...; default: all")
    parser.add_argument("--only", default="", help="numbers, with commas")
    parser.add_argument("--jobs", type=int, default=1, help="mistakes side by side")
    parser.add_argument("--list", action="store_true", help="the list, and what it leaves out")
    args = parser.parse_args()
    chosen = dict(enumerate(MUTATIONS))
    if args.only:
        chosen = {int(number): MUTATIONS[int(number)] for number in args.only.split(",")}
    if args.files:
        files = {f"{name.removesuffix('.py')}.py" for name in args.files}
        chosen = {number: m for number, m in chosen.items() if m.file in files}
    if args.list:
        for number in chosen:
            print(title(number))
        print("no mistake in:", *untouched(), sep="\n  ")
        return
    survivors = run(chosen, args.jobs)
    noticed = len(chosen) - len(survivors)
    print(f"\n{noticed} of {len(chosen)} mistakes noticed; the survivors:")
    for number in survivors:
        print(title(number))
    sys.exit(noticed < ENOUGH * len(chosen))


if __name__ == "__main__":
    main()
