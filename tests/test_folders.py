"""Folders of models: from elsewhere, damaged, absurd; adapters and their bases, wherever they are
moved; what is written is whole or not there. (Code and pickles in them: test_safety.py. Random
damage: test_folder_fuzz.py.)"""

import json
import os
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from checks import change, close, equal, expect, toy
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BertConfig, GPT2Config, Qwen2Config

import contrastive
import model
import pretrain
from data import Item
from plumbing import folders, hub, images, weights
from plumbing.config import TrainingFlags
from plumbing.errors import InputError
from plumbing.formats import IMAGE
from tools import explain, merge

TEXTS = ["a red circle", "two"]


def refused(name, *words):
    """`load` says each of these in one short line."""
    with pytest.raises(InputError) as error:
        model.load(name, device="cpu")
    said = str(error.value)
    for word in words:
        expect(re.search(word, said), said, word, "what load says")
    expect(len(said) < 600 and "\n" not in said, said, "one line", "errors.brief")


def moved_adapter(base, folder):
    """A LoRA adapter of `base` that does something, saved. -> its vectors of TEXTS."""
    embedder = model.load(base, device="cpu").eval()
    torch.manual_seed(0)
    model.choose_trained(embedder, TrainingFlags(model=str(base), lora_rank=2, lora_dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in embedder.named_parameters():
            if "lora_B" in name:  # it starts as zero, and would change nothing
                p += 0.1 * torch.randn(p.shape, generator=generator)
    model.save(embedder, folder)
    return embedder.encode(TEXTS)


# -------------------------------------------------------------------------- absurd, before building


@pytest.mark.parametrize("field, value, words", [
    ("text_config__num_hidden_layers", 10**6, ["num_hidden_layers is 1,000,000", "files have"]),
    ("vision_config__depth", 10**9, ["depth is 1,000,000,000"]),
    ("text_config__vocab_size", 10**9, ["vocab_size is 1,000,000,000", "482 rows"]),
    ("text_config__hidden_size", 10**12, ["hidden_size"]),
    ("text_config__vocab_size", float("nan"), ["vocab_size is nan"]),
    ("vision_config__depth", 300, ["depth is 300", "files have", "weights"]),
    ("vision_config__depth", 1, ["no place for 12 weights", "blocks.1"]),
    ("vision_config__depth", 3, ["lack 12 weights", "blocks.2"]),
    ("text_config__num_hidden_layers", 3, ["num_hidden_layers"]),
    ("text_config__num_hidden_layers", "4", ["num_hidden_layers|str"]),
    ("text_config__num_attention_heads", 0, ["division|num_attention_heads"]),
    ("vision_config__mlp_ratio", 10**9, ["numbers by its config.json"]),
    ("vision_config__in_channels", 10**9, ["numbers by its config.json"]),
    ("model_type", "qwen99", ["qwen99"]),
    ("model_type", 5, ["--model"]),
])  # fmt: skip
def test_a_config_that_its_files_do_not_hold_is_refused(folder, field, value, words):
    """A million layers, a vocabulary of 10^9, layers too few or too many, wrong types: with the
    number and the file, before anything is built."""
    change(folder / "config.json", **{field: value})
    refused(folder, *words)


@pytest.mark.parametrize(
    "key", "num_experts embed_dim head_dim num_blocks stages depths num_layers".split()
)
def test_each_number_of_a_config_that_builds_something_has_a_limit(tmp_path, key):
    """Its files have one weight, of three numbers."""
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {key: 10**9}}))
    with pytest.raises(InputError, match=f"{key} is 1,000,000,000 in its config.json"):
        folders.refuse_absurd_config(tmp_path)


@pytest.mark.parametrize("field, value, words", [
    ("image_processor__size", {"shortest_edge": 10**12, "longest_edge": 10**12}, ["_edge is 1,0"]),
    ("image_processor__patch_size", 10**6, ["patch_size is 1,000,000; 0 to 256"]),
    ("image_processor__merge_size", 10**6, ["merge_size is 1,000,000; 0 to 16"]),
    ("image_processor__merge_size", -1, ["merge_size is -1; 0 to 16"]),
    ("image_processor__image_grid_pinpoints", [[336, 10**6]], ["pinpoints is 1,000,000"]),
    ("image_processor__image_mean", [float("nan")] * 3, ["not of length 1", "processor"]),
    ("image_processor__image_std", [0, 0, 0], ["not of length 1"]),
    ("image_processor__image_std", "x", ["another model: config.json, processor_config.json, t"]),
    ("image_processor__patch_size", 14, ["patch_size 14, its config.json patch_size 8"]),
])  # fmt: skip
def test_a_processor_of_absurd_size_or_without_numbers_is_refused(folder, field, value, words):
    """Pictures of 10^12 pixels from any small one; pixels that are NaN or infinite."""
    change(folder / "processor_config.json", **{field: value})
    (folder / "preprocessor_config.json").unlink()
    refused(folder, *words)


