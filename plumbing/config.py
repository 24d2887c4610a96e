"""Flags: a dataclass whose fields become a command line. Each default exists once.

`ModelFlags` are those of everything that loads a model, `Flags` those of the three stages,
`TrainingFlags` what both training stages share. Each stage adds its own, or other defaults, in its
`Config`."""

import argparse
import dataclasses
import sys

from plumbing.errors import InputError
from plumbing.template import STYLES

# Padded tokens that go through the model at a time. A CPU likes what fits into its caches.
CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}
# Of a contrastive step, the chunks whose graph is kept, so that they run once.
KEEP_GRAPHS = {"cpu": 24, "cuda": 1}

# Flags of earlier versions, and the command that does it now.
MOVED = {
    "--explain": "python -m tools.explain",
    "--search": "python -m tools.search",
    "--query-image": "python -m tools.search",
    "--images": "python -m tools.search",
    "--figures": "python -m tools.figures",
}


def by_device(value, defaults, device):
    """`value`, or where it is None the default for this kind of device."""
    if value is not None:
        return value
    return defaults.get(device.type, defaults["cpu"])


def flag(default, description, choices=None):
    """A field of a Config that becomes a command-line flag."""
    metadata = {"description": description, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def add_flag(parser, field):
    """One field of a Config as an argument of the parser."""
    name = "--" + field.name.replace("_", "-")
    shown = "" if field.default in (None, "") else f" (default: {field.default})"
    text = (field.metadata["description"] + shown).replace("%", "%%")  # argparse formats it
    # argparse calls the type on the word: of `int | None` that is int.
    kind = getattr(field.type, "__args__", [field.type])[0]
    if kind is bool:
        action = argparse.BooleanOptionalAction
        parser.add_argument(name, default=field.default, help=text, action=action)
    else:
        choices = field.metadata["choices"]
        parser.add_argument(name, default=field.default, help=text, type=kind, choices=choices)


@dataclasses.dataclass
class ModelFlags:
    """The flags of everything that loads a model."""

    model: str = flag("toy", "toy, toy-random, a folder, or a hub id")
    compress_tokens: int | None = flag(None, "K; default: the checkpoint's, else 4 (the paper: 32)")
    pooling: str | None = flag(None, "of the K tokens, or the last one", ["mean", "last"])
    prompt: str | None = flag(None, "prompt style", list(STYLES))
    attn: str = flag("sdpa", "attention kernel", ["sdpa", "flash_attention_2", "flex_attention"])
    min_pixels: int = flag(0, "smallest picture (Qwen family), pixels; 0: the model's default")
    max_pixels: int = flag(0, "largest picture (Qwen family), pixels; the paper: 1024 x 28 x 28")
    max_length: int = flag(0, "most tokens of a row; longer ones lose turns, then text; 0: any")
    chunk_tokens: int | None = flag(None, f"padded tokens at a time; default: {CHUNK_TOKENS}")

    @classmethod
    def parse(cls, argv=None):
        """The command line as a Config. Unknown and abbreviated flags are errors."""
        words = sys.argv[1:] if argv is None else argv
        known = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(cls)}
        for word in words:
            name = word.partition("=")[0]
            if name in MOVED and name not in known:
                raise InputError(f"{name} has moved: {MOVED[name]} --help")
        # Of `python -m tools.search` argparse would say search.py, which is nowhere.
        spec = sys.modules["__main__"].__spec__ if cls.__module__ == "__main__" else None
        parser = argparse.ArgumentParser(
            prog=f"python -m {spec.name}" if spec else None,
            description=sys.modules[cls.__module__].__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # --step would pass for --steps
        )
        for field in dataclasses.fields(cls):
            if field.init:  # else a value that is computed, as data_digest
                add_flag(parser, field)
        return cls(**vars(parser.parse_args(argv)))


@dataclasses.dataclass
class Flags(ModelFlags):
    """The flags of the three stages."""

    data: str = flag("shapes", "shapes (the toy world), a .jsonl, a folder or hub id like MMEB")
    image_root: str = flag("", "where the pictures are; empty: beside the data")
    seed: int = flag(0, "of data, dropout and LoRA's start")
    workers: int = flag(1, "loader processes of a rank")


@dataclasses.dataclass
class TrainingFlags(Flags):
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
    keep: int = flag(2, "newest checkpoints that stay during the run")
    resume: bool = flag(False, "go on from the newest checkpoint in --out")
    # No flags, but of the run: what it starts from (checkpoint.digest_of_model), its data
    # (formats.digest_of), and the chunk tokens that fitted into memory (0: not known yet).
    model_digest: str = dataclasses.field(default="", init=False)
    data_digest: int = dataclasses.field(default=0, init=False)
    fitting: int = dataclasses.field(default=0, init=False)


def refuse_impossible(cfg, world):
    """Impossible combinations of stage 2's flags, with the way out."""
    for name, unit in (("--block", cfg.block), ("the number of ranks,", world)):
        if unit < 1 or cfg.batch % unit:
            next_size = (cfg.batch // max(unit, 1) + 1) * max(unit, 1)
            text = f"--batch {cfg.batch} is not a multiple of {name} {unit}; try {next_size}"
            raise InputError(text)
    if cfg.temperature <= 0:
        raise InputError(f"--temperature {cfg.temperature} must be positive; try 0.03")
    if cfg.fsdp and (cfg.lora_rank or cfg.muon_lr or world == 1):
        raise InputError("--fsdp is for full fine-tuning on several ranks, with --muon-lr 0")
