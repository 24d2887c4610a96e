"""Combinations of flags in which one of them would do nothing, or harm. They are refused: whoever
gives a flag expects something of it. First what the flags decide alone, then what depends on the
number of ranks, then what depends on the model."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from plumbing.errors import InputError, brief
from plumbing.files import captions_in, names_a_list


class Rule(NamedTuple):
    """A flag (the name of its field) that works only where works(cfg). Where it does not, and its
    value is not the default, `text` says why; in it {name} stands for the value of another flag."""

    flag: str
    works: Callable
    text: str


def is_toy(cfg) -> bool:
    """Whether the data are the toy world."""
    return cfg.data == "shapes"


def has_captions(cfg) -> bool:
    """Whether the data are a folder of pictures with captions."""
    return bool(captions_in(cfg.data))


def has_sets(cfg) -> bool:
    """Whether the data are sets with names: of the toy world, or in MMEB's layout."""
    return is_toy(cfg) or not (names_a_list(cfg.data) or has_captions(cfg))


SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?) ?([KMG]i?B)?", re.ASCII)
UNITS = {None: 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def bytes_of(text):
    """Of a size, as "4GiB" or "0", its number; None where it is none."""
    match = SIZE.fullmatch(text)
    return int(float(match[1]) * UNITS[match[2]]) if match else None


NO_LORA = "LoRA is off; --lora-rank 16 would switch it on"
OWN_DIALOGUES = "goes with --data shapes; a file brings its own dialogues"
OWN_TEACHER = "without the mask the model is its own teacher; leave --no-compress out"
SAME_ANSWERS = "model and teacher need the same answers; --max-length 0"
NO_CODE = "without tokens there is nothing to compress into; add --no-compress if that is meant"
BELOW_LEAST = "below --min-pixels {min_pixels}"
DRAWN = "the toy world draws its pictures; --data is where others are"
NO_SIZE = "must be a number of bytes, KiB, MiB or GiB, as 4GiB; 0 keeps no graph"
NO_SETS = "chooses sets of MMEB or shapes; {data} is none"
NO_SERVER = "no server is asked; --server URL would be"
RULES = {  # a field -> the rules of every Config that has it
    "min_pixels": (
        Rule("max_pixels", lambda c: c.min_pixels <= c.max_pixels, BELOW_LEAST),
    ),
    "image_root": (
        Rule("image_root", lambda c: not is_toy(c), DRAWN),
    ),
    "subsets": (
        Rule("subsets", has_sets, NO_SETS),
    ),
    "lora_rank": (
        Rule("lora_alpha", lambda c: c.lora_rank, NO_LORA),
        Rule("lora_dropout", lambda c: c.lora_rank, NO_LORA),
        Rule("dora", lambda c: c.lora_rank, NO_LORA),
    ),
    "save_every": (
        Rule("keep", lambda c: c.save_every, "--save-every 0 makes no checkpoints to keep"),
    ),
    "caption": (
        Rule("caption", is_toy, OWN_DIALOGUES),
    ),
    "objective": (  # stage 1
        Rule("texts", is_toy, OWN_DIALOGUES),
        Rule("turns", lambda c: not (c.caption or has_captions(c)), "a caption is one turn"),
        Rule("objective", lambda c: not c.max_length, SAME_ANSWERS),
        Rule("objective", lambda c: c.compress, OWN_TEACHER),
        Rule("attn", lambda c: not c.compress, "the compression mask needs --attn sdpa"),
        Rule("compress_tokens", lambda c: c.compress_tokens != 0 or not c.compress, NO_CODE),
    ),
    "split": (  # stage 2
        Rule("graph_memory", lambda c: bytes_of(c.graph_memory) is not None, NO_SIZE),
        Rule("split", lambda c: has_sets(c) and not is_toy(c), "is of MMEB-train"),
    ),
    "json": (  # evaluation
        Rule("resume", lambda c: c.json, "goes on with what --json holds; name that file"),
        Rule("seed", is_toy, "draws the toy world's sets; {data} has its own"),
    ),
    "server": (  # tools.generate
        Rule("api_key", lambda c: c.server, NO_SERVER),
        Rule("timeout", lambda c: c.server, NO_SERVER),
    ),
}  # fmt: skip


def given(cfg) -> dict:
    """{name: value} of the flags that are not at their default."""
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.init}
    defaults = {f.name: f.default for f in dataclasses.fields(cfg)}
    return {name: value for name, value in values.items() if value != defaults[name]}