@pytest.mark.parametrize(
    "key",
    "min_pixels height width image_size crop_size max_patches max_image_tiles num_crops max_splits "
    "max_soft_tokens image_seq_len image_seq_length".split(),
)
def test_each_number_of_a_processor_that_may_fill_the_memory_has_a_limit(tmp_path, key):
    """Of all families; in the older file, too."""
    numbers = {"merge_size": 2, "sizes": [{key: 10**9}]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(numbers))
    with pytest.raises(InputError, match=f"{key} is 1,000,000,000; 0 to "):
        folders.refuse_absurd_processor(tmp_path)


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors"])
def test_what_may_not_be_read_is_said(folder, name, monkeypatch):
    """The folder or a file in it is another user's."""
    closed, access = str(folder / name), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != closed and access(path, mode))
    refused(folder, f"{name or 'm:'} may not be read by this user")


@pytest.mark.parametrize("name, fields, blamed", [
    ("tokenizer_config.json", dict(eos_token=5), "tokenizer.json, tokenizer_config.json"),
    ("config.json", dict(model_type=5), "config.json"),
    ("config.json", dict(text_config__num_attention_heads=0), "config.json"),
    ("config.json", dict(vision_config__depth=1), "generation_config.json, model.safetensors"),
])  # fmt: skip
def test_what_a_library_does_not_take_names_the_files_that_it_read(folder, name, fields, blamed):
    """Values of wrong types: the sentence is ours, and the library's reason stands in it."""
    change(folder / name, **fields)
    refused(folder, rf"--model .*damaged, or made for another model: .*{re.escape(blamed)} \(")


def test_a_smallest_picture_above_the_models_own_largest_is_refused():
    """It was cut down to it in silence; with --max-pixels the user says both."""
    with pytest.raises(
        InputError, match=r"--min-pixels 50000000: above .* largest .* --max-pixels"
    ):
        model.load("toy", min_pixels=50_000_000, device="cpu")
    processor = model.load("toy", min_pixels=2_000, max_pixels=2_000, device="cpu").processor
    edges = dict(processor.image_processor.size)
    equal((edges["shortest_edge"], edges["longest_edge"]), (2_000, 2_000), "load_processor")


def test_an_edge_is_an_edge_where_nothing_says_that_it_is_an_area(tmp_path):
    """The Qwen family's "edges" are areas, and their processors have a merge_size."""
    size = {"size": {"longest_edge": 1_000_000}}
    for numbers, good in (({**size, "merge_size": 2}, True), (size, False)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(numbers))
        if good:
            folders.refuse_absurd_processor(tmp_path)
            continue
        with pytest.raises(InputError, match="longest_edge is 1,000,000; 0 to 10,000"):
            folders.refuse_absurd_processor(tmp_path)


def test_a_model_that_was_being_written_is_called_so(folder):
    """`tools.merge` was killed while it replaced a model's files: whether it is a model's folder
    was asked, and what makes one of it again not said."""
    (folder / "config.json").unlink()
    refused(folder, "no config.json in it; is it a model's folder?")
    (folder / ".part").mkdir()
    says = "a model was being written into it: the same command once more"
    refused(folder, says)
    (folder / "model.safetensors").unlink()
    refused(folder, says)
    (folder / "checkpoints" / "step-00000100").mkdir(parents=True)
    refused(folder, "its run is not finished")  # where --resume is the way


def test_a_json_file_of_a_gigabyte_is_not_read(folder, monkeypatch):
    """The limit is lowered here, and said."""
    monkeypatch.setattr(folders, "LONGEST_JSON", 100)
    refused(folder, r"\.json: longer than 100 bytes")


def test_the_digest_changes_with_any_weight(tmp_path):
    """Of a large file it takes samples, from its first byte to its last; with its name and size."""
    path = tmp_path / "a.safetensors"
    digests = set()
    for start in (None, 0, 1_500_000, 2_999_999):
        path.write_bytes(bytes(3_000_000))
        if start is not None:
            with open(path, "r+b") as file:
                file.seek(start)
                file.write(b"x")
        digests.add(folders.digest_of_weights(tmp_path))
    path.write_bytes(bytes(3_000_001))
    digests.add(folders.digest_of_weights(tmp_path))
    path.rename(tmp_path / "b.safetensors")
    digests.add(folders.digest_of_weights(tmp_path))
    equal(len(digests), 6, "nothing, three places, the size, the name")
    equal(folders.digest_of_weights(tmp_path) in digests, True, "and with nothing else")


def test_a_model_that_is_replaced_while_it_is_loaded_is_refused(folder, monkeypatch):
    """Of one in several files the first could be the old model's, and the rest the new one's."""
    read = weights.read_weights

    def replaced_meanwhile(*args):
        mllm = read(*args)
        save_file(load_file(folder / "model.safetensors"), folder / "model-00002.safetensors")
        return mllm

    monkeypatch.setattr(weights, "read_weights", replaced_meanwhile)
    refused(folder, "its files were replaced while they were read; begin again")


