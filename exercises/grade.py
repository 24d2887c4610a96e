"""Grades a file, or a folder of submissions.

    python -m exercises.grade my.py            a score line for each exercise
    python -m exercises.grade FOLDER           a line for each FOLDER/*.py or FOLDER/*/*.py;
                                               writes FOLDER/scores.csv and FOLDER/reports/
    python -m exercises.grade FOLDER --only ex3    scores-ex3.csv and reports-ex3/

An exercise's points are multiplied with the share of its tests that pass; all make 100. Each
submission runs in a process of its own, in an empty folder, for at most --seconds; what passed
until then counts. It is no sandbox: a submission can do what you can do on this machine. Use an
account of its own."""

import argparse
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from exercises import ladder

LARGEST = 2**28  # bytes of any file that a submission writes, its report too


def small_files():
    """In the new process: an endless print must not fill the disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))


def run_tests(names, environment, output, seconds):
    """Runs these exercises' tests in an empty folder, what they print goes to `output`.
    -> pytest's exit code; None where it was stopped after `seconds`."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-c", str(ladder.ROOT / "pyproject.toml"), f"--rootdir={ladder.ROOT}"]
    command += [str(ladder.tests_of(name)) for name in names]
    posix = os.name == "posix"
    # An empty folder: a submission finds nobody else's file, and what it writes is deleted.
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=posix,
            preexec_fn=small_files if posix else None,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                if posix:
                    os.killpg(process.pid, signal.SIGKILL)  # and what it started
                else:
                    process.kill()
            process.wait()


def read_records(path):
    """What conftest.py noted, exercise -> test -> the last record of it, which counts. A submission
    that ends in the middle of a line leaves half a record, which is none."""
    records = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            records.setdefault(record["exercise"], {})[record["test"]] = record
    return records


def grade(path, seconds=300, only="", report=os.devnull):
    """Grades one file in a process of its own. -> (points of each exercise, a remark or "")."""
    names = [only] if only else list(ladder.EXERCISES)
    # Points are read from notes that conftest.py takes, not from the output, which anybody prints.
    with tempfile.TemporaryDirectory() as folder, open(report, "w", encoding="utf-8") as output:
        notes = Path(folder, "report.jsonl")
        files = {"EXERCISES": str(path.resolve()), "EXERCISES_REPORT": str(notes)}
        code = run_tests(names, {**os.environ, **files}, output, seconds)
        records = read_records(notes)
        remark = explain_end(code, seconds, records, output)
    points = {}
    for name in names:
        passed = [bool(r.get("passed")) for r in records.get(name, {}).values()]
        share = sum(passed) / len(passed) if passed else 0
        points[name] = ladder.EXERCISES[name].points * share
    return points, remark or refused(path)


def explain_end(code, seconds, records, output):
    """Why a submission's tests did not all run, "" where they did; writes into the report what the
    finished tests said, where pytest had no time to print it."""
    tests = [item for records_of in records.values() for item in records_of.items()]
    lost = [test for test, record in tests if "passed" not in record]
    remark = ""
    if code is None:
        remark = f"stopped after {seconds} s"
    elif code not in (0, 1) or lost:
        remark = f"ended early (exit code {code})"
    if lost:  # the test that was running, and all that come after it
        remark += f" in {Path(lost[0]).name}"
        for test, record in tests:
            if record.get("said"):
                output.write(f"\n{test}\n{record['said']}\n")
        output.write(f"\n{remark}\n")
    return remark


def refused(path):
    """Why no test could run: the file is no Python, or nested too deep for it, imports a solution,
    or is not there any more; else ""."""
    try:
        ladder.refuse(path)
    except (SyntaxError, ValueError, ImportError, OSError, MemoryError, RecursionError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


def grade_file(cfg):
    """A line for each exercise, and the total."""
    points, remark = grade(cfg.path, cfg.seconds, cfg.only)
    for name, got in points.items():
        exercise = ladder.EXERCISES[name]
        print(f"{name:<5} {exercise.title:<20} {got:5.1f} of {exercise.points}")
    most = sum(ladder.EXERCISES[name].points for name in points)
    print(f"total {sum(points.values()):26.1f} of {most}  {remark}".rstrip())


def is_hidden(path) -> bool:
    """No submission: a Mac's archive has a ._a.py beside each a.py, a notebook its checkpoints."""
    return any(part.startswith(".") for part in path.parts)


def grade_class(cfg):
    """A line for each submission, scores.csv, and each one's messages in reports/."""
    found = [*cfg.path.glob("*.py"), *cfg.path.glob("*/*.py")]
    submissions = sorted(path for path in found if not is_hidden(path.relative_to(cfg.path)))
    if not submissions:
        sys.exit(f"{cfg.path}: no *.py in it or in its folders")
    names = [cfg.only] if cfg.only else list(ladder.EXERCISES)
    ending = f"-{cfg.only}" if cfg.only else ""  # a whole grading's files stay
    reports = cfg.path / f"reports{ending}"
    reports.mkdir(exist_ok=True)
    width = max(len(str(path.relative_to(cfg.path))) for path in submissions)
    print(f"{'':<{width}} {' '.join(f'{name:>5}' for name in names)} total")
    with open(cfg.path / f"scores{ending}.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["submission", *names, "total", "seconds", "remark"])
        for path in submissions:
            name, start = str(path.relative_to(cfg.path)), time.time()
            report = reports / f"{name}.txt"  # in a folder as the submission is: none has its name
            report.parent.mkdir(exist_ok=True)
            points, remark = grade(path, cfg.seconds, cfg.only, report)
            total, seconds = sum(points.values()), round(time.time() - start, 1)
            row = [round(p, 1) for p in points.values()]
            table.writerow([name, *row, round(total, 1), seconds, remark])
            file.flush()
            columns = " ".join(f"{p:5.1f}" for p in row)
            print(f"{name:<{width}} {columns} {total:5.1f} {remark}", flush=True)


def heed_signals():
    """What ends this process from outside ends the submission that runs, too: `run_tests` kills it
    on the way out. A closed pipe (`| head`) ends it without a word."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has not all of them
        if number and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def duration(word) -> float:
    """Seconds, more than none, from the command line."""
    seconds = float(word)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{word} must be above 0")
    return seconds


def main():
    parser = argparse.ArgumentParser(
        prog="python -m exercises.grade",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, help="a file, or a folder of submissions")
    parser.add_argument(
        "--seconds", type=duration, default=300, help="at most so long for each file, wall clock"
    )
    parser.add_argument("--only", choices=ladder.EXERCISES, default="", help="one exercise")
    cfg = parser.parse_args()
    heed_signals()
    if not cfg.path.exists():
        sys.exit(f"{cfg.path}: no such file or folder")
    if cfg.path.is_file():
        grade_file(cfg)
    else:
        grade_class(cfg)


if __name__ == "__main__":
    main()
