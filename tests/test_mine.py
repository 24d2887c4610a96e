"""`python -m tools.mine`: hard negatives of a list are the wrong targets at given ranks."""

import json
import os
import random
from unittest import mock

import numpy as np
import pytest
from checks import equal, expect
from PIL import Image

import data
import model
from plumbing.errors import InputError
from tools import export, mine


def oracle(q, t, own, first, last):
    """One query at a time, one target at a time."""
    chosen = []
    for i in range(len(q)):
        wrong = [j for j in range(len(t)) if j not in own[i]]
        wrong.sort(key=lambda j: (-float(q[i] @ t[j]), j))
        chosen.append([j for rank, j in enumerate(wrong, 1) if first <= rank <= last])
    return chosen


def cases():
    """(q, t, own): with several right targets, with ties, with fewer targets than ranks."""
    numbers, choice = np.random.default_rng(0), random.Random(0)
    for n, m in ((7, 20), (5, 4), (3, 1)):
        t = numbers.standard_normal((m, 6)).astype(np.float32)
        t[m // 2 :: 3] = t[0]  # ties
        q = numbers.standard_normal((n, 6)).astype(np.float32)
        own = [set(choice.sample(range(m), choice.randint(1, min(3, m)))) for _ in range(n)]
        yield q, t, own


def check(nearest_wrong):
    for q, t, own in cases():
        for first, last in ((1, 1), (1, 5), (3, 6)):
            got = nearest_wrong(q, t, own, first, last)
            equal(got, oracle(q, t, own, first, last), f"ranks {first} to {last}")


def test_the_chosen_rows_equal_a_loop(monkeypatch):
    """In one block of queries, and in several."""
    check(mine.nearest_wrong)
    monkeypatch.setattr(mine, "BLOCK", 2)
    check(mine.nearest_wrong)


def counts_from_zero(q, t, own, first, last):
    return mine.nearest_wrong(q, t, own, first + 1, last + 1)


def takes_the_right_ones(q, t, own, first, last):
    return mine.nearest_wrong(q, t, [set()] * len(q), first, last)


def takes_the_farthest(q, t, own, first, last):
    return mine.nearest_wrong(-q, t, own, first, last)


@pytest.mark.parametrize("wrong", [counts_from_zero, takes_the_right_ones, takes_the_farthest])
def test_the_loop_check_fails_for_wrong_ranks(wrong):
    """Negative control."""
    with pytest.raises(AssertionError):
        check(wrong)


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """The toy world's pairs as a list, 8 of each task, with a target twice, one line with two
    targets, and one that has a negative."""
    folder = tmp_path_factory.mktemp("mine") / "toy"
    export.export(folder, 8)
    lines = [json.loads(x) for x in (folder / "pairs.jsonl").read_text().splitlines()]
    lines[1]["target"] = lines[0]["target"]
    lines[2]["target"] = [lines[2]["target"], lines[3]["target"]]
    lines[4]["negatives"] = [lines[5]["target"]]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "pairs.jsonl").write_text(text)
    return folder / "pairs.jsonl"


def read(path) -> list:
    (pairs,) = data.read_pairs(str(path)).values()
    return list(pairs)