def test_a_loaded_model_is_no_part_of_its_file(folder):
    """Another program that writes a model over it in place (cp, transformers' save_pretrained)
    changes none that is loaded: an evaluation, or the frozen weights of a training."""
    embedder = model.load(folder, device="cpu")
    before = embedder.encode(TEXTS)
    with open(folder / "model.safetensors", "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 10)  # behind its header
        file.write(bytes(size - size // 10))
    expect((embedder.encode(TEXTS) == before).all(), "other vectors", "the same", "weights.placed")


def test_weights_that_go_while_their_digest_is_taken_are_one_clear_line(tmp_path, monkeypatch):
    """A run whose model takes the place of an adapter, or of one in more files, removes them."""
    gone = tmp_path / "adapter_model.safetensors"
    monkeypatch.setattr(Path, "glob", lambda *_: iter([gone]))
    with pytest.raises(InputError, match="adapter_model.safetensors: no such file. If a run"):
        folders.digest_of_weights(tmp_path)


def test_the_digest_is_the_same_in_whatever_order_a_disk_lists_the_files(tmp_path, monkeypatch):
    """Or --resume on another disk would be another run."""
    for name in "abc":
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * 100)
    digests, glob = set(), Path.glob
    for backwards in (False, True):
        monkeypatch.setattr(Path, "glob", lambda *x, r=backwards: sorted(glob(*x), reverse=r))
        digests.add(folders.digest_of_weights(tmp_path))
    equal(len(digests), 1, "sorted(...)")


def test_what_the_libraries_raise_is_the_folders_fault():
    """Also a panic in Rust, which is no Exception. No more: memory that is short, a signal, one's
    own errors stay what they are."""

    class PanicException(BaseException):
        pass

    for error in (KeyError("x"), PanicException("x")):
        with pytest.raises(InputError, match=rf"its content \({type(error).__name__}: "):
            with folders.reading("m"):
                raise error
    with pytest.raises(InputError, match="--model m: a package is missing: FlashAttention2"):
        with folders.reading("m"):
            raise ImportError("FlashAttention2 cannot be used")
    for error in (torch.OutOfMemoryError("x"), KeyboardInterrupt(), InputError("mine")):
        with pytest.raises(type(error)) as same:
            with folders.reading("m"):
                raise error
        expect(same.value is error, same.value, error, "as it is")


@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.1.mlp.up_proj.weight", "visual"])
def test_weights_that_are_not_finite_are_refused(folder, name):
    """NaN anywhere on a text's or a picture's way: said when it is loaded, not in training."""
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if name in key)
    weights[key][:] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "not of length 1: NaN, infinity or zeros")


def test_of_an_embedder_without_a_nanocoma_json_no_more_is_known_than_its_tokens(folder, capsys):
    """Another K is refused; with the right one a line says what may be wrong."""
    (folder / "nanocoma.json").unlink()
    model.load(folder, device="cpu")
    assert "4 compression tokens, and no nanocoma.json says so: pooling" in capsys.readouterr().out
    with pytest.raises(
        InputError, match="4 compression tokens, and no nanocoma.json.*Copy the file"
    ):
        model.load(folder, compress_tokens=8, device="cpu")


def test_weights_that_are_all_zero_are_refused(folder):
    """As of a download that was preallocated: each vector would be 0, and each cosine."""
    weights = {
        key: torch.zeros_like(w) for key, w in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "not of length 1: NaN, infinity or zeros")


@pytest.mark.parametrize("config", [
    BertConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, vocab_size=9),
    GPT2Config(n_layer=1, n_embd=8, vocab_size=9),
    Qwen2Config(num_hidden_layers=1, hidden_size=8, intermediate_size=8, vocab_size=9),
], ids=["bert", "gpt2", "qwen2"])  # fmt: skip
def test_what_is_no_multimodal_model_is_said_in_one_sentence(tmp_path, config):
    """Its kind, and what to take."""
    config.save_pretrained(tmp_path)
    save_file({"w": torch.zeros(9, 9)}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, f"{config.model_type} is no multimodal LLM", "Take an image-text-to-text")


def test_special_files_are_never_opened(folder):
    """A pipe, for which one would wait for ever, a folder, a link to nothing."""
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)):
        for name in ("nanocoma.json", "tokenizer.json", "model.safetensors"):
            old = folder / name
            kept = old.read_bytes()
            old.unlink()
            make(old)
            refused(folder, f"its {name} is no ordinary file")
            old.rmdir() if old.is_dir() else old.unlink()
            old.write_bytes(kept)