def changed(then, now, harmless=()) -> list:
    """What differs between two runs, "lr was 0.1, is 0.2" each. then, now: {flag: value}, `then`
    with all names of `now`; harmless: flags that may differ."""
    changes = []
    for name, value in now.items():
        if name not in harmless and then[name] != value:
            was, is_now = brief(repr(then[name]), 60), brief(repr(value), 60)
            changes.append(f"{name} was {was}, is {is_now}")
    return changes


def refuse_combinations(cfg):
    """Raises InputError for the first flag that does nothing beside the others."""
    set_flags, values = given(cfg), {}
    for field in dataclasses.fields(cfg):
        values[field.name] = brief(getattr(cfg, field.name))
    for name, rules in RULES.items():
        if name not in values:
            continue
        for rule in rules:
            if rule.flag in set_flags and not rule.works(cfg):
                raise InputError(f"{spelled(cfg, rule.flag)}: {rule.text.format_map(values)}")


def option(name) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")


def spelled(cfg, name) -> str:
    """A flag and its value as words of a command line."""
    value = getattr(cfg, name)
    if isinstance(value, bool):
        return option(name if value else f"no_{name}")
    return f"{option(name)} {brief(value)}"


# ------------------------------------------------------- with the ranks, and with the model


def refuse_idle_ranks(cfg, world):
    """InputError where stage 1's batch has fewer examples than there are ranks."""
    if cfg.batch < world:
        raise InputError(f"--batch {cfg.batch} leaves ranks without work; try {world}")


def refuse_impossible(cfg, world):
    """Impossible combinations of stage 2's flags with the number of ranks, with the way out."""
    # A batch that both the blocks and the ranks divide.
    unit = math.lcm(cfg.block, world)
    if cfg.batch % unit:
        divisor = f"the number of ranks, {world}"
        if cfg.batch % cfg.block:
            divisor = f"--block {cfg.block}"
        next_size = (cfg.batch // unit + 1) * unit
        raise InputError(f"--batch {cfg.batch} is not a multiple of {divisor}; try {next_size}")
    if cfg.fsdp and (cfg.lora_rank or cfg.muon_lr or world == 1):
        raise InputError("--fsdp is for full fine-tuning on several ranks, with --muon-lr 0")


def refuse_for_model(embedder, cfg):
    """The same for a model that is loaded: it may bring an adapter, or K = 0."""
    adapter, mine = embedder.adapter, given(cfg)
    brings = "the model brings a LoRA adapter of its own, which is trained on as it is"
    fold = "fold it in first: stage 2 does without --no-merge, and python -m tools.merge"
    if adapter and cfg.lora_rank:
        way_out = f"Leave the LoRA flags out, or {fold}"
        raise InputError(f"--lora-rank {cfg.lora_rank}: {brings}. {way_out}")
    if adapter and "fsdp" in mine:
        raise InputError(f"--fsdp is for full fine-tuning, and {brings}; {fold}")
    if "merge" in mine and not adapter:
        raise InputError("--no-merge: the model is no LoRA adapter; leave it out")
    if "vision_cache" in mine and not (adapter or cfg.lora_rank or cfg.freeze_vision):
        raise InputError(f"{spelled(cfg, 'vision_cache')}: the tower is trained, and not frozen")
    is_stage_1, K = hasattr(cfg, "compress"), embedder.K
    if is_stage_1 and cfg.compress and not K:
        raise InputError(f"K = 0, as the model or its --prompt has it: {NO_CODE}")
    if is_stage_1 and "pooling" in mine and not K:
        raise InputError(f"{spelled(cfg, 'pooling')}: with K = 0 stage 1 makes no embedder")
