"""The multimodal embedder that all stages share: an MLLM, K compression tokens, pooling; load and save.

    from model import load
    z = load("out/contrastive").encode(["a red circle", PIL.Image.open("a.png")])    # (2, D), unit length

Legend, for all files: B pairs on this rank - N = world * B pairs the loss sees - L sequence - P image
tokens - K compression tokens - D width - V vocabulary; q, t query and target - `_all` gathered over
ranks - h hidden states - z unit-length embeddings.

Top to bottom: pooling - Embedder - load and save - what is trained - plumbing.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
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
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from data import STYLES, Collator, InputError, Item, Lazy

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
HERE = Path(__file__).parent
TOY_K = (
    4  # compression tokens of a model that has none yet: the toy picture has 16 tokens. Paper: 32
)

# ----------------------------------------------------------------------------------------- pooling


def compression_pool(h, attention_mask, K):
    """Mean of the K compression tokens, the last K real tokens of a row (CoMa, section 3.2).

    h (B, L, D), attention_mask (B, L) with 1 for real tokens, padded on either side -> (B, D)."""
    last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)  # (B,) last real token
    at = last[:, None] - torch.arange(K - 1, -1, -1, device=h.device)  # (B, K)
    return h.gather(1, at[..., None].expand(-1, -1, h.shape[-1])).mean(1)  # (B, D)


def last_token_pool(h, attention_mask):
    """The last real token of a row (VLM2Vec): (B, L, D), (B, L) -> (B, D), padded on either side."""
    return compression_pool(h, attention_mask, 1)


# ---------------------------------------------------------------------------------------- Embedder


class Embedder(nn.Module):
    """An MLLM (any `AutoModelForImageTextToText`) that turns an input into one unit-length vector.

    K: compression tokens; pooling: "mean" of them, or the "last" token; style: see data.STYLES."""

    def __init__(self, mllm, processor, K, pooling, style, max_length=0, peft=None):
        super().__init__()
        self.mllm, self.processor = mllm, processor
        self.K, self.pooling, self.style = K, pooling, style
        self.__dict__["peft"] = (
            peft  # the wrapper around mllm, where there is LoRA; no second module
        )
        ids = processor.tokenizer.convert_tokens_to_ids([f"<|compress_{i}|>" for i in range(K)])
        self.collate = Collator(processor, ids, style, max_length)

    @property
    def device(self):
        return next(self.mllm.parameters()).device

    def frozen_tower(self):
        """The vision tower if nothing of it is trained, else None."""
        tower = self.mllm.get_encoder(modality="image")
        return None if any(p.requires_grad for p in tower.parameters()) else tower

    def positions(self, inputs):
        """Position ids, always given explicitly. Trap: a Qwen-VL model remembers the last batch's, and
        Qwen2.5-VL silently falls back to 1-D ones. VLM2Vec's checkpoints need sequential ones."""
        mask = inputs["attention_mask"]
        rope = getattr(self.mllm.model, "get_rope_index", None)  # the families with M-RoPE
        if rope is None or self.style == "vlm2vec":
            return (mask.cumsum(1) - 1).clamp(min=0)  # (B, L)
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return rope(**{k: inputs.get(k) for k in keys})[0]  # (3, B, L)

    def hidden(self, inputs, mask=None):
        """Hidden states of the last layer, after the final norm: (B, L, D).

        mask: bool (B, 1, L, L), True = may attend; without one plain causal attention."""
        kwargs = {k: v for k, v in inputs.items() if k != "roles"}
        kwargs["position_ids"] = self.positions(inputs)
        if mask is not None:
            kwargs["attention_mask"] = mask
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.mllm.model(**kwargs, use_cache=False).last_hidden_state

    def logits(self, h):
        """(n, D) -> (n, V). Given only the positions that matter: (B, L, V) would be gigabytes."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.mllm.get_output_embeddings()(h)

    def forward(self, inputs):
        """Model inputs -> z (B, D), unit length, at least float32."""
        h = self.hidden(inputs)  # (B, L, D)
        K = self.K if self.pooling == "mean" else 1
        z = compression_pool(h, inputs["attention_mask"], K)  # (B, D)
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)

    @torch.no_grad()
    def encode(self, items, chunk_tokens=8192, workers=0, progress="") -> np.ndarray:
        """Embeddings, float32 (len(items), D), in the order given.

        items: Items, strings, PIL images, paths (`pathlib.Path`), mixed. Batched inside, sorted by
        length, `chunk_tokens` padded tokens at a time; pictures are opened in `workers` processes."""
        items, was_training = [Item.of(x) for x in items], self.training
        windows = [items[i : i + 256] for i in range(0, len(items), 256)]
        rows_of = Lazy(len(windows), lambda i: [self.collate.row(x) for x in windows[i]])
        z = []
        self.eval()
        with tqdm(total=len(items), desc=progress, disable=not progress, leave=False) as bar:
            for rows in prefetch(rows_of.get, range(len(windows)), min(workers, len(windows))):
                z += [torch.empty(len(rows), 0)]
                lengths = [len(r["tokens"]["input_ids"]) for r in rows]
                for chunk in token_chunks(lengths, chunk_tokens):
                    part = self(self.collate.pad_rows([rows[i] for i in chunk], self.device)).cpu()
                    if not z[-1].numel():
                        z[-1] = torch.empty(len(rows), part.shape[1])
                    z[-1][chunk] = part
                    bar.update(len(chunk))
        self.train(was_training)
        width = self.mllm.get_input_embeddings().weight.shape[1]
        return torch.cat(z).numpy() if z else np.zeros((0, width), np.float32)


def token_chunks(lengths, budget) -> list:
    """Indices of rows, sorted by length and cut into chunks of at most `budget` padded tokens (one row
    may exceed it alone). The chunks go from the shortest rows to the longest, and the last is full."""
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
    size = getattr(processor.image_processor, "size", None)
    if (min_pixels or max_pixels) and not (size and size.get("longest_edge", 0) > 10_000):
        raise InputError("--min-pixels, --max-pixels: this model's pictures have a fixed size")
    for edge, pixels in (("shortest_edge", min_pixels), ("longest_edge", max_pixels)):
        if pixels:  # the Qwen family's "edges" are areas
            processor.image_processor.size[edge] = pixels
    return processor


def place(name) -> str:
    """Where a model is: the toy's folder, else the name as it stands."""
    return str(HERE / "assets" / "toy") if name in ("toy", "toy-random") else str(name)