def test_a_tokenizer_that_lost_the_compression_tokens_is_refused(folder, good):
    """K says four: rows made anew for them would be random numbers. So do other K than there are
    tokens, and a tokenizer that knows more than there are rows for."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders.TOY / name, folder / name)
    refused(
        folder,
        "K = 4 by its nanocoma.json, but its tokenizer has 0 compression tokens",
        "saved with it",
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(good / name, folder / name)
    change(folder / "nanocoma.json", compress_tokens=2)
    refused(folder, "K = 2 by its nanocoma.json, but its tokenizer has 4")
    change(folder / "nanocoma.json", compress_tokens=4)
    weights = load_file(folders.TOY / "model.safetensors")  # without the four rows
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", text_config__vocab_size=478)
    refused(folder, "478 rows for tokens, none for '<|compress_")


# ------------------------------------------------------------------------------ adapters, and bases


@pytest.fixture(scope="module")
def tree(good, tmp_path_factory):
    """(a folder with an adapter whose base stands in it, as stage 2 leaves it, and one whose base
    stands beside it; their vectors)."""
    top = tmp_path_factory.mktemp("tree")
    shutil.copytree(good, top / "out" / "stage2" / "merged")
    shutil.copytree(good, top / "out" / "pretrain")
    inside = moved_adapter(top / "out" / "stage2" / "merged", top / "out" / "stage2")
    beside = moved_adapter(top / "out" / "pretrain", top / "out" / "lora")
    expect(np.allclose(inside, beside), "differ", "equal", "one base, one adapter")
    return top, inside


@pytest.fixture
def out(tree, tmp_path):
    """A copy of its `out`, in another place; the first one is not there for the time."""
    top, _ = tree
    shutil.copytree(top / "out", tmp_path / "other")
    (top / "out").rename(top / "away")
    yield tmp_path / "other"
    (top / "away").rename(top / "out")


def test_what_was_saved_is_the_base_of_what_follows_anywhere(tmp_path, monkeypatch):
    """--out may be relative; the working directory of the next command is another one."""
    monkeypatch.chdir(tmp_path)
    embedder = toy()
    model.save(embedder, "m")
    equal(embedder.mllm.origin.name, str(tmp_path / "m"), "Origin.of: os.path.abspath")


def test_an_adapter_whose_base_is_gone_is_saved_and_that_is_said(good, tmp_path, capsys):
    """Stage 1 was run again meanwhile, or cleared away: who restores it has the model."""
    shutil.copytree(good, tmp_path / "m")
    moved_adapter(tmp_path / "m", tmp_path / "lora")
    embedder = model.load(tmp_path / "lora", device="cpu")
    capsys.readouterr()
    model.save(embedder, tmp_path / "whole")
    equal(capsys.readouterr().out, "", "its base is there")
    for file in (tmp_path / "m").glob("*.safetensors"):
        file.unlink()
    model.save(embedder, tmp_path / "gone")
    said = capsys.readouterr().out
    assert f"{tmp_path / 'm'} was replaced or removed since" in said, said
    assert (tmp_path / "gone" / "adapter_model.safetensors").exists()


def test_the_base_of_an_adapter_is_looked_at_as_closely(out):
    """It came from elsewhere, too: its list of files may not lead out of it."""
    index = out / "pretrain" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "/etc/weights.safetensors"}}))
    with pytest.raises(InputError, match="lie outside of the folder"):
        model.load(str(out / "lora"), device="cpu")


def test_an_adapter_is_right_wherever_it_is_moved(tree, out, tmp_path, monkeypatch):
    """The base in it, or beside it, goes along; the working directory does not matter."""
    _, want = tree
    for cwd in (tmp_path, "/"):
        monkeypatch.chdir(cwd)
        for name in ("stage2", "lora"):
            close(model.load(out / name, device="cpu").eval().encode(TEXTS), want, name, 1e-6)
    monkeypatch.chdir(out)
    close(model.load("lora", device="cpu").eval().encode(TEXTS), want, "a relative name", 1e-6)
    (out / "stage2").rename(tmp_path / "renamed")
    z = model.load(tmp_path / "renamed", device="cpu").eval().encode(TEXTS)
    close(z, want, "only the adapter's folder, renamed", 1e-6)


def test_a_base_that_was_named_from_the_working_folder_is_found_from_any(folder, monkeypatch):
    """An adapter remembers the whole path, and can be trained on, wherever it stands."""
    monkeypatch.chdir(folder.parent)
    want = moved_adapter("m", "lora")
    Path("far/off").mkdir(parents=True)
    Path("lora").rename("far/off/lora")
    monkeypatch.chdir("/")
    embedder = model.load(folder.parent / "far/off/lora", device="cpu").eval()
    close(embedder.encode(TEXTS), want, "the absolute path", 1e-6)
    trained = [name for name, p in embedder.named_parameters() if p.requires_grad]
    expect(trained and all("lora_" in n or "token" in n for n in trained), trained, "LoRA", "alone")


def test_an_adapter_of_the_toy_remembers_its_weights(good, tmp_path, monkeypatch):
    """Another version of this repository may bring another toy."""
    moved_adapter("toy", tmp_path / "a")
    model.load(tmp_path / "a", device="cpu")
    monkeypatch.setattr(folders, "TOY", good)
    refused(tmp_path / "a", "its base .* has other weights than it was trained on")


def test_a_copied_adapter_finds_its_base_where_it_was(tree, tmp_path, monkeypatch):
    """Copied alone, and loaded from elsewhere, while the base stays."""
    top, want = tree
    shutil.copytree(top / "out" / "lora", tmp_path / "copy")
    monkeypatch.chdir("/")
    close(model.load(tmp_path / "copy", device="cpu").eval().encode(TEXTS), want, "lora", 1e-6)


def test_another_base_under_an_adapter_is_refused(out):
    """Another run would use the folder, which costs it nothing; where another program did, both
    digests are said, and no vector is made."""
    embedder = model.load(out / "pretrain", device="cpu")
    model.save(model.load(out / "stage2" / "merged", device="cpu"), out / "stage2" / "merged")
    with torch.no_grad():
        next(embedder.parameters()).add_(0.01)
    with pytest.raises(InputError, match="stage2 holds an adapter of the model in"):
        model.save(embedder, out / "stage2" / "merged")
    model.save(embedder, out / "stage2" / "other")  # beside the base there is room
    model.load(out / "stage2", device="cpu")
    embedder.mllm.save_pretrained(out / "stage2" / "merged")
    refused(out / "stage2", "base .*merged has other weights", "digest [0-9a-f]{16}, not [0-9a-f]")


def test_a_folder_is_never_asked_for_on_the_hub(out, tmp_path, monkeypatch):
    """A base that is gone is an error with its name, in the adapters of before, too. The hub is for
    adapters that say so, or that other programs wrote, as VLM2Vec's."""
    asked = []

    def fetch(name, *_):
        asked.append(name)
        return str(out / "pretrain")

    monkeypatch.setattr(folders, "fetch", fetch)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(out / "lora", tmp_path / "lora")
    refused(tmp_path / "lora", "its base is not there", "pretrain", "base_is_hub")
    change(tmp_path / "lora" / "adapter_config.json", base_model_name_or_path="out/pretrain")
    old = {"compress_tokens": 4, "pooling": "mean", "prompt": "chat"}
    (tmp_path / "lora" / "nanocoma.json").write_text(json.dumps(old))
    refused(tmp_path / "lora", "its base is not there")
    equal(asked, [], "what anyone could register")
    change(tmp_path / "lora" / "nanocoma.json", base_is_hub=True)
    model.load(tmp_path / "lora", device="cpu")
    (tmp_path / "lora" / "nanocoma.json").unlink()
    model.load(tmp_path / "lora", device="cpu")
    equal(asked, ["out/pretrain"] * 2, "said so; another program's")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere", "a/b/c", "../x"])
