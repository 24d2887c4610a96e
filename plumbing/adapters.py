"""LoRA adapters in peft's format: finding the model that an adapter belongs to, also after both
were moved; loading an adapter; making a new one."""

import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from plumbing.errors import InputError, brief, needs
from plumbing.families import LANGUAGE_ATTENTION, RENAMED
from plumbing.folders import (
    TOYS,
    digest_of_weights,
    local_folder,
    longest_side,
    numbers_in,
    read_json,
    reading,
    shapes_of_weights,
)
from plumbing.ranks import say

FILE = "adapter_model.safetensors"


class Origin(NamedTuple):
    """Where a model's weights are from, which an adapter of it must remember: "toy", a hub id or
    an absolute path; the folder; its digest (None: toy-random has no file)."""

    name: str
    folder: str
    digest: str | None
    is_hub: bool = False

    @staticmethod
    def of(name, folder) -> "Origin":
        """Of the model `name`, whose files are in `folder`."""
        name = str(name)
        if name in TOYS:
            digest = digest_of_weights(folder) if name == "toy" else None
            return Origin(name, folder, digest)
        is_hub = not os.path.isdir(name)
        name = name if is_hub else os.path.abspath(name)
        return Origin(name, os.path.abspath(folder), digest_of_weights(folder), is_hub)

    def refuse_in_its_place(self, path):
        """InputError where an adapter would be saved over its own base: both would be lost."""
        if os.path.realpath(path) == os.path.realpath(self.folder):
            text = "an adapter cannot stand in the place of the model that it is an adapter of"
            raise InputError(f"{path}: {text}; take another folder")

    def is_another(self) -> bool:
        """Whether other weights are in its place by now, or none."""
        return self.digest is not None and digest_of_weights(self.folder) != self.digest

    def refuse_replaced(self):
        """InputError where its weights are other ones by now, of a run that has ended in the same
        folder: of a model in several files, what was read may be a part of each."""
        if self.is_another():
            text = "its files were replaced while they were read; begin again"
            raise InputError(f"--model {brief(self.folder)}: {text}")

    def say_if_gone(self):
        """A line where the base is another one by now, or nowhere: the adapter needs it."""
        if self.is_another():
            text = "was replaced or removed since this command read it. Restore it"
            why = "the adapter that is saved now was trained beside it, and needs it"
            say(f"{self.folder} {text}: {why}")


def origin_of(mllm) -> Origin:
    """Where its weights are from; of a model that `load` did not make, what transformers says."""
    return getattr(mllm, "origin", None) or Origin(mllm.name_or_path, mllm.name_or_path, None)


def bases_beside(path, adapter) -> list:
    """The folders where the base of an adapter may lie: beside it, or where it was when the adapter
    was made. adapter: its config."""
    beside = read_json(path, "nanocoma.json").get("base_beside")
    name = adapter.get("base_model_name_or_path")
    if not isinstance(name, str) or not name or not isinstance(beside, str | None):
        raise InputError(f"--model {path}: its adapter names no base model: {brief(repr(name))}")
    return [os.path.join(path, beside or name), name]


def find_base(path, adapter) -> Origin:
    """What an adapter is an adapter of: a folder, or a hub id. Where the adapter says which weights
    it was trained on, no others are taken."""
    stored, places = read_json(path, "nanocoma.json"), bases_beside(path, adapter)
    name = adapter["base_model_name_or_path"]
    names = [name] if name in TOYS else [place for place in places if os.path.isdir(place)]
    # Trap: a folder's name, as out/pretrain, may be anyone's on the hub. Ours say which it is;
    # those of others, as VLM2Vec's, mean the hub.
    if not names and stored and stored.get("base_is_hub") is not True:
        text = f"its base is not there, neither {brief(places[0])} nor {brief(name)}"
        hint = 'Copy it there; of a hub id say "base_is_hub": true in its nanocoma.json'
        raise InputError(f"--model {path}: {text}. {hint}")
    origins = [Origin.of(x, local_folder(x)) for x in names or [name]]
    return right_base(path, stored, origins)