def load(name, compress_tokens=None, pooling=None, prompt=None, device=None, **more) -> Embedder:
    """An Embedder from "toy", "toy-random", a folder (adapters in peft's format too), or a hub id.

    compress_tokens, pooling, prompt: where None what the checkpoint says; an InputError that names both
    where they contradict it. A model that is no embedder yet gets K new tokens. device: "cuda" if there
    is one. more: dtype of the weights (float32), attn ("sdpa"), max_length, min_pixels, max_pixels."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = place(name)
    if not os.path.isdir(path) and (path.count("/") != 1 or path[0] in "./"):
        raise InputError(f"--model {name}: no such folder; choose toy, a folder, or a hub id")
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
    if style not in STYLES or pooling not in ("mean", "last") or (pooling == "mean" and K == 0):
        raise InputError(
            f"--prompt {style} --pooling {pooling} --compress-tokens {K}: prompts are "
            f"{', '.join(STYLES)}; pooling is mean (of K > 0 tokens) or last"
        )
    mllm, processor, peft = load_mllm(path, name == "toy-random", K, more)
    return Embedder(mllm, processor, K, pooling, style, more.get("max_length", 0), peft).to(device)


def load_mllm(path, fresh, K, more):
    """-> (the transformers model, its processor, the peft wrapper around it or None)."""
    adapter = read_json(path, "adapter_config.json")
    base = place(adapter.get("base_model_name_or_path", path))
    how = dict(
        dtype=more.get("dtype") or torch.float32, attn_implementation=more.get("attn", "sdpa")
    )
    try:
        config = AutoConfig.from_pretrained(base)
        whole = os.path.isdir(base) and not read_json(path, "processor_config.json")
        pixels = (more.get("min_pixels", 0), more.get("max_pixels", 0))
        processor = load_processor(base if whole else path, config, *pixels)
        if fresh:
            torch.manual_seed(0)
            mllm = AutoModelForImageTextToText.from_config(config, **how)
        else:
            mllm = AutoModelForImageTextToText.from_pretrained(base, use_safetensors=True, **how)
    except (OSError, KeyError, ImportError) as e:
        raise InputError(f"--model {path}: {e!s:.300}") from None
    add_compression_tokens(mllm, processor.tokenizer, K)
    if not adapter:
        return mllm, processor, None
    peft = optional("peft", "a LoRA checkpoint").PeftModel.from_pretrained(
        mllm, path, is_trainable=True
    )
    return mllm, processor, peft


def add_compression_tokens(mllm, tokenizer, K):
    """K new special tokens with embedding rows of their own, where the checkpoint has none yet."""
    names, old = [f"<|compress_{i}|>" for i in range(K)], len(tokenizer)
    new = tokenizer.add_tokens(names, special_tokens=True)
    rows = max(
        mllm.get_input_embeddings().weight.shape[0], len(tokenizer)
    )  # some have rows to spare
    table = mllm.resize_token_embeddings(rows, mean_resizing=False).weight.data
    if new:
        known = table[:old].float()
        noise = torch.randn(K, table.shape[1], generator=torch.Generator().manual_seed(0))
        # The mean row, with noise so that the K tokens differ: an equal start would keep them equal.
        table[old : old + K] = (known.mean(0) + known.std(0) * noise).to(table.dtype)


def save(embedder, path, embedding=True):
    """A plain transformers folder (config, safetensors, tokenizer, image processor), or the adapter in
    peft's format, and nanocoma.json (K, pooling, prompt style; not for a model that is no embedder
    yet). Written beside and renamed; rank 0 writes."""
    path, state = (
        Path(path),
        whole_state(embedder),
    )  # all ranks take part where the model is sharded
    if rank() == 0:
        part = path.with_name(path.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        (embedder.peft or embedder.mllm).save_pretrained(part, state_dict=state)
        embedder.mllm.config.save_pretrained(part)
        embedder.processor.save_pretrained(part)
        if embedding:
            about = dict(
                compress_tokens=embedder.K, pooling=embedder.pooling, prompt=embedder.style
            )
            (part / "nanocoma.json").write_text(json.dumps(about | versions(), indent=1) + "\n")
        path.mkdir(parents=True, exist_ok=True)
        for file in sorted(part.iterdir()):
            os.replace(file, path / file.name)
        part.rmdir()


def read_json(folder, name) -> dict:
    """A small JSON file of a checkpoint folder; {} where there is none."""
    file = Path(folder) / name
    return json.loads(file.read_text()) if file.exists() else {}


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
    if cfg.lora_rank and not embedder.peft:
        peft = optional("peft", "--lora-rank")
        lora = peft.LoraConfig(
            r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout, use_dora=cfg.dora,
            target_modules=r".*(language_model|text_model)\..*\.(q|k|v|o)_proj",
            trainable_token_indices={"embed_tokens": embedder.collate.compress_ids} if embedder.K else None,
        )  # fmt: skip
        embedder.__dict__["peft"] = peft.get_peft_model(embedder.mllm, lora)
        embedder.peft.active_peft_config.base_model_name_or_path = cfg.model
    if not embedder.peft and cfg.freeze_vision:
        embedder.mllm.get_encoder(modality="image").requires_grad_(False)
    for p in embedder.parameters():  # trained in float32; frozen in bfloat16 on a GPU
        frozen = torch.bfloat16 if embedder.device.type == "cuda" else p.dtype
        p.data = p.data.to(
            torch.promote_types(p.dtype, torch.float32) if p.requires_grad else frozen
        )
    if cfg.checkpointing:
        embedder.mllm.gradient_checkpointing_enable(dict(use_reentrant=False))
    say(describe(embedder))


def merge(embedder):
    """Folds the adapter into the weights: the same embeddings from a plain model."""
    if embedder.peft:
        embedder.mllm = embedder.peft.merge_and_unload()
        embedder.__dict__["peft"] = None
    return embedder


# --------------------------------------------------------------------------------------- plumbing
# Every collective is a no-op in one process: one code path for world 1 and N.


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def setup() -> torch.device:
    """Joins torchrun's process group, if there is one. -> this rank's device."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def all_sum(x):
    """Sum over ranks, in place: a tensor, or a number."""
    if world() == 1:
        return x
    if isinstance(x, torch.Tensor):
        dist.all_reduce(x)
        return x
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return type(x)(all_sum(torch.tensor(x, dtype=torch.float64, device=device)).item())