def test_a_path_is_never_asked_for_on_the_hub(name, monkeypatch):
    """What is no id, an owner and a name."""
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    refused(name, "no such folder; choose toy, a folder, or a hub id")


def test_a_file_is_no_model_and_not_asked_for_on_the_hub(tmp_path, monkeypatch):
    """As whoever names the weights; `toy` may be a Path."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/model.safetensors").write_text("x")
    for name in ("out/model.safetensors", str(tmp_path / "out" / "model.safetensors")):
        refused(name, "model.safetensors: is a file; name the folder that it is in")
    equal(folders.local_folder(Path("toy")), str(folders.TOY), "Path")


def test_a_name_that_no_file_can_have_is_one_line(shared, tmp_path):
    """Longer than a disk's names are."""
    for write in (model.save, lambda _, path: folders.refuse_unwritable_folder(path)):
        with pytest.raises(InputError, match="not written|cannot be written"):
            write(shared, tmp_path / ("x" * 300) / "m")
    with pytest.raises(InputError, match="--image-root x*…?.*: no such folder"):
        images.Images("x" * 300)


def test_an_adapter_cannot_replace_its_base(folder):
    """--out equal to --model with --lora-rank: an error before training, and where it is saved,
    that leaves the model as it was."""
    embedder = model.load(folder, device="cpu").eval()
    model.choose_trained(embedder, TrainingFlags(model=str(folder), lora_rank=2))
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(InputError, match="take another folder"):
        cfg = TrainingFlags(model=str(folder), lora_rank=2, out=f"{folder}/../m")
        model.choose_trained(model.load(folder, device="cpu"), cfg)
    cfg = contrastive.Config(model=str(folder), out=f"{folder}/../m", lora_rank=2, steps=1)
    with pytest.raises(InputError, match="take another"):
        contrastive.main(cfg)
    with pytest.raises(InputError, match="the model that it is an adapter of; take another folder"):
        model.save(embedder, folder)
    equal(sorted(p.name for p in folder.iterdir()), before, "nothing lost")
    model.load(folder, device="cpu")


def test_peft_loads_our_adapter_by_itself(tree):
    """On the base that transformers loads: the same hidden states."""
    top, want = tree
    mllm = AutoModelForImageTextToText.from_pretrained(top / "out" / "pretrain").eval()
    ours = model.load(top / "out" / "lora", device="cpu").eval()
    wrapped = peft.PeftModel.from_pretrained(mllm, top / "out" / "lora").eval()
    inputs = ours.collate([Item(x) for x in TEXTS])
    with torch.no_grad():
        arguments = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        h = wrapped.base_model.model.model(**arguments).last_hidden_state
    z = model.compression_pool(h, inputs["attention_mask"], 4)
    close(torch.nn.functional.normalize(z, dim=-1), want, "peft", 1e-5)


