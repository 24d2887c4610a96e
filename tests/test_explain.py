"""tools.explain prints what the functions that train compute, and leaves nothing behind."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import close, equal, expect, shorten, toy
from PIL import Image

import contrastive
import model
import pretrain
from data import ANSWER, Item, Pair, read_dialogues, read_pairs
from plumbing.config import TrainingFlags
from plumbing.errors import InputError
from tools import explain, look
from tools.measured import gap


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to run in, that stays empty."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir()), "a walk writes no file"


def test_stage_1_is_walked_through(capsys, place):
    """Roles, labels, the mask (drawn as the function makes it), one line of loss a token."""
    explain.main(["pretrain"])
    said = capsys.readouterr().out
    drawn = re.findall(r"^  ([hxCQA]) ([#.]+)$", said, re.MULTILINE)
    letters = "".join(letter for letter, _ in drawn)
    assert re.fullmatch("hx+C{4}(Q+A+){2}", letters), letters
    for i, (letter, line) in enumerate(drawn):
        want = ["#" if j <= i and not (letter in "QA" and letters[j] == "x") else "."
                for j in range(len(letters))]  # fmt: skip
        assert line == "".join(want), f"row {i}"
    assert said.count("  p = ") == letters.count("A"), "each answer token once"
    assert "with the mask off" in said and re.search(r"logits +\(\d+, \d+\)", said)


@pytest.mark.parametrize("flags", ["--no-compress", "--compress-tokens 0 --pooling last"])
def test_stage_1_without_the_mask(capsys, place, flags):
    """Switched off, or K = 0, where training uses none: a triangle is drawn, and nothing compared
    with it; pretrain is the default stage."""
    explain.main(flags.split())
    said = capsys.readouterr().out
    drawn = re.findall(r"^  [hxCQA] ([#.]+)$", said, re.MULTILINE)
    assert drawn == ["#" * (i + 1) + "." * (len(drawn) - 1 - i) for i in range(len(drawn))]
    assert "with the mask off" not in said


@torch.no_grad()
def test_the_losses_that_are_printed_are_those_of_the_tokens(capsys):
    """Token by token, and their mean, beside that with the mask off."""
    embedder, dialogue = toy(), read_dialogues()[0]
    explain.walk_dialogue(embedder, dialogue, True)
    said = capsys.readouterr().out
    inputs = embedder.collate([dialogue.item], [dialogue.turns[:2]])
    nats = []
    for compress in (True, False):
        logits, labels = pretrain.answer_logits(embedder, inputs, compress)
        nats.append(F.cross_entropy(logits.float(), labels, reduction="none"))
    rows = re.findall(r"(\d+\.\d+)  p = (\d\.\d+)$", said, re.MULTILINE)
    close([float(x) for x, _ in rows], nats[0], "nats of each token", 1e-2)
    expect(nats[0].min() < 5, nats[0], "some p that are no 0.000", "the model")
    printed = torch.tensor([float(p) for _, p in rows])
    expect((printed - (-nats[0]).exp()).abs().max() < 6e-4, rows, (-nats[0]).exp(), "print_loss")
    close(float(re.search(r"mean of \d+: (\S+)", said)[1]), nats[0].mean(), "their mean", 1e-3)
    off = float(re.search(r"picture in view: (\S+)", said)[1])
    close(off, nats[1].mean(), "with the mask off", 1e-3)
    whole = (1, inputs["roles"].shape[1], logits.shape[1])
    expect(f"not {whole}: answers only" in said, said, whole, "(1, L, V)")


def test_a_token_points_to_the_one_that_it_predicts(capsys):
    """The one behind it, where that is an answer's."""
    embedder, dialogue = toy(), read_dialogues()[0]
    inputs = embedder.collate([dialogue.item], [dialogue.turns[:2]])
    explain.print_tokens(embedder, inputs)
    got = re.findall(r"^ +(\d+) .*-> (.*)$", capsys.readouterr().out, re.MULTILINE)
    ids, decode = inputs["input_ids"][0], embedder.processor.tokenizer.decode
    (answers,) = torch.where(inputs["roles"][0] == ANSWER)
    want = [(str(i - 1), repr(decode([ids[i]]))) for i in answers.tolist()]
    equal(got, want, "explain.print_tokens")


def test_only_the_picture_s_equal_tokens_share_a_line(capsys):
    """A word that is said again has a line of its own."""
    embedder = toy()
    collate, image = embedder.collate, embedder.mllm.config.image_token_id
    item = read_dialogues()[0].item
    inputs = collate.pad_rows([collate.row(item, [("!!!!", "????")])])
    explain.print_tokens(embedder, inputs)
    ids = inputs["input_ids"][0]
    repeated = (ids[1:] == ids[:-1]) & (ids[1:] != image)
    assert repeated.any(), "the tokenizer has a token for four"
    shown = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    places = (ids == image).nonzero()[1:, 0].tolist()  # the first stands for them
    equal(shown, [i for i in range(len(ids)) if i not in places], "positions")


