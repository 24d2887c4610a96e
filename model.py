"""The multimodal embedder of all stages: an MLLM, K compression tokens, pooling; load and save.

    from model import load
    z = load("out/contrastive").encode(["a red circle", Image.open("a.png")])  # (2, D), unit length

    python model.py merge IN OUT      folds a LoRA adapter into a plain transformers folder
                                      (--export sentence-transformers: one for that library too)

Legend, for all files: B pairs on this rank - N = world * B pairs the loss sees - L sequence -
P image tokens - K compression tokens - D width - V vocabulary; q, t query and target - h hidden
states - z unit-length embeddings.

Top to bottom: pooling - Embedder - load and save - what is trained - plumbing.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.masking_utils import create_masks_for_generate
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from data import STYLES, Collator, InputError, Item, Lazy, fetch

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
TOY = Path(__file__).parent / "assets" / "toy"
TOY_K = 4  # compression tokens where nothing says how many: toy pictures have 16. The paper: 32

# ----------------------------------------------------------------------------------------- pooling


def compression_pool(h, attention_mask, K):
    """Mean of the K compression tokens, the last K real tokens of a row (CoMa, section 3.2).

    h (B, L, D), attention_mask (B, L) with 1 for real tokens, padded on either side -> (B, D)."""
    last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)  # (B,) last real token
    at = last[:, None] - torch.arange(K - 1, -1, -1, device=h.device)  # (B, K)
    return h.gather(1, at[..., None].expand(-1, -1, h.shape[-1])).mean(1)  # (B, D)


def last_token_pool(h, attention_mask):
    """The last real token of a row (VLM2Vec): (B, L, D), (B, L) -> (B, D), either padding."""
    return compression_pool(h, attention_mask, 1)


# ---------------------------------------------------------------------------------------- Embedder


# Padded tokens that go through the model at a time. A CPU likes what fits into its caches.
CHUNK_TOKENS = dict(cpu=1024, cuda=8192)


def by_device(value, defaults, device):
    """`value`, or where it is None the default for this kind of device."""
    return defaults.get(device.type, defaults["cpu"]) if value is None else value


class Embedder(nn.Module):
    """An MLLM (any `AutoModelForImageTextToText`) that turns an input into one unit-length vector.

    K compression tokens; pooling: "mean" of them, or the "last" token; style: see data.STYLES;
    peft: the wrapper around the MLLM where it has LoRA, else None."""

    def __init__(self, mllm, processor, K, pooling, style, max_length=0, peft=None):
        super().__init__()
        self.mllm, self.processor = mllm, processor
        self.K, self.pooling, self.style = K, pooling, style
        self.peft = [peft]  # in a list: no submodule, the weights are mllm's
        ids = processor.tokenizer.convert_tokens_to_ids([f"<|compress_{i}|>" for i in range(K)])
        self.collate = Collator(processor, ids, style, max_length)

    @property
    def device(self):
        return next(self.mllm.parameters()).device

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")

    def positions(self, inputs):
        """Position ids, always given. Trap: a Qwen-VL model remembers the last batch's, and
        Qwen2.5-VL silently falls back to 1-D ones. VLM2Vec's checkpoints need sequential ones."""
        mask = inputs["attention_mask"]
        rope = getattr(self.mllm.model, "get_rope_index", None)  # the families with M-RoPE
        if rope is None or self.style == "vlm2vec":
            return (mask.cumsum(1) - 1).clamp(min=0)  # (B, L)
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return rope(**{k: inputs.get(k) for k in keys})[0]  # (3, B, L)

    def attention(self, inputs, mask):
        """The mask in the form that the family needs. In Gemma 3 a picture's tokens see each other
        both ways and some layers see a window: there `mask` decides about earlier tokens only."""
        image = inputs.get("token_type_ids")
        if mask is None:
            return inputs["attention_mask"]
        if self.mllm.config._attn_implementation != "sdpa":  # Trap: eager would *add* the booleans
            raise InputError("the compression mask needs --attn sdpa")
        if image is None:
            return mask
        start = (image == 1) & ~F.pad(image == 1, (1, 0))[:, :-1]
        return create_masks_for_generate(
            config=self.mllm.config, past_key_values=None, attention_mask=inputs["attention_mask"],
            inputs_embeds=self.mllm.get_input_embeddings()(inputs["input_ids"]),
            and_mask_function=lambda b, head, i, j: mask[b, 0, i, j] | (j > i),
            block_sequence_ids=torch.where(image == 1, start.cumsum(1) - 1, -1),
        )  # fmt: skip

    def hidden(self, inputs, mask=None):
        """Hidden states of the last layer, after the final norm: (B, L, D).

        mask: bool (B, 1, L, L), True = may attend; without one plain causal attention."""
        return self.outputs(inputs, mask).last_hidden_state

    def outputs(self, inputs, mask=None, **more):
        """All that the model returns; more: what else is asked of it, as `output_attentions`."""
        given = {k: v for k, v in inputs.items() if k != "roles"}
        given["position_ids"] = self.positions(inputs)
        given["attention_mask"] = self.attention(inputs, mask)
        with self.autocast():
            return self.mllm.model(**given, **more, use_cache=False)

    def logits(self, h):
        """(n, D) -> (n, V), for the positions that matter: (B, L, V) would be gigabytes."""
        with self.autocast():
            return self.mllm.get_output_embeddings()(h)

    def forward(self, inputs):
        """Model inputs -> z (B, D), unit length, at least float32."""
        h = self.hidden(inputs)  # (B, L, D)
        K = self.K if self.pooling == "mean" else 1
        z = compression_pool(h, inputs["attention_mask"], K)  # (B, D)
        if sharded(self) and "pixel_values" not in inputs:
            # Trap: FSDP reduces what has a gradient; ranks without a picture would send less.
            tower = self.mllm.get_encoder(modality="image")
            z = z + 0 * sum(p.flatten()[0] for p in tower.parameters())
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)

    @torch.no_grad()
    def encode(self, items, chunk_tokens=None, workers=0, progress="", bad=None) -> np.ndarray:
        """Embeddings, float32 (len(items), D), in the order given.

        items: Items, strings, PIL images, `pathlib.Path`s of pictures, mixed. Batched inside,
        sorted by length, `chunk_tokens` padded tokens at a time; pictures are opened in `workers`
        processes. An item that cannot be read is an InputError; with a list `bad` the error goes
        there, and the item's row is NaN."""
        if isinstance(items, str | Path):
            raise InputError(f"encode: takes a list; [{items!r}] for a single one")
        items, was_training = [Item.of(x) for x in items], self.training
        chunk_tokens = by_device(chunk_tokens, CHUNK_TOKENS, self.device)
        windows = [items[i : i + 256] for i in range(0, len(items), 256)]
        z = np.zeros((len(items), self.mllm.get_input_embeddings().weight.shape[1]), np.float32)
        self.eval()
        bar = tqdm(total=len(items), desc=progress, disable=not progress, leave=False)
        make = partial(_rows, self.collate, windows, bad is not None)
        for start, made in enumerate(prefetch(make, range(len(windows)), workers)):
            at, rows = [], []  # of the items that can be read: where in z, and their rows
            for i, row in enumerate(made, 256 * start):
                if isinstance(row, InputError):
                    z[i] = np.nan
                    bad.append(str(row))
                else:
                    at.append(i)
                    rows.append(row)
            for chunk in token_chunks(row_lengths(rows), chunk_tokens):
                inputs = self.collate.pad_rows([rows[i] for i in chunk], self.device)
                z[[at[i] for i in chunk]] = self(inputs).float().cpu().numpy()
                bar.update(len(chunk))
        bar.close()
        self.train(was_training)
        return z

    def frozen_tower(self):
        """The vision tower if nothing of it is trained, else None."""
        tower = self.mllm.get_encoder(modality="image")
        return None if any(p.requires_grad for p in tower.parameters()) else tower


