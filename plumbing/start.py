"""The beginning of every script: imported first, before torch. From then on signals and errors end
the process as plumbing/ending.py says, and `--help` is answered without torch.

Imported by anything else (tests, notebooks) it changes nothing."""

import os
import sys
import types
from pathlib import Path

from plumbing.ending import leave_by, watch_signals

FULL_HELP = "NANOCOMA_FULL_HELP"  # set where hollow packages were not enough
HEAVY = ("torch", "transformers", "safetensors", "peft", "matplotlib", "pyarrow", "huggingface_hub")


class AnythingAtAll(type):
    """Of a class, any attribute is there, and is such a class again."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything

    def __or__(cls, other):
        return cls

    __ror__ = __or__


class Anything(metaclass=AnythingAtAll):
    """What stands for all that a heavy package holds: a base class, a decorator, a constant."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class Hollow(types.ModuleType):
    """A package without contents."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class HollowPackages:
    """Finds the heavy packages at once, for they are hollow. As documentation builders do (Sphinx:
    autodoc_mock_imports): the script's own parser says all that there is to say."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            return type(__spec__)(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Hollow(spec.name)

    def exec_module(self, module):
        pass


def answer_help():
    """For `--help` the script runs as far as its parser, among hollow packages."""
    sys.meta_path.insert(0, HollowPackages())
    sys.excepthook = answer_slowly


def answer_slowly(kind, error, trace):
    """A script that makes more of a package before its parser: once more, with the real ones."""
    if isinstance(error, BrokenPipeError | KeyboardInterrupt):
        leave_by(error)
    os.environ[FULL_HELP] = "1"
    os.execv(sys.executable, sys.orig_argv)


def begin():
    """Takes the process over, where its script is one of ours."""
    root = Path(__file__).resolve().parent.parent
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or Path(script).resolve().parent not in (root, root / "tools"):
        return
    watch_signals()
    if not sys.stderr.isatty():  # the libraries' bars; a log file wants lines
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.excepthook = lambda kind, error, trace: leave_by(error)
    if {"--help", "-h"} & set(sys.argv[1:]) and FULL_HELP not in os.environ:
        answer_help()


begin()