def test_without_any_gradient_the_gap_is_a_number():
    """One pair, or equal ones: no negatives, so both gradients are zero."""
    zero, one = [torch.zeros(2)], [torch.ones(1), torch.zeros(1)]
    equal((gap(zero, zero), gap(one, [torch.zeros(1)] * 2)), (0.0, 1.0), "not by zero")


def test_stage_2_is_walked_through(capsys, place):
    """Several chunks, and a gradient that is the whole batch's."""
    explain.main(["contrastive", "--model", "toy-random"])
    said = capsys.readouterr().out
    assert said.count("gradient so far") >= 3, said
    assert len(re.findall(r"-?\d\.\d\d\*", said)) == 6, "each query has its own target"
    assert float(re.search(r"differ by (\S+) of it", said)[1]) < 1e-5
    assert "\n  0.0 MiB kept for the backward pass" in said, "pass 1 keeps nothing"
    titles = re.findall(r"^(\d)\. ", said, re.MULTILINE)
    assert titles == list("123456"), "each step once, and in its order"


def test_chance_counts_hard_negatives_and_places_count_padding(capsys):
    """Two pairs with a negative each: four columns, and rows of one to some ten tokens."""
    texts = ["red", "a red circle and a blue square", "a", "green", "two words", "b c d"]
    items = [Item(text) for text in texts]
    pairs = {"a": [Pair(items[i], (items[i + 1],), (items[i + 2],)) for i in (0, 3)]}
    cfg, embedder = contrastive.Config(batch=2, block=2), toy()
    batch = contrastive.local_batch(pairs, embedder.collate, cfg, 0, 0, 1)
    explain.walk_batch(embedder, batch, 0.03, 60)
    said = capsys.readouterr().out
    expect(f"(ln 4 = {math.log(4):.4f} by chance)" in said, said, "ln M", "Aloud.loss_of")
    lengths = [row.length for row in batch.rows]
    chunks = re.findall(r"rows \[(.*)\]: (\d+) tokens in (\d+) places", said)
    for rows, real, places in chunks:
        own = [lengths[int(row)] for row in rows.split(",")]
        equal((int(real), int(places)), (sum(own), len(own) * max(own)), f"rows {rows}")
    expect(any(real != places for _, real, places in chunks), chunks, "some padding", "the rows")


def test_stage_2_runs_the_function_that_trains(capsys, monkeypatch):
    """A mistake in two_passes shows: the check against the whole batch has its own route."""
    two_passes = contrastive.two_passes

    def half_of_it(embed, chunks, loss_of):
        return two_passes(embed, chunks, lambda z: loss_of(z) / 2)

    monkeypatch.setattr(contrastive, "two_passes", half_of_it)
    explain.main(["contrastive", "--model", "toy-random"])
    said = capsys.readouterr().out
    assert float(re.search(r"differ by (\S+) of it", said)[1]) == pytest.approx(0.5, abs=1e-3)


def test_the_gradient_that_is_printed_is_the_gradient(capsys):
    """The last `gradient so far`, and the norms of the cached gradient, by another route."""
    embedder = toy()
    cfg = contrastive.Config(batch=6, block=3)
    batch = contrastive.local_batch(read_pairs(), embedder.collate, cfg, 0, 0, 1)
    explain.walk_batch(embedder, batch, 0.03, 150)
    said = capsys.readouterr().out
    embedder.zero_grad(set_to_none=True)
    z = embedder(embedder.collate.pad_rows(batch.rows))
    z.retain_grad()
    loss, _ = contrastive.info_nce(z[:6], z[6:], 0.03, batch.labels, batch.keys)
    loss.backward()
    norm = torch.cat([grad.flatten() for grad in explain.gradients(embedder)]).norm()
    close(float(re.findall(r"gradient so far (\S+)", said)[-1]), norm, "all chunks", 1e-4)
    printed = said.split("its norms:\n")[1].splitlines()[0].split()
    close([float(x) for x in printed], z.grad.norm(dim=1), "d loss / d z, row by row", 1e-2)
    cells = [
        re.findall(r"(-?\d\.\d\d)(.)", x + " ") for x in said.split("= its own\n")[1].split("\n")
    ]
    got = torch.tensor([[float(x) for x, _ in row] for row in cells[:6]])
    expect(
        (got - z[:6] @ z[6:].T).abs().max() < 6e-3, got, "row = query, column = target", "cosines"
    )
    own = [[j for j, (_, mark) in enumerate(row) if mark == "*"] for row in cells[:6]]
    equal(own, batch.labels.tolist(), "a query's own target")


def test_nothing_is_dropped_out(capsys):
    """Of an adapter with dropout, which loads as it trains: twice the same numbers, and the check
    of stage 2 holds, for its two ways see the same model."""
    embedder, dialogue = shorten(toy()), read_dialogues()[0]
    model.choose_trained(embedder, TrainingFlags(lora_rank=2, lora_dropout=0.5))
    for name, p in embedder.named_parameters():
        if "lora_B" in name:  # it starts as zero, and would change nothing
            torch.nn.init.normal_(p, std=0.1)
    said = []
    for _ in range(2):
        explain.walk_dialogue(embedder.train(), dialogue, True)
        said.append(re.findall(r"\d\.\d+  p = .*", capsys.readouterr().out))
    equal(*said, "explain.walk_dialogue: eval")
    cfg = contrastive.Config(batch=2, block=2)
    batch = contrastive.local_batch(read_pairs(), embedder.collate, cfg, 0, 0, 1)
    explain.walk_batch(embedder.train(), batch, 0.03, 60)
    apart = float(re.search(r"differ by (\S+) of it", capsys.readouterr().out)[1])
    expect(apart < 1e-5, apart, "< 1e-5", "explain.walk_batch: eval")