def _rows(collate, windows, keep_errors, i):
    def row(item):
        try:
            return collate.row(item)
        except InputError as e:
            if not keep_errors:
                raise
            return e

    return [row(x) for x in windows[i]]


def row_lengths(rows) -> list:
    """Tokens of each row."""
    return [len(r["tokens"]["input_ids"]) for r in rows]


def token_chunks(lengths, budget) -> list:
    """Indices of rows, from the shortest to the longest, in chunks of at most `budget` padded
    tokens (a longer row stands alone); the last chunk is a full one."""
    chunks, longest = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if chunks and (len(chunks[-1]) + 1) * longest <= budget:
            chunks[-1].append(i)
        else:
            chunks.append([i])
            longest = lengths[i]
    return chunks[::-1]


# ----------------------------------------------------------------------------------- load and save


def images_only(base):
    """A transformers processor class without its video part. Trap: that part needs torchvision, and
    AutoProcessor fails where it is missing, for pictures too."""
    keep = [name for name in base.get_attributes() if name != "video_processor"]
    return type(base.__name__, (base,), dict(get_attributes=classmethod(lambda cls: keep)))


def load_processor(path, config, min_pixels=0, max_pixels=0):
    """The processor (tokenizer, image processor, chat template) of a checkpoint."""
    processor = images_only(PROCESSOR_MAPPING[type(config)]).from_pretrained(path)
    if min_pixels or max_pixels:  # the Qwen family's "edges" are areas
        size = dict(processor.image_processor.size)
        areas = hasattr(processor.image_processor, "merge_size") and "longest_edge" in size
        if not areas or (max_pixels and min_pixels > max_pixels):
            raise InputError("--min-pixels, --max-pixels: a range, for models of any picture size")
        low, high = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
        processor.image_processor.size = dict(shortest_edge=min(low, high), longest_edge=high)
    return processor


