"""plumbing/start.py reads a script's Config without running the script: the same flags, in the same
words, as the script itself declares; what config.py makes of numbers and names. (That no torch is
loaded: test_ending.py; the command line: test_flags.py.)"""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
from checks import equal, expect

import contrastive
import evaluate
import pretrain
from plumbing import config, start
from plumbing.errors import InputError
from tools import check, explain, export, figures, generate, look, merge, search

SCRIPTS = [pretrain, contrastive, evaluate, check, explain, export, figures, generate, look, merge]


def declared(kind):
    """A Config's fields, as far as a command line can tell."""
    return [(x.name, x.type, x.default, dict(x.metadata), x.init) for x in dataclasses.fields(kind)]


@pytest.mark.parametrize("script", [*SCRIPTS, search], ids=lambda x: x.__name__)
def test_what_is_read_is_what_is_declared(script):
    """Names, kinds, defaults, words, ranges, choices; and a class that parses."""
    read = start.read_config(Path(script.__file__))
    equal(declared(read), declared(script.Config), "read_config")
    equal(issubclass(read, config.CommandLine), True, "its base")
    equal(read.__module__, "__main__", "whose docstring the help begins with")


MODEL = dict(max_length=0, min_pixels=0, max_pixels=0, seed=0, attn="sdpa", data="shapes")
MODEL.update(dict.fromkeys(("compress_tokens", "pooling", "prompt", "chunk_tokens")))
MODEL.update(image_root="", workers=1)
TRAINING = dict(lr=3e-3, muon_lr=0.02, schedule="cosine", warmup=0.05, weight_decay=0.01, clip=1.0)
LORA = dict(lora_rank=0, lora_alpha=64, lora_dropout=0.1, dora=False, freeze_vision=False)
SAVING = dict(save_every=500, keep=2, checkpointing=False, resume=False, skip_bad="")
STAGE_1 = dict(steps=250, batch=64, compress=True, turns=0, caption=False, question_first=0.0)
STAGE_1.update(texts=0.0, objective="ce", model="toy", out="out/pretrain")
STAGE_2 = dict(steps=200, batch=128, block=32, temperature=0.03, mask_false_negatives=True)
STAGE_2.update(merge=True, split="original", vision_cache="device", fsdp=False, model="")
STAGE_2.update(out="out/contrastive", symmetric=False, hardness=0.0, margin=0.0, matryoshka="")
STAGE_2.update(graph_memory="", subsets="")
TABLE = dict(model="", limit=0, subsets="", dim=0, json="", resume=False)
NO_FLAGS = {"command", "model_digest", "data_digest", "fitting"}  # what a run notes beside them


