"""Checkpoints: OUT/checkpoints/step-00000500/{weights.safetensors, optimizer.pt, state.json}.

Data and dropout are functions of (seed, step): the trained weights, the optimiser and the step are
all that a run is made of. Rank 0 writes them, reads them and sends them to the others: of several
nodes only its disk counts.

Top to bottom: saving - ending - beginning - going on - what is the same run."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict as dcp

from plumbing import card
from plumbing.adapters import find_base
from plumbing.agreement import agree, by_rank_0, command_of, join, on_rank_0, together
from plumbing.combinations import changed, option
from plumbing.ending import StepLeft, forget_signals, note_signals, stop_asked
from plumbing.errors import InputError, OfAllRanks, brief
from plumbing.files import on_the_disk, refuse_special
from plumbing.first_pass import digest_of_listed
from plumbing.folders import (
    CHECKPOINTS,
    FINISHED,
    digest_of_settings,
    digest_of_weights,
    local_folder,
    read_json,
)
from plumbing.log import versions
from plumbing.outfolder import take
from plumbing.ranks import all_sum, gather_objects, known_reason, rank, say, world
from plumbing.weights import stage_1_model
from plumbing.writing import written

# What may change before --resume, and changes no bit of what follows (but for --skip-bad: where an
# example cannot be read it is the way out).
HARMLESS = (
    "resume",
    "image_root",  # where the pictures are
    "out",  # where it is saved
    "save_every",  # how often
    "keep",  # how many checkpoints stay
    "workers",  # who reads the data
    "skip_bad",  # which examples are passed over
    "graph_memory",  # what is kept, and not made again
    "fitting",  # no flag: the run goes on from what the checkpoint says
)
# These too, and they move the last bits: sums are taken in other pieces.
ROUNDING = ("chunk_tokens", "checkpointing")
# This one too, for it is the way out where a row of the data turns out to be too long.
CUTTING = "max_length"
# What a run is called by that is no flag: torchrun is told how many.
RANKS = "the number of ranks"
# Names of what a digest tells better: a folder may be moved between runs.
DIGEST_OF = {"model": "model_digest", "data": "data_digest"}
TRAINED = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
# What a run leaves in OUT/checkpoints, and of that what a kill leaves half.
STEP = Path(CHECKPOINTS).name
HALVES = ("part", f"removed-{STEP}")
OURS = (STEP, f"damaged-{STEP}", *HALVES, "lock")


def save_checkpoint(embedder, optimizers, cfg, step):
    """Written beside and renamed: none is ever half. A full disk costs it, not the run."""
    # A collective where the model is sharded: all ranks are here, rank 0 goes on.
    weights, optimizer = dcp.get_state_dict(embedder, optimizers, options=TRAINED)
    names = {name for name, _ in embedder.named_parameters()}  # a tied weight once
    folder = Path(cfg.out, "checkpoints")
    part, whole = folder / "part", folder / f"step-{step:08d}"
    # The state is a function of the step: what is there already is the same.
    if rank() > 0 or whole.exists():
        return
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        weights = {name: w.contiguous() for name, w in weights.items() if name in names}
        save_file(weights, part / "weights.safetensors")
        torch.save(optimizer, part / "optimizer.pt")
        (part / "state.json").write_text(json.dumps(written_state(cfg, step), indent=1) + "\n")
        on_the_disk(part)
        os.replace(part, whole)
    except (OSError, RuntimeError, SafetensorError) as e:
        say(f"no checkpoint at step {step}: {e}. Older ones stay; disk full?")
        shutil.rmtree(part, ignore_errors=True)
        return
    # The new one is safe: only now may older ones go.
    for old in checkpoints_in(cfg.out)[: -cfg.keep]:
        remove(old)


def checkpoints_in(out) -> list:
    """The folders of OUT's checkpoints, oldest first."""
    return sorted(Path(out).glob(CHECKPOINTS))


