"""What the flags ask for and what a checkpoint says become one setting; which model a stage starts
from. (Whole folders: test_folders.py.)"""

import json

import pytest
import torch
from checks import equal, toy

import model
from plumbing import weights
from plumbing.config import TrainingFlags
from plumbing.errors import InputError
from plumbing.log import versions
from plumbing.weights import Options, Settings, describe, device_of, draw_weights, settings

NOTHING = Settings(None, None, None)


@pytest.mark.parametrize(
    ("asked", "stored", "want"),
    [
        ((None, None, None), {}, (4, "mean", "chat")),
        ((0, None, None), {}, (0, "last", "chat")),
        ((None, None, "vlm2vec"), {}, (0, "last", "vlm2vec")),
        ((8, "last", "coma"), {}, (8, "last", "coma")),
        ((None, None, None), {"base_is_hub": True}, (4, "mean", "chat")),
        ((2, "last", "coma"), {"compress_tokens": 2, "pooling": "last", "prompt": "coma"},
         (2, "last", "coma")),
    ],
)  # fmt: skip
def test_what_nobody_says_has_its_default(tmp_path, asked, stored, want):
    """The checkpoint's word where there is no flag; pooling follows K, and K the prompt."""
    (tmp_path / "nanocoma.json").write_text(json.dumps(stored))
    equal(settings("m", str(tmp_path), Settings(*asked)), Settings(*want), f"{asked} {stored}")


