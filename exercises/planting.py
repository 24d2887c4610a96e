"""Puts another function in the place of one of ours, in memory, wherever it has been imported."""

import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
# pytest has tests/ on its path (pyproject.toml); `python -m exercises.bugs` starts before pytest.
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))

# Not exercises/: mistakes.py there keeps the functions that it is built on.
OURS = ("data", "model", "pretrain", "contrastive", "evaluate", "plumbing", "toy")
HELPERS = ("checks", "families", "ranks")  # of the tests


def reached():
    """The modules in which a name can be replaced: ours, and the tests', as far as imported."""
    modules = []
    for name, module in list(sys.modules.items()):
        top = name.split(".")[0]
        if top in OURS or top in HELPERS or top.startswith("test_"):
            modules.append(module)
    return modules


@contextmanager
def planted(owner, name, function):
    """Inside, `owner.name` is `function`, and so is every name by which our files and the tests
    imported it. owner: a module, or a class."""
    original = getattr(owner, name)
    places = [(owner, name)]
    for module in reached():
        # `from contrastive import info_nce` made a second name for the same function.
        places += [(module, key) for key, value in vars(module).items() if value is original]
    with ExitStack() as stack:
        for place, key in places:
            stack.enter_context(mock.patch.object(place, key, function))
        yield
