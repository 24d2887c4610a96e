"""The beginning of every script: imported first, before torch. From then on signals and errors end
the process as plumbing/ending.py says, and `--help` is answered without torch.

Imported by anything else (tests, notebooks) it changes nothing."""

import ast
import dataclasses
import os
import sys
from pathlib import Path

from plumbing import config
from plumbing.ending import leave, leave_by, watch_signals

ROOT = Path(__file__).resolve().parent.parent
TYPES = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "int | None": int | None,
    "str | None": str | None,
}


def read_config(script):
    """The class Config of a script, read and not run: what the script imports takes seconds. Its
    fields are literals; its base stands in plumbing/config.py, or is another script's Config."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            fields = [read_field(line) for line in node.body if isinstance(line, ast.AnnAssign)]
            bases = tuple(read_base(base) for base in node.bases)
            read = dataclasses.make_dataclass("Config", fields, bases=bases)
            # The help begins with the docstring of the module that the class is in.
            read.__module__ = "__main__"
            return read
    raise LookupError(f"{script} has no Config")


def read_base(base):
    """A base as it is written, TrainingFlags or contrastive.Config -> the class."""
    if isinstance(base, ast.Attribute):
        return read_config(ROOT / f"{base.value.id}.py")
    return getattr(config, base.id)


def read_field(line) -> tuple:
    """`name: kind = flag(...)` -> (name, kind, the field)."""
    declare = getattr(config, line.value.func.id)  # flag or word
    values = [ast.literal_eval(x) for x in line.value.args]
    named = {x.arg: ast.literal_eval(x.value) for x in line.value.keywords}
    return line.target.id, TYPES[ast.unparse(line.annotation)], declare(*values, **named)


def open_streams():
    """Whatever is printed goes somewhere. Trap: where stdout is closed (`>&-`) the next file that
    is opened takes its number, and what a library prints would stand in it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        stream.reconfigure(errors="backslashreplace")  # letters that a terminal does not have
        setattr(sys, name, stream)


def has_working_folder() -> bool:
    """Whether there is a working folder. Trap: without one PyTorch ends the process by itself."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def begin():
    """Takes the process over, where its script is one of ours."""
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
    if script.parent not in (ROOT, ROOT / "tools"):
        return
    # An OpenMP thread that waits for another one spins first, and on a busy machine so keeps that
    # one from its core. 2,000 turns, not 300,000 as by default. Read when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    open_streams()
    watch_signals()
    if not has_working_folder():
        leave("the folder that it was started in is not there any more; cd to another one")
    sys.excepthook = lambda kind, error, trace: leave_by(error)
    if {"--help", "-h"} & set(sys.argv[1:]):
        try:
            read_config(script).parse(["--help"])
        except SystemExit:
            leave(status=0)


begin()
