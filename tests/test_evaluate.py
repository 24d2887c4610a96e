"""Precision@1: a hit is a query whose right candidate is nearer than every other one."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from checks import close, equal, expect

import evaluate
from data import Item, Task, read_tasks
from plumbing import checkpoint, retrieval, score_file, table
from plumbing.errors import InputError
from tools.export import export


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def random_case(n=200, m=50, k=10, D=16, seed=0, signal=0.0):
    """n queries, m candidate rows, k candidates each, the first the right one."""
    rng = np.random.default_rng(seed)
    c = unit(rng.standard_normal((m, D)))
    candidates = [rng.choice(m, k, replace=False).tolist() for _ in range(n)]
    right = c[[rows[0] for rows in candidates]]
    return unit(rng.standard_normal((n, D)) + signal * right), c, candidates


def loop(q, c, candidates, tie=1e-6):
    hits = 0
    for i, rows in enumerate(candidates):
        scores = []
        for r in rows:
            scores.append(sum(float(a) * float(b) for a, b in zip(c[r], q[i], strict=True)))
        others = [s for s, r in zip(scores, rows, strict=True) if r != rows[0]]
        hits += all(scores[0] > s + tie for s in others)
    return hits / len(candidates)


def collapsed(n=20, k=5):
    z = unit(np.ones((n, 8)))
    candidates = [list(np.arange(i, i + k) % n) for i in range(n)]
    return z, z, candidates


def check_precision(precision):
    for seed, signal in enumerate((0.0, 2.0, 8.0)):
        q, c, candidates = random_case(seed=seed, signal=signal)
        close(precision(q, c, candidates), loop(q, c, candidates), f"signal {signal}", 1e-6)
    got = precision(*collapsed())
    equal(got, 0.0, "all embeddings equal: each query is a tie, and a tie is no hit")
    q, c, candidates = random_case(signal=20)
    equal(precision(q, c, candidates), 1.0, "queries beside their targets")
    noise = 1e-8 * np.random.default_rng(0).standard_normal((20, 8))
    q, c, candidates = collapsed()
    equal(precision(q, (c + noise).astype(np.float32), candidates), 0.0, "collapsed, and rounding")


def argmax(q, c, candidates, tie=1e-6):
    return float(np.mean([np.argmax(c[r] @ x) == 0 for x, r in zip(q, candidates, strict=True)]))


def no_margin(q, c, candidates, tie=1e-6):
    return evaluate.precision_at_1(q, c, candidates, tie=0)


def all_rows(q, c, candidates, tie=1e-6):
    return float(np.mean((q @ c.T).argmax(1) == [r[0] for r in candidates]))


def test_precision_equals_a_loop_and_a_tie_is_no_hit():
    """precision_at_1 equals a loop over cosines; a collapsed model scores 0, a perfect one 1."""
    check_precision(evaluate.precision_at_1)


@pytest.mark.parametrize("wrong", [argmax, all_rows])
def test_the_precision_check_fails_for_a_wrong_metric(wrong):
    """Negative control: argmax gives a collapsed model 100 %; all rows are not a query's
    candidates."""
    equal(argmax(*collapsed()), 1.0, "the trap: the right one stands at index 0")
    with pytest.raises(AssertionError):
        check_precision(wrong)


def test_rounding_decides_nothing():
    """Negative control of `tie`: scores equal up to rounding are a tie, with a margin of 0 they
    would be decided by the last bit."""
    rng = np.random.default_rng(1)
    q = unit(np.ones((400, 64)))
    c = (q + 1e-7 * rng.standard_normal(q.shape)).astype(np.float32)
    candidates = [[i, (i + 1) % 400] for i in range(400)]
    equal(evaluate.precision_at_1(q, c, candidates), 0.0, "within 1e-6")
    expect(no_margin(q, c, candidates) > 0.1, no_margin(q, c, candidates), "> 0.1", "too exact")


def test_nan_is_never_a_hit():
    """NaN in the query, in the right candidate or in another one: no hit, rivals or none. Without
    a rival all else is a hit."""
    q, c, candidates = random_case(n=4, m=12, k=3, signal=20)
    candidates = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    q = c[[0, 3, 6, 9]].copy()
    equal(evaluate.precision_at_1(q, c, candidates), 1.0, "before")
    equal(evaluate.precision_at_1(q[3:], c, [[9]]), 1.0, "no rival: a hit")
    last = c.copy()
    q[0], c[3], last[3], c[7], last[8] = [math.nan] * 5
    for rows in (c, last):  # max([0.1, nan]) is 0.1, and max([nan, 0.1]) NaN
        equal(evaluate.precision_at_1(q, rows, candidates), 0.25, "only the fourth is left")
    equal(argmax(q, c, candidates) > 0.25, True, "negative control: argmax takes a NaN for a hit")
    for only in ([0], [0, 0]):
        equal(evaluate.precision_at_1(q[:1], c, [only]), 0.0, "a NaN query without a rival")


def test_the_right_row_twice_counts_once():
    """A candidate that *is* the right one (the same row) is no rival; an equal one of another row
    is."""
    q, c, _ = random_case(n=1, m=4, k=4)
    q[0] = c[2]
    equal(evaluate.precision_at_1(q, c, [[2, 0, 2, 1]]), 1.0, "row 2 is the right one, both times")
    c[3] = c[2]
    equal(evaluate.precision_at_1(q, c, [[2, 0, 3, 1]]), 0.0, "row 3 only looks the same: a tie")


def test_without_information_the_score_is_chance():
    """Random embeddings hit 1 / 10 of ten candidates, within four standard errors."""
    got = evaluate.precision_at_1(*random_case(n=3000, m=400, seed=3))
    expect(abs(got - 0.1) < 4 * math.sqrt(0.09 / 3000), got, 0.1, "1 / len(candidates)")


def test_the_order_of_the_other_candidates_does_not_matter():
    """Only index 0 has a meaning."""
    q, c, candidates = random_case(signal=2)
    turned = [[rows[0], *rows[:0:-1]] for rows in candidates]
    want = evaluate.precision_at_1(q, c, candidates)
    equal(evaluate.precision_at_1(q, c, turned), want, "reversed candidates")


def test_the_summary_is_a_plain_mean_over_sets():
    """By meta-task, in and out of distribution, overall: each set counts once, however large it
    is."""

    def result(p_at_1, meta_task, ood, queries):
        numbers = {"p_at_1": p_at_1, "chance": p_at_1 / 2, "queries": queries}
        return {**numbers, "meta_task": meta_task, "ood": ood}

    sets = {
        "a": result(1.0, "VQA", False, 1000),
        "b": result(0.4, "VQA", True, 10),
        "c": result(0.1, "Retrieval", False, 10),
    }
    got = evaluate.summary(sets)
    close(got["meta_tasks"]["VQA"]["p_at_1"], 0.7, "not weighted by queries", 1e-12)
    close(got["meta_tasks"]["Retrieval"]["p_at_1"], 0.1, "one set", 1e-12)
    close(got["ind"]["p_at_1"], 0.55, "a and c", 1e-12)
    close(got["ood"]["p_at_1"], 0.4, "b", 1e-12)
    close(got["overall"]["p_at_1"], 0.5, "the mean of three, not of two meta-tasks", 1e-12)
    close(got["overall"]["chance"], 0.25, "chance is averaged alike", 1e-12)
    del sets["b"]
    equal(evaluate.summary(sets)["ood"], None, "no such set, no number")


def test_a_set_encodes_each_item_once_and_scores_its_own_candidates(shared, monkeypatch):
    """score: equal items are one row; the result holds the score, chance and number of queries; a
    model whose embeddings are all alike scores 0 and is called collapsed."""
    words = ["red", "green", "blue"]
    queries = []
    for word in words:
        others = [Item(x) for x in words if x != word]
        queries.append((Item(word), [Item(word), *others, Item(word)]))
    task = Task("words", "Classification", False, queries)
    seen = []
    encode = evaluate.encode_over_ranks

    def counting(embedder, items, cfg, progress):
        seen.extend(items)
        equal(progress, "words", "a bar with the name of the set")
        return encode(embedder, items, cfg, progress)

    monkeypatch.setattr(evaluate, "encode_over_ranks", counting)
    cfg = evaluate.Config(workers=0)
    got = evaluate.score(shared, task, cfg)
    equal(len(seen), 3, "queries and candidates are the same three items")
    equal((got["p_at_1"], got["queries"], got["ood"]), (1.0, 3, False), "a text beside itself")
    close(got["chance"], 1 / 3, "three distinct candidates", 1e-9)
    alike, nan = unit(np.ones((3, 4))), np.full((3, 4), np.nan)
    for z, warning in ((alike, "collapsed"), (nan, "NaN")):
        monkeypatch.setattr(evaluate, "encode_over_ranks", lambda *_, z=z: z)
        got = evaluate.score(shared, task, cfg)
        equal(got["p_at_1"], 0.0, warning)
        expect(warning in got.get("warning", ""), got, warning, "the reader must see it")


def test_a_query_is_scored_by_its_own_embedding(monkeypatch):
    """Not by that of its right candidate, which would be a hit each time, or of another row."""
    angle_of = {"cold": 0.0, "ice": 0.1, "warm": 0.3, "fire": 1.5}

    def angles(embedder, items, cfg, progress):
        angle = np.array([angle_of[item.text] for item in items])
        return np.stack([np.cos(angle), np.sin(angle)], 1)

    monkeypatch.setattr(evaluate, "encode_over_ranks", angles)
    ice, fire = Item("ice"), Item("fire")
    queries = [(Item("cold"), [ice, fire]), (Item("warm"), [fire, ice])]
    task = Task("words", "Classification", False, queries)
    equal(evaluate.score(None, task, None)["p_at_1"], 0.5, "warm is nearer to ice than to fire")


def test_the_chance_of_a_set_is_the_mean_of_its_queries_own(shared):
    """Two candidates and four: (1/2 + 1/4) / 2, not 1 / 3."""
    red, green, blue, grey = map(Item, ("red", "green", "blue", "grey"))
    queries = [(red, [red, green]), (blue, [blue, red, green, grey])]
    task = Task("unequal", "Classification", False, queries)
    got = evaluate.score(shared, task, evaluate.Config(workers=0))
    equal(got["chance"], 0.375, "score")


def test_of_a_single_embedding_nobody_can_say_that_it_is_like_the_others(shared):
    """A set whose only item is its own right answer: there is no other one, and no collapse."""
    task = Task("one", "Classification", False, [(Item("red"), [Item("red")])])
    got = evaluate.score(shared, task, evaluate.Config(workers=0))
    equal((got["p_at_1"], got.get("warning")), (1.0, None), "evaluate.score")


@pytest.mark.parametrize(("rank", "shown"), [(0, "a set"), (1, "")])
def test_of_several_ranks_one_draws_a_bar(monkeypatch, rank, shown):
    """Eight would be drawn over each other on one screen."""
    seen = []

    def encode(items, chunk_tokens, workers, progress, bad):
        seen.append(progress)
        return np.zeros((len(items), 2), np.float32)

    monkeypatch.setattr(evaluate.ranks, "rank", lambda: rank)
    monkeypatch.setattr(evaluate.ranks, "world", lambda: 2)
    monkeypatch.setattr(evaluate.ranks, "gather_objects", lambda mine: [mine, mine])
    monkeypatch.setattr(evaluate.agreement, "together", lambda work: work())
    embedder, items = SimpleNamespace(encode=encode), [Item("a"), Item("b")]
    evaluate.encode_over_ranks(embedder, items, evaluate.Config(), "a set")
    equal(seen, [shown], "evaluate.encode_over_ranks")


# ------------------------------------------------------------------------------ one's own data


def places_in_loops(q, c, candidates, rights, pool, tie=1e-6):
    """Wrong ones that are not beaten by the best right one, of each query."""
    found = []
    for i, rows in enumerate(candidates):
        right, others = rows[: rights[i]], rows[rights[i] :]
        wrong = {r for r in (others or pool) if r not in right}
        best = max(float(c[r] @ q[i]) for r in right)
        found.append(sum(not best > float(c[r] @ q[i]) + tie for r in wrong))
    return found


def own_case(seed, n=600, m=80, D=12):
    """Queries with one to three right rows; every third has candidates of its own."""
    rng = np.random.default_rng(seed)
    c, q, candidates, rights = unit(rng.standard_normal((m, D))), [], [], []
    for i in range(n):
        rows, P = rng.choice(m, 12, replace=False).tolist(), int(rng.integers(1, 4))
        candidates.append(rows if i % 3 == 0 else rows[:P])
        rights.append(P)
        q.append(c[rows[0]] + 0.6 * rng.standard_normal(D))
    return unit(np.array(q)), c, candidates, rights, list(range(m))


@pytest.mark.parametrize("seed", range(3))
def test_places_equal_a_loop(seed):
    """Against all targets but its own right ones, or against its own candidates; with ties; more
    queries than a block."""
    case = own_case(seed)
    case[1][7] = case[1][9]  # two targets alike
    equal(
        retrieval.ranks_of_right(*case).tolist(),
        places_in_loops(*case),
        "rank of the best right one",
    )


def test_with_one_right_candidate_it_is_the_papers_precision():
    """Two routes to one number, for collapsed embeddings and NaN too."""
    for q, c, candidates in (random_case(signal=2), random_case(signal=20), collapsed()):
        for spoil in (False, True):
            if spoil:
                q = q.copy()
                q[::4] = math.nan
            got = retrieval.measures(q, c, candidates, [1] * len(q), [0])
            close(got["p_at_1"], evaluate.precision_at_1(q, c, candidates), f"NaN: {spoil}", 1e-12)


def test_recall_counts_the_first_k():
    """A query whose right target is third of all: no hit, but recalled at 5; one that is eighth:
    at 10. Two right targets: the better one counts. By chance 1 / 12, and 2 / 12."""
    c = unit(np.stack([np.cos(np.arange(12) / 12), np.sin(np.arange(12) / 12)], 1))
    q, pool = c[[0, 0, 0, 0]], list(range(12))
    got = retrieval.measures(q, c, [[0], [2], [7], [11, 0]], [1, 1, 1, 2], pool)
    equal([got[k] for k in ("p_at_1", "recall_at_5", "recall_at_10")], [0.5, 0.75, 1.0], "in order")
    close(got["chance"], (3 / 12 + 2 / 12) / 4, "right ones among all", 1e-12)
    got = retrieval.measures(q, c, [[4], [5], [9], [10]], [1] * 4, pool)
    equal([got["recall_at_5"], got["recall_at_10"]], [0.25, 0.75], "fifth, sixth, tenth, eleventh")


def own_pairs(folder):
    """Four pairs: an equal target twice, two right ones, candidates of its own."""
    rows = [
        {"query": {"text": "one"}, "target": {"text": "1"}},
        {"query": {"text": "eins"}, "target": {"text": "1"}},
        {"query": {"text": "two"}, "target": [{"text": "2"}, {"text": "zwei"}]},
        {"query": {"text": "three"}, "target": {"text": "3"}, "negatives": [{"text": "4"}]},
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_ones_own_pairs_are_compared_with_all_targets_or_their_own_candidates(tmp_path, shared):
    """Four distinct targets, of which a query's own right ones are no rivals; hard negatives where
    the line has some. --limit cuts the queries, and not the targets."""
    (task,) = read_tasks(own_pairs(tmp_path))
    equal((task.name, task.meta_task, task.ood), ("pairs", "Retrieval", False), "a set")
    equal([text for text, _ in task.pool], ["1", "2", "zwei", "3"], "distinct, in their order")
    equal([[x.text for x in items] for _, items in task.queries],
          [["1"], ["1"], ["2", "zwei"], ["3", "4"]], "right ones first")  # fmt: skip
    got = evaluate.score(shared, task, evaluate.Config(workers=0))
    close(got["chance"], (1 / 4 + 1 / 4 + 2 / 4 + 1 / 2) / 4, "right ones among all", 1e-9)
    equal((got["queries"], got["recall_at_10"]), (4, 1.0), "there are no ten")
    (few,) = read_tasks(own_pairs(tmp_path), limit=2)
    equal((len(few.queries), len(few.pool)), (2, 4), "limit=2")
    equal(evaluate.score(shared, few, evaluate.Config(workers=0))["queries"], 2, "limit=2")
    with pytest.raises(InputError, match="--subsets A: chooses sets of MMEB or shapes"):
        read_tasks(own_pairs(tmp_path), subsets="A")


def test_all_targets_of_a_query_on_several_lines_are_right(tmp_path):
    """A caption of two pictures finds both of them; a line's negative that is right by another line
    is no rival. Without that the best of models would score 0."""
    rows = [
        {"query": {"text": "a"}, "target": {"text": "1"}},
        {"query": {"text": "b"}, "target": {"text": "2"}},
        {"query": {"text": "a"}, "target": {"text": "3"}, "negatives": [{"text": "1"}]},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = read_tasks(str(file))
    equal(list(task.rights), [2, 1, 2], "of each line")
    equal([[x.text for x in items] for _, items in task.queries],
          [["1", "3"], ["2"], ["1", "3"]], "right ones")  # fmt: skip


def test_ranks_that_read_other_data_embed_nothing(tmp_path, monkeypatch):
    """Of a list, and of a folder like MMEB: each embeds its share of what it has read itself, and
    another edition of as many examples would be scored, glued together."""
    export(str(tmp_path), 2)
    compared, file = [], tmp_path / "own.jsonl"
    monkeypatch.setattr(retrieval, "agree", lambda mine, note: compared.append(mine))
    for target in ("b", "b", "c"):
        texts = (("a", "x"), ("b", target))
        lines = [{"query": {"text": query}, "target": {"text": text}} for query, text in texts]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        read_tasks(str(file))
    first, again, other = compared
    assert first == again != other and list(first) == ["data (its digest)"], compared
    folder = tmp_path / "MMEB-eval"
    read_tasks(str(folder))
    changed = next(folder.glob("vqa/test-*.parquet"))
    rows = pq.read_table(changed)
    pq.write_table(pyarrow.concat_tables([rows, rows]).slice(0, len(rows) + 1), changed)
    read_tasks(str(folder))
    *_, sets, others = compared
    assert (
        len(sets) == 2 * 15
        and sets != others
        and sets["i2t (its digest)"] == others["i2t (its digest)"]
    )


def test_ranks_that_would_score_the_sets_in_another_order_embed_nothing(tmp_path, monkeypatch):
    """By the sets.json of their nodes' disks: shares of two sets would be glued together."""
    export(str(tmp_path), 2)
    compared, folder = [], tmp_path / "MMEB-eval"
    monkeypatch.setattr(retrieval, "agree", lambda mine, note: compared.append(mine))
    read_tasks(str(folder))
    kinds = json.loads((folder / "sets.json").read_text())
    kinds["i2t"]["ood"] = True
    (folder / "sets.json").write_text(json.dumps(kinds))
    read_tasks(str(folder))
    one, other = compared
    equal([name for name in one if one[name] != other[name]], ["i2t (its kind)"], "what differs")