def test_stage_2_on_an_adapter_of_stage_1_can_be_moved(tmp_path, monkeypatch):
    """Both stages with LoRA, in a folder of their own; then the result alone, elsewhere."""
    monkeypatch.chdir(tmp_path)
    lora = dict(steps=1, lora_rank=2, workers=0)
    pretrain.main(pretrain.Config(model="toy", batch=2, out="one", **lora))
    contrastive.main(contrastive.Config(model="one", batch=4, block=4, out="two", **lora))
    want = model.load("two", device="cpu").encode(TEXTS)
    Path("two").rename("three")
    shutil.rmtree("one")
    monkeypatch.chdir("/")
    close(model.load(tmp_path / "three", device="cpu").encode(TEXTS), want, "moved", 1e-6)


def test_explaining_stage_2_writes_no_file(tree, tmp_path, monkeypatch):
    """On an adapter, too, which stage 2 would merge first."""
    monkeypatch.chdir(tmp_path)
    explain.main(["contrastive", "--model", str(tree[0] / "out" / "lora")])
    equal(list(tmp_path.iterdir()), [], "no file is written")


@pytest.mark.parametrize("field, value, words", [
    ("base_model_name_or_path", None, ["names no base model: None"]),
    ("base_model_name_or_path", 5, ["names no base model: 5"]),
    ("peft_type", "IA3", ["adapter of type 'IA3'; only plain LoRA"]),
    ("r", 10**9, ["r is 1,000,000,000"]),
    ("r", 0, ["r is 0"]),
    ("r", "4", ["--model"]),
    ("rank_pattern", {"q_proj": 10**9}, ["rank_pattern is 1,000,000,000"]),
    ("layer_replication", [[0, 10**6]], ["only plain LoRA"]),
    ("target_modules", "(.+)+(.+)+(.+)+x", ["repeats a group"]),
    ("target_modules", "(q_proj)*", ["repeats a group"]),
    ("target_modules", "(q_proj){1,9}", ["repeats a group"]),
    ("exclude_modules", "(q_proj)*", ["repeats a group"]),
    ("rank_pattern", {"(q_proj)*": 2}, ["repeats a group"]),
    ("alpha_pattern", {"(q_proj)*": 2}, ["repeats a group"]),
    ("target_modules", ["q_proj"], ["no place for 24 of its adapter's weights"]),
    ("target_modules", ["nothing"], ["--model"]),
])  # fmt: skip
def test_a_damaged_adapter_is_refused(tree, tmp_path, field, value, words):
    """Wrong types, absurd ranks, a pattern that would never end, fewer layers than it was trained
    on, another kind."""
    shutil.copytree(tree[0] / "out" / "lora", tmp_path / "a")
    change(tmp_path / "a" / "adapter_config.json", **{field: value})
    refused(tmp_path / "a", *words)


# ------------------------------------------------------------------------------------------ writing


def test_merge_keeps_the_number_type_of_the_base(tmp_path, capsys):
    """bfloat16 in, bfloat16 out; the rounding costs less than 1e-3 of the cosine."""
    embedder = toy()
    embedder.mllm.bfloat16()
    model.save(embedder, tmp_path / "base")
    want = moved_adapter(tmp_path / "base", tmp_path / "a")
    merge.main([str(tmp_path / "a"), str(tmp_path / "m")])
    types = {w.dtype for w in load_file(tmp_path / "m" / "model.safetensors").values()}
    equal(types, {torch.bfloat16}, "the base's")
    cosine = (model.load(tmp_path / "m", device="cpu").encode(TEXTS) * want).sum(1)
    expect(cosine.min() > 0.999, cosine, "> 0.999", "rounded, and no more")


def test_merge_refuses_to_replace_what_it_reads(out):
    """OUT is IN, under another name too, or the model under the adapter."""
    for target in ("stage2", "stage2/merged", "stage2/../stage2"):
        with pytest.raises(InputError, match="OUT .* would replace .*take another"):
            merge.main([str(out / "stage2"), str(out / target)])
    model.load(out / "stage2", device="cpu")


def test_merge_says_before_any_work_where_it_cannot_write(tmp_path, monkeypatch):
    """OUT is a file, below a file, or has no name."""
    monkeypatch.setattr(model, "load", lambda *_, **__: pytest.fail("work was done"))
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "m", ""):
        with pytest.raises(InputError, match="cannot be written"):
            merge.main(["toy", str(target)])


def test_an_export_that_is_written_again_leaves_nothing_of_the_first(good, tmp_path):
    """sentence-transformers' files, an older model's shards and their index; what is the user's,
    and the log, stays."""
    target = tmp_path / "m"
    merge.main([str(good), str(target), "--export", "sentence-transformers"])
    for name in ("notes.txt", "log.jsonl", "model-00001-of-00002.safetensors",
                 "model.safetensors.index.json", "adapter_config.json"):  # fmt: skip
        (target / name).write_text("{}")
    merge.main([str(good), str(target)])
    names = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    more = {"notes.txt", "log.jsonl", "README.md"}
    equal(names - {p.name for p in good.iterdir()}, more, "what is left, and the card")


