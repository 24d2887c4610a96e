"""Plants one-line mistakes in our code, one at a time, and runs the tests that should notice.

    python tests/mutate.py                     all of tests/mutations.py; prints the survivors
    python tests/mutate.py model plumbing/optim    those of some files
    python tests/mutate.py --only 3,17-20      by number, as printed
    python tests/mutate.py --log verdicts.jsonl    goes on where it was stopped; a new file for
                                                   other code or tests
    python tests/mutate.py --list              the list, and the functions that no mistake is in

Run by hand (a mistake costs about 4 seconds of a core); the suite only checks that the list fits
the code (test_mutations.py). Each mistake is planted in a copy of the files, so that a run that is
stopped leaves nothing behind. Tests must first pass without a mistake: those that fail anyway
notice nothing. A mistake that makes its tests hang is noticed: they are ended after five times the
seconds that they took without it, and 90 more (without it after 900, and then they count as
failed). This process imports the libraries once, and nothing of ours; each run of tests is a fork
of it. Exit status 1 where less than 95 % were noticed."""

# ruff: noqa: F401  libraries are imported for the forks

import argparse
import ast
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parent.parent
THIS = ("__main__", "__mp_main__")  # this file; the second name is another library's for it
FIVE = ("data.py", "model.py", "pretrain.py", "contrastive.py", "evaluate.py")
ENOUGH = 0.95  # share of the mistakes that the tests must notice
OVERDUE, STRANGE = 98, 99  # exit statuses that pytest has none of
LONGEST = 900  # seconds that tests may take without a mistake
PYTEST = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]


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


# --------------------------------------------------------------------------------- a run of tests


def import_libraries():
    """What every run of tests needs, once. Nothing of ours: that comes from the copies."""
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")  # as conftest.py has it
    import hypothesis
    import peft
    import PIL.ImageDraw
    import pyarrow.parquet
    import safetensors.torch
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import transformers.models.auto.processing_auto
    import transformers.models.qwen2_vl.modeling_qwen2_vl

    torch.set_num_threads(1)  # a fork has no other threads
    gc.freeze()  # forks need not copy these objects


def is_ours(module) -> bool:
    """Whether a module was loaded from this checkout, and not from a copy."""
    return (getattr(module, "__file__", None) or "").startswith(f"{ROOT}/")


