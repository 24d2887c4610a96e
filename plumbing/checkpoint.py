"""Checkpoints: OUT/checkpoints/step-00000500/{weights.safetensors, optimizer.pt, state.json}.

Data and dropout are functions of (seed, step): the trained weights, the optimiser and the step are
all that a run is made of."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict as dcp

from plumbing.ending import StepLeft, forget_signals, note_signals, stop_asked
from plumbing.errors import InputError
from plumbing.log import versions
from plumbing.ranks import all_sum, rank, say, world
from plumbing.weights import read_json

HARMLESS = ("out", "resume", "workers", "save_every", "keep")  # flags that may change in between
TRAINED = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
# What reading a damaged checkpoint may raise.
UNREADABLE = (
    OSError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    pickle.UnpicklingError,
    SafetensorError,
)


def save_checkpoint(embedder, optimizers, cfg, step):
    """Written beside and renamed: none is ever half. A full disk costs it, not the run."""
    # A collective where the model is sharded: all ranks are here, rank 0 goes on.
    weights, optimizer = dcp.get_state_dict(embedder, optimizers, options=TRAINED)
    names = {name for name, _ in embedder.named_parameters()}  # a tied weight once
    folder = Path(cfg.out, "checkpoints")
    part = folder / "part"
    name = folder / f"step-{step:08d}"
    # The state is a function of the step: what is there already is the same.
    if rank() > 0 or name.exists():
        return
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        weights = {name: w.contiguous() for name, w in weights.items() if name in names}
        save_file(weights, part / "weights.safetensors")
        torch.save(optimizer, part / "optimizer.pt")
        state = {"step": step, "world": world(), "config": dataclasses.asdict(cfg), **versions()}
        (part / "state.json").write_text(json.dumps(state, indent=1))
        for path in part.iterdir():  # on the disk before the name says so
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.replace(part, name)
    except (OSError, RuntimeError, SafetensorError) as e:
        say(f"no checkpoint at step {step}: {e}. Older ones stay and the run goes on; disk full?")
        shutil.rmtree(part, ignore_errors=True)
        return
    # The new one is safe: only now may older ones go.
    for old in sorted(folder.glob("step-*"))[: -max(1, cfg.keep)]:
        shutil.rmtree(old)


@contextmanager
def kept(embedder, optimizers, cfg, step):
    """Around a step. After it a checkpoint, every --save-every steps; where a signal (on any rank)
    asks the run to end: after the step, or if it takes too long out of the midst of it."""
    try:
        yield
    except StepLeft:
        # Nothing of the step is in the weights yet: only gradients are lost.
        save_checkpoint(embedder, optimizers, cfg, step)
        stop(f"stopped by a signal: step {step + 1} is left, the state before it saved")
    done = step + 1
    asked = all_sum(len(stop_asked))  # a signal may have reached one rank only
    due = cfg.save_every and done % cfg.save_every == 0 and done < cfg.steps
    if asked or due:
        save_checkpoint(embedder, optimizers, cfg, done)
    if asked:
        stop(f"stopped by a signal after step {done}")


def stop(reason):
    """Ends the run, whose state is saved."""
    say(f"{reason}; --resume goes on from there")
    number = stop_asked[0].number if stop_asked else signal.SIGTERM
    forget_signals()
    sys.exit(128 + number)  # what a shell expects of a process that was told to end


def remove_checkpoints(out):
    """The run is over and its model stands in OUT: the checkpoints are needed no more."""
    if rank() == 0:
        shutil.rmtree(Path(out, "checkpoints"), ignore_errors=True)
    forget_signals()
    say(f"saved {out}")


# --------------------------------------------------------------------------------------- beginning


def start_or_resume(embedder, optimizers, cfg) -> int:
    """-> the step to begin with; with --resume that of the newest checkpoint, which is loaded. From
    here on SIGTERM and SIGINT let the step finish, save, and end the run."""
    note_signals()
    checkpoints = sorted(Path(cfg.out, "checkpoints").glob("step-*"))
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    if not cfg.resume:
        where = f"{cfg.out} holds {newest.name} of an unfinished run"
        raise InputError(f"{where}: --resume goes on with it; or take another --out, or remove it")
    state = read_json(newest, "state.json")
    refuse_another_run(state, cfg)
    load_checkpoint(embedder, optimizers, newest)
    say(f"resumed {newest}")
    return state["step"]


def refuse_another_run(state, cfg):
    """Raises InputError, with the names of the flags, where the checkpoint is of another run."""
    then = dict(state.get("config") or {}, world=state.get("world"))
    now = dict(dataclasses.asdict(cfg), world=world())
    changes = []
    for name, value in now.items():
        if name not in HARMLESS and then.get(name) != value:
            changes.append(f"{name} was {then.get(name)!r}, is {value!r}")
    if changes:
        changes = ", ".join(changes)
        text = f"--resume: not the same run: {changes}. Restore that, or take another --out"
        raise InputError(text)


def load_checkpoint(embedder, optimizers, folder):
    """Weights and optimiser states of a checkpoint, into the model and the optimisers."""
    try:
        weights = load_file(folder / "weights.safetensors")
        trained = {name for name, p in embedder.named_parameters() if p.requires_grad}
        # Weights that are not trained are not in it, and must not be.
        if differ := weights.keys() ^ trained:
            raise ValueError(f"{len(differ)} weights too many or too few, {min(differ)} for one")
        path = folder / "optimizer.pt"
        dcp.set_state_dict(
            embedder,
            optimizers,
            model_state_dict=weights,
            # No pickle is executed.
            optim_state_dict=torch.load(path, weights_only=True, map_location="cpu"),
            options=dataclasses.replace(TRAINED, strict=False),
        )
    except UNREADABLE as e:
        where = f"{folder}: not a checkpoint of this run: {type(e).__name__}: {e!s:.200}"
        raise InputError(f"{where}. Remove it, and --resume goes on from the one before") from None
