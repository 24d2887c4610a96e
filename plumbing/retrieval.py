"""Evaluation sets from files: MMEB's, and one's own pairs and captions, whose queries are compared
with all targets of the set, or with their own candidates where the file gives them. What is read is
plain: (name, meta-task, out of distribution?, queries, ...), of which data.py makes its Tasks.

Top to bottom: what is read - where the right one stands among the others."""

import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from plumbing import formats, mmeb
from plumbing.agreement import agree
from plumbing.errors import InputError, brief
from plumbing.folders import read_json
from plumbing.lines import Lazy, no_twins

SETS = "sets.json"  # of a folder in MMEB's layout: what kinds of sets are in it
DEPTHS = (5, 10)  # of Recall@k, for one's own data
TIE = 1e-6  # between cosines, as evaluate.precision_at_1 has it
BLOCK = 256  # queries whose scores against all targets are computed at a time
META_TASKS = ("Classification", "VQA", "Retrieval", "Grounding", "Other")


def read_tasks(source, image_root, subsets, limit) -> list:
    """The fields of a Task, for each set of a .jsonl of pairs, a folder with captions, a folder or
    hub id in MMEB's layout.

    A folder in MMEB's layout may hold sets.json, {name: {"meta_task": ..., "ood": true or false}},
    for sets that are none of MMEB's; without it they are "Other", and in distribution."""
    note = f"--data {brief(source, 60)}"  # each rank embeds its share of what it has read itself
    if formats.is_list(source):
        formats.refuse_subsets(source, subsets)
        pair_sets = formats.read_pair_sets(source, image_root)
        agree({"data (its digest)": formats.checked_digest(pair_sets.values())}, note)
        return [own_task(name, pairs, limit) for name, pairs in pair_sets.items()]
    named, tasks, digests = read_named(source), [], {}
    for name, queries in mmeb.eval_sets(source, image_root, subsets, limit).items():
        meta_task, ood = named.get(name) or mmeb.meta_task_of(name)
        tasks.append((name, meta_task, ood, queries))
        digests[f"{name} (its digest)"] = len(queries), queries.source.raw.digest
        digests[f"{name} (its kind)"] = meta_task, ood  # by which the sets are put in order
    agree(digests, note)
    return tasks


def read_named(folder) -> dict:
    """{set: (meta-task, out of distribution?)} of a folder's sets.json; {} where there is none."""
    file, named = Path(folder, SETS), {}
    for name, x in read_json(folder, file.name, no_twins).items():
        known = isinstance(x, dict) and x.get("meta_task") in META_TASKS
        if not known or set(x) - {"meta_task", "ood"} or not isinstance(x.get("ood", False), bool):
            wanted = f'{{"meta_task": one of {", ".join(META_TASKS)}, "ood": true or false}}'
            raise InputError(f"{file}: {brief(name)} must be {wanted}")
        if not os.path.isdir(os.path.join(folder, name)):
            raise InputError(f"{file}: names {brief(name)}, and there is no folder {brief(name)}")
        named[name] = (x["meta_task"], x.get("ood", False))
    return named


def all_rights(lines) -> dict:
    """{query: its right targets, in their order} of a list's (query, targets): a query may stand on
    several lines, and what is right by one of them is right."""
    rights = defaultdict(dict)
    for query, targets in lines:
        rights[query].update(dict.fromkeys(targets))
    return rights


def own_task(name, pairs, limit) -> tuple:
    """Pairs as an evaluation set, all six fields of a Task. A query's candidates are its targets
    and, where its line has some, its hard negatives; without these it is compared with the distinct
    targets of the whole file. Of a query that stands on several lines all of their targets are
    right. limit > 0: so many queries at most."""
    lines = [(content, targets) for content, targets, _ in pairs]  # each is read once
    rights_of = all_rights(lines)
    pool = dict.fromkeys(target for _, targets in lines for target in targets)  # in their order

    def query(i):
        content, _, negatives = pairs[i]
        rights = rights_of[content]
        return content, [*rights, *(wrong for wrong in negatives if wrong not in rights)]

    queries = Lazy(len(pairs), query, pairs.source).first(limit)
    rights = [len(rights_of[content]) for content, _ in lines[: len(queries)]]
    return name, "Retrieval", False, queries, rights, list(pool)


# ------------------------------------------------------------------------- where the right one is


def ranks_of_right(q, c, candidates, rights, pool) -> np.ndarray:
    """The rank, from 0, of each query's best right candidate: how many wrong ones score as high, up
    to TIE, or higher. 0 is a hit. A right one that is NaN ranks last; a wrong one counts. (n,)

    q (n, D) and c (m, D) unit-length. candidates[i]: rows of c, the first rights[i] right; where
    there are no others, all rows of `pool` but the right ones are wrong candidates."""
    pool = np.array(pool)
    column = {row: j for j, row in enumerate(pool)}
    targets = c[pool]  # (columns, D)
    ranks = np.zeros(len(q), int)
    for first in range(0, len(q), BLOCK):
        block = q[first : first + BLOCK] @ targets.T  # (b, columns)
        for i, scores in enumerate(block, first):
            right, others = candidates[i][: rights[i]], candidates[i][rights[i] :]
            best = (c[right] @ q[i]).max()  # NaN where one of them is
            if others:
                wrong = c[[row for row in dict.fromkeys(others) if row not in right]] @ q[i]
            else:
                wrong = np.delete(scores, [column[row] for row in right])
            not_beaten = ~(best > wrong + TIE)
            ranks[i] = not_beaten.sum() if np.isfinite(best) else len(c)
    return ranks


def measures(q, c, candidates, rights, pool) -> dict:
    """Precision@1, its chance, and Recall@5 and 10 (the share of queries with a right target among
    the first k), each 0 ... 1, of one's own data. Arguments: see ranks_of_right."""
    ranks = ranks_of_right(q, c, candidates, rights, pool)
    chances = []
    for rows, n in zip(candidates, rights, strict=True):
        all_rows = set(rows) if len(rows) > n else pool
        chances.append(n / len(all_rows))
    result = {"p_at_1": float((ranks == 0).mean()), "chance": float(np.mean(chances))}
    for k in DEPTHS:
        result[f"recall_at_{k}"] = float((ranks < k).mean())
    return result