def test_a_list_gets_negatives_and_keeps_all_else(listed):
    """Ranks 2 to 4 of toy-random: never a target of the query or its equal, nor twice the same, in
    the order of their cosines; what a line had stays."""
    out = listed.with_name("mined.jsonl")
    words = ["--model", "toy-random", "--first", "2", "--last", "4", "--workers", "0"]
    mine.main(["--data", str(listed), "--out", str(out), *words])
    before, after = ([json.loads(x) for x in p.read_text().splitlines()] for p in (listed, out))
    kept = [{k: x for k, x in line.items() if k != "negatives"} for line in after]
    equal(kept, [{k: x for k, x in line.items() if k != "negatives"} for line in before], "else")
    embedder = model.load("toy-random", device="cpu").eval()
    pairs = read(out)
    targets = {item.key: item for pair in pairs for item in pair.targets}
    z = embedder.encode([*(pair.query for pair in pairs), *targets.values()])
    q, t = z[: len(pairs)], dict(zip(targets, z[len(pairs) :], strict=True))
    for i, pair in enumerate(pairs):
        had = len(before[i].get("negatives", []))
        equal(had, 1 if i == 4 else 0, f"line {i + 1}: its own")
        mined = [item.key for item in pair.negatives[had:]]
        taken = {item.key for item in pair.targets} | {x.key for x in pair.negatives[:had]}
        wrong = sorted((key for key in targets if key not in taken), key=lambda k: -(q[i] @ t[k]))
        scores = [float(q[i] @ t[key]) for key in mined]
        want = [float(q[i] @ t[key]) for key in wrong[1:4]]
        expect(np.allclose(scores, want, atol=1e-5), scores, want, f"line {i + 1}: ranks 2 to 4")
        expect(not taken & set(mined) and len(set(mined)) == 3, mined, "three others", f"{i + 1}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--data pairs.jsonl --out out.jsonl --first 3 --last 2", "--first 3 is beyond --last 2"),
        ("--data pairs.jsonl --out pairs.jsonl", "the list itself"),
        ("--data pairs.jsonl --out ../toy/pairs.jsonl", "the list itself"),
        ("--data loop.jsonl --out out.jsonl", "loop.jsonl"),
        ("--data shapes --out out.jsonl", "takes a .jsonl"),
        ("--out out.jsonl", "takes a .jsonl"),
        ("--data pairs.jsonl", "an empty name"),
        ("--data pairs.jsonl --out out.csv", "--out out.csv: .*end it with .jsonl"),
        ("--data pairs.jsonl --out out", "--out out: .*end it with .jsonl"),
        ("--data dialogues.jsonl --out out.jsonl --model toy-random", "this is a dialogue"),
    ],
)
def test_what_cannot_be_mined_is_one_line(listed, monkeypatch, words, says):
    """And no file is left."""
    monkeypatch.chdir(listed.parent)
    whole = listed.read_bytes()
    if not os.path.lexists("loop.jsonl"):  # the folder is the same for all of these
        os.symlink("loop.jsonl", "loop.jsonl")
    with pytest.raises(InputError, match=says):
        mine.main(words.split())
    equal(listed.read_bytes(), whole, "the list stays")
    expect(not (listed.parent / "out.jsonl").exists(), "out.jsonl", "no file", "")


@pytest.fixture
def four(tmp_path, monkeypatch):
    """Four pairs of texts in the working folder."""
    monkeypatch.chdir(tmp_path)
    lines = [{"query": {"text": f"q {i}"}, "target": {"text": f"t {i}"}} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def mine_with(embedder, monkeypatch, *words, data="pairs.jsonl"):
    """The command, with an embedder that is there."""
    monkeypatch.setattr(model, "load_for", lambda *_: embedder)
    words = ["--model", "toy-random", "--out", "out.jsonl", "--workers", "0", *words]
    mine.main(["--data", data, *words])


def test_another_lines_target_of_the_same_query_is_never_mined(tmp_path):
    """Both are right for it."""
    rows = [{"query": {"text": q}, "target": {"text": t}} for q, t in ("ax", "ay", "bz")]
    file, out = tmp_path / "pairs.jsonl", tmp_path / "mined.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", "toy-random", "--first", "1", "--last", "1", "--workers", "0"]
    mine.main(["--data", str(file), "--out", str(out), *words])
    mined = [json.loads(line)["negatives"] for line in out.read_text().splitlines()]
    equal(mined[:2], [[{"text": "z"}]] * 2, "of the query a")


def test_no_score_makes_a_right_target_wrong():
    """NaN sorts behind infinity, and a query's own target was told apart by that alone."""
    q, t = np.full((1, 2), np.nan, np.float32), np.eye(3, 2, dtype=np.float32)
    equal(mine.nearest_wrong(q, t, [{0, 1}], 1, 3), [[2]], "only what is wrong")


@pytest.mark.parametrize(
    ("text", "says"), [("q 2", "line 3: its query"), ("t 1", "line 2: its target")]
)
def test_an_embedding_that_is_not_finite_is_said_with_its_line(
    four, shared, monkeypatch, text, says
):
    """Its cosines are NaN, which have no order; and no list is left."""
    encode = model.Embedder.encode

    def spoiled(self, items, *args):
        z = encode(self, items, *args)
        z[[item.text == text for item in items]] = np.nan
        return z

    monkeypatch.setattr(model.Embedder, "encode", spoiled)
    with pytest.raises(InputError, match=f"pairs.jsonl, {says} has an embedding that is not"):
        mine_with(shared, monkeypatch, "--first", "1")
    expect(not (four / "out.jsonl").exists(), "out.jsonl", "no file", "")


