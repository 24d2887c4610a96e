"""OUT, the folder that a run writes: found fit before any work, and of one run at a time."""

import os
from pathlib import Path

from plumbing.adapters import bases_beside
from plumbing.errors import InputError, brief
from plumbing.files import absence
from plumbing.folders import CHECKPOINTS, TOY, read_json, refuse_foreign
from plumbing.locks import OF_A_RUN, lock
from plumbing.writing import first_record, refuse_other, refuse_unwritable


def take(cfg):
    """OUT is there, can be written, and is this process's from here on. InputError with the way out
    where it is not. For rank 0, which alone writes."""
    if not str(cfg.out).strip():
        raise InputError("--out is empty: name a folder, as out/run")
    out = Path(cfg.out)
    try:
        refuse_own_start(cfg)
        refuse_foreign(out)
        if not any(out.glob(CHECKPOINTS)):  # the log of a run that goes on is made whole again
            refuse_other(out / "log.jsonl", "--out", is_log, "log of a run")
        lock_run(out)
        if (out / "log.jsonl").is_dir():
            raise IsADirectoryError(f"{out / 'log.jsonl'} is a folder")
        refuse_unwritable(out / "log.jsonl", "--out")  # checkpoints may be on another disk
    except InputError:  # which is a ValueError
        raise
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        name, reason = getattr(e, "filename", None) or out, getattr(e, "strerror", None) or e
        if os.path.islink(name) and not os.path.exists(name):
            reason = absence(name, "folder")
        cause = f"{name}: {reason}"
        text = f"--out {brief(out)} cannot be written ({brief(cause)})"
        raise InputError(f"{text}: name a folder of one's own, on a disk with room") from None


def lock_run(out):
    """Holds the lock of the run in `out`, and makes its folder: again where another run, at its
    end, has removed it in between."""
    lock_file = out / OF_A_RUN
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock(lock_file, out.resolve())
    except FileNotFoundError:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock(lock_file, out.resolve())


def is_log(path) -> bool:
    """Whether a file begins as plumbing/log.py's do, with the flags of a run."""
    return "config" in (first_record(path) or {})


def refuse_own_start(cfg):
    """Raises InputError where the run would overwrite the model that it starts from, or the base of
    that adapter: a new adapter would be its own base, a resumed run start from another model."""
    starts, written = [TOY, Path(cfg.model)], [Path(cfg.out)]
    if adapter := read_json(cfg.model, "adapter_config.json"):
        # Trap: not find_base. It may ask the hub, together with ranks that are not here.
        starts += map(Path, bases_beside(cfg.model, adapter))
        written.append(Path(cfg.out, "merged"))  # stage 2 merges the adapter into it
    written = [os.path.realpath(folder) for folder in written]
    for start in starts:
        if os.path.isdir(start) and os.path.realpath(start) in written:
            text = f"--out {cfg.out} would overwrite {start}, which --model {cfg.model} starts from"
            raise InputError(f"{text}: take another --out")