def test_own_data_go_through_the_script_to_the_table_and_the_json(tmp_path, capsys):
    """Pairs, then pictures with captions; Recall@5 and 10 stand behind the queries. A picture that
    is lost is named before anything is embedded."""
    from tools.export import export_captions

    scores = tmp_path / "s.json"
    flags = dict(model="toy-random", workers=0, json=str(scores))
    evaluate.main(evaluate.Config(data=own_pairs(tmp_path), **flags))
    line = next(x for x in capsys.readouterr().out.splitlines() if "pairs (Retrieval)" in x)
    expect(line.split()[4:6] == ["4", "R@5"] and "R@10 100.0" in line, line, "4 R@5 ... R@10", "")
    row = json.loads(scores.read_text())["sets"]["pairs"]
    equal(set(row) >= {"p_at_1", "recall_at_5", "recall_at_10", "queries"}, True, str(row))
    export_captions(tmp_path, 3)
    evaluate.main(evaluate.Config(data=str(tmp_path / "captions"), **flags))
    equal(
        list(json.loads(scores.read_text())["sets"]), ["captions_i2t", "captions_t2i"], "both ways"
    )
    (tmp_path / "captions" / "00001.png").unlink()
    with pytest.raises(InputError, match="00001.png: no such picture"):
        read_tasks(str(tmp_path / "captions"))


