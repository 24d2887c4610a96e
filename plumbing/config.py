"""Flags: a dataclass whose fields become a command line, and are checked in one place: each by its
kind and range here, the combinations in combinations.py. Each default exists once.

`ModelFlags` are those of everything that loads a model, `Flags` those of both stages and of the
evaluation, `TrainingFlags` what the stages share. Each script and each command adds its own, or
other defaults, in its `Config`."""

import argparse
import dataclasses
import numbers
import os
import sys

from plumbing.combinations import option, refuse_combinations
from plumbing.errors import InputError, brief

# Padded tokens that go through the model at a time. A CPU likes what fits into its caches.
CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}
MUON_LR = 0.02  # where all weights are trained
# The largest number of a flag that names no `most`, and the least by which one must exceed `above`:
# beyond these it is a slip of the keyboard, or PyTorch cannot compute with it.
MOST, SMALLEST = 1_000_000_000, 1e-12

# Flags of earlier versions, and the command that does it now.
MOVED = {
    "--explain": "python -m tools.explain",
    "--search": "python -m tools.search",
    "--query-image": "python -m tools.search",
    "--images": "python -m tools.search",
    "--figures": "python -m tools.figures",
}
DATA = ("data", "subsets", "skip_bad", "images")  # flags that name what is read
TEXTS = ("text", "image_text")  # flags that are words for a model; other text names a place
KINDS = {  # of a field -> what its value must be, and how that is called
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
}


def by_device(value, defaults, device):
    """`value`, or where it is None the default for this kind of device."""
    if value is not None:
        return value
    return defaults.get(device.type, defaults["cpu"])


# -------------------------------------------------------------------------------------- one flag


def flag(default, description, choices=None, least=None, most=None, above=None):
    """A field of a Config that becomes a command-line flag. Every number says the least that it may
    be, or what it must be above; `most` where a larger one is a slip."""
    metadata = {"description": description, "choices": choices}
    metadata.update(least=least, most=most, above=above)
    return dataclasses.field(default=default, metadata=metadata)


def word(description, shown):
    """A field that is given without a name, as DIR in `python -m tools.export DIR`. shown: what
    `--help` calls it."""
    metadata = {"description": description, "choices": None, "shown": shown}
    return dataclasses.field(metadata=metadata)


def kind_of(field):
    """What a value of this field is: of `int | None` that is int."""
    return getattr(field.type, "__args__", [field.type])[0]


def range_of(field) -> str:
    """The numbers that a field takes, in words: "above 0", "0 to 1", "1 or more"."""
    least, most, above = (field.metadata.get(name) for name in ("least", "most", "above"))
    if above is not None:
        return f"above {above}" if most is None else f"above {above} and at most {most}"
    return f"{least} or more" if most is None else f"{least} to {most}"


def in_range(field, value) -> bool:
    """Whether a number (NaN never) is within the range of its field."""
    least, most, above = (field.metadata.get(name) for name in ("least", "most", "above"))
    least = least if above is None else above + SMALLEST
    return least <= value <= (MOST if most is None else most)


def refuse_value(field, value):
    """Raises InputError, with what would be right, where a field cannot have this value."""
    if value is None and type(None) in getattr(field.type, "__args__", ()):
        return
    name, kind = option(field.name), kind_of(field)
    right, called = KINDS[kind]
    # A truth value is a whole number to Python, and none to a user.
    if not isinstance(value, right) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{name} {brief(repr(value))} must be {called}")
    if kind is str:
        if "\0" in value or not is_unicode(value):
            raise InputError(f"{name} {brief(ascii(value))} is no text (UTF-8): rename or copy it")
        # Trap: of --out=~/x the shell leaves ~ as it is, and a folder of that name would be made.
        if value.partition("/")[0] == "~" and field.name not in TEXTS:
            text = "~ is no home folder here: leave a blank in the place of ="
            raise InputError(f"{name} {brief(value)}: {text}, or write the whole path")
    elif kind is not bool and not in_range(field, value):
        default = "" if field.default is None else f"; the default is {field.default}"
        is_too_large = value > MOST and not field.metadata["most"]
        is_too_small = 0 < value < SMALLEST
        is_slip = is_too_large or is_too_small
        limits = f" (in all {SMALLEST:g} to {MOST:,})" if is_slip else ""
        text = f"{name} {brief(value)} must be {range_of(field)}{limits}{default}"
        raise InputError(f"{text} ({field.metadata['description']})")  # which may say why
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise InputError(f"{name} {brief(value)}: choose from {', '.join(choices)}")