def remove(folder):
    """A checkpoint goes. Whatever the disk says to that, it costs no run."""
    # Trap: NFS keeps an open file by a hidden name, and so the folder; a kill leaves half of it. By
    # another name nobody takes that for a checkpoint.
    gone = folder.with_name(f"removed-{folder.name}")
    with suppress(OSError):
        os.replace(folder, gone)
    for left in (folder, gone):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def saved_after(embedder, optimizers, cfg, step):
    """Around a step. After every --save-every steps a checkpoint is saved. Where a signal (on any
    rank) asks the run to end, it is saved after this step, and the run ends; a step that then takes
    too long is left in its midst. An error of all ranks (a picture that broke since the run began,
    a loss that is not finite) costs no step that was taken before."""
    try:
        yield
    except StepLeft:
        # Nothing of the step is in the weights yet: only gradients are lost.
        if step:  # Trap: optimisers that have taken no step have no state to be saved
            save_checkpoint(embedder, optimizers, cfg, step)
        stop(f"stopped by a signal: step {step + 1} is left, as if it had not begun", cfg)
    except OfAllRanks as e:
        way = ""
        if step:
            save_checkpoint(embedder, optimizers, cfg, step)
            way = f". {way_on(cfg)}"
        forget_signals()
        raise InputError(f"{e}{way}") from None
    except BaseException:
        forget_signals()  # the run is over, and signals do again what they did before it
        raise
    done = step + 1
    asked = all_sum(len(stop_asked))  # a signal may have reached one rank only
    due = cfg.save_every and done % cfg.save_every == 0 and done < cfg.steps
    if asked or due:
        save_checkpoint(embedder, optimizers, cfg, done)
    if asked:
        stop(f"stopped by a signal after step {done}", cfg)


def stop(reason, cfg):
    """Ends the run, and says where --resume goes on: a full disk may have cost it its state."""
    say(f"{reason}. {way_on(cfg)}")
    number = stop_asked[0].number if stop_asked else signal.SIGTERM
    forget_signals()
    sys.exit(128 + number)  # what a shell expects of a process that was told to end


def way_on(cfg) -> str:
    """Where --resume goes on, the same words on all ranks, when rank 0 is done with saving: at the
    end of one rank torchrun ends the others."""
    # Not --resume: beside the model of a run before, `refuse_taken` would refuse it.
    way = "There is no checkpoint: without --resume the run begins anew"
    if saved := checkpoints_in(cfg.out):
        way = f"--resume goes on from {saved[-1].name}"
    return gather_objects(way)[0]


# ------------------------------------------------------------------------------------------ ending


def finish(save, embedder, cfg, **options):
    """save(embedder, OUT, **options), a mark that the run is over, and its checkpoints go. Raises
    InputError on all ranks alike where the model cannot be written: the newest one stays."""
    cause = try_to_save(save, embedder, cfg, options)
    if cause:  # once more, when all checkpoints but the newest have made room
        if rank() == 0:
            for old in checkpoints_in(cfg.out)[:-1]:
                remove(old)
        cause = try_to_save(save, embedder, cfg, options)
    if cause:
        raise not_saved(cause, embedder, cfg)
    if rank() == 0:
        mark_finished(cfg)
        card.write(cfg.out)
    remove_checkpoints(cfg.out)
    forget_signals()
    say(f"saved {cfg.out}")


def not_saved(cause, embedder, cfg) -> InputError:
    """The error of a model that cannot be written: why, the room that it needs, the way out."""
    way = "there is no checkpoint: lower --save-every"
    if saved := checkpoints_in(cfg.out):
        way = f"free some, and the same command with --resume finishes from {saved[-1].name}"
    room = f"{weight_of(embedder) / 2**20:.1f} MiB are needed in {cfg.out}"
    return InputError(f"the model is not saved: {cause}. {room}; {way}")


def mark_finished(cfg):
    """Writes the mark that the run is over: a later --resume finds it, and trains no more."""
    mark = json.dumps(written_state(cfg, cfg.steps), indent=1) + "\n"
    try:
        with written(Path(cfg.out, FINISHED), "the mark") as part:
            part.write_text(mark)
    except InputError as e:
        say(f"{cfg.out}: the model is saved, but not the mark that the run is over: {e}")


def try_to_save(save, embedder, cfg, options) -> str:
    """-> why rank 0 could not, on all ranks; "" where it could."""
    cause = ""
    try:
        save(embedder, cfg.out, **options)
    except (OSError, RuntimeError, SafetensorError, InputError) as e:
        cause = brief(e)
    return gather_objects(cause)[0]


def weight_of(embedder) -> int:
    """Bytes of the weights that a folder of this model holds."""
    whole = not embedder.adapter
    return sum(p.nbytes for p in embedder.parameters() if p.requires_grad or whole)


def remove_checkpoints(out):
    """The run is over, or a new one begins: the checkpoints are needed no more. Only what is ours
    goes: `checkpoints` may be a link to a disk on which others keep things, too."""
    if rank() > 0:
        return
    remove_all(out, OURS)
    with suppress(OSError):  # a link, or something is left in it
        Path(out, "checkpoints").rmdir()


def remove_all(out, patterns):
    """What is called so in OUT/checkpoints goes."""
    folder = Path(out, "checkpoints")
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------- beginning