def test_a_toy_set_has_as_many_queries_as_its_cap_says():
    """`vqa:500` is 500, `vqa` 100; --limit cuts both."""
    for subsets, limit, want in (("vqa:500", 0, 500), ("vqa", 0, 100), ("vqa:500", 20, 20),
                                 ("vqa:5", 20, 5), ("vqa", 300, 300)):  # fmt: skip
        (task,) = read_tasks(subsets=subsets, limit=limit)
        equal(len(task.queries), want, f"--subsets {subsets} --limit {limit}")


def test_scores_that_cannot_be_written_leave_the_old_ones(tmp_path, shared, monkeypatch):
    """The disk is full at the end: one line, and the file of before."""
    file = tmp_path / "s.json"
    old = '{"overall": 0.5}'
    file.write_text(old)

    def full(*_):
        raise OSError(28, "No space left on device")

    cfg = evaluate.Config(json=str(file))
    equal(score_file.kept(cfg, "digest"), {}, "without --resume")
    monkeypatch.setattr(score_file, "versions", dict)
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(InputError, match="--json .*s.json: not written: No space left on device"):
        score_file.finish(cfg, shared, "digest", {}, score_file.NOT_YET)
    equal((file.read_text(), len(list(tmp_path.iterdir()))), (old, 1), "and no half of a new one")