def is_unicode(text) -> bool:
    """False where bytes that are no UTF-8 have become halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------ the command line


def in_plain_digits(kind):
    """int or float of a text in plain digits. Trap: to Python "1_0" is a number, and so are the
    digits of any script."""

    def convert(text):
        if not text.isascii() or "_" in text:
            raise ValueError(text)
        return kind(text)

    convert.__name__ = kind.__name__  # argparse: "invalid int value"
    return convert


class Parser(argparse.ArgumentParser):
    """argparse with short errors."""

    def error(self, message):
        """One line and status 2: the usage of forty flags would bury it."""
        self.exit(2, f"{self.prog}: error: {brief(message, 300)}\n")


class Once(argparse.Action):
    """A flag that names data. To argparse a second one takes the first one's place, unsaid: a run
    would read half of what was meant."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        if before not in (self.default, values):
            both = f"{option_string} {brief(before, 60)} and {option_string} {brief(values, 60)}"
            raise InputError(f"{both}: only one would be read; join them, or leave one out")
        setattr(namespace, self.dest, values)


def add_flag(parser, field):
    """One field of a Config as an argument of the parser."""
    if field.default is dataclasses.MISSING:  # a word
        shown = field.metadata["shown"]
        parser.add_argument(field.name, metavar=shown, help=field.metadata["description"])
        return
    default = "" if field.default in (None, "") else f" (default: {field.default})"
    text = (field.metadata["description"] + default).replace("%", "%%")  # argparse formats it
    kind, name = kind_of(field), option(field.name)
    if kind is bool:
        action = argparse.BooleanOptionalAction
        parser.add_argument(name, default=field.default, help=text, action=action)
    else:
        choices = field.metadata["choices"]
        kind = kind if kind is str else in_plain_digits(kind)
        action = Once if field.name in DATA else "store"  # others: a script's, then one's own
        parser.add_argument(
            name, default=field.default, help=text, type=kind, choices=choices, action=action
        )


def program(module):
    """What `--help` calls the program. Of `python -m tools.search` argparse would say search.py,
    which is nowhere."""
    if module == "__main__":
        spec = sys.modules["__main__"].__spec__
        module = spec.name if spec else ""
    return f"python -m {module}" if module.startswith(("tools.", "toy.")) else None