def begin(cfg) -> torch.device:
    """Joins the ranks and refuses, before any work and on all ranks alike, what cannot end well:
    flags or a model that differ between ranks; an --out that cannot be written, is in use or holds
    another run. Sets cfg.command, cfg.model_digest, an empty cfg.model. -> this rank's device."""
    device = join(cfg)
    cfg.command = command_of(cfg)
    cfg.model = cfg.model or stage_1_model()
    on_rank_0(lambda: take(cfg))
    cfg.model_digest = same_model(cfg.model)
    on_rank_0(lambda: refuse_taken(cfg))
    # They take the room of whole ones, without which the next one, or the model, may not fit.
    on_rank_0(lambda: remove_all(cfg.out, HALVES))
    return device


def same_model(name) -> str:
    """The digest of a model, which all ranks have alike; InputError on all where they do not."""
    digest = together(lambda: digest_of_model(name))
    agree({"the model's files": digest}, f"--model {brief(name, 60)}")
    return digest


def refuse_replaced(name, digest):
    """InputError, on all ranks alike, where a model that is loaded now is not the one of `digest`,
    with which the command began: reading the data took its time."""
    if same_model(name) != digest:
        text = "its files were replaced since this command began; begin it again"
        raise InputError(f"--model {brief(name, 60)}: {text}")


def same_data(cfg):
    """InputError on all ranks alike where they read other data, or skip other examples of them."""
    data = {"data (their digest)": cfg.data_digest, "--skip-bad": digest_of_listed(cfg.skip_bad)}
    agree(data, f"--data {brief(cfg.data, 60)}")


def digest_of_model(name) -> str:
    """Changes with the weights that a run starts from, and with how they are read; of an adapter,
    with its base's weights, too."""
    if name == "toy-random":  # drawn, not read from the toy's folder
        return name
    folder = local_folder(name)
    adapter = read_json(folder, "adapter_config.json")
    digest = f"{digest_of_weights(folder)} with {digest_of_settings(folder, adapter)}"
    if adapter:
        digest += f" on {find_base(folder, adapter).digest}"
    return digest


def refuse_taken(cfg):
    """Raises InputError where OUT holds an unfinished run and --resume is not given, or it is given
    and the run is another one: before the model is loaded, and OUT/merged written."""
    saved, finished = checkpoints_in(cfg.out), Path(cfg.out, FINISHED).exists()
    if saved and not finished and not cfg.resume:
        where = f"{cfg.out} holds {saved[-1].name} of an unfinished run"
        raise InputError(f"{where}: --resume goes on with it; or take another --out, or remove it")
    if cfg.resume and not saved and not finished and Path(cfg.out, "config.json").exists():
        where = f"--resume: {cfg.out} holds a model, and no checkpoint to go on from"
        raise InputError(f"{where}: without --resume it is replaced; or take another --out")
    if not cfg.resume:
        return
    states = [(folder, "state.json") for folder in saved]
    if finished:
        states = [(cfg.out, FINISHED)]
    for folder, name in states:
        with suppress(Damaged):  # reported when it is loaded
            # The data are not read yet.
            refuse_another_run(read_state(folder, name), cfg, but=("data", "data_digest"))


def keep_base(save, embedder, cfg):
    """save(embedder, OUT/merged): the model that --lora-rank makes an adapter of, with stage 1's
    folded in. OfAllRanks where it cannot be written; where --resume finds the run finished, what
    stands there is left alone."""

    def write():
        if cfg.lora_rank and not is_finished(cfg):
            save(embedder, Path(cfg.out, "merged"))  # alone, for no model is sharded yet

    on_rank_0(write)


def start_or_resume(embedder, optimizers, cfg) -> int:
    """-> the step to begin with; with --resume that of the newest checkpoint, which is loaded. From
    here on a signal lets the step finish, the state be saved, and the run end. A run that is
    finished already ends here, with status 0."""
    note_signals()
    same_data(cfg)
    refuse_replaced(cfg.model, cfg.model_digest)
    shapes = {name: p.shape for name, p in embedder.named_parameters() if p.requires_grad}
    layout = (embedder.K, embedder.pooling, embedder.style, len(shapes))
    agree({"K, pooling, prompt, trained weights": layout}, f"--model {brief(cfg.model, 60)}")
    if by_rank_0(lambda: is_finished(cfg)):
        if rank() == 0:
            card.write(cfg.out)  # the run may have been killed just before
        remove_checkpoints(cfg.out)
        say(f"--resume: the run in {cfg.out} is finished; its model is there")
        sys.exit(0)
    on_rank_0(lambda: forget_finished(cfg))
    newest = on_rank_0(lambda: newest_whole(shapes, cfg))
    state = gather_objects(newest.state if newest else None)[0]  # rank 0's
    if state is None:
        return 0
    load_checkpoint(embedder, optimizers, newest)
    same_chunks = state.flags.get("chunk_tokens") == cfg.chunk_tokens
    cfg.fitting = state.flags.get("fitting", 0) if same_chunks else 0
    say_what_rounds(state, cfg)
    return state.step