def right_base(path, stored, origins) -> Origin:
    """The first of these that holds the weights that the adapter was trained on; of adapters that
    do not say, which old ones and other programs' do not, the first."""
    want = stored.get("base_digest")
    for origin in origins:
        if want in (None, origin.digest):
            return origin
    text = f"its base {origins[0].folder} has other weights than it was trained on"
    digests = f"digest {origins[0].digest}, not {brief(want)}"
    hint = "was another model saved there? Restore it, or train the adapter anew"
    raise InputError(f"--model {path}: {text} ({digests}): {hint}")


def refuse_in_place_of_base(part, path):
    """InputError where a model, written into `part`, would take the place `path` of another one
    that the folder above is an adapter of: stage 2's OUT/merged is such a base."""
    above = Path(path).absolute().parent
    stored = read_json(above, "nanocoma.json")
    digest = stored.get("base_digest")
    if stored.get("base_beside") == Path(path).name and digest != digest_of_weights(part):
        text = f"{brief(above)} holds an adapter of the model in {brief(path)}"
        raise InputError(f"{text}, which another one would replace: take another folder")


def refuse_absurd_adapter(path):
    """InputError for what is no plain LoRA, or has a rank that no weight in its file has: peft
    would build it first, and look into the file only then."""
    config = read_json(path, "adapter_config.json")
    if config.get("peft_type") != "LORA" or config.get("layer_replication"):
        kind = brief(repr(config.get("peft_type")))
        raise InputError(f"--model {path}: an adapter of type {kind}; only plain LoRA is read")
    shapes = shapes_of_weights(path, FILE)
    if not shapes:
        raise InputError(f"--model {path}: no weights in its {FILE}")
    most = longest_side(shapes)
    for key in ("r", "rank_pattern"):
        for _, r in numbers_in(config.get(key)):
            if not 1 <= r <= most:
                text = f"its adapter's {key} is {r:,}; its file has no weight beyond {most:,}"
                raise InputError(f"--model {path}: {text}")
    # Trap: brackets that repeat what repeats take a time that doubles with each letter.
    patterns = [config.get("target_modules"), config.get("exclude_modules")]
    patterns += [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    for pattern in patterns:
        if isinstance(pattern, str) and re.search(r"\)[*+{]", pattern):
            text = f"its adapter's pattern {brief(pattern)!r} repeats a group"
            raise InputError(f"--model {path}: {text}; name the modules one by one")


def load_adapter(mllm, path):
    """A LoRA adapter in peft's format, around the model. -> the wrapper. Trap: what an adapter
    lacks, or calls by another name, peft leaves at random with a mere warning."""
    with needs("peft", "a LoRA checkpoint"):
        import peft
    with reading(path, "adapter_*"):
        refuse_absurd_adapter(path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapter = peft.PeftModel.from_pretrained(
                mllm, path, is_trainable=True, key_mapping=RENAMED
            )
    for warning in said:
        if "missing adapter keys" in str(warning.message):
            text = f"not an adapter of this model: {brief(warning.message)}"
            raise InputError(f"--model {path}: {text}")
    # The other way round peft does not even warn.
    in_file = shapes_of_weights(path, FILE)
    used = peft.get_peft_model_state_dict(adapter, save_embedding_layers=False)
    lost = sum("lora_" in name for name in in_file) - sum("lora_" in name for name in used)
    if lost > 0:
        text = f"the model has no place for {lost} of its adapter's weights"
        raise InputError(f"--model {path}: {text}: not an adapter of this model")
    return adapter


def new_adapter(mllm, cfg, compress_ids):
    """LoRA on q, k, v, o of the language model, and the compression tokens' embedding rows, around
    the model. -> the wrapper."""
    origin_of(mllm).refuse_in_its_place(cfg.out)  # now, and not when it is saved
    with needs("peft", "--lora-rank"):
        import peft
    lora = peft.LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        use_dora=cfg.dora,
        trainable_token_indices={"embed_tokens": compress_ids} if compress_ids else None,
        target_modules=LANGUAGE_ATTENTION,
    )
    return peft.get_peft_model(mllm, lora)


def without_casts(adapter):
    """The wrapper (or None), its layers without casts of their own. Under autocast all is bfloat16
    in the end; peft would first make float32 of each input, which a GPU writes, reads and keeps."""
    if adapter is None:
        return None
    for module in adapter.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return adapter