@pytest.mark.parametrize(
    "name",
    "special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.json "
    "tokenizer.model chat_template.jinja additional_chat_templates/tool_use.jinja "
    "preprocessor_config.json generation_config.json 2_Pooling/config.json".split(),
)
def test_nothing_that_a_library_would_believe_is_left_of_an_older_model(tmp_path, name):
    """What a model of another family had, and the new one has not."""
    for file in ("part/config.json", f"m/{name}"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    folders.put_in_place(tmp_path / "part", tmp_path / "m")
    expect(not (tmp_path / "m" / name).exists(), "left", name, "folders.STALE")


def test_saved_files_have_ordinary_permissions(good, tmp_path):
    """Those of the umask, and not the owner's alone, as safetensors writes them."""
    old = os.umask(0o022)
    try:
        model.save(model.load(good, device="cpu"), tmp_path / "m")
    finally:
        os.umask(old)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "m").iterdir()}
    equal(set(modes.values()), {"0o644"}, modes)


def test_a_new_folder_that_cannot_be_written_is_not_there(tmp_path):
    """Not an empty one, which would be taken for a model's; other errors are told as they are."""
    for error, told in ((OSError(28, "No space left"), InputError), (KeyError("x"), KeyError)):
        with pytest.raises(told):
            with folders.written_beside(tmp_path / "new") as part:
                (part / "config.json").touch()
                raise error
        equal(list(tmp_path.iterdir()), [], "what is left")


@pytest.mark.parametrize("limit", [100, 100_000])
def test_a_full_disk_costs_nothing_of_what_was_whole(folder, limit):
    """No file may grow beyond the limit: the first file, or the weights, cannot be written. One
    line; the older model is as it was, and no part of the new one is left."""
    embedder = model.load(folder, device="cpu").eval()
    want = embedder.encode(TEXTS)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        with pytest.raises(InputError, match="m: not written: .*as it was; .* MB are free"):
            model.save(nudged(embedder), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    equal((list(folder.parent.iterdir()), [*folder.glob(".*")]), ([folder], []), "no part of it")
    close(model.load(folder, device="cpu").eval().encode(TEXTS), want, "the older model", 0)


def nudged(embedder):
    """A model that is another one."""
    with torch.no_grad():
        next(embedder.parameters()).add_(1)
    return embedder


def test_the_room_that_is_left_is_said_in_megabytes(tmp_path, monkeypatch):
    """Of the disk that the folder would be on, which is not there yet."""
    disk = SimpleNamespace(total=9_000_000, used=6_000_000, free=3_000_000)
    asked = []
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: asked.append(path) or disk)
    said = folders.way_out(tmp_path / "a" / "b")
    expect("; 3.0 MB are free on that disk" in said, said, "3.0 MB", "folders.way_out")
    equal(asked, [tmp_path], "the folder above it that is there")


def test_what_cannot_be_written_is_one_line(shared, tmp_path):
    """Below a file, in place of a file, where nobody may write, without a name."""
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "m", "/proc/m", "", "  "):
        with pytest.raises(InputError, match="not written|names none"):
            model.save(shared, target)
    equal((tmp_path / "file").read_text(), "x", "the file")


def test_a_link_to_nowhere_is_no_place_for_a_model(tmp_path):
    """Nor what would be below it, as where a disk is not mounted. It was said after all the work:
    that something stood there, and that more room was wanted."""
    (tmp_path / "old disk").mkdir()
    (tmp_path / "link").symlink_to("old disk")
    for target in (tmp_path / "link", tmp_path / "link" / "a" / "b"):
        folders.refuse_unwritable_folder(target)
    (tmp_path / "old disk").rmdir()
    for target in (tmp_path / "link", tmp_path / "link" / "a" / "b"):
        with pytest.raises(InputError, match="/link: is a symbolic link to old disk, which is not"):
            folders.refuse_unwritable_folder(target)


# ------------------------------------------------------------------------ what users pass to `load`


@pytest.mark.parametrize("name", [None, 5, b"toy", ["toy"], "", "a\0b", True, object()])
def test_what_is_no_name_of_a_model_is_said(name):
    """Wrong types, an empty name: never a number for an open file."""
    refused(name, "--model" if name == "a\0b" else "is no name of a model")


@pytest.mark.parametrize("options, word", [
    (dict(device="gpu"), "device 'gpu'"),
    (dict(device=3.5), "device 3.5"),
    (dict(device="cuda"), "no GPU here"),
    (dict(device="cpu", compress_tokens="4"), "--compress-tokens"),
    (dict(device="cpu", max_length="x"), "max_length 'x': a whole number"),
    (dict(device="cpu", max_length=-1), "max_length -1"),
    (dict(device="cpu", max_pixels=2.5), "max_pixels 2.5"),
    (dict(device="cpu", attn=None), "attn None"),
    (dict(device="cpu", attn="fast"), "attn|fast"),
])  # fmt: skip
def test_a_wrong_option_of_load_is_named(options, word):
    """Types and values that no model can have."""
    with pytest.raises(InputError, match=word):
        model.load("toy", **options)


