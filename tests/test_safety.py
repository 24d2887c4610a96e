"""Folders from elsewhere: nothing in them is executed or unpickled, and what is missing is said.
(Checkpoints from elsewhere: test_checkpoint.py. Other damage, at random: test_fuzz.py.)"""

import json
import os
import pickle
import shutil
import warnings

import pytest
import torch
from checks import change, close, equal
from safetensors.torch import load_file, save_file

import model
from plumbing import config, folders, hub, images, lines, rendering, weights, zips
from plumbing.config import TrainingFlags
from plumbing.errors import InputError
from tools import generate

MARK = "MODEL_FOLDER_RAN_CODE"


class Bomb:
    """Unpickled, it leaves a mark in the environment."""

    def __reduce__(self):
        return os.putenv, (MARK, "1")


def exploded() -> bool:
    """Whether a Bomb was unpickled, or code of a folder run (putenv is seen by child processes)."""
    return os.popen(f"echo ${MARK}").read().strip() == "1"


def test_the_bomb_would_explode():
    """Negative control: the check sees what it looks for."""
    try:
        pickle.loads(pickle.dumps(Bomb()))
        assert exploded()
    finally:
        os.unsetenv(MARK)
    assert not exploded()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_model.bin"])
def test_pickled_weights_are_refused(folder, name):
    """In the place of safetensors, under their name, or as an adapter."""
    (folder / "model.safetensors").unlink()
    torch.save(dict(w=Bomb()), folder / name)
    if name.startswith("adapter"):
        change(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="toy")
    with pytest.raises(InputError, match=f"--model {folder}: "):
        model.load(folder, device="cpu")
    assert not exploded()


def test_code_in_a_folder_is_never_run(folder):
    """`auto_map` names a module beside the weights: of a known family the library's class is used,
    an unknown one is refused."""
    (folder / "evil.py").write_text(f"import os\nos.putenv('{MARK}', '1')\nclass A: pass\n")
    autos = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
    change(folder / "config.json", auto_map={k: "evil.A" for k in autos})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]})
    assert model.load(folder, device="cpu").K == 4
    change(folder / "config.json", model_type="evil")
    with pytest.raises(InputError, match="--model"):
        model.load(folder, device="cpu")
    assert not exploded()


def test_weights_outside_of_the_folder_are_refused(folder, tmp_path):
    """An index that leads out of it with `..`."""
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "model.safetensors"), "../model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(metadata={}, weight_map=names)))
    with pytest.raises(InputError, match=r"'\.\./model.safetensors' lie outside"):
        model.load(folder, device="cpu")


def damaged(weights):
    """Ways that a file of weights can be bad: (name, its bytes)."""
    size = int.from_bytes(weights[:8], "little")
    yield "cut off", weights[: len(weights) // 2]
    yield "no bytes", b""
    yield "gigantic header", (2**60).to_bytes(8, "little") + weights[8:]
    yield "header of 200 MB", (200 * 2**20).to_bytes(8, "little") + b"{" * 1000
    yield "no JSON", weights[:8] + b"x" * size + weights[8 + size :]


@pytest.mark.parametrize("way", range(5))
def test_damaged_weights_are_an_error(folder, way):
    name, content = list(damaged((folder / "model.safetensors").read_bytes()))[way]
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=f"--model {folder}: model.safetensors: "):
        model.load(folder, device="cpu")
        pytest.fail(name)


def test_missing_weights_are_an_error_and_not_random_numbers(folder):
    """transformers would draw them anew, and only warn. (That no family's tied weights are called
    missing: test_families.py loads them all.)"""
    weights = load_file(folder / "model.safetensors")
    del weights[next(k for k in weights if k.endswith("layers.0.mlp.up_proj.weight"))]
    save_file(weights, folder / "model.safetensors", dict(format="pt"))
    with pytest.raises(InputError, match="lack 1 weights, .*layers.0.mlp.up_proj.weight for one"):
        model.load(folder, device="cpu")


@pytest.mark.parametrize(
    "wrong", ["[]", '{"compress_tokens": "4"}', '{"compress_tokens": 1000000000}',
              '{"compress_tokens": -1}', '{"pooling": "max"}', '{"prompt": ["chat"]}'],
)  # fmt: skip
def test_a_wrong_nanocoma_json_is_an_error(folder, wrong):
    """Good JSON of the wrong kind, a K that is none or would fill the memory, unknown names."""
    (folder / "nanocoma.json").write_text(wrong)
    with pytest.raises(InputError, match="nanocoma.json"):
        model.load(folder, device="cpu")