def test_scores_are_not_written_over_the_data(tmp_path):
    """--data pairs.jsonl --json pairs.jsonl: a slip that would cost the data."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("{}")
    with pytest.raises(InputError, match="--json .*would be written over what is read"):
        score_file.kept(evaluate.Config(data=str(file), json=str(file)), "digest")


def mmeb_folder(folder, *names):
    """A folder in MMEB's layout: sets of three queries with two candidates each."""
    columns = {"qry_text": ["q"] * 3, "qry_img_path": [""] * 3}
    columns.update(tgt_text=[["t", "u"]] * 3, tgt_img_path=[["", ""]] * 3)
    for name in names:
        (folder / name).mkdir()
        pq.write_table(pyarrow.table(columns), folder / name / "test-0.parquet")
    return folder


def test_a_set_s_meta_task_is_mmebs_or_what_sets_json_says(tmp_path):
    """And whether it is out of distribution: what the means are over."""
    folder = mmeb_folder(tmp_path, "GQA", "CIRR", "mine", "yours", "nobody's")
    named = {"mine": {"meta_task": "VQA", "ood": True}, "yours": {"meta_task": "Grounding"}}
    (folder / "sets.json").write_text(json.dumps(named))
    got = {task.name: (task.meta_task, task.ood) for task in read_tasks(str(folder))}
    want = {"GQA": ("VQA", True), "CIRR": ("Retrieval", False), "mine": ("VQA", True)}
    want.update({"yours": ("Grounding", False), "nobody's": ("Other", False)})
    equal(got, want, "retrieval.read_named, mmeb.meta_task_of")
    equal([len(task.queries) for task in read_tasks(str(folder), limit=2)], [2] * 5, "limit")
    for subsets, limit, want in (("GQA:2", 0, 2), ("GQA:2", 1, 1), ("GQA:1", 2, 1)):
        (task,) = read_tasks(str(folder), None, subsets, limit)
        equal(len(task.queries), want, f"--subsets {subsets} --limit {limit}")


