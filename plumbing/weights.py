"""A folder or hub id -> model and processor, and back: safetensors only, no code from elsewhere; K,
pooling and prompt as flags and checkpoint say together. (Adapters: adapters.py; what a folder may
hold: folders.py.)"""

import copy
import json
import math
import os
import re
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from plumbing import folders
from plumbing.adapters import Origin, find_base, origin_of, refuse_in_place_of_base
from plumbing.combinations import option
from plumbing.errors import InputError, brief
from plumbing.families import load_processor, refuse_cross_attention
from plumbing.folders import CARD, WEIGHTS, read_json, reading, written_beside
from plumbing.formats import IMAGE, Content
from plumbing.inputs import evaluating, whole_number
from plumbing.log import versions
from plumbing.ranks import say, world
from plumbing.template import STYLES

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
DEFAULT_K = 4  # where nothing says how many: toy pictures have 16 tokens. The paper: 32
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")  # kernels
SETTINGS = ("compress_tokens", "pooling", "prompt")  # in nanocoma.json of an embedder
MOST_K = 1_000  # as the flag has it; beyond, it is a slip
PATCHES = {  # of a processor -> of a vision tower's config
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}
PROBE = 300  # tokens of a picture, at most, that `prove` embeds: on a CPU more would take minutes


class Options(NamedTuple):
    """How a model is to be read: the attention kernel, the most tokens of a row (0: any), the
    smallest and largest picture in pixels (0: the model's own), the first numbers of an embedding
    that are used (0: all)."""

    attn: str = "sdpa"
    max_length: int = 0
    min_pixels: int = 0
    max_pixels: int = 0
    dim: int = 0

    def checked(self) -> "Options":
        """As they are, or an InputError that names one."""
        if self.attn not in ATTENTION:
            raise InputError(f"attn {brief(repr(self.attn))}: choose from {', '.join(ATTENTION)}")
        for name, value in self._asdict().items():
            if name != "attn":
                whole_number(name, value, 0)
        return self


def device_of(name) -> torch.device:
    """A device by its name; None: the GPU, if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type != "cuda":  # which has its own line, below
            torch.empty(0, device=device)  # an "mps" or "xpu" may not be here
    except (AssertionError, RuntimeError, TypeError) as e:
        raise InputError(f"device {brief(repr(name))}: {brief(e)}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device}: PyTorch finds no GPU here; device='cpu' runs anywhere")
    return device


# ----------------------------------------------------------------------------------------- settings


class Settings(NamedTuple):
    """What makes an MLLM an embedder: K, "mean" of the K tokens or "last" token, prompt style, and
    the lengths whose prefixes were trained as embeddings, too."""

    K: int
    pooling: str
    style: str
    prefixes: tuple = ()


def settings(name, path, asked) -> Settings:
    """What the flags ask for (None: nothing) and what the checkpoint `path` says, together; an
    InputError that names both where they contradict each other. asked: Settings."""
    stored = read_json(path, "nanocoma.json")
    K = agreed("compress_tokens", asked.K, stored, name)
    pooling = agreed("pooling", asked.pooling, stored, name)
    style = agreed("prompt", asked.style, stored, name) or "chat"
    lost = [key for key in SETTINGS if key not in stored]
    if 0 < len(lost) < len(SETTINGS):
        text = f"lacks {', '.join(lost)}: copy the one that was saved with the model"
        raise InputError(f"{brief(path)}/nanocoma.json {text}")
    if K is None:
        K = 0 if style == "vlm2vec" else DEFAULT_K
    if pooling is None:
        pooling = "mean" if K else "last"
    least = 1 if pooling == "mean" else 0
    known = style in list(STYLES) and pooling in ("mean", "last")
    if not known or type(K) is not int or not least <= K <= MOST_K:
        flags = f"--prompt {brief(style)} --pooling {brief(pooling)} --compress-tokens {brief(K)}"
        flags += " (by its nanocoma.json)" if stored else ""
        raise InputError(f"{flags}: prompts are {', '.join(STYLES)}; pooling mean (K > 0) or last")
    return Settings(K, pooling, style, stored_prefixes(stored, path))


def stored_prefixes(stored, path) -> tuple:
    """The prefixes by a folder's nanocoma.json, or an InputError."""
    lengths = stored.get("matryoshka", [])
    if not isinstance(lengths, list) or not all(type(n) is int and n > 0 for n in lengths):
        text = f'"matryoshka" is {brief(lengths)}, and not a list of lengths'
        raise InputError(f"{brief(path)}/nanocoma.json: {text}")
    return tuple(lengths)