def test_another_seed_draws_other_pairs_of_a_file(tmp_path, shared, monkeypatch):
    """A file is the same for every seed."""
    drawn = []
    monkeypatch.setattr(model, "load_for", lambda *_: shared)
    monkeypatch.setattr(explain, "walk_batch", lambda _, batch, *__: drawn.append(batch.ids))
    pairs = [{"query": {"text": f"q {i}"}, "target": {"text": f"t {i}"}} for i in range(99)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(x) + "\n" for x in pairs))
    for seed in "011":
        explain.main(["contrastive", "--data", str(tmp_path / "l.jsonl"), "--seed", seed])
    expect(drawn[0] != drawn[1] == drawn[2], drawn, "others", "--seed")


def test_the_flags_reach_the_walks(shared, monkeypatch):
    """What is walked through is what was asked for."""
    walked = []
    monkeypatch.setattr(model, "load_for", lambda *_: shared)
    monkeypatch.setattr(explain, "walk_dialogue", lambda _, *args: walked.append(args))
    monkeypatch.setattr(explain, "walk_batch", lambda _, *args: walked.append(args))
    explain.main("--seed 3 --caption --no-compress".split())
    equal(walked.pop(), (read_dialogues(seed=3, caption=True)[0], False), "pretrain")
    explain.main("contrastive --temperature 0.5 --chunk-tokens 77 --subsets t2i".split())
    batch, *others = walked.pop()
    equal(others, [0.5, 77], "temperature, chunk_tokens")
    equal({name.partition("[")[0] for name in batch.ids}, {"t2i"}, "subsets")


def test_an_adapter_is_folded_in_as_stage_2_does(monkeypatch):
    """Else the walk would show an adapter's gradient, and stage 2 trains all weights."""
    loaded, merged, walked = object(), shorten(toy()), []
    monkeypatch.setattr(model, "load_for", lambda *_: loaded)
    monkeypatch.setattr(model, "merge", lambda embedder: merged if embedder is loaded else None)
    monkeypatch.setattr(explain, "walk_batch", lambda embedder, *_: walked.append(embedder))
    explain.main(["contrastive", "--model", "toy-random"])
    expect(walked == [merged], walked, "the merged one", "explain_contrastive")


def test_without_a_model_the_walk_begins_where_its_stage_does(tmp_path, shared, monkeypatch):
    """Stage 1 with the toy, stage 2 with what stage 1 has left, not with what it has made of it."""
    monkeypatch.chdir(tmp_path)
    for name in ("out/pretrain", "out/contrastive"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    loaded = []
    monkeypatch.setattr(model, "load_for", lambda cfg, _: loaded.append(cfg.model) or shared)
    monkeypatch.setattr(explain, "walk_dialogue", lambda *_: None)
    monkeypatch.setattr(explain, "walk_batch", lambda *_: None)
    explain.main(["pretrain"])
    explain.main(["contrastive"])
    equal(loaded, ["toy", "out/pretrain"], "explain_pretrain, explain_contrastive")


def test_another_stage_is_an_error():
    """The two that there are stand in the message."""
    with pytest.raises(InputError, match="evaluate: the stage is pretrain or contrastive"):
        explain.main(["evaluate"])


def test_look_shows_no_right_candidate_as_a_wrong_one():
    """Beside the right one, two others."""
    shown = 0
    for _, lines in look.examples():
        right, wrong = (
            [x[7:] for x in lines if x.startswith(word)] for word in ("right: ", "wrong: ")
        )
        shown += len(wrong)
        expect(not set(right) & set(wrong), lines, "others", "look.examples")
    expect(shown, shown, "some", "tools.look has other words for them")


def test_each_picture_of_the_sheet_stands_beside_its_words(tmp_path):
    """Query and target in a row; four pixels for each, of its own colour."""
    look.look(str(tmp_path / "x.png"))
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    for i, (scenes, _) in enumerate(look.examples()):
        for j, scene in enumerate(scenes):
            picture = np.asarray(scene.render())
            x, y, side = 6 + 134 * j, look.HEIGHT * i + 6, 128 // len(picture)
            got = sheet[y : y + 128, x : x + 128]
            equal(got[::side, ::side].tolist(), picture.tolist(), f"example {i}, picture {j}")
            equal(got[side - 1 :: side, side - 1 :: side].tolist(), picture.tolist(), "unsmoothed")
    equal([len(scenes) for scenes, _ in look.examples()[6:]], [1, 1, 1, 1, 2], "and the right one")