@dataclasses.dataclass
class CommandLine:
    """A dataclass whose fields are flags: checked when it is made, from words or in Python."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.init:  # else a value that is computed, as data_digest
                value = getattr(self, field.name)
                if isinstance(value, os.PathLike):
                    value = os.fspath(value)
                    setattr(self, field.name, value)
                refuse_value(field, value)
        refuse_combinations(self)

    @classmethod
    def parse(cls, argv):
        """The command line as a Config. Unknown and abbreviated flags are errors."""
        known = {option(f.name) for f in dataclasses.fields(cls)}
        for each in argv:
            name = each.partition("=")[0]
            if name in MOVED and name not in known:
                raise InputError(f"{name} has moved: {MOVED[name]} --help")
        parser = Parser(
            program(cls.__module__),
            description=sys.modules[cls.__module__].__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # --step would pass for --steps
        )
        for field in dataclasses.fields(cls):
            if field.init:
                add_flag(parser, field)
        return cls(**vars(parser.parse_args(argv)))


# ---------------------------------------------------------------------- what the scripts share


@dataclasses.dataclass
class ModelFlags(CommandLine):
    """The flags of everything that loads a model."""

    model: str = flag("toy", "toy, toy-random, a folder, or a hub id")
    compress_tokens: int | None = flag(
        None, "K; default: the checkpoint's, else 4 (vlm2vec: 0)", least=0, most=1_000
    )
    pooling: str | None = flag(
        None, "mean of K tokens, or last; default: the checkpoint's", ["mean", "last"]
    )
    prompt: str | None = flag(
        None, "its style; default: the checkpoint's, else chat", ["coma", "chat", "vlm2vec"]
    )
    attn: str = flag("sdpa", "attention kernel", ["sdpa", "flash_attention_2", "flex_attention"])
    min_pixels: int = flag(
        0, "smallest picture (Qwen family), pixels; 0: the model's default", least=0
    )
    max_pixels: int = flag(
        0, "largest picture (Qwen family), pixels; the paper: 1024 x 28 x 28", least=0
    )
    max_length: int = flag(
        0, "most tokens of a row; longer ones lose turns, then text; 0: any", least=0
    )
    chunk_tokens: int | None = flag(
        None, "padded tokens at a time; default: 1024 on a CPU, 8192 on a GPU", least=1
    )


@dataclasses.dataclass
class Flags(ModelFlags):
    """The flags of both stages and of the evaluation."""

    data: str = flag(
        "shapes",
        "shapes (toy world), a list, a folder with captions; MMEB or a hub id (not pretrain)",
    )
    image_root: str = flag("", "where the pictures are; empty: beside the data")
    seed: int = flag(
        0, "of the toy world, and of all that training draws", least=0, most=2_147_483_647
    )
    workers: int = flag(1, "loader processes of a rank", least=0, most=256)


@dataclasses.dataclass
class TrainingFlags(Flags):
    """The flags that both training stages share."""

    out: str = flag("out/run", "folder for the model, log.jsonl and checkpoints")
    steps: int = flag(300, "optimiser steps", least=0)
    batch: int = flag(64, "examples a step, over all ranks", least=1, most=1_000_000)
    lr: float = flag(3e-3, "peak learning rate of AdamW", above=0)
    muon_lr: float | None = flag(
        None,
        "peak rate of Muon on matrices; 0: none; default: 0.02, with LoRA 0.02 / LoRA's scale",
        least=0,
    )
    schedule: str = flag("cosine", "fall of the rate after the warm-up", ["cosine", "linear"])
    warmup: float = flag(
        0.05, "share of the steps that the learning rate takes to rise", least=0, most=1
    )
    weight_decay: float = flag(0.01, "decoupled weight decay", least=0)
    clip: float = flag(1.0, "largest gradient norm; 0: no clipping", least=0)
    lora_rank: int = flag(
        0, "rank of LoRA on the language model's attention; 0: train all", least=0, most=16_384
    )
    lora_alpha: int = flag(64, "LoRA's scale is alpha / rank", least=1)
    lora_dropout: float = flag(0.1, "dropout in front of LoRA's matrices", least=0, most=0.9)
    dora: bool = flag(False, "DoRA: LoRA with the weights' magnitudes trained too")
    freeze_vision: bool = flag(False, "leave the vision tower as it is (with LoRA always)")
    checkpointing: bool = flag(False, "gradient checkpointing: less memory, more time")
    save_every: int = flag(500, "steps between checkpoints; 0: only the model at the end", least=0)
    keep: int = flag(2, "newest checkpoints that stay during the run", least=1)
    resume: bool = flag(False, "go on from the newest checkpoint in --out")
    skip_bad: str = flag("", "bad examples to pass over: what tools.check --list-bad FILE wrote")
    # No flags, but of the run: the file whose flags these are, digests of what it starts from and
    # of its data, and the chunk tokens that fitted into memory (0: not known yet).
    command: str = dataclasses.field(default="", init=False)
    model_digest: str = dataclasses.field(default="", init=False)
    data_digest: int = dataclasses.field(default=0, init=False)
    fitting: int = dataclasses.field(default=0, init=False)

    def __post_init__(self):
        super().__post_init__()
        if self.muon_lr is None:
            # A step of LoRA's matrices moves the weight by alpha / rank times as much.
            self.muon_lr = MUON_LR * self.lora_rank / self.lora_alpha if self.lora_rank else MUON_LR


@dataclasses.dataclass
class LossFlags(TrainingFlags):
    """The flags of the loss' variants (plumbing/losses.py)."""

    symmetric: bool = flag(False, "targets must find their queries, too, as in CLIP")
    hardness: float = flag(
        0.0, "alpha: a negative weighs e^(alpha x its cosine), as in LLaVE; 0: all 1", least=0
    )
    margin: float = flag(
        0.0, "nearer than the positive by more than this: no negative; 0: off", least=0, most=2
    )
    matryoshka: str = flag("", "lengths whose prefixes are trained as embeddings, too: 32,64")