@pytest.mark.parametrize("kind", ["Classification", "VQA", "Retrieval", "Grounding", "Other"])
def test_sets_json_may_name_each_meta_task(tmp_path, kind):
    """Also "Other", so that such a set can be out of distribution."""
    (tmp_path / "A").mkdir()
    (tmp_path / "sets.json").write_text(json.dumps({"A": {"meta_task": kind, "ood": True}}))
    equal(retrieval.read_named(tmp_path), {"A": (kind, True)}, "retrieval.META_TASKS")


def test_a_right_target_that_stands_twice_is_one(tmp_path, shared):
    """In one line, or right and "wrong" at once: it is no rival of itself, and no better chance."""
    same = {"query": {"text": "two"}, "target": [{"text": "2"}, {"text": "2"}]}
    own = {"query": {"text": "3"}, "target": {"text": "3"}}
    own["negatives"] = [{"text": "4"}, {"text": "4"}, {"text": "5"}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (same, own)))
    (task,) = read_tasks(str(file))
    equal((list(task.rights), [x.text for x in task.pool]), ([1, 1], ["2", "3"]), "distinct")
    got = evaluate.score(shared, task, evaluate.Config(workers=0))
    close(got["chance"], (1 / 2 + 1 / 3) / 2, "distinct candidates", 1e-9)
    c = unit(np.eye(3))
    equal(retrieval.ranks_of_right(c[:1], c, [[0, 0, 1]], [1], [0, 1, 2]).tolist(), [0], "no rival")


