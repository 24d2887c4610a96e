"""The toy MLLM, toy/mllm: as finished as the instruction-tuned models whose part it plays, and what
toy/make.py makes."""

import json

import torch

import model
import pretrain
from data import Item
from plumbing.folders import TOY
from toy.make import build_toy
from toy.world import Shapes


def answered(name, n=240):
    """How many of n questions about scenes that training never showed, one each, a model answers
    word for word, by greedy decoding."""
    embedder = model.load(name, compress_tokens=0, pooling="last", device="cpu").eval()
    world, items, turns = Shapes("test", seed=1), [], []
    for i in range(n):
        content, talk, _ = world.dialogue(i)
        items.append(Item(*content))
        turns.append(talk[:1])
    right = 0
    with torch.no_grad():
        for i in range(0, n, 60):
            inputs = embedder.collate(items[i : i + 60], turns[i : i + 60])
            logits, labels = pretrain.answer_logits(embedder, inputs, compress=False)
            right += pretrain.exact_answers(logits, labels, inputs)[0]
    return right


def test_the_toy_mllm_answers_nine_of_ten_held_out_questions_word_for_word():
    """216 of 240; with random weights none."""
    right = answered("toy")
    assert right >= 216, f"{right} of 240 right, want 216"
    assert answered("toy-random", 60) == 0, "negative control"


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