def agreed(key, asked, stored, name):
    """A flag's value, or the checkpoint's, or None where neither says anything."""
    if asked is None:
        return stored.get(key)
    if stored.get(key, asked) != asked:
        flag = option(key)
        raise InputError(f"{flag} {asked}, but {name} was trained with {flag} {stored[key]}")
    return asked


def first_model(*names) -> str:
    """The first of these folders that holds a model, else "toy". Says which is passed over although
    a run into it was begun: who waits for its model must not take another one for it."""
    for name in names:
        if Path(name, "config.json").exists():
            return name
        if reason := folders.begun_in(name):
            say(f"{name} is not taken: {reason}")
    return "toy"


def trained_model() -> str:
    """What evaluation, search and mining take where no --model is given: the last stage's model."""
    return first_model("out/contrastive", "out/pretrain")


def stage_1_model() -> str:
    """What stage 2 starts from where no --model is given; says which it is."""
    name = first_model("out/pretrain")
    hint = ": no model is in out/pretrain; python pretrain.py makes it" if name == "toy" else ""
    say(f"starting from {name}{hint}")
    return name


# ------------------------------------------------------------------------------------------ loading


def load_mllm(path, name, options) -> tuple:
    """Model and processor of `path`, the local folder of `name`; of an adapter's folder, those of
    its base. -> (the transformers model, its processor, whether `path` holds an adapter)."""
    adapter = read_json(path, "adapter_config.json")
    origin = find_base(path, adapter) if adapter else Origin.of(name, path)
    base = origin.folder
    # An adapter's folder may bring a tokenizer of its own, with the K tokens.
    own = os.path.exists(os.path.join(path, "tokenizer_config.json"))
    processor_folder = path if own else base
    for folder in {path, base}:
        folders.refuse_hostile(folder)
    if folders.is_unfinished(path):  # a second run into it, or one that was killed at its very end
        text = f"a run into it is not finished: {folders.RESUME}"
        say(f"--model {path}: {text}. The model that is taken may be that of the run before")
    folders.refuse_absurd_config(base)
    folders.refuse_absurd_processor(processor_folder)
    with reading(base, "config.json"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        refuse_other_kinds(base, config)
        refuse_larger_than_its_files(base, config)
    # The tokenizer looks into config.json, too.
    kinds = ("config.json", "*token*.json", "*processor_config.json", "*.jinja")
    with reading(processor_folder, *kinds):
        small, large = options.min_pixels, options.max_pixels
        processor = load_processor(processor_folder, config, small, large)
        if template := read_json(path, "nanocoma.json").get("chat_template"):
            # The folder's other one is for sentence-transformers.
            processor.chat_template = processor.tokenizer.chat_template = template
    with reading(base, "config.json", "generation_config.json", WEIGHTS):
        if origin.name == "toy-random":
            mllm = draw_weights(config, options.attn)
        else:
            mllm = read_weights(base, config, options.attn)
    origin.refuse_replaced()
    mllm.origin = origin
    return mllm, processor, bool(adapter)


def refuse_other_kinds(folder, config):
    """A model that is no multimodal LLM, as BERT, GPT-2 or a Qwen2 without eyes."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        text = f"{config.model_type} is no multimodal LLM: it takes texts with pictures nowhere"
        way_out = "Take an image-text-to-text model, as Qwen/Qwen2-VL-2B-Instruct"
        raise InputError(f"--model {folder}: {text}. {way_out}")


def refuse_larger_than_its_files(folder, config):
    """A model that would take far more memory than its files hold, found on PyTorch's meta device:
    what is built there has shapes and no memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), no_init_weights():
        mllm = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
    claimed = sum(x.numel() for x in (*mllm.parameters(), *mllm.buffers()))
    stored = sum(math.prod(shape) for shape in folders.shapes_of_weights(folder).values())
    if claimed > 4 * stored + 50_000_000:  # 4 bits in a byte, tied weights, tables of positions
        text = f"{claimed:,} numbers by its config.json, but its files have {stored:,}"
        raise InputError(f"--model {folder}: {text}")


def draw_weights(config, attn):
    """A model with random weights, always the same ones."""
    torch.manual_seed(0)  # not --seed: runs with other seeds start from the same weights
    return AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation=attn
    )