# ---------------------------------------------------------------------- what users pass to `encode`


PICTURE = Image.new("RGB", (60, 40), "red")


@pytest.fixture(scope="module")
def red(tmp_path_factory):
    """A picture's file."""
    path = tmp_path_factory.mktemp("red") / "red.png"
    PICTURE.save(path)
    return path


def test_encode_takes_what_sentence_transformers_takes(shared, red):
    """A dict with a picture and a text, in either order; a tuple; a numpy picture; a path under
    "image"; an array or generator of texts."""
    both = shared.encode([Item(f"{IMAGE} what?", (PICTURE,))])[0]
    array = np.asarray(PICTURE)
    for image in (PICTURE, array, red, str(red), [red]):
        one, other = {"image": image, "text": " what?"}, {"text": " what?", "image": image}
        for x in (one, other, {"image": image, "text": f"{IMAGE} what?"}):
            close(shared.encode([x])[0], both, x, 1e-6)
    for x in ((PICTURE, " what?"), (" what?", array)):
        close(shared.encode([x])[0], both, x, 1e-6)
    alone = shared.encode([PICTURE])
    for x in (array, {"image": array}, {"image": red, "text": None}, (array[..., :3])):
        close(shared.encode([x]), alone, x, 1e-6)
    texts = shared.encode(TEXTS)
    for many in (np.array(TEXTS), (x for x in TEXTS), tuple(TEXTS), [{"text": x} for x in TEXTS]):
        close(shared.encode(many), texts, many, 1e-6)
    gray = np.full((40, 60), 7, np.uint8)
    close(shared.encode([gray]), shared.encode([Image.fromarray(gray)]), "(H, W)", 1e-6)
    for nothing in ([], (), np.array([]), iter(())):
        equal(shared.encode(nothing).shape, (0, 128), "nothing in, nothing out")


@pytest.mark.parametrize("items", [
    "red", b"red", None, 5, 2.5, True, Path("a.png"), PICTURE, np.asarray(PICTURE), {"text": "red"},
    torch.zeros(3, 8, 8), {"a", "b"}, Item("red"), np.array("red"), object(),
], ids=lambda x: type(x).__name__)  # fmt: skip
def test_a_single_input_is_no_list_and_is_told_so(shared, items):
    """encode("red") would embed three letters."""
    with pytest.raises(InputError, match=r"encode: takes a list; \[.* for a single one"):
        shared.encode(items)


@pytest.mark.parametrize("x", [
    None, 5, b"red", True, [], ["red"], [["red"]], (), ("red", "blue"), (PICTURE, PICTURE, "x"),
    torch.zeros(3, 8, 8), np.zeros((8, 8, 3), np.float32), np.zeros((3, 8, 8), np.uint8),
    np.zeros((0, 8, 3), np.uint8), np.array(["a"]), {}, {"text": 5}, {"image": 5}, {"img": PICTURE},
    {"text": "", "image": None}, {"image": [None]}, {"image": torch.zeros(3, 8, 8)},
    {"role": "user", "content": []}, Item("red", "a.png"), Item(5), Item("red", (None,)), object(),
    Item(IMAGE, ()), {"text": f"{IMAGE}{IMAGE}", "image": PICTURE}, {"image": "no.png"},
], ids=lambda x: type(x).__name__)  # fmt: skip
def test_what_is_no_input_is_told_the_right_form(shared, x):
    """Numbers, tensors, lists in the list, other keys, pixels that are no bytes: one line."""
    with pytest.raises(InputError) as error:
        shared.encode(["red", x])
    said = str(error.value)
    expect(len(said) < 600, said, "one line", "errors.brief")
    expect(re.search("Image.open|uint8|<image> for|no such picture|tuple", said), said, "", "form")


@pytest.mark.parametrize("options", [dict(chunk_tokens=0), dict(chunk_tokens="x"),
                                     dict(workers=-1), dict(workers="x")])  # fmt: skip
def test_a_wrong_option_of_encode_is_named(shared, options):
    """No endless loop over chunks of nothing."""
    with pytest.raises(InputError, match=f"{next(iter(options))} .*: a whole number"):
        shared.encode(["red"], **options)


def test_an_encode_that_fails_leaves_the_mode_as_it_was(embedder):
    """Training goes on with dropout where the caller catches the error; and a tower that was put
    into evaluation mode stays in it."""
    embedder.train()
    tower = embedder.mllm.model.visual.eval()
    for items in (["red", Path("no-such-picture.png")], ["red"], [None]):
        try:
            embedder.encode(items)
        except InputError:
            pass
        equal(
            (embedder.training, embedder.mllm.training, tower.training), (True, True, False), items
        )


def test_a_name_of_any_length_is_shown_in_brief():
    """100,000 characters came back."""
    with pytest.raises(InputError, match="no such folder") as refused:
        model.load("y" * 100_000)
    expect(len(str(refused.value)) < 400, len(str(refused.value)), "a line", "errors.brief")
