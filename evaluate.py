"""Evaluation: Precision@1 on MMEB-style tasks (VLM2Vec's measure).

    python evaluate.py                                       the toy world's 15 sets
        (two cores: 0.5 minutes; after the two stages 78.3 of 100, chance 5.9)
    python evaluate.py --data MMEB-eval                      a folder in MMEB's layout
    python evaluate.py --data pairs.jsonl                    your own pairs, or DIR with captions
    torchrun --nproc-per-node 8 evaluate.py --data MMEB-eval --json scores.json [--resume]

Each query is compared with its own candidates (in your own data: its negatives, or all targets); it
is a hit where the right one is the nearest. Reads a model and tasks; prints a table; writes --json.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
from dataclasses import dataclass

import numpy as np

from data import Item, read_tasks
from model import load_for
from plumbing import agreement, checkpoint, ranks, retrieval, score_file, table
from plumbing.config import Flags, flag
from plumbing.weights import trained_model


@dataclass
class Config(Flags):
    """Flags of the evaluation."""

    model: str = flag("", "empty: out/contrastive, else out/pretrain, else toy")
    subsets: str = flag("", "the sets to evaluate, with caps, A,B:100; empty: all")
    dim: int = flag(0, "use only the first numbers of z (Matryoshka); 0: all", least=0)
    limit: int = flag(0, "queries of each set; 0: all (the toy world: 100)", least=0)
    json: str = flag("", "also write the scores to this file, set by set")
    resume: bool = flag(False, "score only the sets that --json does not hold yet")


# ---------------------------------------------------------------------------------------- the idea


def precision_at_1(q, c, candidates, tie=1e-6) -> float:
    """Share of queries whose right candidate scores higher than each other one by more than `tie`.

    q (n, D) and c (m, D) unit-length, candidates[i]: rows of c, the right one first. A tie is no
    hit: by `argmax` a collapsed model (all embeddings equal) would score 100 %, for the right one
    stands at index 0. NaN is never a hit. Several candidates that *are* the right one (the same
    row of c) count as one. -> 0 ... 1; by chance 1 / (a query's distinct candidates)."""
    hits = 0
    for i, rows in enumerate(candidates):
        scores = c[rows] @ q[i]  # (len(rows),) cosines
        is_other = np.asarray(rows) != rows[0]
        others = scores[is_other]  # may be empty: a hit, unless NaN
        if np.isfinite(scores[0]) and np.all(scores[0] > others + tie):
            hits += 1
    return hits / len(candidates)


def summary(sets) -> dict:
    """Plain means over sets, as MMEB does: by meta-task, in and out of distribution, overall.

    sets: {name: what `score` returns}; a mean over no set is None."""

    def mean(rows):
        if not rows:
            return None
        p_at_1 = float(np.mean([row["p_at_1"] for row in rows]))
        return {"p_at_1": p_at_1, "chance": float(np.mean([row["chance"] for row in rows]))}

    rows = list(sets.values())
    meta_tasks = {}  # in the order of the sets
    for name in dict.fromkeys(row["meta_task"] for row in rows):
        meta_tasks[name] = mean([row for row in rows if row["meta_task"] == name])
    return {
        "meta_tasks": meta_tasks,
        "ind": mean([row for row in rows if not row["ood"]]),  # MMEB: 20 sets
        "ood": mean([row for row in rows if row["ood"]]),  # MMEB: 16
        "overall": mean(rows),
    }


# --------------------------------------------------------------------------------- from a model


def encode_over_ranks(embedder, items, cfg, progress, bad=None) -> np.ndarray:
    """Embeddings of `items`, made by all ranks together; every rank gets all: (len(items), D).

    bad: a list for errors of items that cannot be read (their rows are NaN); None: they raise."""
    rank, world = ranks.rank(), ranks.world()
    errors = None if bad is None else []  # of this rank's items
    arguments = (cfg.chunk_tokens, cfg.workers, progress if rank == 0 else "", errors)
    part = agreement.together(lambda: embedder.encode(items[rank::world], *arguments))
    z = np.zeros((len(items), part.shape[1]), np.float32)  # (len(items), D)
    # Every world-th item was rank r's: put back in the order given.
    for r, (rows, rank_errors) in enumerate(ranks.gather_objects((part, errors))):
        z[r::world] = rows
        if rank_errors:
            bad.extend(rank_errors)
    return z


def score(embedder, task, cfg) -> dict:
    """Encodes a set, each item once. -> {"p_at_1", "chance", "queries", "meta_task", "ood", ...}"""
    items, row_of_key = [], {}  # the distinct items; an item's key -> its row of z

    def row_of(item):  # that of an equal item, or a new one
        if item.key not in row_of_key:
            row_of_key[item.key] = len(items)
            items.append(item)
        return row_of_key[item.key]

    queries, candidates = [], []  # as rows of z
    for query, choices in task.queries:
        queries.append(row_of(query))
        candidates.append([row_of(choice) for choice in choices])
    pool = [row_of(Item(*content)) for content in task.pool]
    z = encode_over_ranks(embedder, items, cfg, task.name)  # (items, D)
    if task.rights:  # one's own data: several may be right, and Recall@5 and 10 count too
        result = retrieval.measures(z[queries], z, candidates, task.rights, pool)
    else:
        chance = float(np.mean([1 / len(set(rows)) for rows in candidates]))
        result = {"p_at_1": precision_at_1(z[queries], z, candidates), "chance": chance}  # 0 ... 1
    result.update(queries=len(queries), **score_file.identity(task))
    # NaN, or a model that collapsed: the table must say it, for the score alone does not.
    if not np.isfinite(z).all():
        result["warning"] = "NaN in the embeddings"
    elif len(z) > 1 and z.std(0).max() < 1e-3:
        result["warning"] = "collapsed: all embeddings are alike"
    return result


def main(cfg):
    """The table, from flags to the overall mean."""
    # 1. The tasks and the model.
    device = agreement.join(cfg)
    cfg.model = cfg.model or trained_model()
    digest = checkpoint.same_model(cfg.model)
    scored = score_file.kept(cfg, digest)  # with --resume: the sets that an earlier run has done
    tasks = read_tasks(cfg.data, cfg.image_root, cfg.subsets, cfg.limit, cfg.seed)
    embedder = load_for(cfg, device)
    checkpoint.refuse_replaced(cfg.model, digest)

    # 2. Each set, those in distribution first.
    note = table.partial_note(cfg)
    sets = {}  # a set's name -> what `score` returns
    ranks.say(f"evaluating {cfg.model}\n{table.head(note)}")
    for ood, group in ((False, "in distribution"), (True, "out of distribution")):
        chosen = [task for task in tasks if task.ood == ood]
        if chosen:
            ranks.say(f"-- {group}")
        for task in chosen:
            if not score_file.holds(scored, task):
                scored[task.name] = score(embedder, task, cfg)
                score_file.keep(cfg, embedder, digest, scored)
            row = sets[task.name] = scored[task.name]
            ranks.say(table.line(f"  {task.name} ({task.meta_task})", row, table.ending(row)))

    # 3. The means, and the file.
    means = summary(sets)
    ranks.say(table.lines_of_means(means, note))
    score_file.finish(cfg, embedder, digest, sets, means)


if __name__ == "__main__":
    ranks.run(main, Config)