def place(name) -> str:
    """The folder of a model: the toy's, one's own, or what of a hub id a model needs, downloaded:
    its weights as safetensors, no pickles and no code."""
    if name in ("toy", "toy-random") or os.path.isdir(name):
        return str(TOY if name in ("toy", "toy-random") else name)
    return fetch(str(name), "model", ["*.json", "*.jinja", "*.model", "*.txt"], ["*.safetensors"])


def read_json(folder, name) -> dict:
    """A small JSON file of a checkpoint folder; {} where there is none."""
    file = Path(folder) / name
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except (ValueError, RecursionError) as e:
        raise InputError(f"{file}: not readable as JSON: {e}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: must hold an object, not a {type(found).__name__}")
    return found


def refuse_hostile(folder):
    """What a folder from elsewhere may not hold: pickled weights in the place of safetensors, a
    list of files that leads out of it. (Code in it is never run.)"""
    for index in Path(folder).glob("*.index.json"):
        files = read_json(folder, index.name).get("weight_map")
        for file in set(map(str, files.values())) if isinstance(files, dict) else ():
            if os.path.basename(file) != file:
                raise InputError(f"{index}: the weights in {file!r} lie outside of the folder")
    if not any(Path(folder).glob("*.safetensors")):
        raise InputError(f"--model {folder}: no *.safetensors in it, and pickles are not opened")


