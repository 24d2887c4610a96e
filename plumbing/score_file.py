"""The file that evaluate.py --json writes, and how --resume goes on with an interrupted evaluation:
FILE.unfinished holds the sets that are scored so far, until FILE holds all of them."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from plumbing import card
from plumbing.agreement import by_rank_0
from plumbing.combinations import changed
from plumbing.errors import InputError
from plumbing.folders import read_json
from plumbing.log import versions
from plumbing.ranks import rank, say
from plumbing.table import partial_note
from plumbing.writing import naming_errors, refuse_other, refuse_unwritable, written

# Flags that change no score: where things lie, how the work is cut. What the model is, its digest
# says better than its name.
HARMLESS = ("model", "image_root", "workers", "chunk_tokens", "json", "resume")
# What the scores of each set are, at least.
ROW = {"p_at_1": float, "chance": float, "queries": int, "meta_task": str, "ood": bool}
NOT_YET = {"meta_tasks": {}, "ind": None, "ood": None, "overall": None}  # means, before the end


def unfinished(cfg) -> str:
    """The path of the sets that are scored so far."""
    return f"{cfg.json}.unfinished"


def kept(cfg, digest) -> dict:
    """{set: evaluate.score's} of the sets that need not be scored again: with --resume those that
    an earlier run of this model (by its digest) with these flags has left, else none.

    All ranks get what rank 0 reads, or its InputError: where --json cannot be written; where an
    earlier run is unfinished and --resume is not given; where it is, and the scores are others."""

    def read():
        if not cfg.json:
            return {}
        refuse_unwritable(cfg.json, "--json", [cfg.data])
        refuse_other(cfg.json, "--json", is_scores, "file of scores")
        begun = os.path.lexists(unfinished(cfg))
        if begun and not cfg.resume:
            text = "an evaluation that did not come to its end; --resume goes on with it"
            raise InputError(f"{unfinished(cfg)}: {text}, or take it away")
        path = unfinished(cfg) if begun else cfg.json
        if cfg.resume and os.path.lexists(path):
            return sets_of(path, cfg, digest)
        return {}

    return by_rank_0(read)


def scores_in(path) -> dict:
    """What a file of scores holds."""
    return read_json(Path(path).parent, Path(path).name)


def is_scores(path) -> bool:
    """Whether a file is one of scores."""
    return "overall" in scores_in(path)


def sets_of(path, cfg, digest) -> dict:
    """The sets of a file of scores. InputError where they are not of this model and these flags."""
    known = scores_in(path)
    sets, flags = known.get("sets"), known.get("config")
    are_objects = isinstance(sets, dict) and isinstance(flags, dict)
    if not are_objects or not all(map(is_row, sets.values())):
        raise InputError(f"{path}: not as evaluate.py --json writes it; take it away")
    changes = []
    if known.get("model_digest") != digest:
        changes.append("the model's files are others")
    now = asdict(cfg)
    changes += changed(now | flags, now, HARMLESS)  # an older version's file lacks newer flags
    if changes:
        text = f"holds other scores: {', '.join(changes)}"
        raise InputError(f"--resume: {path} {text}. Restore that, or take another --json")
    return sets


def is_row(row) -> bool:
    """Whether an object of JSON is what `evaluate.score` returns."""
    if not isinstance(row, dict):
        return False
    return all(isinstance(row.get(name), kind) for name, kind in ROW.items())


def identity(task) -> dict:
    """What stands in a set's scores and tells its data from others: meta-task, in distribution or
    not, a number that changes with its list or tables (0: the toy world, which the flags tell)."""
    source = getattr(task.queries, "source", None)  # a plain sequence has none
    digest = source.raw.digest if source and source.raw else 0
    return {"meta_task": task.meta_task, "ood": task.ood, "data_digest": digest}


def holds(sets, task) -> bool:
    """Whether a set is among those that need not be scored again. Of other data it is not, and that
    is said: a list was edited, a table replaced, sets.json changed since."""
    row = sets.get(task.name)
    if not row:
        return False
    if any(row.get(name) != value for name, value in identity(task).items()):
        say(f"--resume: the data of {task.name} have changed since it was scored; it is again")
        return False
    return True


def write_json(path, cfg, embedder, digest, sets, means):
    """All scores, with the model, its digest and the flags that they belong to."""
    scores = {"sets": sets, "meta_tasks": {}}
    for name, row in means["meta_tasks"].items():
        scores["meta_tasks"][name] = row["p_at_1"]
    for key in ("ind", "ood", "overall"):
        scores[key] = means[key]["p_at_1"] if means[key] else None
    scores.update(
        model=cfg.model,
        model_digest=digest,
        prompt=embedder.style,
        pooling=embedder.pooling,
        K=embedder.K,
        partial=partial_note(cfg) != "",
        config=asdict(cfg),
        versions=versions(),
    )
    with written(path, "--json") as part:
        part.write_text(json.dumps(scores, indent=1) + "\n")


def keep(cfg, embedder, digest, sets):
    """On rank 0: writes the sets that are scored so far."""
    if cfg.json and rank() == 0:
        write_json(unfinished(cfg), cfg, embedder, digest, sets, NOT_YET)


def finish(cfg, embedder, digest, sets, means):
    """On rank 0: writes all scores into --json; in the model's folder they go onto its card too."""
    if not cfg.json or rank() != 0:
        return
    write_json(cfg.json, cfg, embedder, digest, sets, means)
    with naming_errors(unfinished(cfg), "--json"):
        Path(unfinished(cfg)).unlink(missing_ok=True)
    if Path(cfg.json).resolve() == Path(cfg.model, card.SCORES).resolve():
        card.write(cfg.model)
