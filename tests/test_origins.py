"""Where weights are from, what a folder may claim, how one is replaced: the small parts of
adapters.py and folders.py, on folders that hold next to nothing. (Whole models: test_folders.py.)
"""

import json
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from checks import equal, expect
from safetensors import SafetensorError
from safetensors.torch import save_file

import model
from plumbing import adapters, folders, locks
from plumbing.adapters import Origin, find_base, origin_of
from plumbing.config import TrainingFlags
from plumbing.errors import InputError
from plumbing.families import RENAMED


def weights_in(folder, value=0.0):
    """A folder with one weight."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.full((2,), value)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.layers.3.self_attn", "model.language_model.layers.3.self_attn"),
        ("model.embed_tokens.x", "model.language_model.embed_tokens.x"),
        ("language_model.model.layers.3.self_attn", "model.language_model.layers.3.self_attn"),
        ("model.language_model.layers.3.self_attn", "model.language_model.layers.3.self_attn"),
    ],
)
def test_layers_of_older_adapters_have_their_new_names(old, new):
    """Of the Qwens, and of LLaVA and its like, from before transformers 4.52."""
    for pattern, name in RENAMED.items():
        old = re.sub(pattern, name, old)
    equal(old, new, "families.RENAMED")


# --------------------------------------------------------------------------------- where from


def test_a_folder_is_remembered_by_its_whole_path_and_a_hub_id_by_its_name(tmp_path, monkeypatch):
    """With the digest of its weights; of the toy the word for it."""
    weights_in(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    whole, digest = str(tmp_path / "m"), folders.digest_of_weights(tmp_path / "m")
    equal(Origin.of("m", "m"), Origin(whole, whole, digest, False), "a relative name")
    equal(Origin.of("team/m", whole), Origin("team/m", whole, digest, True), "a hub id")
    equal(Origin.of("toy-random", "x"), Origin("toy-random", "x", None), "no file")
    equal(Origin.of("toy", whole), Origin("toy", whole, digest), "the toy")


def test_an_adapter_stands_anywhere_but_in_the_place_of_its_base(tmp_path, monkeypatch):
    """By whatever name that is called."""
    weights_in(tmp_path / "m")
    (tmp_path / "link").symlink_to("m")
    monkeypatch.chdir(tmp_path)
    origin = Origin.of("m", "m")
    origin.refuse_in_its_place(tmp_path / "n")
    for name in ("m", "link", "./m/../m", str(tmp_path / "m")):
        with pytest.raises(InputError, match="in the place of the model"):
            origin.refuse_in_its_place(name)


def test_a_model_says_where_it_is_from_or_transformers_does():
    """One that `load` has made, one that it has not."""
    mine = Origin("a", "b", "c")
    equal(origin_of(SimpleNamespace(origin=mine, name_or_path="x")), mine, "load_mllm")
    equal(origin_of(SimpleNamespace(name_or_path="x")), Origin("x", "x", None), "name_or_path")


@pytest.fixture
def adapter(tmp_path):
    """adapter(name, **stored) -> (a folder of an adapter of `name`, its config)."""

    def make(name, **stored):
        folder = tmp_path / "lora"
        folder.mkdir(exist_ok=True)
        (folder / "nanocoma.json").write_text(json.dumps(stored))
        return folder, {"base_model_name_or_path": name}

    return make


def test_a_base_is_looked_for_beside_the_adapter_and_then_where_it_was(adapter, tmp_path):
    """The first whose weights are those that the adapter was trained on."""
    there, beside = weights_in(tmp_path / "there", 1.0), weights_in(tmp_path / "beside", 2.0)
    digests = [folders.digest_of_weights(x) for x in (there, beside)]
    for digest, want in ((None, beside), (digests[0], there), (digests[1], beside)):
        said = {} if digest is None else {"base_digest": digest}
        got = find_base(*adapter(str(there), base_beside="../beside", **said))
        equal(got.digest, folders.digest_of_weights(want), f"{digest}")
    equal(find_base(*adapter(str(there))).folder, str(there), "nothing is said of beside")
    says = rf"has other weights than it was trained on \(digest {digests[1]}, not 0{{16}}\)"
    with pytest.raises(InputError, match=says):
        find_base(*adapter(str(there), base_beside="../beside", base_digest="0" * 16))


def test_a_name_is_asked_for_on_the_hub_only_where_that_is_meant(adapter, monkeypatch, tmp_path):
    """A folder's name that is gone may be anyone's; other programs' adapters mean the hub."""
    base, asked = weights_in(tmp_path / "cache"), []
    monkeypatch.setattr(adapters, "local_folder", lambda name: asked.append(name) or str(base))
    for said in ({"base_is_hub": False}, {"prompt": "chat"}):
        with pytest.raises(InputError, match='its base is not there, .*"base_is_hub": true'):
            find_base(*adapter("team/base", **said))
    equal(asked, [], "nothing")
    folder, config = adapter("team/base", base_is_hub=True)
    equal(find_base(folder, config).name, "team/base", "base_is_hub")
    (folder / "nanocoma.json").unlink()
    equal(find_base(folder, config).name, "team/base", "VLM2Vec's, for one")
    equal(asked, ["team/base"] * 2, "the hub")
    for name in (None, "", 5):
        with pytest.raises(InputError, match="its adapter names no base model"):
            find_base(folder, {"base_model_name_or_path": name})
    for beside in (5, ["a"]):
        with pytest.raises(InputError, match="its adapter names no base model"):
            find_base(*adapter("team/base", base_beside=beside))