def gather_objects(x) -> list:
    """What every rank holds, in the order of ranks."""
    found = [None] * world()
    if world() > 1:
        dist.all_gather_object(found, x)
    return found if world() > 1 else [x]


def sum_gradients(parameters, bucket=25_000_000):
    """Gradients summed over ranks, in flat buckets of at most `bucket` numbers: few, large messages.
    A parameter that this rank's batch did not touch counts as zero, so ranks never differ in calls."""
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    groups, size = [[]], 0
    for p in parameters if world() > 1 else []:
        if size + p.numel() > bucket and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(p.grad)
        size += p.numel()
    for grads in groups if world() > 1 else []:
        flat = all_sum(torch.cat([g.flatten() for g in grads]))
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


def _same(x):
    return x


def _ignore_interrupt(worker):
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all; the main process ends the loader


def _packed(make, i):
    try:  # arrays in one message: as tensors they would each hold a file descriptor
        return pickle.dumps(
            tree_map(lambda t: t.numpy() if isinstance(t, torch.Tensor) else t, make(i)), 5
        )
    except InputError as e:
        return e


def prefetch(make, indices, workers):
    """Yields make(i) for i in `indices`, in order, made ahead in `workers` processes (0: in this one).
    An InputError in a worker is raised here, as it was."""
    lazy = Lazy(sys.maxsize, partial(_packed, make))
    for packed in DataLoader(
        lazy, batch_size=None, sampler=indices, num_workers=workers, collate_fn=_same,
        worker_init_fn=_ignore_interrupt,
    ):  # fmt: skip
        if isinstance(packed, InputError):
            raise packed
        yield tree_map(
            lambda t: torch.from_numpy(t) if isinstance(t, np.ndarray) else t, pickle.loads(packed)
        )