def test_places_do_not_depend_on_the_block(monkeypatch):
    """Queries are scored a block at a time, each against all targets."""
    q, c, candidates = random_case(n=60, m=40, k=1)
    rights, pool = [1] * 60, sorted({row for rows in candidates for row in rows})
    whole = retrieval.ranks_of_right(q, c, candidates, rights, pool)
    monkeypatch.setattr(retrieval, "BLOCK", 7)
    equal(
        retrieval.ranks_of_right(q, c, candidates, rights, pool).tolist(), whole.tolist(), "BLOCK"
    )


def test_what_stands_on_the_screen_is_what_was_measured():
    """In percent; a dash where there is nothing to average; behind it recall, and a warning."""
    row = {"p_at_1": 0.256, "chance": 0.125, "queries": 40}
    equal(table.line("GQA", row).split(), ["GQA", "25.6", "12.5"], "line")
    equal(table.line("OOD", None).split(), ["OOD", "-"], "line")
    whole = table.line("GQA", row, table.ending(row))
    for column, cell in (("score", "25.6"), ("chance", "12.5"), ("queries", "40")):
        shown = ((table.head("")[1:], column), (whole, cell))
        above, below = (text.index(x) + len(x) for text, x in shown)
        equal(below, above, f"{cell} ends where {column} does")
    equal(len(table.line("OOD", None)), len(table.line("OOD", row)), "a dash ends there, too")
    row.update(recall_at_5=0.5, recall_at_10=0.75, warning="collapsed")
    equal(table.ending(row).split(), ["40", "R@5", "50.0", "R@10", "75.0", "collapsed"], "ending")
    width = len(table.ending({"queries": 4000}))
    equal(len(table.ending({"queries": 7})), width, "what follows stands in a column")
    for flags, note in (
        ({}, ""), ({"limit": 20}, "(partial: --limit 20)"),
        ({"subsets": "vqa"}, "(partial: --subsets)"),
        ({"limit": 5, "subsets": "vqa"}, "(partial: --limit 5, --subsets)"),
    ):  # fmt: skip
        equal(table.partial_note(evaluate.Config(**flags)), note, f"{flags}")
        equal(table.head(note).split("queries"), [table.head("")[:-7], note and f" {note}"], "head")


@pytest.mark.parametrize("flags", [{}, {"limit": 5}, {"subsets": "vqa"}])
def test_the_json_holds_the_scores_and_what_they_belong_to(tmp_path, flags):
    """Field by field; a mean over no sets is null."""
    cfg = evaluate.Config(model="toy-random", json=str(tmp_path / "s.json"), **flags)
    embedder = SimpleNamespace(style="coma", pooling="mean", K=3)
    sets = {"vqa": {"p_at_1": 0.5, "chance": 0.1, "queries": 10}}
    mean = {"p_at_1": 0.5, "chance": 0.1}
    means = {"meta_tasks": {"VQA": mean}, "ind": mean, "ood": None, "overall": mean}
    score_file.finish(cfg, embedder, "abc on def", sets, means)
    got = json.loads((tmp_path / "s.json").read_text())
    want = {
        "sets": sets, "meta_tasks": {"VQA": 0.5}, "ind": 0.5, "ood": None, "overall": 0.5,
        "model": "toy-random", "model_digest": "abc on def", "prompt": "coma", "pooling": "mean",
        "K": 3,
        "partial": flags != {}, "config": asdict(cfg), "versions": score_file.versions(),
    }  # fmt: skip
    equal(got, want, "score_file.finish")
    with pytest.raises(InputError, match="--json .*: a folder; give the path of a file"):
        score_file.kept(evaluate.Config(json=str(tmp_path)), "")