def test_an_adapter_of_a_hub_id_is_saved_as_one(embedder, good, tmp_path, monkeypatch):
    """Else it could not be loaded: a name that is no folder is asked for at the hub only where our
    own adapters say that it is one."""
    digest = folders.digest_of_weights(good)
    embedder.mllm.origin = Origin("team/base", str(good), digest, is_hub=True)
    model.choose_trained(embedder, TrainingFlags(lora_rank=2, out=str(tmp_path / "lora")))
    model.save(embedder, tmp_path / "lora")
    monkeypatch.setattr(adapters, "local_folder", lambda name: str(good))
    config = folders.read_json(tmp_path / "lora", "adapter_config.json")
    got = find_base(str(tmp_path / "lora"), config)
    equal((got.name, got.digest), ("team/base", digest), "weights.write_settings")


# --------------------------------------------------------------------------- what a folder claims


def test_all_numbers_of_a_config_are_looked_at_under_their_names():
    """At any depth; those of a list, and of lists in it, have the list's."""
    config = {"a": {"b": [1, [2.5, {"c": 3}]]}, "d": -1, "e": "9", "f": None}
    equal(list(folders.numbers_in(config)), [("b", 1), ("b", 2.5), ("c", 3), ("d", -1)], "all")


@pytest.mark.parametrize(
    ("key", "value", "good"),
    [("merge_size", -1, False), ("merge_size", 0, True), ("merge_size", 2, True),
     ("patch_size", 10**6, False), ("patch_size", 14, True), ("patch_size", [-1, 14], False),
     ("patch_size", float("nan"), False), ("other", -1, True), ("image_mean", -1, True)],
)  # fmt: skip
def test_sizes_of_a_processor_are_from_0_to_a_limit(tmp_path, key, value, good):
    """In either file; what is no size may be any number."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(json.dumps({"image_processor": {key: value}}))
        if good:
            folders.refuse_absurd_processor(tmp_path)
        else:
            with pytest.raises(InputError, match=f"{name}: {key} is "):
                folders.refuse_absurd_processor(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError(28, "full"), InputError), (SafetensorError("full"), InputError),
     (Exception("full, as the tokenizers say it"), InputError), (KeyError("x"), KeyError),
     (RuntimeError("x"), RuntimeError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=repr,
)  # fmt: skip
def test_what_is_written_beside_takes_the_place_whole_or_not_at_all(tmp_path, error, told):
    """What a disk may say is one line; a mistake of ours is one. The older files stay."""
    folder = tmp_path / "m"
    with folders.written_beside(folder) as part:
        (part / "config.json").write_text('{"model_type": 1}')
    with pytest.raises(told):
        with folders.written_beside(folder) as part:
            (part / "config.json").write_text('{"model_type": 2}')
            raise error
    left = {path.name: path.read_text() for path in folder.iterdir()}
    equal(left, {"config.json": '{"model_type": 1}'}, "written_beside")
    expect(oct((folder / "config.json").stat().st_mode)[-3:] in ("644", "664"), "", "644", "umask")


def older_and_newer(folder):
    """A model in a folder, and the files of another one that shall take its place."""
    old = {"config.json": "1", "model.safetensors": "1", "nanocoma.json": "1", "vocab.json": "1"}
    new = {"config.json": "2", "model.safetensors": "2", "nanocoma.json": "2", "modules.json": "2"}
    part = folder / ".part"
    part.mkdir(parents=True)
    for where, files in ((folder, old), (part, new)):
        for name, text in files.items():
            (where / name).write_text(text)
    return part


@pytest.mark.parametrize("moved", range(5))
def test_a_kill_between_two_files_leaves_no_mixture_of_two_models(tmp_path, monkeypatch, moved):
    """Loaded it would be new weights with the old pooling, without a word: so no library takes it
    for a model before all of it is there."""
    part, replace, left = older_and_newer(tmp_path), os.replace, [None] * moved

    def broken_off(*names):
        if not left:
            raise OSError(5, "Input/output error")
        left.pop()
        replace(*names)

    monkeypatch.setattr(folders.os, "replace", broken_off)
    if moved == 4:
        folders.put_in_place(part, tmp_path)
    else:
        with pytest.raises(InputError, match="Input/output error. It is no model now"):
            folders.put_in_place(part, tmp_path)
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    equal("config.json" in names, moved == 4, "LAST: it is the last of all")
    equal("modules.json" in names, moved >= 3, "LAST")
    expect("vocab.json" not in names, names, "what `load` would believe is gone", "STALE")
    equal(part.exists(), moved < 4, "by it the next command knows that it may write here")
    if part.exists():
        folders.refuse_foreign(tmp_path)


@pytest.mark.parametrize("removed", range(6))
def test_a_kill_while_an_older_models_files_go_leaves_it_whole_or_no_model(
    tmp_path, monkeypatch, removed
):
    """Without its nanocoma.json an embedder would be loaded with other pooling, an export without
    its modules.json embed otherwise, and the mark of a finished run speak of a model that is none.
    """
    old = ("finished.json", "config.json", "modules.json", "nanocoma.json", "vocab.json")
    for name in old:
        (tmp_path / name).touch()
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").touch()
    unlink, left = os.unlink, [None] * removed

    def killed(path, **at):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        unlink(path, **at)

    monkeypatch.setattr(folders.Path, "unlink", killed)
    if removed == len(old):
        folders.put_in_place(tmp_path / "part", tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            folders.put_in_place(tmp_path / "part", tmp_path)
    lacks = [name for name in old if not (tmp_path / name).exists()]
    want = [name for name in old[:removed] if removed < len(old) or name != "config.json"]
    equal(lacks, want, "STALE: in the order in which it goes")


def test_a_folder_that_was_broken_off_stays_ours_when_the_next_try_fails_too(tmp_path):
    """A sick disk fails more than once: --resume must be able to finish all the same. In a folder
    that was not broken off nothing stays."""
    part = older_and_newer(tmp_path)
    for name in folders.MODELS_OWN:
        (tmp_path / name).unlink(missing_ok=True)
    (part / "deep").mkdir()
    with pytest.raises(InputError, match="not written: "), folders.written_beside(tmp_path) as part:
        equal(list(part.iterdir()), [], "nothing of the older try is mixed with the new one")
        (part / "model.safetensors").touch()
        raise OSError(28, "No space left on device")
    equal(list(part.iterdir()), [], "it takes no room")
    folders.refuse_foreign(tmp_path)
    with pytest.raises(InputError), folders.written_beside(tmp_path / "other") as part:
        raise OSError(28, "No space left on device")
    equal((tmp_path / "other").exists(), False, "folders.part_in")


def test_a_folder_in_the_place_of_a_file_is_told_before_any_file_is_replaced(tmp_path):
    """Else the error would say that what stood there is as it was."""
    part = older_and_newer(tmp_path)
    for name in ("nanocoma.json", "vocab.json"):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises(IsADirectoryError, match=f"{name} is a folder"):
            folders.refuse_folders(part, tmp_path)
        (tmp_path / name).rmdir()
        (tmp_path / name).write_text("1")
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "vocab.json").mkdir()
    with pytest.raises(InputError, match="vocab.json is a folder. What stood there is as it was"):
        with folders.written_beside(tmp_path) as part:
            (part / "config.json").write_text("2")
    texts = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    equal(set(texts.values()), {"1"}, "written_beside")


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    """A finished model's, too: then its checkpoints go, and a power cut would leave neither."""
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync"))

    def renamed(*names):
        done.append("replace")
        replace(*names)

    monkeypatch.setattr(os, "replace", renamed)
    with folders.written_beside(tmp_path / "m") as part:
        (part / "config.json").touch()
        (part / "deep").mkdir()
        (part / "deep" / "x.json").touch()
    equal(done, ["fsync"] * 2 + ["replace"] * 2, "on_the_disk")


