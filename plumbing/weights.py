"""A folder or hub id -> model and processor, and back: safetensors only, no code from elsewhere;
LoRA adapters in peft's format; K, pooling and prompt as flags and checkpoint say together."""

import hashlib
import json
import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText

from plumbing.errors import InputError, needs
from plumbing.families import LANGUAGE_ATTENTION, RENAMED, load_processor
from plumbing.hub import fetch
from plumbing.log import versions
from plumbing.ranks import say, world
from plumbing.template import STYLES

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
TOY = Path(__file__).parent.parent / "toy" / "mllm"
DEFAULT_K = 4  # where nothing says how many: toy pictures have 16 tokens. The paper: 32
SAMPLE = 4096  # bytes, see digest_of_weights
MODEL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


class Options(NamedTuple):
    """How a model is to be read: the attention kernel, the most tokens of a row (0: any), the
    smallest and largest picture in pixels (0: the model's own)."""

    attn: str = "sdpa"
    max_length: int = 0
    min_pixels: int = 0
    max_pixels: int = 0


# ------------------------------------------------------------------------------------------ folders


def place(name) -> str:
    """The folder of a model: the toy's, one's own, or what of a hub id a model needs, downloaded:
    its weights as safetensors, no pickles and no code."""
    if name in ("toy", "toy-random"):
        return str(TOY)
    if os.path.isdir(name):
        return str(name)
    return fetch(str(name), "model", MODEL_FILES, ["*.safetensors"])


def read_json(folder, name) -> dict:
    """A small JSON file of a checkpoint folder; {} where there is none."""
    file = Path(folder) / name
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text())
    except (ValueError, RecursionError) as e:
        raise InputError(f"{file}: not readable as JSON: {e}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: must hold an object, not a {type(value).__name__}")
    return value


class Settings(NamedTuple):
    """What makes an MLLM an embedder: K, "mean" of the K tokens or "last" token, prompt style."""

    K: int
    pooling: str
    style: str


def settings(name, path, asked) -> Settings:
    """What the flags ask for (None: nothing) and what the checkpoint `path` says, together; an
    InputError that names both where they contradict each other. asked: Settings."""
    stored = read_json(path, "nanocoma.json")
    K = agreed("compress_tokens", asked.K, stored, name)
    pooling = agreed("pooling", asked.pooling, stored, name)
    style = agreed("prompt", asked.style, stored, name) or "chat"
    if K is None:
        K = 0 if style == "vlm2vec" else DEFAULT_K
    if pooling is None:
        pooling = "mean" if K else "last"
    least = 1 if pooling == "mean" else 0
    known = style in list(STYLES) and pooling in ("mean", "last")
    if not known or type(K) is not int or not least <= K <= 10_000:
        flags = f"--prompt {style} --pooling {pooling} --compress-tokens {K}"
        raise InputError(f"{flags}: prompts are {', '.join(STYLES)}; pooling mean (K > 0) or last")
    return Settings(K, pooling, style)


def agreed(key, asked, stored, name):
    """A flag's value, or the checkpoint's, or None where neither says anything."""
    if asked is None:
        return stored.get(key)
    if stored.get(key, asked) != asked:
        flag = "--" + key.replace("_", "-")
        raise InputError(f"{flag} {asked}, but {name} was trained with {flag} {stored[key]}")
    return asked


def first_model(*folders) -> str:
    """The first of these folders that holds a model, else "toy"."""
    for folder in folders:
        if Path(folder, "config.json").exists():
            return folder
    return "toy"


def stage_1_model() -> str:
    """What stage 2 starts from where no --model is given; says which it is."""
    name = first_model("out/pretrain")
    hint = ": there is no out/pretrain; python pretrain.py makes it" if name == "toy" else ""
    say(f"starting from {name}{hint}")
    return name


def refuse_hostile(folder):
    """What a folder from elsewhere may not hold: pickled weights in the place of safetensors, a
    list of files that leads out of it. (Code in it is never run.)"""
    for index in Path(folder).glob("*.index.json"):
        weight_map = read_json(folder, index.name).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else ()
        for file in {str(f) for f in files}:
            if os.path.basename(file) != file:
                raise InputError(f"{index}: the weights in {file!r} lie outside of the folder")
    if not any(Path(folder).glob("*.safetensors")):
        raise InputError(f"--model {folder}: no *.safetensors in it, and pickles are not opened")


