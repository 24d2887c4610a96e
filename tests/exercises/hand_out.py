"""Makes a student's copy of the class.

    python tests/exercises/hand_out.py DIR

DIR gets the code, the tests, the toy model, and exercises.py, the stub, at its root, which
`python -m pytest -m ex1 tests/exercises` grades there without further ado. Nothing is taken out:
the reference stands in the files that the class reads (EXERCISES.md says why)."""

import shutil
import sys
from pathlib import Path

import ladder

LEFT_OUT = (".*", "__pycache__", "out", "venv*", "exercises.py", "submissions")


def hand_out(folder):
    """Writes the copy. Raises FileExistsError where there is something already."""
    folder = Path(folder).resolve()
    if folder.is_relative_to(ladder.ROOT):
        raise FileExistsError(f"{folder} lies inside of {ladder.ROOT}; choose a place beside it")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; a student's work may be in it")
    left_out = shutil.ignore_patterns(*LEFT_OUT)
    shutil.copytree(ladder.ROOT, folder, ignore=left_out, dirs_exist_ok=True)
    shutil.copy(ladder.STUB, folder / "exercises.py")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python tests/exercises/hand_out.py DIR")
    try:
        made = hand_out(sys.argv[1])
    except FileExistsError as e:
        sys.exit(str(e))
    print(f"{made}: solve {made / 'exercises.py'}, read EXERCISES.md, then")
    print(f"cd {made} && python -m pytest -q -x --tb=short -m ex1 tests/exercises")
