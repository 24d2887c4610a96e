"""Grades a file, or a folder of submissions.

    python tests/exercises/grade.py my.py            a score line for each exercise
    python tests/exercises/grade.py FOLDER           a line for each FOLDER/*.py or FOLDER/*/*.py;
                                                     writes FOLDER/scores.csv and FOLDER/reports/
    python tests/exercises/grade.py FOLDER --only ex3    scores-ex3.csv and reports-ex3/

An exercise is worth 10 points, times the share of its tests that pass. Each submission runs in a
process of its own, in an empty folder, for at most --seconds; what passed until then counts. It is
no sandbox: a submission can do what you can do on this machine. Use an account of its own."""

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

import ladder

LARGEST = 2**28  # bytes of any file that a submission writes, its report too


def small_files():
    """In the new process: an endless print must not fill the disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))


def grade(path, seconds=300, only="", report=os.devnull):
    """Grades one file in a process of its own. -> (points of each exercise, a remark or "")."""
    names = [only] if only else list(ladder.NAMES)
    tests = [str(next(ladder.HERE.glob(f"test_{name}_*.py"))) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-c", str(ladder.ROOT / "pyproject.toml"), f"--rootdir={ladder.ROOT}"]
    remark = ""
    with tempfile.TemporaryDirectory() as folder, open(report, "w", encoding="utf-8") as said:
        lines = Path(folder, "report.jsonl")
        given = os.environ | dict(EXERCISES=str(path.resolve()), EXERCISES_REPORT=str(lines))
        posix = dict(start_new_session=True, preexec_fn=small_files) if os.name == "posix" else {}
        how = dict(cwd=folder, env=given, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        process = subprocess.Popen([*command, *tests], **how, **posix)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code, remark = None, f"stopped after {seconds} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # and what it started
                os.killpg(process.pid, signal.SIGKILL) if posix else process.kill()
            process.wait()
        heard = {}  # exercise -> test -> the last word on it, which counts
        for line in lines.read_text().splitlines() if lines.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                r = json.loads(line)
                heard.setdefault(r["exercise"], {})[r["test"]] = r
        rest = [(test, r) for tests in heard.values() for test, r in tests.items()]
        lost = [test for test, r in rest if "passed" not in r]
        if code not in (0, 1, None) or lost and not remark:
            remark = f"ended early (exit code {code})"
        if lost:  # pytest had no time to print what the finished tests said
            remark += f" in {Path(lost[0]).name}"
            said.writelines(f"\n{test}\n{r['said']}\n" for test, r in rest if r.get("said"))
            said.write(f"\n{remark}\n")
    points = {}
    for name in names:
        passed = [bool(r.get("passed")) for r in heard.get(name, {}).values()]
        points[name] = 10 * sum(passed) / len(passed) if passed else 0
    return points, remark or refused(path)


def refused(path):
    """Why no test could run: the file is no Python, or imports a solution; else ""."""
    try:
        ladder.refuse(path)
    except (SyntaxError, ValueError, ImportError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="a file, or a folder of submissions")
    parser.add_argument(
        "--seconds", type=float, default=300, help="at most so long for each file, wall clock"
    )
    parser.add_argument("--only", choices=ladder.NAMES, default="", help="one exercise")
    cfg = parser.parse_args()
    if not cfg.path.exists():
        sys.exit(f"{cfg.path}: no such file or folder")
    if cfg.path.is_file():
        points, remark = grade(cfg.path, cfg.seconds, cfg.only)
        for k, p in points.items():
            print(f"{k:<5} {ladder.NAMES[k]:<20} {p:5.1f} of 10")
        print(f"total {sum(points.values()):26.1f} of {10 * len(points)}  {remark}".rstrip())
        return
    found = sorted([*cfg.path.glob("*.py"), *cfg.path.glob("*/*.py")])
    if not found:
        sys.exit(f"{cfg.path}: no *.py in it or in its folders")
    names = [cfg.only] if cfg.only else list(ladder.NAMES)
    width = max(len(str(f.relative_to(cfg.path))) for f in found)
    print(f"{'':<{width}} {' '.join(f'{k:>5}' for k in names)} total")
    of = f"-{cfg.only}" * bool(cfg.only)  # a whole grading's files stay
    reports = cfg.path / f"reports{of}"
    reports.mkdir(exist_ok=True)
    with open(cfg.path / f"scores{of}.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["submission", *names, "total", "seconds", "remark"])
        for path in found:
            name, start = str(path.relative_to(cfg.path)), time.time()
            report = reports / (name.replace(os.sep, "-") + ".txt")
            points, remark = grade(path, cfg.seconds, cfg.only, report)
            total, took = sum(points.values()), round(time.time() - start, 1)
            row = [round(p, 1) for p in points.values()]
            table.writerow([name, *row, round(total, 1), took, remark])
            file.flush()
            print(f"{name:<{width}} {' '.join(f'{p:5.1f}' for p in row)} {total:5.1f} {remark}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