def load(name, compress_tokens=None, pooling=None, prompt=None, device=None, **more) -> Embedder:
    """An Embedder from "toy", "toy-random", a folder (adapters in peft's format too), or a hub id.

    compress_tokens, pooling, prompt: where None what the checkpoint says; an InputError that names
    both where they contradict it. A model that is no embedder yet gets K new tokens. device: "cuda"
    if there is one. more: attn ("sdpa"), max_length, min_pixels, max_pixels."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = place(name)
    stored, asked = read_json(path, "nanocoma.json"), dict(compress_tokens=compress_tokens)
    asked |= dict(pooling=pooling, prompt=prompt)
    for key, value in asked.items():
        if value is not None and stored.get(key, value) != value:
            f = "--" + key.replace("_", "-")
            raise InputError(f"{f} {value}, but {name} was trained with {f} {stored[key]}")
        asked[key] = stored.get(key) if value is None else value
    style, K = asked["prompt"] or "chat", asked["compress_tokens"]
    K = K if K is not None else 0 if style == "vlm2vec" else TOY_K
    pooling = asked["pooling"] or ("mean" if K else "last")
    known = style in list(STYLES) and pooling in ("mean", "last")
    if not known or type(K) is not int or not (pooling == "mean") <= K <= 10_000:
        flags = f"--prompt {style} --pooling {pooling} --compress-tokens {K}"
        raise InputError(f"{flags}: prompts are {', '.join(STYLES)}; pooling mean (K > 0) or last")
    mllm, processor, peft = load_mllm(path, name, K, **more)
    embedder = Embedder(mllm, processor, K, pooling, style, more.get("max_length", 0), peft)
    return embedder.to(device) if device.type == "cuda" else embedder.float()


def load_mllm(path, name, K, attn="sdpa", min_pixels=0, max_pixels=0, max_length=0):
    """-> (the transformers model, its processor, the peft wrapper around it or None)."""
    adapter = read_json(path, "adapter_config.json")
    name = adapter.get("base_model_name_or_path", name)
    base = place(name) if adapter else path
    for folder in {path, base}:
        refuse_hostile(folder)
    kind, how = AutoModelForImageTextToText, dict(dtype="auto", attn_implementation=attn)
    how |= dict(use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        own = os.path.exists(os.path.join(path, "tokenizer_config.json"))
        processor = load_processor(path if own else base, config, min_pixels, max_pixels)
        if name == "toy-random":
            torch.manual_seed(0)
            mllm = kind.from_config(config, dtype=torch.float32, attn_implementation=attn)
        else:
            mllm, info = kind.from_pretrained(base, **how)
            if lost := sorted(info["missing_keys"]):  # they would be random numbers
                raise ValueError(f"its files lack {len(lost)} weights, {lost[0]} for one")
    except (OSError, KeyError, ImportError, ValueError, TypeError, SafetensorError) as e:
        raise InputError(f"--model {base}: {e!s:.300}") from None
    add_compression_tokens(mllm, processor.tokenizer, K)
    return mllm, processor, load_adapter(mllm, path) if adapter else None


def load_adapter(mllm, path):
    """A LoRA adapter in peft's format, around the model. Trap: adapters from before transformers
    4.52 (VLM2Vec's) have other names for the layers, and would be left out with a mere warning."""
    peft = optional("peft", "a LoRA checkpoint")
    renamed = {r"^model\.(layers|embed_tokens)\.": r"model.language_model.\1."}
    renamed[r"^language_model\.model\."] = "model.language_model."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            how = dict(is_trainable=True, key_mapping=renamed)
            found = peft.PeftModel.from_pretrained(mllm, path, **how)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as e:
            raise InputError(f"--model {path}: its adapter: {e!s:.300}") from None
    if lost := [str(w.message) for w in said if "missing adapter keys" in str(w.message)]:
        raise InputError(f"--model {path}: not an adapter of this model: {lost[0]:.300}")
    return found


def add_compression_tokens(mllm, tokenizer, K):
    """K new special tokens with embedding rows of their own, where the checkpoint has none yet."""
    names, old = [f"<|compress_{i}|>" for i in range(K)], len(tokenizer)
    new = tokenizer.add_tokens(names, special_tokens=True)
    rows = max(mllm.get_input_embeddings().weight.shape[0], len(tokenizer))  # some have to spare
    table = mllm.resize_token_embeddings(rows, mean_resizing=False).weight.data
    if new:
        known = table[:old].float()
        noise = torch.randn(K, table.shape[1], generator=torch.Generator().manual_seed(0))
        # The mean row, with noise so that the K tokens differ: equal ones would stay equal.
        table[old : old + new] = (known.mean(0) + known.std(0) * noise[-new:]).to(table.dtype)


def save(embedder, path, embedding=True):
    """A plain transformers folder (config, safetensors, tokenizer, image processor), or the adapter
    in peft's format, and nanocoma.json (K, pooling, prompt style; not for a model that is no
    embedder yet). Written beside and renamed; rank 0 writes, all ranks take part."""
    path, part, peft = Path(path), Path(f"{path}.part"), embedder.peft[0]
    state = None
    if sharded(embedder):
        whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = dcp.get_model_state_dict(embedder.mllm, options=whole)
        names = [n for n, _ in embedder.mllm.named_parameters()]  # a tied weight once
        state = {n: state[n] for n in names if n in state}  # rank 0 holds it
    if rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        if peft:
            peft.save_pretrained(part, save_embedding_layers=False)  # the K rows are in the adapter
        else:
            embedder.mllm.save_pretrained(part, state_dict=state)
        embedder.mllm.config.save_pretrained(part)
        embedder.processor.save_pretrained(part)
        # Trap: where torchvision is, AutoProcessor wants a video part, and finds it in this file.
        embedder.processor.image_processor.save_pretrained(part)
        if embedding:
            about = dict(compress_tokens=embedder.K, pooling=embedder.pooling)
            about |= dict(prompt=embedder.style, **versions())
            (part / "nanocoma.json").write_text(json.dumps(about, indent=1) + "\n")
        path.mkdir(parents=True, exist_ok=True)
        for old in [*path.glob("adapter_*"), path / "nanocoma.json"]:  # `load` would believe them
            if not (part / old.name).exists():
                old.unlink(missing_ok=True)
        for file in sorted(part.iterdir()):
            os.replace(file, path / file.name)
        part.rmdir()


def optional(package, what):
    """A package that only one flag needs."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"{what} needs {package}: pip install {package}") from None


# --------------------------------------------------------------------------------- what is trained


def choose_trained(embedder, cfg):
    """LoRA (--lora-rank > 0: on q, k, v, o of the language model, and the K embedding rows), or all
    weights; the vision tower stays as it is with LoRA or --freeze-vision."""
    if cfg.lora_rank and not embedder.peft[0]:
        peft = optional("peft", "--lora-rank")
        rows = {"embed_tokens": embedder.collate.compress_ids} if embedder.K else None
        lora = peft.LoraConfig(
            r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout,
            use_dora=cfg.dora, trainable_token_indices=rows,
            target_modules=r".*(language_model|text_model)\..*\.(q|k|v|o)_proj",
        )  # fmt: skip
        embedder.peft[0] = peft.get_peft_model(embedder.mllm, lora)
        embedder.peft[0].active_peft_config.base_model_name_or_path = cfg.model
    if not embedder.peft[0] and cfg.freeze_vision:
        embedder.mllm.get_encoder(modality="image").requires_grad_(False)
    for p in embedder.parameters():  # trained in float32; what is frozen in bfloat16 on a GPU
        frozen = torch.bfloat16 if embedder.device.type == "cuda" else p.dtype
        full = torch.promote_types(p.dtype, torch.float32)
        p.data = p.data.to(full if p.requires_grad else frozen)
    if cfg.checkpointing:
        embedder.mllm.gradient_checkpointing_enable(dict(use_reentrant=False))
    trained = sum(p.numel() for p in embedder.parameters() if p.requires_grad)
    total = sum(p.numel() for p in embedder.parameters())
    say(f"{embedder.mllm.config.model_type} | {trained:,} of {total:,} parameters trained | "
        f"K = {embedder.K}, {embedder.pooling} pooling, {embedder.style} prompt | "
        f"{world()} rank(s) on {embedder.device.type}")  # fmt: skip


def merge(embedder):
    """Folds the adapter into the weights: the same embeddings from a plain model."""
    if embedder.peft[0]:
        embedder.mllm, embedder.peft[0] = embedder.peft[0].merge_and_unload(), None
    return embedder


def shard(embedder):
    """PyTorch's FSDP2: parameters, gradients and optimiser states divided over the ranks. Each
    decoder layer is a unit of its own; all else is one more, gathered by every forward, so that a
    rank whose chunk holds no picture calls for the same weights as the others."""
    if embedder.device.type == "cuda":
        how = dict(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    else:
        how = dict(mesh=init_device_mesh("cpu", (world(),)))
    for layer in embedder.mllm.get_decoder().layers:
        fully_shard(layer, **how)
    fully_shard(embedder, **how)


def sharded(embedder) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(embedder, FSDPModule)


# --------------------------------------------------------------------------------------- plumbing
# Every collective is a no-op in one process: one code path for world 1 and N.


def rank():
    """Which process this is, 0 ... world() - 1; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    """Prints, on rank 0 only, above a progress bar."""
    if rank() == 0:
        tqdm.write(text)


def versions() -> dict:
    """Of the libraries that numbers depend on: {name: version}."""
    return {m.__name__: m.__version__ for m in (torch, transformers, np)}


def setup() -> torch.device:
    """Joins torchrun's process group, if there is one. -> this rank's device."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


def run(main, config):
    """main(config) of a script: an InputError becomes one clear line and exit status 1, and so does
    the loss of another rank. The ranks that are left are then ended by torchrun, and never wait."""
    try:
        main(config.parse())
    except (InputError, RuntimeError) as e:
        if isinstance(e, torch.OutOfMemoryError):
            e = f"{e!s:.120}: out of memory; halve --chunk-tokens, or take --checkpointing"
        elif not isinstance(e, InputError):
            if world() == 1 or not re.search("gloo|nccl|connection", str(e), re.IGNORECASE):
                raise
            what = re.sub(r"^\[.*?\] ", "", str(e).splitlines()[0])
            what = f"rank {rank()} lost the others ({what:.80})"
            e = f"{what}: one of them ended first. --resume goes on from the last checkpoint"
        print(f"\n{Path(sys.argv[0]).name}: {e}", file=sys.stderr, flush=True)
        os._exit(1)  # not through destructors: they may wait for the other ranks
    if dist.is_initialized():
        dist.destroy_process_group()


def all_sum(x):
    """Sum over ranks: a tensor, in place, or a number."""
    if not isinstance(x, torch.Tensor):
        return sum(gather_objects(x))
    if world() > 1:
        dist.all_reduce(x)
    return x


def gather_objects(x) -> list:
    """What every rank holds, in the order of ranks."""
    found = [x] * world()
    if world() > 1:
        dist.all_gather_object(found, x)
    return found


def sum_gradients(parameters, bucket=25_000_000):
    """Gradients summed over ranks, in flat buckets of about `bucket` numbers: few, large messages.
    A parameter that this rank's batch did not touch counts as zero: ranks never differ in calls."""
    flats = [[]]
    for p in parameters:
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            flats[-1].append(p.grad)
            if sum(g.numel() for g in flats[-1]) >= bucket:
                flats.append([])
    for grads in flats if world() > 1 else []:
        flat = all_sum(torch.cat([g.flatten() for g in grads])) if grads else torch.empty(0)
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


def _worker(number):
    for s in (signal.SIGINT, signal.SIGTERM):  # they may reach all: the rank still needs its batch
        signal.signal(s, signal.SIG_IGN)
    rank_process = os.getppid()

    def outlive_nobody():
        # Trap: a rank that is killed leaves its workers; they hold its sockets open, and the other
        # ranks would wait for it.
        while os.getppid() == rank_process:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=outlive_nobody, daemon=True).start()