def test_ranks_that_no_target_has_are_refused_before_anything_is_embedded(
    four, shared, monkeypatch
):
    """Every line got "negatives": []; at the last rank there is one each."""
    mine_with(shared, monkeypatch, "--first", "3", "--last", "3")
    lines = [json.loads(line) for line in (four / "out.jsonl").read_text().splitlines()]
    equal([len(line["negatives"]) for line in lines], [1] * 4, "three wrong ones of four")
    monkeypatch.setattr(model.Embedder, "encode", pytest.fail)
    says = "--first 4: no query of pairs.jsonl has more than 3 wrong targets, of 4 distinct"
    with pytest.raises(InputError, match=says):
        mine_with(shared, monkeypatch, "--first", "4")


@pytest.mark.parametrize(("last", "few"), [("3", 0), ("4", 4)])
def test_how_many_lines_get_fewer_is_said(four, shared, monkeypatch, capsys, last, few):
    """Of three wrong targets there are ranks 1 to 3, and no fourth."""
    mine_with(shared, monkeypatch, "--first", "1", "--last", last)
    said = capsys.readouterr().out
    says = f"4 pairs, 4 distinct targets; {few} lines get fewer than {last} negatives"
    expect(says in said, said, says, "mine.mine")


def test_what_a_line_calls_wrong_already_is_not_mined_again(four, shared, monkeypatch):
    """It stays the first of its negatives, and takes no rank: two others are left of three."""
    lines = [json.loads(line) for line in (four / "pairs.jsonl").read_text().splitlines()]
    lines[0]["negatives"] = [{"text": "t 1"}]
    (four / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine_with(shared, monkeypatch, "--first", "1", "--last", "3")
    (first, *_) = (four / "out.jsonl").read_text().splitlines()
    texts = [x["text"] for x in json.loads(first)["negatives"]]
    equal((texts[0], sorted(texts)), ("t 1", ["t 1", "t 2", "t 3"]), "Targets.own")


def test_the_flags_reach_the_pictures_and_the_model(four, shared, monkeypatch):
    """--image-root, --chunk-tokens, --workers; without --model it is that of the last stage."""
    seen, models, encode = [], [], model.Embedder.encode

    def noted(self, items, *args):
        seen.append(args)
        return encode(self, items)

    monkeypatch.setattr(model.Embedder, "encode", noted)
    monkeypatch.setattr(model, "load_for", lambda cfg, device: models.append(cfg.model) or shared)
    lines = [json.loads(line) for line in (four / "pairs.jsonl").read_text().splitlines()]
    lines[0]["query"] = {"image": "a.png"}
    (four / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (four / "elsewhere").mkdir()
    Image.new("RGB", (32, 32)).save(four / "elsewhere" / "a.png")
    words = "--data pairs.jsonl --out out.jsonl --first 1 --image-root elsewhere --chunk-tokens 77"
    for stage in ("toy", "out/pretrain", "out/contrastive"):
        if stage != "toy":
            (four / stage).mkdir(parents=True)
            (four / stage / "config.json").write_text("{}")
        mine.main([*words.split(), "--workers", "0"])
        equal(models[-1], stage, "weights.first_model")
    equal(seen, [(77, 0, "embedding")] * 3, "Embedder.encode")


def test_a_target_is_said_with_the_first_line_that_names_it(four, shared, monkeypatch):
    """Though an earlier one stands twice in the list; how many more are not finite, too."""
    lines = [json.loads(line) for line in (four / "pairs.jsonl").read_text().splitlines()]
    lines[1]["target"] = lines[0]["target"]
    (four / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    encode = model.Embedder.encode

    def spoiled(self, items, *args):
        z = encode(self, items, *args)
        z[[item.text in ("t 2", "t 3") for item in items]] = np.nan
        return z

    monkeypatch.setattr(model.Embedder, "encode", spoiled)
    says = r"line 3: its target has an embedding that is not finite \(and 1 more are not\)"
    with pytest.raises(InputError, match=says):
        mine_with(shared, monkeypatch, "--first", "1")


def test_letters_of_any_script_stay_readable(four, shared, monkeypatch):
    """As the list has them, and not as \\u732b: a person looks into what was mined."""
    lines = [json.loads(line) for line in (four / "pairs.jsonl").read_text().splitlines()]
    lines[0]["target"] = {"text": "eine \u732b"}
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (four / "pairs.jsonl").write_text(text, encoding="utf-8")
    mine_with(shared, monkeypatch, "--first", "1", "--last", "3")
    mined = (four / "out.jsonl").read_text(encoding="utf-8")
    equal(mined.count("eine \u732b"), 4, "a target once, and a negative of the three others")


def test_a_list_that_is_saved_anew_meanwhile_is_read_once(four, shared):
    """Another order would give each query the negatives of another one."""
    path = four / "pairs.jsonl"
    lines = path.read_text().splitlines(True)
    read_pairs = mine.read_pairs

    def changed_behind_it(*words):
        pairs = read_pairs(*words)
        path.with_name("new").write_text("".join(lines[::-1] + lines))
        path.with_name("new").replace(path)
        return pairs

    cfg = mine.Config(data=str(path), first=1, last=1, workers=0)
    with mock.patch.object(mine, "read_pairs", changed_behind_it):
        mined = mine.mine(shared, cfg)
    equal([x["query"] for x in mined], [json.loads(x)["query"] for x in lines], "source.raw")


def test_a_query_for_which_all_is_right_costs_no_other_its_negatives(four, shared, monkeypatch):
    """The first one has all four targets, the others have three wrong ones each."""
    lines = [json.loads(line) for line in (four / "pairs.jsonl").read_text().splitlines()]
    lines[0]["target"] = [{"text": f"t {i}"} for i in range(4)]
    (four / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine_with(shared, monkeypatch, "--first", "1", "--last", "3")
    lines = [json.loads(line) for line in (four / "out.jsonl").read_text().splitlines()]
    equal([len(line["negatives"]) for line in lines], [0, 3, 3, 3], "mine.refuse_few")


def test_a_target_that_stands_twice_in_a_line_is_one(four, shared, monkeypatch):
    """Spelled otherwise, too: it has a row of its own only once, and the line stays as it is."""
    lines = [json.loads(line) for line in (four / "pairs.jsonl").read_text().splitlines()]
    lines[0]["target"] = [lines[0]["target"], {**lines[0]["target"], "image": None}]
    (four / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine_with(shared, monkeypatch, "--first", "1", "--last", "3")
    (first, *_) = map(json.loads, (four / "out.jsonl").read_text().splitlines())
    equal(first["target"], lines[0]["target"], "the line's own")
    equal(sorted(x["text"] for x in first["negatives"]), ["t 1", "t 2", "t 3"], "as_written")


def test_negatives_may_be_none_or_no_target_of_any_line(four, shared, monkeypatch):
    """`null`, as pandas writes it; a text that stands in no other line: it stays in front."""
    lines = [json.loads(line) for line in (four / "pairs.jsonl").read_text().splitlines()]
    lines[0]["negatives"], lines[1]["negatives"] = None, [{"text": "nowhere else"}]
    (four / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine_with(shared, monkeypatch, "--first", "1", "--last", "3")
    lines = [json.loads(line) for line in (four / "out.jsonl").read_text().splitlines()]
    mined = [line["negatives"] for line in lines]
    equal([len(negatives) for negatives in mined], [3, 4, 3, 3], "mine.mine")
    equal(mined[1][0], {"text": "nowhere else"}, "in front")


def test_a_lists_name_may_end_in_capitals(four, shared, monkeypatch):
    """As files from elsewhere do; training takes it, too."""
    (four / "pairs.jsonl").rename(four / "PAIRS.JSONL")
    mine_with(shared, monkeypatch, "--first", "1", "--last", "1", data="PAIRS.JSONL")
    equal(len((four / "out.jsonl").read_text().splitlines()), 4, "mine.main")


def test_targets_that_are_equally_near_come_in_the_order_of_the_list():
    """On every machine the same negatives."""
    scores = np.arange(300) % 2  # the odd ones are nearest
    chosen = mine.nearest_wrong(np.ones((1, 1)), scores[:, None], [{0}], 1, 300)
    equal(chosen, [[*range(1, 300, 2), *range(2, 300, 2)]], "nearest_wrong: stable")
