"""Evaluation: Precision@1 on MMEB-style tasks (VLM2Vec, section 4).

    python evaluate.py                                       the toy world's 15 sets
        (two cores: 0.4 minutes; after the two stages 72.7 of 100, chance 5.9)
    python evaluate.py --data MMEB-eval                      a folder in MMEB's layout
    torchrun --nproc-per-node 8 evaluate.py --data MMEB-eval --json scores.json
    python evaluate.py --images DIR --search "a red circle above a blue square"
    python evaluate.py --figures DIR                         what the models do, drawn

Each query is compared with its own candidates; a hit is a query whose right candidate is nearer
than every other one. Reads a model folder and tasks; prints a table; writes --json. Searching is in
search.py, the figures are in figures.py.
"""

import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import model
from data import IMAGE, InputError, read_tasks
from model import flag


@dataclass
class Config(model.Flags):
    """Flags of the evaluation."""

    model: str = flag("", "empty: out/contrastive, else out/pretrain, else toy")
    subsets: str = flag("", "the sets to evaluate, A,B,C; empty: all there are")
    limit: int = flag(0, "queries of each set; 0: all (the toy world: 100)")
    json: str = flag("", "also write the scores to this file")
    search: str = flag("", "in place of the table: rank the pictures of --images by this text")
    query_image: str = flag("", "or by this picture, or by both together")
    images: str = flag("", "the folder to search; its index is kept beside it")
    image_text: str = flag(IMAGE, "the instruction that its pictures are embedded with")
    top: int = flag(8, "results of a search")
    search_out: str = flag("out/search.png", "the picture of a search's results")
    figures: str = flag("", "in place of the table: draw the README's figures into this folder")


# ---------------------------------------------------------------------------------------- the idea


def precision_at_1(q, c, candidates, tie=1e-6) -> float:
    """Share of queries whose right candidate scores higher than each other one by more than `tie`.

    q (n, D) and c (m, D) unit-length, candidates[i]: rows of c, the right one first. A tie with the
    right one is not a hit: with `argmax`, a collapsed model (all embeddings equal) would score 100
    %, for the right one stands at index 0. NaN is never a hit. Several candidates that *are* the
    right one (the same row of c) count as one. 1 / len(candidates) on average when the embeddings
    carry no information."""
    hits = 0
    for i, rows in enumerate(candidates):
        scores = c[rows] @ q[i]  # cosines
        others = scores[np.asarray(rows) != rows[0]]
        hits += bool(np.isfinite(scores[0]) and np.all(scores[0] > others + tie))
    return hits / len(candidates)


# ---------------------------------------------------------------------------------------- plumbing


def encode_sharded(embedder, items, cfg, what, bad=None) -> np.ndarray:
    """Embeddings of `items`, made by all ranks together; every rank gets all: (len(items), D)."""
    rank, world, mine = model.rank(), model.world(), None if bad is None else []
    what = what if rank == 0 else ""
    made = embedder.encode(items[rank::world], cfg.chunk_tokens, cfg.workers, what, mine)
    z = np.zeros((len(items), made.shape[1]), np.float32)
    for r, (part, errors) in enumerate(model.gather_objects((made, mine))):
        z[r::world] = part
        if errors:
            bad.extend(errors)
    return z


def score(embedder, task, cfg) -> dict:
    """One set: each distinct item is encoded once, then Precision@1."""
    index = {}  # key of an item -> (its row of z, item)

    def at(item):
        return index.setdefault(item.key, (len(index), item))[0]

    queries, candidates = [], []
    for query, choices in task.queries:
        queries.append(at(query))
        candidates.append([at(c) for c in choices])
    items = [item for _, item in index.values()]
    z = encode_sharded(embedder, items, cfg, task.name)
    result = dict(
        p_at_1=precision_at_1(z[queries], z, candidates),
        chance=float(np.mean([1 / len(set(rows)) for rows in candidates])),
        queries=len(queries),
        meta_task=task.meta_task,
        ood=task.ood,
    )
    if not np.isfinite(z).all():
        result["warning"] = "NaN in the embeddings"
    elif len(items) > 1 and z.std(0).max() < 1e-3:
        result["warning"] = "collapsed: all embeddings are alike"
    return result