def read_weights(folder, config, attn):
    """A model with the weights of a folder, whose config is read already; ValueError where they are
    not all there."""
    mllm, loaded = AutoModelForImageTextToText.from_pretrained(
        folder,
        config=config,
        dtype="auto",  # as the checkpoint has it; `choose_trained` widens what is trained
        attn_implementation=attn,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(loaded["missing_keys"]):  # they would be random numbers
        raise ValueError(f"its files lack {len(missing)} weights, {missing[0]} for one")
    # Other names may be left over; those of a layer say that config.json is another model's.
    if unused := sorted(key for key in loaded["unexpected_keys"] if re.search(r"\.\d+\.", key)):
        raise ValueError(f"its config.json has no place for {len(unused)} weights, as {unused[0]}")
    return mllm


def refuse_lost_tokens(path, mllm, tokenizer, K):
    """The K compression tokens are all in the tokenizer, or, of a model that is no embedder yet,
    none is; and what the tokenizer knows has rows of weights. Trap: rows that are missing would be
    made anew, at random, without a word."""
    vocabulary = tokenizer.get_vocab()
    present = sum(re.fullmatch(r"<\|compress_\d+\|>", token) is not None for token in vocabulary)
    stored = "compress_tokens" in read_json(path, "nanocoma.json")
    if K and present and not stored:
        text = f"its tokenizer has {present} compression tokens, and no nanocoma.json says so"
        if present != K:
            raise InputError(f"--model {path}: {text}. Copy the file that was saved with it")
        say(f"{path}: {text}: pooling and prompt are those of the flags, or the defaults")
    if stored and present != K:
        text = f"K = {K} by its nanocoma.json, but its tokenizer has {present} compression tokens"
        raise InputError(f"--model {path}: {text}. Copy the tokenizer that was saved with it")
    rows = mllm.get_input_embeddings().weight.shape[0]
    known = set(range(rows))
    trained = read_json(path, "adapter_config.json").get("trainable_token_indices")
    if isinstance(trained, dict):
        known.update(*trained.values())  # an adapter's own rows
    if lost := [token for token, i in vocabulary.items() if i not in known]:
        text = f"its weights have {rows:,} rows for tokens, none for {brief(lost[0])!r}"
        raise InputError(f"--model {path}: {text}: the tokenizer is another model's")


def placed(embedder, device):
    """-> the embedder on a device, on a CPU in float32 (bfloat16 is slow there).

    Trap: there weights that are float32 in their file are still that file, mapped: what another
    program writes over it (cp, save_pretrained) would be in the model, unsaid, and where it makes
    the file shorter the process would end by a bus error. So they get memory of their own."""
    if device.type != "cpu":
        return embedder.to(device)
    for p in embedder.parameters():
        p.data = p.data.to(torch.float32, copy=True)  # one copy, of whatever type it is in its file
    return embedder.float()  # the buffers


@torch.no_grad()
def prove(embedder, folder):
    """-> the embedder, after it has embedded a text and a small picture: what does not fit together
    in a folder, or is not finite, is said now and not in the midst of a training."""
    refuse_cross_attention(embedder.mllm)
    refuse_other_patches(embedder, folder)
    refuse_dim(embedder)
    collate = copy.copy(embedder.collate)
    collate.max_length = 0  # whatever --max-length makes of them
    # Of no round size, and not black: a processor that has lost how to resize is found out, and one
    # that scales to infinity.
    picture = Image.new("RGB", (70, 50), "white")
    z = []  # of (1, D): the text's, and the picture's
    # Not `encode`: its loader draws a random number, and the run would be another one.
    with evaluating(embedder):
        with reading(folder, "config.json", "tokenizer.json"):
            z.append(embedder(collate([Content("a")])))
        with reading(folder, "config.json", "*processor_config.json"):
            if len(collate.picture(picture).columns["input_ids"]) < PROBE:
                z.append(embedder(collate([Content(IMAGE, (picture,))])))
    lengths = torch.cat(z).norm(dim=1)
    if not (lengths > 0.5).all():  # of NaN, infinity, zeros; else they are 1
        cause = "NaN, infinity or zeros in its weights, or processor"
        raise InputError(f"--model {brief(folder)}: its vectors are not of length 1: {cause}")
    return embedder


def refuse_other_patches(embedder, folder):
    """InputError where the processor cuts pictures otherwise than the vision tower takes them: one
    of many tokens is not tried out."""
    processor = embedder.processor.image_processor
    tower = getattr(embedder.mllm.config, "vision_config", None)
    for name, name_there in PATCHES.items():
        cut, taken = getattr(processor, name, None), getattr(tower, name_there, None)
        if isinstance(cut, int) and isinstance(taken, int) and cut != taken:
            text = f"its processor has {name} {cut}, its config.json {name_there} {taken}"
            raise InputError(f"--model {brief(folder)}: {text}")


def refuse_dim(embedder):
    """InputError where --dim asks for more numbers than an embedding has; says so where the model
    was not trained for as few."""
    width, dim = embedder.mllm.get_input_embeddings().weight.shape[1], embedder.dim
    if dim > width:
        raise InputError(f"--dim {dim}: its embeddings have {width} numbers")
    if dim < width and dim not in embedder.prefixes:
        known = ", ".join(map(str, embedder.prefixes)) or "none"
        say(f"--dim {dim}: not among the prefixes that the model was trained for ({known})")


def describe(embedder) -> str:
    """A line about a model: family, what is trained, K, pooling, prompt, devices."""
    trained = sum(p.numel() for p in embedder.parameters() if p.requires_grad)
    total = sum(p.numel() for p in embedder.parameters())
    return (
        f"{embedder.mllm.config.model_type} | {trained:,} of {total:,} parameters trained | "
        f"K = {embedder.K}, {embedder.pooling} pooling, {embedder.style} prompt | "
        f"{world()} rank(s) on {embedder.device.type}"
    )


# ------------------------------------------------------------------------------------------- saving


def write_folder(embedder, path, weights, is_embedder):
    """A plain transformers folder (config, safetensors, tokenizer, image processor), or the adapter
    in peft's format; nanocoma.json. Either all of it or, with an InputError, nothing. weights:
    {name: tensor} in the place of the model's own, where it is sharded."""
    if not isinstance(path, str | os.PathLike) or not str(path).strip():
        raise InputError(f"a model is saved into a folder, and {brief(repr(path))} names none")
    if embedder.adapter:
        origin_of(embedder.mllm).refuse_in_its_place(path)
    with written_beside(path) as part:
        write_model(embedder, part, weights)
        write_settings(embedder, part, path, is_embedder)
        if not embedder.adapter:
            refuse_in_place_of_base(part, path)
    if embedder.adapter:
        origin_of(embedder.mllm).say_if_gone()
    else:  # the base of an adapter that is added later
        embedder.mllm.origin = Origin.of(os.path.abspath(path), path)


def write_model(embedder, folder, weights=None):
    """All but nanocoma.json, see `write_folder`."""
    if embedder.adapter:  # the K embedding rows are in it
        embedder.adapter.active_peft_config.base_model_name_or_path = origin_of(embedder.mllm).name
        embedder.adapter.save_pretrained(folder, save_embedding_layers=False)
        Path(folder, CARD).unlink(missing_ok=True)  # peft's form; a person's card may be there
    else:
        embedder.mllm.save_pretrained(folder, state_dict=weights)
        # Trap: that has written the type of the *first* weight. Beside a frozen tower in bfloat16
        # the trained ones are float32, and would be rounded when they are loaded.
        types = {p.dtype for p in embedder.mllm.parameters()}
        embedder.mllm.config.dtype = reduce(torch.promote_types, types)
    embedder.mllm.config.save_pretrained(folder)
    embedder.processor.save_pretrained(folder)
    # Trap: where torchvision is, AutoProcessor wants a video part, and finds it in this file.
    embedder.processor.image_processor.save_pretrained(folder)


def write_settings(embedder, folder, path, is_embedder=True):
    """nanocoma.json: K, pooling and prompt of an embedder, an adapter's base, the versions. path:
    where the folder will be."""
    stored = {}
    if is_embedder:
        stored.update(compress_tokens=embedder.K, pooling=embedder.pooling, prompt=embedder.style)
        if embedder.prefixes:
            stored.update(matryoshka=list(embedder.prefixes))
    if embedder.adapter:
        origin = origin_of(embedder.mllm)
        stored.update(base_digest=origin.digest, base_is_hub=origin.is_hub)
        if os.path.isabs(origin.name):
            stored["base_beside"] = os.path.relpath(origin.folder, path)
    if stored:
        stored.update(versions())
        Path(folder, "nanocoma.json").write_text(json.dumps(stored, indent=1) + "\n")