def test_two_commands_do_not_write_one_folder(tmp_path):
    """Each would take away the other's files; and none writes into a run's OUT while it is at
    work there, whether or not it has a checkpoint."""
    reading, writing = os.pipe()
    other = os.fork()
    if other == 0:
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        locks.lock(tmp_path / "run" / locks.OF_A_RUN, tmp_path)
        with folders.written_beside(tmp_path / "m"):
            os.write(writing, b"written")
            time.sleep(30)
        os._exit(0)
    os.read(reading, 7)
    try:
        with pytest.raises(InputError, match=f"m is in use by another command .process {other}"):
            with folders.written_beside(tmp_path / "m"):
                raise AssertionError("it is in use")
        assert (tmp_path / "m" / ".part").exists(), "the other's part stays"
        with pytest.raises(InputError, match="run is in use by another command"):
            folders.refuse_unwritable_folder(tmp_path / "run")
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    folders.refuse_unwritable_folder(tmp_path / "run")
    with folders.written_beside(tmp_path / "m") as part:
        (part / "config.json").write_text("{}")
    equal([path.name for path in (tmp_path / "m").iterdir()], ["config.json"], "nothing is left")


def test_a_folder_without_safetensors_or_with_a_list_that_leads_out_of_it_is_refused(tmp_path):
    """Before anything in it is opened."""
    with pytest.raises(InputError, match="no .*safetensors in it, and pickles are not opened"):
        folders.refuse_hostile(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match="pickles are not opened"):
        folders.refuse_hostile(tmp_path)
    weights_in(tmp_path)
    folders.refuse_hostile(tmp_path)
    for file, good in (("model.safetensors", True), ("../x", False), ("a/b", False), ("/x", False)):
        (tmp_path / "model.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
        if good:
            folders.refuse_hostile(tmp_path)
            continue
        with pytest.raises(InputError, match="lie outside of the folder"):
            folders.refuse_hostile(tmp_path)


class PanicException(BaseException):  # noqa: N818  by the name that Rust's bindings have for it
    """What the tokenizers' Rust code raises."""


@pytest.mark.parametrize(
    ("error", "told"),
    [(ValueError("x"), InputError), (KeyError("x"), InputError), (PanicException("x"), InputError),
     (KeyboardInterrupt(), KeyboardInterrupt), (SystemExit(1), SystemExit),
     (torch.OutOfMemoryError("x"), torch.OutOfMemoryError)],
    ids=repr,
)  # fmt: skip
def test_what_the_libraries_raise_of_a_folder_is_its_fault(error, told):
    """A clear line, but for memory, and what ends the process."""
    with pytest.raises(told) as raised:
        with folders.reading("some/folder"):
            raise error
    if told is InputError:
        says = f"--model some/folder: damaged, .* \\({type(error).__name__}: "
        expect(re.match(says, str(raised.value)), raised.value, says, "folders.reading")
    own = InputError("its own words")
    with pytest.raises(InputError, match="^its own words$"), folders.reading("some/folder"):
        raise own


GOOD = {"peft_type": "LORA", "r": 2, "rank_pattern": {"a": 1}, "target_modules": "x(y)z"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"rank_pattern": None, "alpha_pattern": None, "target_modules": ["q_proj"]}, None),
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'"),
        ({"peft_type": None}, "an adapter of type None"),
        ({"layer_replication": [[0, 1]]}, "only plain LoRA is read"),
        *(({"r": r}, f"its adapter's r is {r}") for r in (0, -1, 4)),
        ({"r": 3}, None),
        ({"rank_pattern": {"a": 99}}, "its adapter's rank_pattern is 99"),
        ({"rank_pattern": {"a": 0}}, "its adapter's rank_pattern is 0"),
        *(({"target_modules": f"(a|b){x}c"}, "repeats a group") for x in ("*", "+", "{9}")),
        ({"exclude_modules": "(a)+"}, "repeats a group"),
        ({"rank_pattern": {"(a)+": 1}}, "repeats a group"),
        ({"alpha_pattern": {"(a)*": 1}}, "repeats a group"),
    ],
)
def test_an_adapter_is_plain_lora_of_a_rank_that_its_file_has(tmp_path, change, says):
    """Looked at before peft builds anything."""
    save_file({"x.lora_A": torch.zeros(2, 3)}, tmp_path / adapters.FILE)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**GOOD, **change}))
    if says is None:
        return adapters.refuse_absurd_adapter(tmp_path)
    with pytest.raises(InputError, match=says):
        adapters.refuse_absurd_adapter(tmp_path)


def test_an_adapter_without_weights_is_refused(tmp_path):
    """None in its file, or no file."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(GOOD))
    for write in (lambda: None, lambda: save_file({}, tmp_path / adapters.FILE)):
        write()
        with pytest.raises(InputError, match="no weights in its adapter_model.safetensors"):
            adapters.refuse_absurd_adapter(tmp_path)