@pytest.mark.parametrize(
    ("script", "defaults"),
    [
        (pretrain, {**MODEL, **TRAINING, **LORA, **SAVING, **STAGE_1}),
        (contrastive, {**MODEL, **TRAINING, **LORA, **SAVING, **STAGE_2}),
        (evaluate, {**MODEL, **TABLE}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_numbers_of_the_readme_are_of_these_defaults(script, defaults):
    """What a run without flags does: who changes one measures README's and docs/results.md's
    numbers anew."""
    found = dataclasses.asdict(script.Config())
    equal({name: x for name, x in found.items() if name not in NO_FLAGS}, defaults, "flag(...)")


DEFAULTS = {  # of the commands whose flags are neither words nor a stage's
    "compare_logs": dict(out="out/compare_logs.png"),
    "condense": dict(out="out/condense", condense=5.0, condense_share=0.4),
    "export": dict(examples=100),
    "figures": dict(model="out/contrastive", seed=0),
    "generate": dict(images="", out="", model="", server="", api_key="none", questions="", batch=16,
                     max_pixels=0, max_tokens=256, temperature=0.7, timeout=120.0, wait=10.0,
                     seed=0),
    "lessons": dict(out="out/lessons", least=3),
    "mine": dict(model="", data="", out="", image_root="", workers=1, first=5, last=8),
    "search": dict(model="", images="", text="", query_image="", workers=1, dim=0,
                   image_text="<image>", top=8, out="out/search.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_command_does_by_itself_what_its_page_says(name):
    """README's `--first 5 --last 8`, export's "100 examples of each kind", the folders where each
    stage and command writes."""
    read = start.read_config(start.ROOT / "tools" / f"{name}.py")
    own = set(read.__annotations__)
    found = {x.name: x.default for x in dataclasses.fields(read) if x.name in own}
    words = {x for x, default in found.items() if default is dataclasses.MISSING}
    equal({x: found[x] for x in found if x not in words}, DEFAULTS[name], "flag(...)")


def test_chunks_are_as_large_as_the_help_says():
    """Padded tokens at a time, on a CPU and on a GPU."""
    (field,) = [x for x in dataclasses.fields(evaluate.Config) if x.name == "chunk_tokens"]
    want = "default: {cpu} on a CPU, {cuda} on a GPU".format_map(config.CHUNK_TOKENS)
    expect(want in field.metadata["description"], field.metadata["description"], want, "flag(...)")


SHARE, AT_LEAST_0, ABOVE_0 = (0, 1, None), (0, None, None), (None, None, 0)
RANGES = {  # (least, most, above)
    **dict.fromkeys(("warmup", "question_first", "texts"), SHARE),
    **dict.fromkeys(("muon_lr", "weight_decay", "clip", "hardness", "steps", "turns"), AT_LEAST_0),
    **dict.fromkeys(("max_length", "min_pixels", "max_pixels", "dim", "limit"), AT_LEAST_0),
    **dict.fromkeys(("lr", "temperature"), ABOVE_0),
    **dict.fromkeys(("block", "keep", "lora_alpha", "chunk_tokens"), (1, None, None)),
    "save_every": AT_LEAST_0,
    "seed": (0, 2_147_483_647, None),
    "workers": (0, 256, None),
    "lora_rank": (0, 16_384, None),
    "lora_dropout": (0, 0.9, None),
    "margin": (0, 2, None),
    "compress_tokens": (0, 1000, None),
}


@pytest.mark.parametrize("script", [pretrain, contrastive, evaluate], ids=lambda x: x.__name__)
def test_numbers_that_would_train_or_score_nonsense_are_out_of_range(script):
    """A batch of one pair has no negatives; a temperature of 0 divides by it; a warm-up is a share.
    (That each number keeps to its range: test_flags.py.)"""
    batch = {"batch": (2 if script is contrastive else 1, 1_000_000, None)}
    seen = {}
    for field in dataclasses.fields(script.Config):
        if field.name in {**RANGES, **batch}:
            seen[field.name] = tuple(field.metadata[x] for x in ("least", "most", "above"))
    equal(seen, {name: {**RANGES, **batch}[name] for name in seen}, "flag(...)")
    expect(len(seen) >= 6, seen, "most of them", "a flag of another name?")


AT_LEAST_1, SECONDS = (1, None, None), (0, 86_400, None)
TOOLS = {  # of a command's own flags: (least, most, above)
    "condense": {"condense": ABOVE_0, "condense_share": (None, 1, 0)},
    "explain": {"chunk_tokens": AT_LEAST_1, "seed": RANGES["seed"], "temperature": ABOVE_0},
    "export": {"examples": (1, 100_000, None)},
    "figures": {"seed": RANGES["seed"]},
    "generate": {"batch": (1, 1024, None), "max_pixels": AT_LEAST_0, "max_tokens": AT_LEAST_1,
                 "temperature": (0, 10, None), "timeout": (None, 86_400, 0), "wait": SECONDS,
                 "seed": RANGES["seed"]},
    "lessons": {"least": (1, 4, None)},
    "mine": {"workers": RANGES["workers"], "first": AT_LEAST_1, "last": AT_LEAST_1},
    "search": {"workers": RANGES["workers"], "dim": AT_LEAST_0, "top": (1, 1000, None)},
}  # fmt: skip


@pytest.mark.parametrize("name", TOOLS)
def test_the_numbers_of_a_command_have_their_ranges_too(name):
    """A rank 0 is none, a share is none beyond 1, and no picture has five objects."""
    read = start.read_config(start.ROOT / "tools" / f"{name}.py")
    fields = [x for x in dataclasses.fields(read) if x.name in read.__annotations__]
    numbers = [x for x in fields if config.kind_of(x) in (int, float)]
    found = {x.name: tuple(x.metadata[y] for y in ("least", "most", "above")) for x in numbers}
    equal(found, TOOLS[name], "flag(...)")


def test_a_script_without_a_config_is_none(tmp_path):
    """A class of another name is not taken for it."""
    (tmp_path / "x.py").write_text("class Other:\n    a: int = 1\n")
    with pytest.raises(LookupError, match="x.py has no Config"):
        start.read_config(tmp_path / "x.py")


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_ends_the_process_with_status_0(word, monkeypatch, capsys):
    """Both words for it, and before the script goes on; other words do not."""
    script = Path(pretrain.__file__)
    ends = []
    monkeypatch.setattr(start, "watch_signals", lambda: None)
    monkeypatch.setattr(start, "leave", lambda status: ends.append(status))
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", [str(script), "--steps", "3", word])
    start.begin()
    equal(ends, [0], "leave(status=0)")
    said = capsys.readouterr().out
    assert "--question-first" in said and "optimiser steps" in said, said
    monkeypatch.setattr(sys, "argv", [str(script), "--steps", "3"])
    start.begin()
    equal((ends, capsys.readouterr().out), ([0], ""), "no help is asked for")


def test_a_closed_stderr_is_no_error_either(monkeypatch):
    """`2>&-`: Python has none then, and what is printed to it would go to stdout."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    start.open_streams()
    expect(sys.stdout and sys.stderr, (sys.stdout, sys.stderr), "both", "start.open_streams")


def test_a_program_that_is_started_has_an_output_too():
    """`>&-`: what fills the gap is handed on, or the program's first file would take its number."""
    lines = "import os, subprocess", "os.close(1)", "from plumbing import start"
    lines += "start.open_streams()", "raise SystemExit(subprocess.call(['echo', 'x']))"
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=start.ROOT, capture_output=True, text=True, timeout=120)
    equal((done.returncode, done.stderr), (0, ""), "os.set_inheritable")


@pytest.mark.parametrize("script", [check, export, figures, merge], ids=lambda x: x.__name__)
def test_a_word_that_is_needed_has_no_default(script):
    """`python -m tools.merge` alone says what it lacks, instead of merging nothing."""
    words = [x for x in dataclasses.fields(script.Config) if x.metadata.get("shown")]
    needed = [x.name for x in words if x.default is dataclasses.MISSING]
    equal(needed, [x.name for x in words], "config.word")


def test_help_calls_a_program_as_a_user_does():
    """argparse itself would say search.py, which is nowhere."""
    for module, want in (
        ("tools.search", "python -m tools.search"),
        ("toy.make", "python -m toy.make"),
        ("pretrain", None),  # as argparse says it
        ("toolshed", None),
        ("__main__", None),
    ):
        equal(config.program(module), want, module)


@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_number(value):
    """To Python it is one: `steps=True` would be one step."""
    for kind in (pretrain.Config, contrastive.Config, evaluate.Config):
        for field in dataclasses.fields(kind):
            if field.init and config.kind_of(field) in (int, float):
                with pytest.raises(InputError, match=config.option(field.name)):
                    config.refuse_value(field, value)


def test_a_number_without_a_limit_of_its_own_has_one():
    """2^63 and 1e39 would be errors of torch, or no numbers to it; 1e-300 is nought to it."""
    fields = {x.name: x for x in dataclasses.fields(pretrain.Config)}
    equal(config.in_range(fields["steps"], config.MOST), True, "the largest")
    equal(config.in_range(fields["steps"], config.MOST + 1), False, "one more")
    expect(config.MOST < 2**63, config.MOST, "< 2^63", "torch's integers")
    for name, value in (("lr", 1e39), ("muon_lr", 1e39), ("lr", 1e-300)):
        equal(config.in_range(fields[name], value), False, f"{name} {value}")
    for value in (math.inf, -math.inf, math.nan):
        equal(config.in_range(fields["weight_decay"], value), False, value)