def flag(default, about, **more):
    """A field of a Config that becomes a command-line flag."""
    return dataclasses.field(default=default, metadata=dict(about=about, **more))


@dataclasses.dataclass
class Flags:
    """The flags that all scripts share. Each script adds its own, or other defaults."""

    model: str = flag("toy", "toy, toy-random, a folder, or a hub id")
    data: str = flag(
        "shapes", "shapes (the toy world), a .jsonl file, or a folder in MMEB's layout"
    )
    image_root: str = flag("", "where the pictures are; empty: beside the data")
    seed: int = flag(0, "of data, dropout and new weights")
    compress_tokens: int | None = flag(None, "K; default: the checkpoint's, else 4 (the paper: 32)")
    pooling: str | None = flag(
        None, "mean of the K tokens, or the last token", choices=["mean", "last"]
    )
    prompt: str | None = flag(None, "prompt style", choices=list(STYLES))
    attn: str = flag("sdpa", "attention kernel: sdpa, eager, flash_attention_2, flex_attention")
    min_pixels: int = flag(0, "smallest picture (Qwen family), pixels; 0: the model's default")
    max_pixels: int = flag(0, "largest picture (Qwen family), pixels; the paper: 1024 x 28 x 28")
    max_length: int = flag(
        0, "most tokens of a row; longer ones lose text in the middle; 0: no limit"
    )
    chunk_tokens: int = flag(8192, "padded tokens that go through the model at a time")
    workers: int = flag(1, "loader processes of a rank")

    @classmethod
    def parse(cls, argv=None):
        """The command line as a Config. Unknown and abbreviated flags are errors."""
        doc = sys.modules[cls.__module__].__doc__
        parser = argparse.ArgumentParser(
            description=doc,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for f in dataclasses.fields(cls):
            kind = str(f.type).split(" ")[0] if isinstance(f.type, str) else f.type
            kind = {"int": int, "float": float, "str": str, "bool": bool}.get(str(kind), kind)
            kind = next((t for t in getattr(kind, "__args__", ()) if t is not type(None)), kind)
            how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
            if "choices" in f.metadata:
                how["choices"] = f.metadata["choices"]
            about = f.metadata["about"] + (
                "" if f.default is None else f" (default: {f.default!r})"
            )
            name = "--" + f.name.replace("_", "-")
            parser.add_argument(name, default=f.default, help=about.replace("%", "%%"), **how)
        return cls(**vars(parser.parse_args(argv)))


@dataclasses.dataclass
class Config(Flags):
    """The flags that both training stages share."""

    out: str = flag("out/run", "folder for the model, log.jsonl and checkpoints")
    steps: int = flag(300, "optimiser steps")
    batch: int = flag(64, "examples a step, over all ranks")
    lr: float = flag(3e-3, "peak learning rate of AdamW")
    muon_lr: float = flag(
        0.02, "peak rate of Muon on the weight matrices; 0: AdamW trains everything"
    )
    warmup: float = flag(0.05, "share of the steps that the learning rate takes to rise")
    weight_decay: float = flag(0.01, "decoupled weight decay")
    clip: float = flag(1.0, "largest gradient norm; 0: no clipping")
    lora_rank: int = flag(
        0, "rank of LoRA on the language model's q, k, v, o; 0: train all weights"
    )
    lora_alpha: int = flag(64, "LoRA's scale is alpha / rank")
    lora_dropout: float = flag(0.1, "dropout in front of LoRA's matrices")
    dora: bool = flag(False, "DoRA: LoRA with the weights' magnitudes trained too")
    freeze_vision: bool = flag(False, "leave the vision tower as it is (with LoRA always)")
    checkpointing: bool = flag(False, "gradient checkpointing: less memory, a third more time")
    save_every: int = flag(500, "steps between checkpoints; 0: only the model at the end")
    keep: int = flag(2, "checkpoints that stay")
    resume: bool = flag(False, "go on from the newest checkpoint in --out")


def run(main, config):
    """main(config) of a script: an InputError becomes one clear line and exit status 1."""
    try:
        main(config.parse())
    except InputError as e:
        sys.exit(f"\n{Path(sys.argv[0]).name}: {e}")
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def versions() -> dict:
    return {m.__name__: m.__version__ for m in (torch, transformers, np)}


def say(*text):
    """Prints, on rank 0 only, above a progress bar."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, text)))


def make_optimizers(embedder, lr, muon_lr, weight_decay) -> list:
    """AdamW on all that is trained; with muon_lr, Muon on the weight matrices inside the layers."""
    named = [(n, p) for n, p in embedder.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    matrices = matrices if muon_lr else []
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    found = [torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay))
    for group in (g for o in found for g in o.param_groups):
        group["peak"] = group["lr"]
    return found


def set_lr(optimizers, step, cfg) -> float:
    """Warm-up, then half a cosine to zero. -> the learning rate of AdamW at this step."""
    rise = max(1, round(cfg.warmup * cfg.steps))
    share = min(1.0, (step + 1) / rise)
    share *= 0.5 * (1 + math.cos(math.pi * max(0, step - rise) / max(1, cfg.steps - rise)))
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = group["peak"] * share
    return optimizers[0].param_groups[0]["lr"]


def seed_step(seed, step):
    """Dropout's random numbers are a function of (seed, step, rank): nothing of them must be saved."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_093 + rank())


class Log:
    """One aligned line a step on the screen (rank 0), the same numbers as a line of log.jsonl."""

    def __init__(self, cfg, about, start=0):
        self.cfg, self.start, self.t0 = cfg, start, time.time()
        self.file, first = (
            None,
            dict(config=dataclasses.asdict(cfg), world=world(), **about, **versions()),
        )
        if rank() == 0:
            path = Path(cfg.out) / "log.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_text().splitlines(True)[: start + 1] if start else []
            part = path.with_suffix(".part")
            part.write_text("".join(old) or json.dumps(first) + "\n")
            os.replace(part, path)
            self.file = open(path, "a", buffering=1)
        self.bar = tqdm(total=cfg.steps, initial=start, disable=rank() != 0, leave=False)

    def __call__(self, step, timing, **numbers):
        """numbers: reproducible ones, into log.jsonl; timing: text for the screen alone."""
        if rank() == 0:
            self.file.write(json.dumps(dict(step=step + 1, **numbers)) + "\n")
            self.bar.update()
            done = step + 1 - self.start
            left = (time.time() - self.t0) / done * (self.cfg.steps - step - 1) / 60
            if (step + 1) % max(
                1, min(20, self.cfg.steps // 10)
            ) == 0 or step + 1 == self.cfg.steps:
                words = " | ".join(
                    f"{k} {v:.1e}" if k == "lr" else f"{k} {v:.3f}" for k, v in numbers.items()
                )
                say(f"step {step + 1:>5}/{self.cfg.steps} | {words} | {timing} | eta {left:.1f}m")


def check_finite(step, lr, ids, **numbers):
    """Stops the run, on all ranks alike, when a number is NaN or infinite."""
    bad = [f"{k} = {v}" for k, v in numbers.items() if not math.isfinite(v)]
    if bad:
        raise InputError(
            f"step {step + 1}: {', '.join(bad)} at lr {lr:.2e}. The examples of rank {rank()}: {ids}. "
            "The last checkpoint is good; try a lower --lr, or look at these examples"
        )


def clip_and_step(embedder, optimizers, cfg, step, lr, loss, ids) -> float:
    """Clips the gradient, checks that it is finite, takes the step. -> the gradient's norm."""
    parameters = [p for p in embedder.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
    check_finite(step, lr, ids, loss=loss, gradient=float(norm))
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)
    return float(norm)


def load_for(cfg, device) -> Embedder:
    """The model that the flags ask for."""
    more = {k: getattr(cfg, k) for k in ("max_length", "attn", "min_pixels", "max_pixels")}
    return load(cfg.model, cfg.compress_tokens, cfg.pooling, cfg.prompt, device, **more)


def describe(embedder) -> str:
    """What the model is, in one line."""
    trained = sum(p.numel() for p in embedder.parameters() if p.requires_grad)
    total = sum(p.numel() for p in embedder.parameters())
    return (
        f"{embedder.mllm.config.model_type} | {trained:,} of {total:,} parameters trained | K = {embedder.K}, "
        f"{embedder.pooling} pooling, {embedder.style} prompt | {world()} rank(s) on {embedder.device.type}"
    )


# Checkpoints: OUT/checkpoints/step-00000500/{trained.safetensors, optimizer.pt, state.json}. Data and
# dropout are functions of (seed, step), so weights, optimiser and step number are the whole state.

HARMLESS = ("out", "resume", "workers", "save_every", "keep")  # flags that may differ when resuming
stop_asked = []  # signals that asked the run to save and end


def catch_signals():
    """SIGTERM and SIGINT let the step finish, save a checkpoint and end the run."""
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda number, frame: stop_asked.append(number))


def save_checkpoint(embedder, optimizers, cfg, step):
    """Written beside and renamed: a cut-off one is never seen. A full disk costs the checkpoint only."""
    state = trained_state(embedder)
    adam = optimizer_states(embedder, optimizers)
    folder = Path(cfg.out) / "checkpoints"
    if rank() == 0:
        part, name = folder / "part", folder / f"step-{step:08d}"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            save_file(state, part / "trained.safetensors")
            torch.save(adam, part / "optimizer.pt")
            about = dict(step=step, world=world(), config=dataclasses.asdict(cfg), **versions())
            (part / "state.json").write_text(json.dumps(about, indent=1))
            for file in part.iterdir():  # on the disk before the name says so
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
            os.replace(part, name)
        except (OSError, RuntimeError, SafetensorError) as e:
            say(f"no checkpoint at step {step}: {e}. The older ones stay; is the disk full?")
            shutil.rmtree(part, ignore_errors=True)
            return
        for old in sorted(folder.glob("step-*"))[: -cfg.keep]:
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
    """-> the step to begin with; with --resume that of the newest checkpoint, which is loaded."""
    catch_signals()
    found = sorted((Path(cfg.out) / "checkpoints").glob("step-*"))
    if not found:
        say(*["--resume: no checkpoint yet, starting at step 0"] * cfg.resume)
        return 0
    if not cfg.resume:
        raise InputError(
            f"{cfg.out} holds {found[-1].name} of an unfinished run: --resume goes on with it, another "
            f"--out starts a new run (or remove {found[-1].parent})"
        )
    about = json.loads((found[-1] / "state.json").read_text())
    then, now = (dict(c, world=w) for c, w in (
        (about["config"], about["world"]), (dataclasses.asdict(cfg), world())))  # fmt: skip
    differ = [k for k in now if k not in HARMLESS and then.get(k) != now[k]]
    if differ:
        what = ", ".join(f"{k} was {then.get(k)!r}, is {now[k]!r}" for k in differ)
        raise InputError(
            f"--resume would not continue the same run: {what}. Restore them, or take a new --out"
        )
    trained = {n: p for n, p in embedder.named_parameters() if p.requires_grad}
    saved = load_file(found[-1] / "trained.safetensors")
    if saved.keys() != trained.keys():
        raise InputError(f"{found[-1]}: holds other weights than this model trains")
    for n, p in trained.items():
        p.data.copy_(saved[n])
    states = torch.load(found[-1] / "optimizer.pt", weights_only=True, map_location="cpu")
    for o, state in zip(optimizers, states, strict=True):
        o.load_state_dict(state)
    say(f"resumed {found[-1]}")
    return about["step"]


def finish(embedder, cfg, embedding=True):
    """The run is over: the model stands in OUT, its checkpoints are needed no more."""
    save(embedder, cfg.out, embedding)
    if rank() == 0:
        shutil.rmtree(Path(cfg.out) / "checkpoints", ignore_errors=True)
    say(f"saved {cfg.out}")


def trained_state(embedder):
    return {
        n: p.detach().cpu().contiguous() for n, p in embedder.named_parameters() if p.requires_grad
    }


def optimizer_states(embedder, optimizers):
    return [o.state_dict() for o in optimizers]


def whole_state(embedder):
    return None