# -------------------------------------------------------------------------------------- going on


class Damaged(InputError):
    """A checkpoint that cannot be read; the one before may be."""


class State(NamedTuple):
    """What a checkpoint, or the mark of a finished run, says of its run."""

    step: int  # steps that were taken
    flags: dict  # {field of the Config: value}
    world: int  # ranks
    versions: dict  # of the libraries, {name: version}


class Checkpoint(NamedTuple):
    """What was read of a checkpoint's folder."""

    folder: Path
    state: State
    weights: dict  # {name: tensor}
    optimizer: dict  # as torch.distributed.checkpoint has it: state, param_groups


def is_finished(cfg) -> bool:
    """Whether --resume finds this run's model whole. InputError where it is another run's."""
    if not cfg.resume or not Path(cfg.out, FINISHED).exists():
        return False
    refuse_another_run(read_state(cfg.out, FINISHED), cfg)
    return True


def forget_finished(cfg):
    """A run begins anew in OUT: what is left of a finished one's checkpoints goes, and its mark."""
    mark = Path(cfg.out, FINISHED)
    if not mark.exists():
        return
    for old in checkpoints_in(cfg.out):
        remove(old)
    mark.unlink()


def newest_whole(shapes, cfg):
    """The newest Checkpoint that can be read; None where there is none. What is damaged is said and
    laid aside. shapes: {name: shape} of the trained weights."""
    damaged = []
    for folder in reversed(checkpoints_in(cfg.out)):
        try:
            state = read_state(folder)
            refuse_another_run(state, cfg)
            newest = Checkpoint(folder, state, *read_tensors(folder, shapes))
        except Damaged as e:
            damaged.append(folder)
            say(f"damaged: {e}")
            continue
        for bad in damaged:  # else it would count as newer than what is saved from here on
            aside = bad.with_name(f"damaged-{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(bad, aside)
        say(f"resumed {folder}")
        return newest
    if damaged:
        text = f"{damaged[0]} is damaged, and there is none before that could be read"
        raise InputError(f"{text}. Remove {damaged[0].parent} to begin again at step 1")
    if cfg.resume:
        say(f"--resume: {cfg.out} holds no checkpoint; the run begins at step 1")
    return None


def read_tensors(folder, shapes) -> tuple:
    """(weights, optimiser states) of a checkpoint's folder, found to fit. Raises Damaged."""
    path = folder / "optimizer.pt"
    try:
        for file in (folder / "weights.safetensors", path):
            refuse_special(file)  # a pipe in its place would be waited for
        weights = load_file(folder / "weights.safetensors")
        # No pickle is executed.
        optimizer = torch.load(path, weights_only=True, map_location="cpu")
        # Weights that are not trained are not in it, and must not be.
        if differ := {(name, w.shape) for name, w in weights.items()} ^ shapes.items():
            raise ValueError(f"{len(differ)} weights too many or too few, {min(differ)} for one")
        if not optimizer["state"].keys() & shapes.keys():  # else it would begin anew, unsaid
            raise ValueError("no state of the optimisers")
        for name, values in optimizer["state"].items():
            for value in values.values():
                if value.shape not in (shapes[name], ()):
                    raise ValueError(f"{name}: optimiser state of shape {tuple(value.shape)}")
        named = [name for group in optimizer["param_groups"] for name in group["params"]]
        if sorted(named) != sorted(shapes):
            raise ValueError("the optimisers' states are of other weights")
    except Exception as e:  # whatever a damaged file makes of the libraries
        if is_of_machine(e):
            raise not_now(folder, e) from None
        text = f"{folder}: not a checkpoint of this run: {type(e).__name__}: {brief(e)}"
        raise Damaged(text) from None
    return weights, optimizer


def is_of_machine(error) -> bool:
    """Whether it tells of the machine, and not of the file that was read: no memory, too many open
    files, a network's disk that was away."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch has a RuntimeError, safetensors a FileNotFoundError without a number, `open_file` its
    # InputError, with the disk's own behind it.
    codes = (errno.ENOMEM, errno.ENFILE, errno.EMFILE, errno.ESTALE)
    words = ("can't allocate memory", *(os.strerror(code) for code in codes))
    if getattr(error, "errno", None) in codes or any(word in str(error) for word in words):
        return True
    return error.__cause__ is not None and is_of_machine(error.__cause__)


def not_now(folder, error) -> InputError:
    """The error where a checkpoint may be whole, and only the machine cannot read it now."""
    text = f"{folder} cannot be read now: {type(error).__name__}: {brief(error)}"
    return InputError(f"{text}. It stays; --resume goes on from it when it can")


def load_checkpoint(embedder, optimizers, newest):
    """Weights and optimiser states into the model and the optimisers of all ranks. newest: the
    Checkpoint, on rank 0; the others are sent what it read."""
    options = dataclasses.replace(TRAINED, strict=False, broadcast_from_rank0=world() > 1)
    weights, states = (newest.weights, newest.optimizer) if newest else ({}, {})
    try:
        # Trap: not in one call. Without weights `set_state_dict` takes the optimisers to be all.
        dcp.set_optimizer_state_dict(embedder, optimizers, states, options=options)
        dcp.set_model_state_dict(embedder, weights, options=options)
    except Exception as e:  # as in `read_tensors`
        if known_reason(e):  # a rank that is gone, a full GPU: no fault of the checkpoint
            raise
        where = newest.folder if newest else "the checkpoint"
        if is_of_machine(e):
            raise not_now(where, e) from None
        text = f"{where}: not a checkpoint of this run: {type(e).__name__}: {brief(e)}"
        raise InputError(f"{text}. Remove it, and --resume goes on from the one before") from None


# ---------------------------------------------------------------------------- what is the same run


def written_state(cfg, step) -> dict:
    """What `read_state` reads."""
    return {"step": step, "world": world(), "config": dataclasses.asdict(cfg), **versions()}


def read_state(folder, name="state.json") -> State:
    """The state of a checkpoint's folder, or of a finished run's. Raises Damaged where it is
    missing or of wrong types."""
    path = Path(folder, name)
    try:
        raw = read_json(folder, name)
    except (InputError, OSError) as e:
        if is_of_machine(e):
            raise not_now(folder, e) from None
        raise Damaged(brief(e)) from None
    step, flags, ranks = (raw.get(key) for key in ("step", "config", "world"))
    if not isinstance(flags, dict) or type(step) is not int or type(ranks) is not int:
        raise Damaged(f"{path}: is missing, or lacks step, config or world")
    numbers = [step, flags.get("steps"), flags.get("fitting", 0)]
    if any(type(x) is not int or x < 0 for x in numbers) or step > flags["steps"]:
        raise Damaged(f"{path}: step {step!r} of {flags.get('steps')!r} makes no sense")
    libraries = {name: raw.get(name) for name in versions()}  # None: an older state lacks it
    return State(step, flags, ranks, libraries)


def refuse_another_run(state, cfg, but=()):
    """Raises InputError, with the names of the flags, where the state is of another run. but: what
    is not known yet."""
    then = state.flags | {RANKS: state.world}
    now = dataclasses.asdict(cfg) | {RANKS: world()}
    # A folder may have been moved: where its digest is the same, its name does not count.
    moved = [name for name, x in DIGEST_OF.items() if now[x] and then.get(x) == now[x]]
    # An older version's state lacks newer flags, which were at their defaults then; what it did not
    # compute is not compared.
    defaults = type(cfg)()
    for field in dataclasses.fields(cfg):
        known = defaults if field.init else cfg
        then.setdefault(field.name, getattr(known, field.name))
    changes = changed(then, now, (*HARMLESS, *ROUNDING, CUTTING, *but, *moved))
    if changes:
        text = f"not the same run: {', '.join(changes)}"
        raise InputError(f"--resume: {text}. Restore that, or take another --out")


def say_what_rounds(state, cfg):
    """A line where a run goes on in a way that moves its last bits."""
    names = [name for name in ROUNDING if state.flags.get(name) != getattr(cfg, name)]
    changes = [option(name) for name in names]
    for name, version in versions().items():
        if state.versions[name] not in (version, None):
            changes.append(name)
    if changes:
        text = "the last bits may differ; with dropout, all that is drawn for it"
        say(f"the run began with another {', '.join(changes)}: {text}")
    if state.flags.get(CUTTING) != getattr(cfg, CUTTING):
        say(f"the run began with another {option(CUTTING)}: from here on other texts are cut")