# ----------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapter(good, tmp_path_factory):
    """A LoRA embedder on `good`, moved away from it, and its folder."""
    embedder = model.load(good, device="cpu").eval()
    cfg = TrainingFlags(model=str(good), lora_rank=4, lora_dropout=0.0, dora=True)
    model.choose_trained(embedder, cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in embedder.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "lora_B" in n:  # it starts as zero, and would change nothing
                p += 0.1 * noise
    folder = tmp_path_factory.mktemp("adapter")
    model.save(embedder, folder)
    return embedder, folder


TEXTS = ["a red circle", "two"]


def test_adapters_with_the_names_of_older_transformers_are_really_used(adapter, good, tmp_path):
    """VLM2Vec's have `model.layers` where the library now has `model.language_model.layers`; peft
    would warn, and embed with the base model."""
    embedder, folder = adapter
    old = shutil.copytree(folder, tmp_path / "old")
    weights = load_file(old / "adapter_model.safetensors")
    renamed = {k.replace("model.language_model.", "model."): v for k, v in weights.items()}
    assert renamed.keys() != weights.keys() and any(".model.layers.0." in k for k in renamed)
    save_file(renamed, old / "adapter_model.safetensors")
    change(old / "adapter_config.json", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    got, want = model.load(old, device="cpu").eval().encode(TEXTS), embedder.encode(TEXTS)
    close(got, want, "the old names", 1e-6)
    assert (model.load(good, device="cpu").encode(TEXTS) * want).sum(1).max() < 0.9999


def test_a_folder_that_is_written_again_holds_nothing_of_the_first_run(adapter, good, tmp_path):
    """A full model where an adapter stood, a model that is no embedder where one was."""
    out = shutil.copytree(adapter[1], tmp_path / "out")
    plain = model.load(good, device="cpu").eval()
    model.save(plain, out)
    close(model.load(out, device="cpu").eval().encode(TEXTS), plain.encode(TEXTS), "the second")
    model.save(plain, out, is_embedder=False)
    assert not (out / "nanocoma.json").exists()


def test_an_adapter_of_another_model_is_an_error(adapter, tmp_path):
    """Names that fit nothing, a layer that it lacks: an error, not a warning and the base model's
    embeddings, or random numbers."""
    other = shutil.copytree(adapter[1], tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    save_file({k.replace("layers.", "blocks."): v for k, v in weights.items()},
              other / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(InputError, match="not an adapter of this model"):
        model.load(other, device="cpu")
    fewer = {k: v for k, v in weights.items() if "layers.1." not in k}
    assert 0 < len(fewer) < len(weights)
    save_file(fewer, other / "adapter_model.safetensors")
    with pytest.raises(InputError, match="not an adapter of this model: .*missing adapter keys"):
        model.load(other, device="cpu")


LIMITS = {  # what comes from elsewhere -> the most of it that is read, made or waited for
    (lines, "MOST"): 16 * 2**20,
    (images, "MOST_PIXELS"): 100_000_000,
    (images, "MOST_STRETCHED"): 200,
    (images, "DEEPEST"): 200,
    (images, "MOST_SIZES"): 256,
    (zips, "MOST_BYTES"): 200_000_000,
    (zips, "MOST_TABLE"): 2_000_000_000,
    (folders, "LONGEST_JSON"): 50_000_000,
    (folders, "LONGEST_EDGE"): 10_000,
    (rendering, "LONGEST"): 1_000_000,
    (rendering, "PROCESSOR_SECONDS"): 2,
    (rendering, "MEMORY"): 2**30,
    (hub, "LONGEST_WAIT"): 3600,
    (weights, "MOST_K"): 1_000,
    (config, "MOST"): 1_000_000_000,
    (generate, "LONGEST_REPLY"): 10_000_000,
}


def test_the_limits_on_what_comes_from_elsewhere_are_these_numbers():
    """The tests of each lower it, or count from it: a nought too many would pass them all."""
    found = {(module, name): getattr(module, name) for module, name in LIMITS}
    equal(found, LIMITS, "a limit was moved: measure what it costs, and change it here too")


def test_an_adapter_that_lacks_weights_is_an_error_where_warnings_are_off_too(adapter, tmp_path):
    """As under PYTHONWARNINGS=ignore: peft says it by a mere warning, and they would be random."""
    other = shutil.copytree(adapter[1], tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    fewer = {k: v for k, v in weights.items() if "layers.1." not in k}
    save_file(fewer, other / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="not an adapter of this model: .*missing adapter"):
            model.load(other, device="cpu")
