"""The toy MLLM, toy/mllm: as finished as the instruction-tuned models whose part it plays, and what
toy/make.py makes; and the lessons that finished it."""

import hashlib
import json
import random
import shutil
from collections import Counter

import pytest
import torch
from checks import equal, expect

import model
import pretrain
from data import Dialogue
from plumbing.errors import InputError
from plumbing.folders import TOY
from tools import lessons
from toy import make
from toy.make import build_toy
from toy.world import ASK, HELD_OUT, IMAGE, Shapes


def answered(embedder, kind, n=200):
    """How many of n questions of a kind, about scenes that training never showed, one each, a model
    answers word for word, by greedy decoding."""
    world, rows = Shapes("test", seed=1), []
    for i in range(10 * n):
        rng = random.Random(f"{kind} {i}")
        scene = world.scene(rng)
        for _, question, answer in world.ask(rng, scene, (kind,))[: n - len(rows)]:
            talk = Dialogue.of(((IMAGE, (scene,)), ((question, answer),), ""))
            rows.append(embedder.collate.row(talk.item, talk.turns))
    right = 0
    with torch.no_grad():
        for i in range(0, n, 50):
            inputs = embedder.collate.pad_rows(rows[i : i + 50])
            logits, labels = pretrain.answer_logits(embedder, inputs, compress=False)
            right += pretrain.exact_answers(logits, labels, inputs["roles"])[0]
    return right


@pytest.fixture(scope="module")
def finished():
    """The toy MLLM as it is kept."""
    return model.load("toy", compress_tokens=0, pooling="last", device="cpu").eval()


@pytest.mark.parametrize("kind", ASK)
def test_the_toy_mllm_answers_99_of_100_held_out_questions_of_each_kind(finished, kind):
    """Word for word, 198 of 200."""
    right = answered(finished, kind)
    assert right >= 198, f"{right} of 200 right, want 198"


def test_one_that_was_never_trained_answers_none():
    """Negative control."""
    untrained = model.load("toy-random", compress_tokens=0, pooling="last", device="cpu").eval()
    equal(answered(untrained, "count", n=50), 0, "toy-random")


def test_the_toy_mllm_is_what_its_script_makes(tmp_path):
    """`python -m toy.make DIR`, but for the weights and the library's version: the same tokenizer,
    template, image processor and config."""
    for part in build_toy():
        part.save_pretrained(tmp_path)
    for path in sorted(TOY.iterdir()):
        if path.suffix == ".safetensors":
            continue
        got, want = ((folder / path.name).read_text() for folder in (tmp_path, TOY))
        if path.suffix == ".json":
            got, want = json.loads(got), json.loads(want)
            for config in (got, want):
                config.pop("transformers_version", None)
        assert got == want, path.name


def test_the_weights_that_the_script_draws_are_the_same_each_time(finished, monkeypatch):
    """Whatever was drawn before."""
    monkeypatch.setattr(make, "build_tokenizer", lambda: finished.processor.tokenizer)
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn.append(build_toy()[0].state_dict())
    equal([k for k, x in drawn[0].items() if not x.equal(drawn[1][k])], [], "toy.make: its seed")


def test_weights_that_are_there_are_not_replaced_by_random_ones(tmp_path):
    """`python -m toy.make toy/mllm` once more would cost the finished model."""
    shutil.copy(TOY / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"hours of lessons")
    with pytest.raises(InputError, match="has weights, which random ones would replace"):
        make.main([str(tmp_path)])
    equal(len([*tmp_path.iterdir()]), 2, "nothing is written")


# ------------------------------------------------------------------------------------- its lessons


def test_lessons_are_about_objects_that_are_alike_and_true():
    """Often all of one colour or shape, mostly about places; each answer is the scene's, the same
    whenever it is drawn, and no combination that is held out for tests is ever seen."""
    world, kinds, alike, sizes = Shapes(), Counter(), 0, Counter()
    for i in range(300):
        (_, (scene,)), turns, name = lessons.lesson(world, i)
        equal(lessons.lesson(world, i), ((IMAGE, (scene,)), turns, name), "a pure function of i")
        sizes[len(scene.objects)] += 1
        names = {(o.color, o.shape) for o in scene.objects}
        assert not names & HELD_OUT and len(dict(turns)) == len(turns) > 0
        few = [len({getattr(o, part) for o in scene.objects}) for part in ("color", "shape")]
        alike += len(scene.objects) > 2 and min(few) == 1
        for question, answer in turns:
            if question.startswith("where is"):
                kinds["place"] += 1
                places = {o.place for o in scene.objects if question == f"where is the {o.name}?"}
                equal({answer}, places, question)
            kinds["all"] += 1
    expect(sizes[1] + sizes[2] > 50, sizes, "a quarter of 300", "--least: in half of the pictures")
    expect(30 < alike < 90, alike, "about 17 % of 300, of one colour or shape", "few")
    expect(kinds["place"] > 0.1 * kinds["all"], kinds, "half of the places' share", "kinds")


def test_lessons_are_those_that_finished_the_toy_mllm():
    """Its weights are made by them (toy/make.py): other draws would make another model."""
    h = hashlib.sha256()
    for seed, least in ((0, 3), (1, 4), (2, 4)):
        for i in (*range(40), 10**9 - 1):
            h.update(repr(lessons.lesson(Shapes(seed=seed), i, least)).encode())
    equal(h.hexdigest()[:16], "62527d41505fdf4c", "the draws, their order, a kind of question")


def test_lessons_take_the_place_of_dialogues(monkeypatch):
    """In stage 1 as it is; with other data, or captions, they would not, and are refused."""
    monkeypatch.setattr(Shapes, "dialogue", Shapes.dialogue)  # it is put back
    drawn = []
    monkeypatch.setattr(
        pretrain, "main", lambda cfg: drawn.append(pretrain.read_dialogues(cfg.data)[5].id)
    )
    for flags in ("--caption", "--texts 0.5", "--data talks.jsonl"):
        with pytest.raises(InputError, match="lessons are the toy world's"):
            lessons.main(lessons.Config.parse(flags.split()))
    equal(drawn, [], "before anything is read")
    lessons.main(lessons.Config())
    equal(drawn, ["lesson-5"], "what stage 1 reads")
    for least in (1, 4):
        lessons.main(lessons.Config(least=least))
        got = [Shapes().dialogue(i) for i in range(20)]
        equal(got, [lessons.lesson(Shapes(), i, least) for i in range(20)], f"--least {least}")