def digest_of_weights(folder) -> str:
    """Sixteen characters that change with the weights in a folder: of each *.safetensors its size,
    its header and samples all over it. (A whole 13 GB file would take a minute to read.)"""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for place in range(0, size, max(size // 256, SAMPLE)):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


@contextmanager
def written_beside(path):
    """Gives a new folder to write into; what it holds at the end goes to `path`, file by file. Of
    an older run in `path` the files go away that `load` would believe."""
    # On the same disk, so that a rename is all that is left to do.
    path, part = Path(path), Path(f"{path}.part")
    shutil.rmtree(part, ignore_errors=True)
    yield part
    path.mkdir(parents=True, exist_ok=True)
    for old in [*path.glob("adapter_*"), path / "nanocoma.json"]:
        if not (part / old.name).exists():
            old.unlink(missing_ok=True)
    for file in sorted(part.iterdir()):
        os.replace(file, path / file.name)
    part.rmdir()


# ------------------------------------------------------------------------------------------ loading


def load_mllm(path, name, options=Options()) -> tuple:  # noqa: B008
    """Model and processor of a folder, `path = place(name)`; of an adapter's folder, those of its
    base. -> (the transformers model, its processor, whether `path` holds an adapter)."""
    adapter = read_json(path, "adapter_config.json")
    if adapter:
        name = adapter.get("base_model_name_or_path", name)
    base = place(name) if adapter else path
    for folder in {path, base}:
        refuse_hostile(folder)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        # An adapter's folder may bring a tokenizer of its own, with the K tokens.
        own = os.path.exists(os.path.join(path, "tokenizer_config.json"))
        folder = path if own else base
        processor = load_processor(folder, config, options.min_pixels, options.max_pixels)
        if name == "toy-random":
            mllm = draw_weights(config, options.attn)
        else:
            mllm = read_weights(base, options.attn)
    except (OSError, KeyError, ImportError, ValueError, TypeError, SafetensorError) as e:
        raise InputError(f"--model {base}: {e!s:.300}") from None
    return mllm, processor, bool(adapter)


def draw_weights(config, attn):
    """A model with random weights, always the same ones."""
    torch.manual_seed(0)  # not --seed: runs with other seeds start from the same weights
    return AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation=attn
    )


def read_weights(folder, attn):
    """A model with the weights of a folder; ValueError where they are not all there."""
    mllm, loaded = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype="auto",  # as the checkpoint has it; `choose_trained` widens what is trained
        attn_implementation=attn,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(loaded["missing_keys"]):  # they would be random numbers
        raise ValueError(f"its files lack {len(missing)} weights, {missing[0]} for one")
    return mllm


def describe(embedder) -> str:
    """A line about a model: family, what is trained, K, pooling, prompt, devices."""
    trained = sum(p.numel() for p in embedder.parameters() if p.requires_grad)
    total = sum(p.numel() for p in embedder.parameters())
    return (
        f"{embedder.mllm.config.model_type} | {trained:,} of {total:,} parameters trained | "
        f"K = {embedder.K}, {embedder.pooling} pooling, {embedder.style} prompt | "
        f"{world()} rank(s) on {embedder.device.type}"
    )


# ----------------------------------------------------------------------------------------- adapters


def load_adapter(mllm, path):
    """A LoRA adapter in peft's format, around the model. -> the wrapper. Trap: what an adapter
    lacks, or calls by another name, peft leaves at random with a mere warning."""
    with needs("peft", "a LoRA checkpoint"):
        import peft
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            adapter = peft.PeftModel.from_pretrained(
                mllm, path, is_trainable=True, key_mapping=RENAMED
            )
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as e:
            raise InputError(f"--model {path}: its adapter: {e!s:.300}") from None
    for warning in said:
        if "missing adapter keys" in str(warning.message):
            text = f"not an adapter of this model: {warning.message!s:.300}"
            raise InputError(f"--model {path}: {text}")
    return adapter


def new_adapter(mllm, cfg, compress_ids):
    """LoRA on q, k, v, o of the language model, and the compression tokens' embedding rows, around
    the model. -> the wrapper, whose base is cfg.model."""
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
    adapter = peft.get_peft_model(mllm, lora)
    adapter.active_peft_config.base_model_name_or_path = cfg.model
    return adapter


# ------------------------------------------------------------------------------------------- saving


def write_settings(embedder, folder):
    """nanocoma.json: the settings and the versions."""
    stored = {
        "compress_tokens": embedder.K,
        "pooling": embedder.pooling,
        "prompt": embedder.style,
        **versions(),
    }
    Path(folder, "nanocoma.json").write_text(json.dumps(stored, indent=1) + "\n")


def write_model(embedder, folder, weights=None):
    """A plain transformers folder (config, safetensors, tokenizer, image processor), or the adapter
    in peft's format. weights: {name: tensor} in the place of the model's own, where it is
    sharded."""
    if embedder.adapter:  # the K embedding rows are in it
        embedder.adapter.save_pretrained(folder, save_embedding_layers=False)
    else:
        embedder.mllm.save_pretrained(folder, state_dict=weights)
    embedder.mllm.config.save_pretrained(folder)
    embedder.processor.save_pretrained(folder)
    # Trap: where torchvision is, AutoProcessor wants a video part, and finds it in this file.
    embedder.processor.image_processor.save_pretrained(folder)
