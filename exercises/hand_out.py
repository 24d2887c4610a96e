"""Makes a student's copy of the class.

    python -m exercises.hand_out DIR

DIR gets the code, the tests, the toy model, and my_exercises.py, the stub, at its root, which
`python -m pytest -m ex1 exercises` grades there without further ado."""

import argparse
import shutil
import sys
from pathlib import Path

from exercises import ladder

# What a teacher's clone holds beside these at its root (solutions, scores) stays there.
FIVE = ("data.py", "model.py", "pretrain.py", "contrastive.py", "evaluate.py")
FILES = (*FIVE, "LICENSE", "requirements.txt", "pyproject.toml")
FOLDERS = ("plumbing", "toy", "tools", "exercises", "tests", "docs")
LEFT_OUT = (".*", "__pycache__", "submissions", "reports", "TEACHING.md")


def hand_out(folder):
    """Writes the copy. Raises FileExistsError where there is something already."""
    folder = Path(folder).resolve()
    if folder.is_relative_to(ladder.ROOT):
        raise FileExistsError(f"{folder} lies inside of {ladder.ROOT}; choose a place beside it")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; a student's work may be in it")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(ladder.ROOT / name, folder)
    readme = (ladder.ROOT / "README.md").read_text()
    # A link would lead to what only teachers have.
    readme = readme.replace("[TEACHING.md](exercises/TEACHING.md)", "TEACHING.md")
    (folder / "README.md").write_text(readme)
    # Nothing is taken out of the code: a class reads it, and the tests are how it reads.
    left_out = shutil.ignore_patterns(*LEFT_OUT)
    for name in FOLDERS:
        shutil.copytree(ladder.ROOT / name, folder / name, ignore=left_out)
    shutil.copy(ladder.STUB, folder / ladder.OWN.name)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help="new or empty, outside of this repository")
    try:
        folder = hand_out(parser.parse_args().folder)
    except OSError as e:  # a disk that is full, a folder below a file
        sys.exit(str(e))
    print(f"{folder}: solve {folder / ladder.OWN.name}, read exercises/README.md, then")
    print(f"cd {folder} && python -m pytest -q -x --tb=short -m ex1 exercises")


if __name__ == "__main__":
    main()