def _packed(make, i):
    try:  # arrays in one message: as tensors they would each hold a file descriptor
        return pickle.dumps(tree_map_only(torch.Tensor, torch.Tensor.numpy, make(i)), 5)
    except InputError as e:
        return e


def prefetch(make, indices, workers):
    """Yields make(i) for each i, in order, made ahead in `workers` processes (0: in this one). An
    InputError in a worker is raised here, as it was."""
    lazy, ahead = Lazy(sys.maxsize, partial(_packed, make)), min(workers, len(indices))
    how = dict(batch_size=None, sampler=indices, worker_init_fn=_worker)
    how["multiprocessing_context"] = "fork" if ahead else None  # a closure cannot be spawned
    for packed in DataLoader(lazy, num_workers=ahead, **how):
        if isinstance(packed, InputError):
            raise packed
        yield tree_map_only(np.ndarray, torch.from_numpy, pickle.loads(packed))


def flag(default, about, choices=None):
    """A field of a Config that becomes a command-line flag."""
    return dataclasses.field(default=default, metadata=dict(about=about, choices=choices))


@dataclasses.dataclass
class Flags:
    """The flags that all scripts share. Each script adds its own, or other defaults."""

    model: str = flag("toy", "toy, toy-random, a folder, or a hub id")
    data: str = flag("shapes", "shapes (the toy world), a .jsonl, a folder or hub id like MMEB")
    image_root: str = flag("", "where the pictures are; empty: beside the data")
    seed: int = flag(0, "of data, dropout and LoRA's start")
    compress_tokens: int | None = flag(None, "K; default: the checkpoint's, else 4 (the paper: 32)")
    pooling: str | None = flag(None, "of the K tokens, or the last one", ["mean", "last"])
    prompt: str | None = flag(None, "prompt style", list(STYLES))
    attn: str = flag("sdpa", "attention kernel", ["sdpa", "flash_attention_2", "flex_attention"])
    min_pixels: int = flag(0, "smallest picture (Qwen family), pixels; 0: the model's default")
    max_pixels: int = flag(0, "largest picture (Qwen family), pixels; the paper: 1024 x 28 x 28")
    max_length: int = flag(0, "most tokens of a row; longer ones lose text in the middle; 0: any")
    chunk_tokens: int | None = flag(None, f"padded tokens at a time; default: {CHUNK_TOKENS}")
    workers: int = flag(1, "loader processes of a rank")

    @classmethod
    def parse(cls, argv=None):
        """The command line as a Config. Unknown and abbreviated flags are errors."""
        how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        parser = argparse.ArgumentParser(description=sys.modules[cls.__module__].__doc__, **how)
        for f in filter(lambda f: f.init, dataclasses.fields(cls)):
            kind = getattr(f.type, "__args__", [f.type])[0]  # int | None -> int
            how = dict(type=kind, choices=f.metadata["choices"])
            how = dict(action=argparse.BooleanOptionalAction) if kind is bool else how
            shown = "" if f.default in (None, "") else f" (default: {f.default})"
            about, name = f.metadata["about"] + shown, "--" + f.name.replace("_", "-")
            parser.add_argument(name, default=f.default, help=about.replace("%", "%%"), **how)
        return cls(**vars(parser.parse_args(argv)))