def summary(sets) -> dict:
    """Plain means over sets, as MMEB does: by meta-task, in and out of distribution, overall."""

    def mean(rows):
        rows, keys = list(rows), ("p_at_1", "chance")
        return {k: float(np.mean([r[k] for r in rows])) for k in keys} if rows else None

    metas = dict.fromkeys(r["meta_task"] for r in sets.values())
    return dict(
        meta_tasks={m: mean(r for r in sets.values() if r["meta_task"] == m) for m in metas},
        ind=mean(r for r in sets.values() if not r["ood"]),
        ood=mean(r for r in sets.values() if r["ood"]),
        overall=mean(sets.values()),
    )


def line(name, r, note=""):
    """One row of the table, in percent."""
    score = "-" if r is None else f"{100 * r['p_at_1']:6.1f}   {100 * r['chance']:6.1f}"
    return f"{name:<34} {score:>15} {note}".rstrip()


def main(cfg):
    """The table; or a search, or the figures."""
    device = model.setup()
    if cfg.figures:
        model.optional("matplotlib", "--figures")
        figures = importlib.import_module("figures")
        return figures.draw(cfg.figures, cfg.model, cfg.seed, device)
    if not cfg.model:
        made = [f for f in ("out/contrastive", "out/pretrain") if Path(f, "config.json").exists()]
        cfg.model = (made + ["toy"])[0]
    if bool(cfg.images) != bool(cfg.search or cfg.query_image):
        raise InputError("a search needs --images DIR, and --search TEXT or --query-image FILE")
    embedder = model.load_for(cfg, device)
    if cfg.images:
        model.say(f"searching with {cfg.model}")
        return importlib.import_module("search").search(embedder, cfg)
    model.say(f"evaluating {cfg.model}")
    tasks = read_tasks(cfg.data, cfg.image_root or None, cfg.subsets, cfg.limit, cfg.seed)
    cuts = [f"--limit {cfg.limit}"] * bool(cfg.limit) + ["--subsets"] * bool(cfg.subsets)
    partial = f" (partial: {', '.join(cuts)})" * bool(cuts)
    model.say(f"\n{'Precision@1 x 100' + partial:<34} {'score':>6}   {'chance':>6}   queries")
    sets, shown = {}, None
    for task in sorted(tasks, key=lambda t: t.ood):
        group = f"{'out of' if task.ood else 'in'} distribution"
        if group != shown:
            model.say(f"-- {group}")
            shown = group
        r = sets[task.name] = score(embedder, task, cfg)
        name = f"  {task.name} ({task.meta_task})"
        model.say(line(name, r, f"{r['queries']:>7} {r.get('warning', '')}"))
    means = summary(sets)
    model.say("-- mean over sets")
    for name, r in means["meta_tasks"].items():
        model.say(line("  " + name, r))
    for name, key in (("IND", "ind"), ("OOD", "ood"), ("Overall", "overall")):
        model.say(line(name + partial, means[key]))
    if cfg.json and model.rank() == 0:
        numbers = {k: v["p_at_1"] if v else None for k, v in means.items() if k != "meta_tasks"}
        metas = {m: r["p_at_1"] for m, r in means["meta_tasks"].items()}
        about = dict(model=cfg.model, prompt=embedder.style, pooling=embedder.pooling, K=embedder.K)
        about |= dict(partial=bool(cuts), config=asdict(cfg), versions=model.versions())
        text = json.dumps(dict(sets=sets, meta_tasks=metas, **numbers, **about), indent=1)
        Path(cfg.json).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.json).write_text(text + "\n")


if __name__ == "__main__":
    model.run(main, Config)
