"""Mines hard negatives: writes into a list of pairs, for each query, wrong targets that a model
takes for near. The nearest are often right and not named so: --first leaves them out.

    python -m tools.mine --data pairs.jsonl --out mined.jsonl --first 5 --last 8
    python contrastive.py --data mined.jsonl

Every distinct target of the list is ranked by its cosine with the query; the query's own targets
and negatives, and what equals one of them, are left out before ranks are counted. Ranks --first to
--last become `negatives`, behind those that a line has; all else of it stays. Pictures keep their
names: --out belongs beside the list, unless --image-root is given to both commands.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import json
import os
from dataclasses import dataclass
from functools import partial

import numpy as np

import model
from data import Item, read_pairs
from plumbing.config import ModelFlags, flag
from plumbing.errors import InputError, brief
from plumbing.formats import parse_content
from plumbing.lines import parse_json
from plumbing.ranks import run_command, say, setup
from plumbing.retrieval import all_rights
from plumbing.weights import trained_model
from plumbing.writing import holds_lines, refuse_no_list, refuse_other, refuse_unwritable, written

BLOCK = 1024  # queries whose cosines with all targets are in memory at a time


@dataclass
class Config(ModelFlags):
    """Flags of mining."""

    model: str = flag("", "empty: out/contrastive, else out/pretrain, else toy")
    data: str = flag("", "a .jsonl of pairs")
    out: str = flag("", "the same list with negatives")
    image_root: str = flag("", "where the pictures are; empty: beside the data")
    workers: int = flag(1, "loader processes", least=0, most=256)
    first: int = flag(5, "the nearest rank that is taken; 1: the nearest wrong target", least=1)
    last: int = flag(8, "the last rank that is taken", least=1)


def nearest_wrong(q, t, own, first, last) -> list:
    """Of each query the rows of t at ranks first to last, counted from 1 and from the nearest,
    its own left out. q (n, D), t (m, D); own[i]: the rows of t that are right for query i.
    -> n lists, shorter where there are fewer wrong ones."""
    chosen = []
    everything = np.arange(len(t))
    for start in range(0, len(q), BLOCK):
        scores = q[start : start + BLOCK] @ t.T  # (BLOCK, m)
        for row, right in zip(scores, own[start : start + BLOCK], strict=True):
            wrong = np.delete(everything, list(right))
            order = wrong[np.argsort(-row[wrong], kind="stable")]
            chosen.append(order[first - 1 : last].tolist())
    return chosen


class Targets:
    """The distinct targets of a list: equal content is one."""

    def __init__(self, pairs, raw_targets):
        """raw_targets: of each pair {its target as an Item: as the list has it}: see as_written."""
        self.items, self.raw = [], []  # as Items, and as the list has them
        self.pair_of = []  # of each the first pair that names it
        self.own = []  # of each pair: the rows of its query's targets and of its own negatives
        row_of = {}  # an item's key -> its row
        for i, targets in enumerate(raw_targets):
            for item, raw in targets.items():
                if item.key not in row_of:
                    row_of[item.key] = len(self.items)
                    self.items.append(item)
                    self.raw.append(raw)
                    self.pair_of.append(i)
        rights_of = all_rights((pair.query, pair.targets) for pair in pairs)
        for pair in pairs:
            keys = [item.key for item in (*rights_of[pair.query], *pair.negatives)]
            self.own.append({row_of[key] for key in keys if key in row_of})


def as_written(line, images) -> dict:
    """{target as an Item: as a line of the list has it}; equal ones count once. images: finds
    their pictures."""
    raws = line["target"] if isinstance(line["target"], list) else [line["target"]]
    return {Item(*parse_content(raw, images)): raw for raw in raws}


def refuse_few(targets, cfg):
    """InputError, before anything is embedded, where no query has a wrong target at --first."""
    most = max(len(targets.items) - len(own) for own in targets.own)
    if most < cfg.first:
        text = f"no query of {brief(cfg.data)} has more than {most:,} wrong targets, of "
        text += f"{len(targets.items):,} distinct ones; take a smaller one"
        raise InputError(f"--first {cfg.first:,}: {text}")


def refuse_not_finite(z, places, name):
    """InputError with the place of the first row of z (n, D) that no order can rank. places: what
    each row is, as "pairs.jsonl, line 7: its query"; name: of the model."""
    bad = np.flatnonzero(~np.isfinite(z).all(1))
    if len(bad):
        others = f" (and {len(bad) - 1:,} more are not)" if len(bad) > 1 else ""
        text = f"{places[bad[0]]} has an embedding that is not finite{others}"
        way_out = "take another model, or leave it out"
        raise InputError(f"{text}, by --model {brief(name)}; {way_out}")


def mine(embedder, cfg) -> list:
    """The list's lines, each with its negatives."""
    (pairs,) = read_pairs(cfg.data, cfg.image_root).values()
    source = pairs.source.raw  # the same reading: the file may change meanwhile
    lines = [parse_json(source.line(i)) for i in range(len(source))]
    raw_targets = [as_written(line, pairs.source.images) for line in lines]
    pairs = list(pairs)  # each line is parsed once, however often its pair is asked for
    targets = Targets(pairs, raw_targets)
    refuse_few(targets, cfg)
    queries = [pair.query for pair in pairs]
    z = embedder.encode(queries + targets.items, cfg.chunk_tokens, cfg.workers, "embedding")
    places = [f"{source.where(i)}: its query" for i in range(len(pairs))]
    places += [f"{source.where(i)}: its target" for i in targets.pair_of]
    refuse_not_finite(z, places, cfg.model)
    q, t = z[: len(queries)], z[len(queries) :]
    chosen = nearest_wrong(q, t, targets.own, cfg.first, cfg.last)
    per_line = cfg.last - cfg.first + 1  # negatives that are asked for
    few = sum(len(rows) < per_line for rows in chosen)
    seen = f"{len(pairs):,} pairs, {len(targets.items):,} distinct targets"
    say(f"{seen}; {few:,} lines get fewer than {per_line:,} negatives")
    mined = []
    for line, rows in zip(lines, chosen, strict=True):
        negatives = [*(line.get("negatives") or []), *(targets.raw[row] for row in rows)]
        mined.append({**line, "negatives": negatives})
    return mined


def main(argv):
    """The command line."""
    cfg = Config.parse(argv)
    if cfg.first > cfg.last:
        raise InputError(f"--first {cfg.first} is beyond --last {cfg.last}")
    if not cfg.data.lower().endswith(".jsonl"):
        raise InputError(f"--data {brief(cfg.data)}: mining takes a .jsonl of pairs")
    if os.path.realpath(cfg.data) == os.path.realpath(cfg.out):
        raise InputError(f"--out {brief(cfg.out)}: the list itself; give it another name")
    refuse_unwritable(cfg.out, "--out")
    refuse_other(cfg.out, "--out", partial(holds_lines, keys=("query",)), "list of pairs")
    refuse_no_list(cfg.out, "--out")
    cfg.model = cfg.model or trained_model()
    embedder = model.load_for(cfg, setup())
    say(f"mining with {brief(cfg.model)}")
    lines = mine(embedder, cfg)
    with written(cfg.out, "--out") as part:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        part.write_text(text, encoding="utf-8")
    say(f"wrote {cfg.out}")


if __name__ == "__main__":
    run_command(main)