@dataclasses.dataclass
class Config(Flags):
    """The flags that both training stages share."""

    out: str = flag("out/run", "folder for the model, log.jsonl and checkpoints")
    steps: int = flag(300, "optimiser steps")
    batch: int = flag(64, "examples a step, over all ranks")
    lr: float = flag(3e-3, "peak learning rate of AdamW")
    muon_lr: float = flag(0.02, "peak rate of Muon on the weight matrices; 0: AdamW trains all")
    schedule: str = flag("cosine", "after the warm-up, down to zero", ["cosine", "linear"])
    warmup: float = flag(0.05, "share of the steps that the learning rate takes to rise")
    weight_decay: float = flag(0.01, "decoupled weight decay")
    clip: float = flag(1.0, "largest gradient norm; 0: no clipping")
    lora_rank: int = flag(0, "rank of LoRA on the language model's attention; 0: train all")
    lora_alpha: int = flag(64, "LoRA's scale is alpha / rank")
    lora_dropout: float = flag(0.1, "dropout in front of LoRA's matrices")
    dora: bool = flag(False, "DoRA: LoRA with the weights' magnitudes trained too")
    freeze_vision: bool = flag(False, "leave the vision tower as it is (with LoRA always)")
    checkpointing: bool = flag(False, "gradient checkpointing: less memory, more time")
    save_every: int = flag(500, "steps between checkpoints; 0: only the model at the end")
    keep: int = flag(2, "checkpoints that stay")
    resume: bool = flag(False, "go on from the newest checkpoint in --out")
    data_digest: int = dataclasses.field(default=0, init=False)  # no flag: see data.ready


