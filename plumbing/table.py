"""The evaluation's table on the screen, and its JSON."""

import json
from dataclasses import asdict
from pathlib import Path

from plumbing import card
from plumbing.agreement import on_rank_0
from plumbing.folders import read_json
from plumbing.log import versions
from plumbing.writing import refuse_other, refuse_unwritable, written


def head(note) -> str:
    """The line above the rows."""
    return f"\n{'Precision@1 x 100':<34} {'score':>6}   {'chance':>6}   queries {note}".rstrip()


def line(name, row, note="") -> str:
    """One row, in percent; row: {"p_at_1", "chance"}, or None where there is nothing to average."""
    shown = "-"
    if row is not None:
        shown = f"{100 * row['p_at_1']:6.1f}   {100 * row['chance']:6.1f}"
    return f"{name:<34} {shown:>15} {note}".rstrip()


def ending(row) -> str:
    """What stands behind the numbers of a set: its queries, Recall@5 and 10 of one's own data, a
    warning."""
    words = [f"{row['queries']:>9}"]
    for name, share in row.items():
        if name.startswith("recall_at_"):
            words.append(f"R@{name.removeprefix('recall_at_')} {100 * share:.1f}")
    words.append(row.get("warning", ""))
    return " ".join(words)


def partial_note(cfg) -> str:
    """What of the evaluation was left out, "(partial: --limit 20)"; "" where nothing was."""
    cuts = []
    if cfg.limit:
        cuts.append(f"--limit {cfg.limit}")
    if cfg.subsets:
        cuts.append("--subsets")
    return f"(partial: {', '.join(cuts)})" if cuts else ""


def refuse_json(cfg):
    """InputError, now and on all ranks alike, where rank 0 could not write --json at the end."""

    def refuse():
        if cfg.json:
            refuse_unwritable(cfg.json, "--json", [cfg.data])
            refuse_other(cfg.json, "--json", is_scores, "file of scores")

    on_rank_0(refuse)


def is_scores(path) -> bool:
    """Whether a file is what `write_json` writes."""
    return "overall" in read_json(Path(path).parent, Path(path).name)


def write_json(cfg, embedder, digest, sets, means):
    """All scores, with the model, its digest and the flags that they belong to, into --json."""
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
    with written(cfg.json, "--json") as part:
        part.write_text(json.dumps(scores, indent=1) + "\n")
    if Path(cfg.json).resolve() == Path(cfg.model, card.SCORES).resolve():
        card.write(cfg.model)  # the scores belong into it