def become_pytest(house, tests):
    """A fork's whole life: runs the tests in a copy of the house, and exits with their status."""
    os.setsid()  # a group of its own, with all that it will start
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(house)
    log = os.open("pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["PYTHONPATH"] = str(house)
    sys.argv = ["pytest"]
    sys.path[:] = [str(house), *(x for x in sys.path if not f"{x}/".startswith(f"{ROOT}/"))]
    for name in [k for k, x in sys.modules.items() if is_ours(x) and k not in THIS]:
        del sys.modules[name]
    status = STRANGE
    try:
        status = pytest.main([*PYTEST, f"--basetemp={house}.tmp", *tests.split()])
        strangers = [k for k, x in sys.modules.items() if is_ours(x) and k not in THIS]
        # Trap: a mistake in a copy that nobody imports would be survived by everything.
        if strangers:
            print("loaded from the checkout and not from its copy:", *strangers)
            status = STRANGE
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Run(NamedTuple):
    """Tests that are running in a fork."""

    pid: int
    house: Path
    began: float
    limit: float  # seconds

    @staticmethod
    def start(house, tests, limit=600) -> "Run":
        sys.stdout.flush()  # or the fork would write it again
        pid = os.fork()
        if pid == 0:
            become_pytest(house, tests)
        return Run(pid, house, time.time(), limit)

    def ended(self):
        """None while it runs, else its exit status; one that is overdue is ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.time() - self.began < self.limit:
            return None
        self.end_group()
        if pid:
            return os.waitstatus_to_exitcode(status)
        os.waitpid(self.pid, 0)
        return OVERDUE

    def end_group(self):
        """Ends it with all that it started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def reason(self) -> str:
        """The last line that says what failed."""
        lines = (self.house / "pytest.log").read_text(errors="replace").strip().splitlines()
        told = [x for x in lines if x.startswith(("FAILED", "ERROR", "loaded from"))]
        return [*lines[-1:], *told, ""][-2][:200]


# ------------------------------------------------------------------------------------ the campaign


class Verdict(NamedTuple):
    """What came of a mistake; of "" -> "" in no file: of tests without one."""

    file: str
    old: str
    new: str
    tests: str
    word: str  # passed, noticed, SURVIVED; BROKEN: the tests fail without a mistake
    seconds: float
    reason: str = ""


class Campaign:
    """Plants the chosen mistakes, {number: Mutation}, in copies of the house side by side. log: a
    file of verdicts, which are not asked for again, or None."""

    def __init__(self, chosen, log=None):
        self.waiting, self.log = list(chosen.items()), log
        self.verdicts = {}  # (file, old, new, tests) -> Verdict
        if log and log.exists():
            for line in log.read_text().splitlines():
                verdict = Verdict(**json.loads(line))
                self.verdicts[verdict[:4]] = verdict

    def note(self, verdict, text):
        """Keeps a verdict, on the disk too, and prints it."""
        self.verdicts[verdict[:4]] = verdict
        if self.log:
            with open(self.log, "a") as file:
                print(json.dumps(verdict._asdict()), file=file)
        seconds = f"{verdict.seconds:4.0f} s"
        print(f"{verdict.word:<9} {seconds}  {text}  {verdict.reason}", flush=True)

    def tests_in(self, house, tests):
        """Runs tests, step by step. Yields None while they run. -> (exit status, seconds, reason).
        A mistake that makes tests hang is noticed by the time that they took without it."""
        untouched = self.verdicts.get(("", "", "", tests))
        run = Run.start(house, tests, 90 + 5 * untouched.seconds if untouched else LONGEST)
        try:
            while (status := run.ended()) is None:
                yield
        finally:
            run.end_group()
        reason = "does not end" if status == OVERDUE else run.reason()
        return status, time.time() - run.began, reason

    def one(self, house, number, mutation):
        """A mistake: its tests run without it, and with it. A generator, see above."""
        bare = ("", "", "", mutation.tests)
        if bare not in self.verdicts:
            status, seconds, reason = yield from self.tests_in(house, mutation.tests)
            word = "BROKEN" if status else "passed"
            self.note(Verdict(*bare, word, seconds, reason), f"    [{mutation.tests}]")
        status, seconds, reason = 0, 0, ""
        word = self.verdicts[bare].word
        if word == "passed":
            path = house / mutation.file
            text = path.read_text()
            try:
                path.write_text(text.replace(mutation.old, mutation.new))
                status, seconds, reason = yield from self.tests_in(house, mutation.tests)
            finally:
                path.write_text(text)
            word = "noticed" if status else "SURVIVED"
            if status in (STRANGE, -signal.SIGTERM, -signal.SIGKILL):  # ended by somebody else
                word = "BROKEN"
        self.note(Verdict(*mutation, word, seconds, reason), title(number))

    def work(self, jobs):
        """All of it."""
        with tempfile.TemporaryDirectory() as folder:
            houses = [copy_of_the_house(Path(folder, str(i))) for i in range(jobs)]
            workers = [self.worker(house) for house in houses]
            try:
                while workers:
                    workers = [x for x in workers if next(x, "over") != "over"]
                    time.sleep(0.05)
            finally:
                for worker in workers:
                    worker.close()

    def worker(self, house):
        """One mistake after the other, in one copy. A generator, see above."""
        while self.waiting:
            number, mutation = self.waiting.pop(0)
            if mutation not in self.verdicts:
                yield from self.one(house, number, mutation)


# -------------------------------------------------------------------------------------- the command


def title(number) -> str:
    """One mistake, in a line."""
    m = MUTATIONS[number]
    old, new = " ".join(m.old.split()), " ".join(m.new.split())
    return f"{number:>3} {m.file}:{line_of(m)}  {old}  ->  {new or 'nothing'}   [{m.tests}]"


def numbers_of(text) -> list:
    """ "3,17-20" -> [3, 17, 18, 19, 20]."""
    numbers = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="model, plumbing/optim ...; default: all")
    parser.add_argument("--only", default="", help="numbers, with commas and hyphens")
    parser.add_argument("--jobs", type=int, default=1, help="mistakes side by side")
    parser.add_argument("--log", type=Path, help="file of verdicts, to go on with later")
    parser.add_argument("--list", action="store_true", help="the list, and what it leaves out")
    args = parser.parse_args()
    chosen = dict(enumerate(MUTATIONS))
    if args.only:
        chosen = {number: MUTATIONS[number] for number in numbers_of(args.only)}
    if args.files:
        files = {f"{name.removesuffix('.py')}.py" for name in args.files}
        chosen = {number: m for number, m in chosen.items() if m.file in files}
    if args.list:
        for number in chosen:
            print(title(number))
        print("no mistake in:", *untouched(), sep="\n  ")
        return
    import_libraries()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the copies go, as after Ctrl-C
    campaign = Campaign(chosen, args.log)
    campaign.work(args.jobs)
    left = {n: campaign.verdicts[m] for n, m in chosen.items()}
    left = {n: verdict for n, verdict in left.items() if verdict.word != "noticed"}
    noticed = len(chosen) - len(left)
    print(f"\n{noticed} of {len(chosen)} mistakes noticed; the others:")
    for number, verdict in left.items():
        print(verdict.word, title(number))
    sys.exit(noticed < ENOUGH * len(chosen))


if __name__ == "__main__":
    main()