def load_for(cfg, device) -> Embedder:
    """The model that the flags ask for."""
    more = {k: getattr(cfg, k) for k in ("max_length", "attn", "min_pixels", "max_pixels")}
    return load(cfg.model, cfg.compress_tokens, cfg.pooling, cfg.prompt, device, **more)


def make_optimizers(embedder, cfg) -> list:
    """AdamW on all that is trained; with --muon-lr, Muon on the matrices inside the layers."""
    named = [(n, p) for n, p in embedder.named_parameters() if p.requires_grad]
    inner = [n for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    inner = set(inner) if cfg.muon_lr else set()
    adam, muon = ([p for n, p in named if (n in inner) == m] for m in (False, True))
    how = dict(weight_decay=cfg.weight_decay)
    found = [torch.optim.AdamW(adam, lr=cfg.lr, betas=(0.9, 0.98), **how)] if adam else []
    return found + ([torch.optim.Muon(muon, lr=cfg.muon_lr, **how)] if muon else [])


def begin_step(optimizers, step, cfg) -> float:
    """Seeds dropout and sets the learning rates: warm-up, then half a cosine, or a line, to zero.
    Both are functions of (seed, step, rank): nothing of them must be saved. -> AdamW's rate."""
    torch.manual_seed((cfg.seed * 1_000_003 + step) * 4_093 + rank())
    rise = max(1, round(cfg.warmup * cfg.steps))
    past = max(0, step - rise) / max(1, cfg.steps - rise)  # 0 ... 1
    fall = 1 - past if cfg.schedule == "linear" else (1 + math.cos(math.pi * past)) / 2
    for o in optimizers:
        for group in o.param_groups:
            peak = cfg.muon_lr if isinstance(o, torch.optim.Muon) else cfg.lr
            group["lr"] = peak * min(1.0, (step + 1) / rise) * fall
    return optimizers[0].param_groups[0]["lr"]


def end_step(embedder, optimizers, cfg, step, loss, ids) -> float:
    """Clips the gradient and takes the step. -> the gradient's norm before clipping. Raises
    InputError on all ranks alike where the loss or the gradient is not finite."""
    parameters = [p for p in embedder.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(loss + norm):
        at = f"step {step + 1}, lr {optimizers[0].param_groups[0]['lr']:.2e}"
        raise InputError(
            f"{at}: loss {loss}, gradient norm {norm}; rank {rank()} had the examples {ids}. The "
            "last checkpoint is good: look at these examples, or start again with a lower --lr"
        )
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)
    return norm


class Log:
    """One aligned line on the screen every few steps; every step as a line of log.jsonl."""

    def __init__(self, cfg, start):
        self.cfg, self.start, self.t0, self.waited = cfg, start, time.time(), 0.0
        self.every = max(1, min(20, cfg.steps // 10))
        path, old = Path(cfg.out, "log.jsonl"), []
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            if start and path.exists():
                old = path.read_text().splitlines(True)[: start + 1]
            first = dict(config=dataclasses.asdict(cfg), world=world(), **versions())
            Path(f"{path}.part").write_text("".join(old) or json.dumps(first) + "\n")
            os.replace(f"{path}.part", path)
            self.file = open(path, "a", buffering=1)
        self.bar = tqdm(total=cfg.steps, initial=start, disable=rank() != 0, leave=False)

    def steps(self, batches):
        """Yields (step, batch), and counts the time that a step waits for its batch."""
        for step in range(self.start, self.cfg.steps):
            t0 = time.time()
            batch = next(batches)
            self.waited += time.time() - t0 if step > self.start else 0
            yield step, batch

    def __call__(self, step, speed, **numbers):
        """numbers: reproducible, so also into log.jsonl; speed: (how many, of what) a step."""
        numbers = {k: v for k, v in numbers.items() if v or k != "cut"}
        if rank() == 0:
            self.file.write(json.dumps(dict(step=step + 1, **numbers)) + "\n")
            self.bar.update()
            if (step + 1) % self.every and step + 1 < self.cfg.steps:
                return
            each = (time.time() - self.t0) / (step + 1 - self.start)  # seconds a step
            words = [f"{k} {v:.1e}" if k == "lr" else f"{k} {v:.3f}" for k, v in numbers.items()]
            share = self.waited / (time.time() - self.t0)
            words += [f"{speed[0] / each:.0f} {speed[1]}/s", f"waits {share:.0%}"]
            if torch.cuda.is_available():
                words += [f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"]
            words += [f"eta {each * (self.cfg.steps - step - 1) / 60:.1f}m"]
            say(f"step {step + 1:>5}/{self.cfg.steps} | " + " | ".join(words))
            if step + 1 == self.cfg.steps:
                self.bar.close()


# Checkpoints: OUT/checkpoints/step-00000500/{weights.safetensors, optimizer.pt, state.json}. Data
# and dropout are functions of (seed, step): trained weights, optimiser and step are all there is.

HARMLESS = ("out", "resume", "workers", "save_every", "keep")  # flags that may change in between
TRAINED = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
stop_asked = []  # signals that asked the run to save and end


def save_checkpoint(embedder, optimizers, cfg, step):
    """Written beside and renamed: none is ever half. A full disk costs it, not the run."""
    weights, optimizer = dcp.get_state_dict(embedder, optimizers, options=TRAINED)
    names = {n for n, _ in embedder.named_parameters()}  # a tied weight once
    folder = Path(cfg.out, "checkpoints")
    part = folder / "part"
    if rank() > 0:
        return
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        weights = {n: w.contiguous() for n, w in weights.items() if n in names}
        save_file(weights, part / "weights.safetensors")
        torch.save(optimizer, part / "optimizer.pt")
        about = dict(step=step, world=world(), config=dataclasses.asdict(cfg), **versions())
        (part / "state.json").write_text(json.dumps(about, indent=1))
        for file in part.iterdir():  # on the disk before the name says so
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        os.replace(part, folder / f"step-{step:08d}")
    except (OSError, RuntimeError, SafetensorError) as e:
        say(f"no checkpoint at step {step}: {e}. Older ones stay and the run goes on; disk full?")
        return shutil.rmtree(part, ignore_errors=True)
    for old in sorted(folder.glob("step-*"))[: -max(1, cfg.keep)]:
        shutil.rmtree(old)


def maybe_checkpoint(embedder, optimizers, cfg, step):
    """Every --save-every steps, and when a signal (on any rank) asked the run to end."""
    done, stop = step + 1, all_sum(len(stop_asked))
    if stop or (cfg.save_every and done % cfg.save_every == 0 and done < cfg.steps):
        save_checkpoint(embedder, optimizers, cfg, done)
    if stop:
        say(f"stopped by a signal after step {done}; --resume goes on from there")
        sys.exit(128 + signal.SIGTERM)


def start_or_resume(embedder, optimizers, cfg) -> int:
    """-> the step to begin with; with --resume that of the newest checkpoint, which is loaded. From
    here on SIGTERM and SIGINT let the step finish, save, and end the run."""
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda number, frame: stop_asked.append(number))
    found = sorted(Path(cfg.out, "checkpoints").glob("step-*"))
    if not found:
        return 0
    if not cfg.resume:
        where = f"{cfg.out} holds {found[-1].name} of an unfinished run"
        raise InputError(f"{where}: --resume goes on with it; or take another --out, or remove it")
    about = read_json(found[-1], "state.json")
    then = dict(about.get("config") or {}, world=about.get("world"))
    now = dict(dataclasses.asdict(cfg), world=world())
    if differ := [k for k in now if k not in HARMLESS and then.get(k) != now[k]]:
        what = ", ".join(f"{k} was {then.get(k)!r}, is {now[k]!r}" for k in differ)
        raise InputError(f"--resume: not the same run: {what}. Restore that, or take another --out")
    try:
        weights = load_file(found[-1] / "weights.safetensors")
        trained = {n for n, p in embedder.named_parameters() if p.requires_grad}
        if differ := weights.keys() ^ trained:
            raise ValueError(f"{len(differ)} weights too many or too few, {min(differ)} for one")
        optimizer = torch.load(found[-1] / "optimizer.pt", weights_only=True, map_location="cpu")
        how = dict(options=dataclasses.replace(TRAINED, strict=False))
        how |= dict(model_state_dict=weights, optim_state_dict=optimizer)
        dcp.set_state_dict(embedder, optimizers, **how)
    except (OSError, EOFError, LookupError, TypeError, ValueError, RuntimeError, AttributeError,
            pickle.UnpicklingError, SafetensorError) as e:  # fmt: skip
        where = f"{found[-1]}: not a checkpoint of this run: {type(e).__name__}: {e!s:.200}"
        raise InputError(f"{where}. Remove it, and --resume goes on from the one before") from None
    say(f"resumed {found[-1]}")
    return about["step"]


def finish(embedder, cfg, embedding=True):
    """The run is over: the model stands in OUT, its checkpoints are needed no more."""
    save(embedder, cfg.out, embedding)
    if rank() == 0:
        shutil.rmtree(Path(cfg.out, "checkpoints"), ignore_errors=True)
    say(f"saved {cfg.out}")


if __name__ == "__main__":
    import tools  # which imports this file by its name

    tools.run(tools.model_commands)