def test_scores_go_onto_the_models_card_however_its_folder_is_spelled(tmp_path, monkeypatch):
    """--json ./m/scores.json of --model m; scores of another name are nobody's card."""
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    cards = []
    monkeypatch.setattr(score_file.card, "write", cards.append)
    embedder = SimpleNamespace(style="chat", pooling="mean", K=4)
    for json_file in ("./m/scores.json", str(tmp_path / "m/scores.json"), "m/other.json"):
        cfg = evaluate.Config(model="m", json=json_file)
        score_file.keep(cfg, embedder, "digest", {})
        score_file.finish(cfg, embedder, "digest", {}, score_file.NOT_YET)
    equal(cards, ["m", "m"], "once each, when all is scored")


def stopped(monkeypatch, n) -> list:
    """Scoring breaks off after n sets. -> the names of those that are scored from here on."""
    names, score = [], evaluate.score

    def score_some(embedder, task, cfg):
        if len(names) == n:
            raise InputError("a bad picture")
        names.append(task.name)
        return score(embedder, task, cfg)

    monkeypatch.setattr(evaluate, "score", score_some)
    return names


def test_an_interrupted_evaluation_goes_on_with_the_sets_that_are_left(
    tmp_path, monkeypatch, capsys
):
    """It breaks in its third set. Without --resume the next one is refused; with it the table and
    the file are those of a run that was not interrupted, as of one that has nothing left to do."""
    flags = dict(model="toy-random", limit=2, workers=0)
    whole, file = tmp_path / "whole.json", tmp_path / "s.json"
    evaluate.main(evaluate.Config(json=str(whole), **flags))
    want, shown = json.loads(whole.read_text()), capsys.readouterr().out
    names = list(want["sets"])
    with monkeypatch.context() as patch, pytest.raises(InputError, match="a bad picture"):
        stopped(patch, 2)
        evaluate.main(evaluate.Config(json=str(file), **flags))
    begun = json.loads(Path(f"{file}.unfinished").read_text())
    equal((list(begun["sets"]), begun["overall"]), (names[:2], None), "what is kept")
    equal(file.exists(), False, "no scores before the last set")
    with pytest.raises(InputError, match=r"s.json.unfinished: .*--resume goes on with it"):
        evaluate.main(evaluate.Config(json=str(file), **flags))
    scored = stopped(monkeypatch, None)
    for left in (names[2:], []):
        capsys.readouterr()
        evaluate.main(evaluate.Config(json=str(file), resume=True, **flags))
        equal(scored, left, "what was scored")
        equal(capsys.readouterr().out, shown, "the table")
        got = json.loads(file.read_text())
        equal(got.pop("config") | {"json": str(whole), "resume": False}, want["config"], "flags")
        equal(got, {name: x for name, x in want.items() if name != "config"}, "the file")
        equal(sorted(x.name for x in tmp_path.iterdir()), ["s.json", "whole.json"], "no others")
        scored.clear()


ROW = {"p_at_1": 0.5, "chance": 0.1, "queries": 10, "meta_task": "VQA", "ood": False}
EMBEDDER = SimpleNamespace(style="chat", pooling="mean", K=4)


def test_a_set_that_is_scored_no_longer_counts_where_it_is_gone(tmp_path, monkeypatch):
    """It was among the data when an earlier run scored it."""
    file = tmp_path / "s.json"
    cfg = evaluate.Config(model="toy-random", subsets="vqa", limit=2, workers=0, json=str(file))
    digest = checkpoint.same_model("toy-random")
    vqa = dict(ROW, p_at_1=0.25, data_digest=0)
    score_file.keep(cfg, EMBEDDER, digest, {"gone": ROW, "vqa": vqa})
    cfg.resume = True
    evaluate.main(cfg)
    got = json.loads(file.read_text())
    equal((list(got["sets"]), got["overall"]), (["vqa"], 0.25), "sets, and their mean")


def test_sets_of_data_that_have_changed_are_scored_again(tmp_path, monkeypatch, capsys):
    """Of pictures with captions both ways; of MMEB's layout the one set whose table is another, and
    the one that sets.json calls otherwise. Their old scores would be printed as those of today."""
    from tools.export import export_captions

    file = tmp_path / "s.json"
    flags = dict(model="toy-random", workers=0, json=str(file), resume=True)
    scored = stopped(monkeypatch, None)

    def again(want, **data):
        for left in (want, []):  # the second time nothing has changed
            scored.clear()
            capsys.readouterr()
            evaluate.main(evaluate.Config(**flags, **data))
            said = capsys.readouterr().out.count("have changed since")
            equal((scored, said), (left, len(left) * bool(known)), "scored anew, and said")

    export_captions(tmp_path, 3)
    captions, known = tmp_path / "captions" / "metadata.jsonl", False
    again(["captions_i2t", "captions_t2i"], data=str(captions.parent))
    captions.write_text(captions.read_text().replace("at the", "in the"))
    known = True
    again(["captions_i2t", "captions_t2i"], data=str(captions.parent))

    file.unlink()
    export(str(tmp_path / "toy"), 2)
    folder, known = tmp_path / "toy" / "MMEB-eval", False
    data = dict(data=str(folder), subsets="i2t,t2i,vqa")
    again(["i2t", "t2i", "vqa"], **data)
    changed = next(folder.glob("vqa/test-*.parquet"))
    pq.write_table(pq.read_table(changed).slice(1), changed)
    kinds = json.loads((folder / "sets.json").read_text())
    kinds["t2i"]["meta_task"] = "Other"
    (folder / "sets.json").write_text(json.dumps(kinds))
    known = True
    again(["t2i", "vqa"], **data)
    equal(list(json.loads(file.read_text())["meta_tasks"]), ["Retrieval", "Other", "VQA"], "means")