@pytest.mark.parametrize(
    ("asked", "stored", "says"),
    [
        ((4, None, None), {"compress_tokens": 2}, "--compress-tokens 4, but m was .* with .* 2"),
        ((0, None, None), {"compress_tokens": 2}, "--compress-tokens 0, but m"),
        ((None, "last", None), {"pooling": "mean"}, "--pooling last, but m was trained with"),
        ((None, None, "chat"), {"prompt": "coma"}, "--prompt chat, but m was trained with"),
        ((None, None, None), {"compress_tokens": 8, "prompt": "coma"}, "json lacks pooling: copy"),
        ((None, None, None), {"pooling": "last"}, "json lacks compress_tokens, prompt"),
        ((0, "mean", None), {}, "pooling mean .K > 0. or last"),
        ((-1, "last", None), {}, "--compress-tokens -1"),
        ((10_001, None, None), {}, "--compress-tokens 10001"),
        ((None, "max", None), {}, "--pooling max"),
        ((None, None, "official"), {}, "prompts are coma, chat, vlm2vec"),
    ],
)
def test_what_contradicts_or_cannot_be_is_refused(tmp_path, asked, stored, says):
    """With both values, by the flag's name."""
    (tmp_path / "nanocoma.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=says):
        settings("m", str(tmp_path), Settings(*asked))


def test_stage_2_starts_from_stage_1_where_it_is_whole(tmp_path, monkeypatch, capsys):
    """A folder without a model in it is none; what was taken is said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "pretrain").mkdir(parents=True)
    equal(weights.stage_1_model(), "toy", "no config.json")
    assert "starting from toy: no model is in out/pretrain; python" in capsys.readouterr().out
    (tmp_path / "out" / "pretrain" / "config.json").write_text("{}")
    equal(weights.stage_1_model(), "out/pretrain", "first_model")
    equal(capsys.readouterr().out, "starting from out/pretrain\n", "say")


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        ("checkpoints/step-00000100", "its run is not finished"),
        (".part", "a model was being written into it"),
    ],
)
def test_a_model_that_is_not_finished_is_not_passed_over_in_silence(
    left, reason, tmp_path, monkeypatch, capsys
):
    """A killed stage 2, then `evaluate.py`: the table was of another model, without a reason."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "contrastive" / left).mkdir(parents=True)
    (tmp_path / "out" / "pretrain").mkdir()
    (tmp_path / "out" / "pretrain" / "config.json").write_text("{}")
    equal(weights.trained_model(), "out/pretrain", "the next one is taken")
    said = capsys.readouterr().out
    assert said.startswith(f"out/contrastive is not taken: {reason}") and "command" in said, said
    (tmp_path / "out" / "contrastive" / "config.json").write_text("{}")
    equal(weights.trained_model(), "out/contrastive", "a model is there, of a run before")
    equal(capsys.readouterr().out, "", "and `load` says so")


def test_options_are_whole_numbers_and_a_kernels_name():
    """0 stands for any; less is nothing."""
    for name in ("max_length", "min_pixels", "max_pixels"):
        assert Options(**{name: 0}).checked() == Options(**{name: 0})
        for value in (-1, "5", 2.5):
            with pytest.raises(InputError, match=f"{name} .*: a whole number of at least 0"):
                Options(**{name: value}).checked()
    with pytest.raises(InputError, match="attn 5: choose from eager, sdpa"):
        Options(attn=5).checked()


def test_a_device_is_one_of_this_machine():
    """Without a name the best there is."""
    equal((device_of(None).type, device_of("cpu").type), ("cpu", "cpu"), "no GPU in these tests")
    for name, says in (("cuda:0", "PyTorch finds no GPU here"), ("tpu!", "device 'tpu!': "),
                       ("mps", "device 'mps': "), ("xpu", "device 'xpu': "),
                       ([1], r"device \[1\]: ")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            device_of(name)


@pytest.mark.parametrize(
    ("name", "there"),
    [("patch_size", "patch_size"), ("merge_size", "spatial_merge_size"),
     ("temporal_patch_size", "temporal_patch_size")],
)  # fmt: skip
def test_each_measure_of_a_patch_is_that_of_the_tower(name, there):
    """Else a picture is cut into other pieces than the tower takes."""
    embedder = toy()
    weights.refuse_other_patches(embedder, "m")
    setattr(embedder.processor.image_processor, name, 7)
    with pytest.raises(InputError, match=f"--model m: .*{name} 7, its config.json {there} [1-8]"):
        weights.refuse_other_patches(embedder, "m")


def test_a_model_is_tried_whatever_length_its_rows_may_have():
    """Rows of two tokens would be refused; the model is none the worse."""
    embedder = model.load("toy-random", 4, device="cpu", max_length=2)
    equal(embedder.collate.max_length, 2, "prove")


def test_random_weights_are_the_same_whatever_was_drawn_before(shared):
    """Runs with other seeds start from the same weights."""
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        mllm = draw_weights(shared.mllm.config, "sdpa")
        drawn.append(torch.cat([p.flatten() for p in mllm.parameters()]))
    equal(torch.equal(*drawn), True, "torch.manual_seed(0)")


def test_a_model_is_described_by_what_is_trained():
    """Numbers of what has a gradient, and of all."""
    embedder = toy()
    for p in embedder.parameters():
        p.requires_grad = False
    p.requires_grad = True
    total = sum(p.numel() for p in embedder.parameters())
    says = f"qwen2_vl | {p.numel():,} of {total:,} parameters trained | K = 4, mean pooling, "
    equal(describe(embedder), says + "chat prompt | 1 rank(s) on cpu", "describe")


def test_what_is_trained_is_said_when_it_is_chosen(capsys):
    """In the run's first lines: who forgot --freeze-vision sees it there."""
    embedder = toy()
    model.choose_trained(embedder, TrainingFlags(freeze_vision=True))
    equal(capsys.readouterr().out, describe(embedder) + "\n", "a line")


def test_settings_are_written_with_the_versions_that_made_them(tmp_path, shared):
    """Where numbers differ years later, these are asked for first."""
    weights.write_settings(shared, tmp_path, tmp_path)
    stored = json.loads((tmp_path / "nanocoma.json").read_text())
    want = {"compress_tokens": 4, "pooling": "mean", "prompt": "chat", **versions()}
    equal(stored, want, "nanocoma.json")