def test_other_scores_are_not_gone_on_with(tmp_path):
    """Of another model or other flags, with their names; what changes no score may differ."""
    file = str(tmp_path / "s.json")
    cfg = evaluate.Config(model="m", data="a.jsonl", limit=5, json=file)
    for path in (f"{file}.unfinished", file):
        score_file.write_json(path, cfg, EMBEDDER, "one", {"a": ROW}, score_file.NOT_YET)
        same = dict(model="moved", data="a.jsonl", json=file, resume=True, workers=3)
        same.update(image_root="b", chunk_tokens=7)
        equal(score_file.kept(evaluate.Config(limit=5, **same), "one"), {"a": ROW}, "kept")
        with pytest.raises(
            InputError, match="model's files are others, limit was 5, is 6.*Restore"
        ):
            score_file.kept(evaluate.Config(limit=6, **same), "two")
        known = json.loads(Path(path).read_text())
        del known["config"]["limit"]
        Path(path).write_text(json.dumps(known))
        equal(
            list(score_file.kept(evaluate.Config(limit=6, **same), "one")), ["a"], "an older file"
        )
        Path(path).unlink()
    equal(score_file.kept(evaluate.Config(limit=5, **same), "one"), {}, "nothing to go on with")


@pytest.mark.parametrize(
    "damage",
    [{"sets": [1]}, {"sets": {"a": 1}}, {"sets": {"a": {}}}, {"config": None},
     {"sets": {"a": dict(ROW, p_at_1="0.5")}}, {"sets": {"a": dict(ROW, ood=1)}}],
)  # fmt: skip
def test_a_damaged_file_of_scores_is_not_gone_on_with(tmp_path, damage):
    """One line that names the file."""
    cfg = evaluate.Config(model="m", json=str(tmp_path / "s.json"), resume=True)
    known = {"overall": None, "sets": {"a": ROW}, "config": {}, "model_digest": "one"} | damage
    Path(f"{cfg.json}.unfinished").write_text(json.dumps(known))
    with pytest.raises(InputError, match=r"s.json.unfinished: not as evaluate.py --json writes"):
        score_file.kept(cfg, "one")


def test_all_ranks_go_on_with_what_rank_0_reads_and_it_alone_writes(tmp_path, monkeypatch):
    """Nodes may have disks of their own."""
    cfg = evaluate.Config(json=str(tmp_path / "s.json"))
    monkeypatch.setattr(score_file, "by_rank_0", lambda read: "what rank 0 reads")
    equal(score_file.kept(cfg, "digest"), "what rank 0 reads", "kept")
    monkeypatch.setattr(score_file, "rank", lambda: 1)
    score_file.keep(cfg, EMBEDDER, "digest", {})
    score_file.finish(cfg, EMBEDDER, "digest", {}, score_file.NOT_YET)
    equal(list(tmp_path.iterdir()), [], "written by rank 1")


def test_what_is_nearer_by_more_than_rounding_is_nearer():
    """Both measures: a difference of 1e-5 is one, of 5e-7 none."""
    q = np.array([[1.0, 0.0]])
    for gap, hit in ((1e-5, 1.0), (5e-7, 0.0)):
        cosines = np.array([1.0, 1 - gap])
        c = np.stack([cosines, np.sqrt(1 - cosines**2)], 1)
        equal(evaluate.precision_at_1(q, c, [[0, 1]]), hit, f"precision_at_1, {gap}")
        got = retrieval.measures(q, c, [[0, 1]], [1], [0, 1])
        equal(got["p_at_1"], hit, f"measures, {gap}")


def test_a_right_target_that_is_nan_is_recalled_at_no_depth():
    """However few there are: of two candidates NaN is not among the first ten."""
    c = unit(np.eye(12))
    c[0] = math.nan
    got = retrieval.measures(unit(np.ones((1, 12))), c, [[0, 1]], [1], list(range(12)))
    equal([got[k] for k in ("p_at_1", "recall_at_5", "recall_at_10")], [0.0] * 3, "NaN")
