"""Every flag of every script and command: the values that it takes, those that it refuses, and the
company in which it does nothing. Refused means: before any work, one line that names the flag, its
value and the way out. (Help, and where flags of earlier versions went: test_scripts.py.)"""

import ast
import dataclasses
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from checks import equal, expect, toy
from hypothesis import given, settings
from hypothesis import strategies as st

import contrastive
import evaluate
import model
import pretrain
from plumbing import combinations, config, optim
from plumbing.combinations import option, refuse_idle_ranks, refuse_impossible
from plumbing.config import CHUNK_TOKENS, in_range, kind_of
from plumbing.errors import InputError
from plumbing.template import STYLES
from plumbing.weights import ATTENTION
from tools import compare_logs, explain, export, figures, generate, mine, search

CONFIGS = {
    "pretrain": pretrain.Config,
    "contrastive": contrastive.Config,
    "evaluate": evaluate.Config,
    "search": search.Config,
    "explain": explain.Config,
    "generate": generate.Config,
    "export": export.Config,
    "figures": figures.Config,
    "compare_logs": compare_logs.Config,
    "mine": mine.Config,
}
WORDS = {  # what a command cannot do without
    "export": ["DIR"],
    "figures": ["DIR"],
    "compare_logs": ["MINE", "REFERENCE"],
}
LORA, SERVER = ["--lora-rank", "4"], ["--server", "http://localhost:8000/v1"]
COMPANY = {  # the flags beside which a flag does something
    "lora_alpha": LORA,
    "lora_dropout": LORA,
    "dora": LORA,
    "image_root": ["--data", "MMEB"],
    "split": ["--data", "MMEB"],
    "api_key": SERVER,
    "timeout": SERVER,
}


class Flag(NamedTuple):
    """A flag of a command."""

    command: str
    field: dataclasses.Field

    def parse(self, *words):
        """The command's Config, from these words and those that it needs."""
        company = COMPANY.get(self.field.name, [])
        if self.command == "pretrain" and self.field.name == "attn":
            company = ["--no-compress"]
        if self.command == "evaluate" and self.field.name == "resume":
            company = ["--json", "x"]
        needed = [*WORDS.get(self.command, []), *company]
        return CONFIGS[self.command].parse([*needed, *map(str, words)])


def all_flags(*kinds):
    """Every flag of these kinds; all there are, without kinds."""
    for command, cfg in CONFIGS.items():
        for field in dataclasses.fields(cfg):
            has_default = field.default is not dataclasses.MISSING
            if field.init and has_default and (not kinds or kind_of(field) in kinds):
                yield Flag(command, field)


def named(flag):
    """The name of a test's case."""
    return f"{flag.command} {option(flag.field.name)}" if isinstance(flag, Flag) else None


def limits(field):
    """-> (least, most, above) of a number; each may be None."""
    return tuple(field.metadata[name] for name in ("least", "most", "above"))


def refused(make, *parts):
    """make() raises InputError, in one short line that holds the parts."""
    with pytest.raises(InputError) as caught:
        make()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400, line
    for part in parts:
        assert part in line, f"{part!r} is not in: {line}"


# ------------------------------------------------------------------------------- the values of one


def test_a_home_folder_that_no_shell_has_put_in_its_place_is_no_folder_of_that_name():
    """Of `--out=~/x` bash and dash leave it as it is: a run went into a folder called "~", which
    nobody looks into, and which nobody dares to remove."""
    for value in ("~", "~/x"):
        with pytest.raises(InputError, match=f"--out {value}: ~ is no home folder here"):
            pretrain.Config(out=value)
        with pytest.raises(InputError, match="write the whole path"):
            evaluate.Config.parse([f"--json={value}"])
    pretrain.Config(out="x~")
    pretrain.Config(out="out/~")
    for name in ("text", "image_text"):
        search.Config(images="DIR", **{name: "~/x, what is in it?"})  # words, and no place


@pytest.mark.parametrize("flag", list(all_flags(int, float)), ids=named)
def test_every_number_has_a_range_and_keeps_to_it(flag):
    """The numbers at its ends are taken; those beyond them, no number at all, NaN and infinity are
    not: on the command line and in Python alike."""
    field, name = flag.field, option(flag.field.name)
    least, most, above = limits(field)
    whole = kind_of(field) is int
    expect((least is None) != (above is None), limits(field), "least= or above=", f"{named(flag)}")
    lowest, highest = (least if above is None else above), (most or config.MOST)
    good, bad = [lowest + (above is not None) * 1e-9, highest], [lowest - 1, highest * 2 + 1]
    if above is not None:
        bad.append(above)
    if not whole:
        good = [float(x) for x in good]
        bad += [math.nan, math.inf, -math.inf]
    for value in good:
        expect(in_range(field, value), f"{value} refused", config.range_of(field), named(flag))
    for value in bad:
        refused(lambda: flag.parse(f"{name}={value}"), name, f"must be {config.range_of(field)}")
        refused(lambda: dataclasses.replace(flag.parse(), **{field.name: value}), name, "must be")
    for text in ("x", "", "1e999999x", "9" * 5000):
        with pytest.raises((SystemExit, InputError)):
            flag.parse(f"{name}={text}")


def test_a_number_without_a_range_would_be_found():
    """Negative control of the first line above, and of the range itself."""

    @dataclasses.dataclass
    class Config(config.CommandLine):
        rate: float = config.flag(1.0, "has none")
        clip: float = config.flag(1.0, "has one", least=0)
        share: float = config.flag(0.5, "has two ends", least=0, most=1)
        lr: float = config.flag(0.5, "not zero", above=0)

    rate, clip, share, lr = dataclasses.fields(Config)
    equal(limits(rate), (None, None, None), "nothing declared")
    equal([in_range(clip, x) for x in (-1, 0, 5.5, math.nan)], [False, True, True, False], "clip")
    equal([in_range(share, x) for x in (-0.1, 0, 1, 1.5)], [False, True, True, False], "share")
    equal([in_range(lr, x) for x in (0, 1e-9, math.inf)], [False, True, False], "lr")
    words = [config.range_of(field) for field in (clip, share, lr)]
    equal(words, ["0 or more", "0 to 1", "above 0"], "range_of")


@pytest.mark.parametrize("flag", list(all_flags()), ids=named)
def test_each_flag_arrives_as_a_user_spells_it(flag):
    """`--name value`, the last of its choices; `--name` and `--no-name` where it is a switch."""
    field, name = flag.field, option(flag.field.name)
    value = "x"
    if kind_of(field) in (int, float):
        value = next(x for x in (1, 2, 0.5) if in_range(field, x))
    if field.metadata["choices"]:
        value = field.metadata["choices"][-1]
    value = {"--server": "http://x", "--graph-memory": "4GiB"}.get(name, value)
    cases = [([name, str(value)], value)]
    if kind_of(field) is bool:
        cases = [([name], True), ([f"--no-{name[2:]}"], False)]
    for words, want in cases:
        equal(getattr(flag.parse(*words), field.name), want, words)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_unknown_abbreviated_or_no_choice_ends_a_command_with_one_line(name, capsys):
    """Status 2, without the usage of forty flags; a value of 100,000 characters is not repeated."""
    cfg = CONFIGS[name]
    equal(cfg.parse(WORDS.get(name, [])), cfg(*WORDS.get(name, [])), "no flags: the defaults")
    cases = [["--nonsense", "1"], ["--mode", "3"], ["x" * 100_000, "--no-such"]]
    if "pooling" in {f.name for f in dataclasses.fields(cfg)}:
        cases += [["--pooling", "max"], ["--pooling", "max" * 100_000]]
    for words in cases:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cfg.parse([*WORDS.get(name, []), *words])
        said = capsys.readouterr().err
        equal((end.value.code, said.count("\n")), (2, 1), said)
        expect(len(said) < 400 and "error: " in said, len(said), "< 400 characters", said[:400])


@pytest.mark.parametrize(
    "flags",
    [
        {"batch": "8"}, {"batch": 8.0}, {"batch": True}, {"batch": None}, {"lr": "1e-3"},
        {"lr": 1j}, {"dora": 1}, {"dora": "yes"}, {"model": None}, {"model": 3}, {"model": b"toy"},
        {"data": ["a.jsonl"]}, {"steps": np.float32(3)}, {"compress_tokens": "4"},
        {"pooling": "max"}, {"schedule": "Cosine"}, {"prompt": ""},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_in_python(flags):
    """What argparse cannot let through, a notebook can."""
    (name,) = flags
    refused(lambda: contrastive.Config(**flags), option(name))


@pytest.mark.parametrize("name", config.DATA)
def test_of_two_data_none_takes_the_others_place(name):
    """Two lists are no longer one: argparse keeps the last, and half of the training is gone. The
    same one twice is one; another flag may be given again, as behind those of a script."""
    command = search if name == "images" else contrastive
    words = [option(name), "a.jsonl", option(name)]
    says = f"{option(name)} a.jsonl and {option(name)} b.jsonl: only one would be read; join them"
    with pytest.raises(InputError, match=says):
        command.Config.parse([*words, "b.jsonl"])
    with pytest.raises(InputError, match=says):
        command.Config.parse([f"{option(name)}=a.jsonl", f"{option(name)}=b.jsonl"])
    beside = ["--data", "a"] if name in ("subsets", "skip_bad") else []
    equal(getattr(command.Config.parse([*beside, *words, "a.jsonl"]), name), "a.jsonl", name)
    equal(command.Config.parse(["--model", "toy", "--model", "x"]).model, "x", "the last one")


def test_what_python_calls_a_number_or_a_path_is_taken():
    """numpy's numbers, a whole number for a rate, a pathlib.Path, None for "the default"."""
    cfg = contrastive.Config(batch=np.int64(64), lr=1, compress_tokens=None, out=Path("a/b"))
    equal((cfg.batch, cfg.lr, cfg.compress_tokens, cfg.out), (64, 1, None, "a/b"), "as given")


@pytest.mark.parametrize("text", [os.fsdecode(b"caf\xe9"), "a\0b"], ids=ascii)
def test_text_that_is_none_is_refused(text):
    """Bytes that are no UTF-8, which print would end with; a NUL, which no file's name has."""
    for name in ("model", "data", "out"):
        refused(lambda name=name: pretrain.Config(**{name: text}), f"--{name}", "no text")
    refused(lambda: search.Config(text=text * 1000), "--text", "no text")


@dataclasses.dataclass
class Small(config.CommandLine):
    """A Config of a command that has none of its own."""

    folder: str = config.word("where", "DIR")
    share: float = config.flag(0.5, "100 % of it", least=0, most=1)


def test_help_is_the_docstring_as_it_stands_and_each_flag_with_its_default(capsys, monkeypatch):
    """With the program as it is started; a % is a %."""
    for cfg, name, says in (
        (Small, "", ["usage: ", "DIR", "--share SHARE", "100 % of it (default: 0.5)", __doc__]),
        (search.Config, "python -m tools.search", ["--top TOP", search.__doc__]),
    ):
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            cfg.parse(["--help"])
        said = capsys.readouterr().out
        equal(end.value.code, 0, said)
        for part in (name, *says):
            expect(part.strip() in said, said, part, "Parser")


def test_what_suits_the_device_is_the_default():
    """Of kinds without a number of their own that of a CPU."""
    for device, want in (("cpu", 1024), ("cuda", 8192), ("mps", 1024)):
        equal(config.by_device(None, CHUNK_TOKENS, torch.device(device)), want, device)
        equal(config.by_device(7, CHUNK_TOKENS, torch.device(device)), 7, "what is given")


# ------------------------------------------------------------------------------ flags beside others

ALONE = [  # (command, words that are refused, the rule's flag, a part of what is said)
    ("pretrain", "--dora", "dora", "--lora-rank 16 would"),
    ("pretrain", "--lora-alpha 32", "lora_alpha", "--lora-alpha 32: LoRA is off"),
    ("contrastive", "--lora-dropout 0", "lora_dropout", "LoRA is off"),
    ("contrastive", "--save-every 0 --keep 3", "keep", "makes no checkpoints"),
    ("pretrain", "--image-root pictures", "image_root", "the toy world draws its pictures"),
    ("evaluate", "--image-root pictures", "image_root", "--data is where others are"),
    ("search", "--min-pixels 9000 --max-pixels 5000", "max_pixels", "below --min-pixels 9000"),
    ("contrastive", "--data pairs.jsonl --subsets A", "subsets", "pairs.jsonl is none"),
    ("evaluate", "--data birds --subsets A", "subsets", "chooses sets of MMEB or shapes"),
    ("explain", "--data pairs.jsonl --subsets A", "subsets", "pairs.jsonl is none"),
    ("contrastive", "--graph-memory 4gib", "graph_memory", "as 4GiB; 0 keeps no graph"),
    ("contrastive", "--split diverse_instruction", "split", "is of MMEB-train"),
    ("contrastive", "--data pairs.jsonl --split diverse_instruction", "split", "is of MMEB-train"),
    ("contrastive", "--data birds --split diverse_instruction", "split", "is of MMEB-train"),
    ("contrastive", "--data pairs.json --split diverse_instruction", "split", "is of MMEB-train"),
    ("contrastive", "--data PAIRS.JSONL --split diverse_instruction", "split", "is of MMEB-train"),
    ("evaluate", "--data pairs.csv --subsets A", "subsets", "pairs.csv is none"),
    ("pretrain", "--data talks.jsonl --caption", "caption", "a file brings its own dialogues"),
    ("explain", "--data talks.jsonl --caption", "caption", "a file brings its own dialogues"),
    ("pretrain", "--data talks.jsonl --texts 0.5", "texts", "--texts 0.5: goes with --data shapes"),
    ("pretrain", "--caption --turns 2", "turns", "a caption is one turn"),
    ("pretrain", "--data birds --turns 2", "turns", "a caption is one turn"),
    ("pretrain", "--objective kl --max-length 90", "objective", "the same answers"),
    ("pretrain", "--objective kl --no-compress", "objective", "its own teacher"),
    ("pretrain", "--attn flash_attention_2", "attn", "the compression mask needs --attn sdpa"),
    ("pretrain", "--compress-tokens 0", "compress_tokens", "add --no-compress if that is meant"),
    ("evaluate", "--resume", "resume", "goes on with what --json holds; name that file"),
    ("evaluate", "--data MMEB-eval --seed 3", "seed", "draws the toy world's sets"),
    ("generate", "--api-key abc", "api_key", "no server is asked"),
    ("generate", "--timeout 5", "timeout", "no server is asked"),
]
TOGETHER = [  # the same flags in company in which they do something
    ("pretrain", "--dora --lora-alpha 32 --lora-dropout 0 --lora-rank 4"),
    ("pretrain", "--lora-rank 4 --freeze-vision --muon-lr 0.01"),
    ("contrastive", "--save-every 5 --keep 3"),
    ("pretrain", "--image-root pictures --data talks.jsonl --turns 2"),
    ("search", "--min-pixels 5000 --max-pixels 9000"),
    ("search", "--min-pixels 5000"),
    ("search", "--min-pixels 5000 --max-pixels 5000"),
    ("contrastive", "--subsets classify:500,vqa"),
    ("contrastive", "--data MMEB-train --split diverse_instruction --subsets mmeb20"),
    ("evaluate", "--data TIGER-Lab/MMEB-eval --subsets A:10 --limit 5"),
    ("evaluate", "--seed 3 --subsets vqa"),
    ("pretrain", "--caption --texts 0.5 --question-first 1"),
    ("pretrain", "--objective kl"),
    ("pretrain", "--attn flash_attention_2 --no-compress"),
    ("pretrain", "--compress-tokens 0 --no-compress"),
    ("contrastive", "--compress-tokens 0 --pooling last --attn flash_attention_2"),
    ("contrastive", "--vision-cache off --freeze-vision --no-mask-false-negatives"),
    ("contrastive", "--graph-memory 0"),
    ("contrastive", "--lora-alpha 64"),  # the default, spelled out
    ("generate", "--api-key abc --timeout 5 --server http://h:1/v1"),
]


@pytest.fixture
def birds(tmp_path, monkeypatch):
    """The working folder has a folder of pictures with captions in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "metadata.csv").write_text("file_name,text\n")


@pytest.mark.parametrize("command, words, flag, says", ALONE)
def test_a_flag_that_does_nothing_is_refused(birds, command, words, flag, says):
    """Who gives a flag wants it to do something."""
    refused(lambda: CONFIGS[command].parse(words.split()), option(flag), says)


@pytest.mark.parametrize("command, words", TOGETHER)
def test_a_flag_that_does_something_is_taken(birds, command, words):
    """Negative control: the rules forbid nothing else."""
    CONFIGS[command].parse(words.split())


def test_every_rule_has_its_row():
    """In the table above; of a flag with several rules, as many rows."""
    rules = [rule.flag for group in combinations.RULES.values() for rule in group]
    rows = [flag for _, _, flag, _ in ALONE]
    for flag in set(rules):
        expect(rows.count(flag) >= rules.count(flag), flag, "a row for each rule", "ALONE")


def test_what_only_the_model_decides_is_refused_when_it_is_loaded(embedder):
    """An adapter of its own, and LoRA flags or --fsdp; none, and --no-merge; K = 0, and the mask;
    AdamW's rate where Muon trains all."""
    plain = model.load("toy-random", 0, device="cpu")  # K = 0
    for loaded, cfg, says in (
        (embedder, contrastive.Config(merge=False), "--no-merge: the model is no LoRA adapter"),
        (embedder, contrastive.Config(vision_cache="off"), "the tower is trained, and not frozen"),
        (plain, pretrain.Config(), "K = 0, as the model or its --prompt has it"),
        (plain, pretrain.Config(compress=False, pooling="last"), "stage 1 makes no embedder"),
    ):
        refused(lambda x=loaded, c=cfg: model.choose_trained(x, c), says)
    matrices = torch.nn.Linear(3, 3, bias=False)
    refused(lambda: optim.make_optimizers(matrices, pretrain.Config(lr=1e-5)), "Muon trains all")
    optim.make_optimizers(matrices, pretrain.Config())
    optim.make_optimizers(torch.nn.Linear(3, 3), pretrain.Config(lr=1e-5))  # AdamW has the bias
    model.choose_trained(plain, pretrain.Config(compress=False))
    model.choose_trained(embedder, pretrain.Config(lora_rank=2))
    for cfg in (
        pretrain.Config(lora_rank=2),
        contrastive.Config(merge=False, lora_rank=4, dora=True),
    ):
        refused(lambda c=cfg: model.choose_trained(embedder, c), "a LoRA adapter of its own")
    # Before the training: a sharded adapter could not be saved at its end.
    sharded = contrastive.Config(merge=False, fsdp=True, muon_lr=0.0)
    refused(lambda: model.choose_trained(embedder, sharded), "--fsdp", "does without --no-merge")
    model.choose_trained(embedder, contrastive.Config(merge=False, vision_cache="host"))
    model.choose_trained(toy(), contrastive.Config(vision_cache="off", freeze_vision=True))


def test_what_lora_is_asked_for_reaches_its_matrices(embedder):
    """Scale, dropout, DoRA, and of the model the language's attention alone."""
    flags = dict(lora_rank=4, lora_alpha=6, lora_dropout=0.25, dora=True)
    model.choose_trained(embedder, pretrain.Config(**flags))
    layers = {n: m for n, m in embedder.named_modules() if hasattr(m, "lora_A") and m.lora_A}
    for name, layer in layers.items():
        (scale,), (dropout,) = layer.scaling.values(), layer.lora_dropout.values()
        got = (layer.lora_A["default"].out_features, scale, dropout.p, *layer.use_dora.values())
        equal(got, (4, 6 / 4, 0.25, True), name)
    equal({name.split(".")[-1] for name in layers}, {f"{x}_proj" for x in "qkvo"}, "which")
    expect(not any("visual" in name for name in layers), layers.keys(), "no tower", "which")


def test_a_package_that_only_one_flag_needs_is_named_where_it_is_missing(embedder, monkeypatch):
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, "peft", None)
    cfg = pretrain.Config(lora_rank=4)
    refused(lambda: model.choose_trained(embedder, cfg), "--lora-rank needs peft: pip install peft")


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("pretrain", ["--temperature", "0.1"]),
        ("contrastive", ["--no-compress"]),
        ("contrastive", ["--caption"]),
    ],
)
def test_explain_takes_the_flags_of_its_stage_only(stage, words):
    """--temperature means nothing in stage 1, --no-compress and --caption nothing in stage 2."""
    refused(lambda: explain.main([stage, *words]), words[0], f"{stage} has none")
    refused(lambda: explain.main(["evaluate" * 100]), "the stage is pretrain or contrastive")


@pytest.mark.parametrize("words", ["--chunk-tokens 9", "--subsets vqa"])
def test_explain_pretrain_takes_no_flag_of_the_other_walk(words):
    """Its one row is one chunk, its dialogues are of no set: they would do nothing, unsaid."""
    name = words.split()[0]
    says = f"{words}: pretrain has none; explain contrastive has"
    refused(lambda: explain.main(["pretrain", *words.split()]), name, says)


# ---------------------------------------------------------------------------------- hints that help


@pytest.mark.parametrize("batch", [2, 3, 7, 30, 127])
@pytest.mark.parametrize("block", [1, 4, 32, 33])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_batch_that_is_proposed_is_a_good_one(batch, block, world):
    """ "try N": with N, and the same blocks and ranks, nothing is refused any more."""
    cfg = contrastive.Config(batch=batch, block=block)
    try:
        refuse_impossible(cfg, world)
    except InputError as e:
        proposed = int(re.search(r"try (\d+)", str(e))[1])
        assert proposed > batch, e
        refuse_impossible(dataclasses.replace(cfg, batch=proposed), world)
    else:
        equal((batch % block, batch % world), (0, 0), "what blocks and ranks divide")


@pytest.mark.parametrize(
    ("batch", "block", "world"), [(128, 32, 8), (128, 32, 16), (12, 4, 6), (4, 4, 4)]
)
def test_a_block_may_lie_on_several_ranks(batch, block, world):
    """Both divide the batch, and that is all; the default batch goes onto 8 GPUs."""
    refuse_impossible(contrastive.Config(batch=batch, block=block), world)


@pytest.mark.parametrize(
    ("batch", "block", "world", "says"),
    [(10, 4, 1, "--block 4"), (10, 4, 2, "--block 4"), (12, 4, 5, "the number of ranks, 5")],
)
def test_a_batch_that_does_not_fit_names_what_it_does_not_fit(batch, block, world, says):
    """The blocks, where they do not divide it; else the ranks."""
    cfg = contrastive.Config(batch=batch, block=block)
    refused(lambda: refuse_impossible(cfg, world), f"--batch {batch} is not a multiple of {says};")


def test_a_rank_without_an_example_is_refused():
    """In stage 1, too; with the batch that does."""
    refuse_idle_ranks(pretrain.Config(batch=3), 3)
    refused(lambda: refuse_idle_ranks(pretrain.Config(batch=2), 3), "--batch 2", "try 3")


def test_sharding_is_refused_where_it_does_not_go():
    """With Muon, with LoRA, on one rank."""
    good = dict(fsdp=True, muon_lr=0.0)
    for flags, world in (({"muon_lr": 0.02}, 2), ({"lora_rank": 2}, 2), ({}, 1)):
        cfg = contrastive.Config(**{**good, **flags})
        refused(lambda c=cfg, w=world: refuse_impossible(c, w), "--fsdp is for full fine-tuning")
    refuse_impossible(contrastive.Config(**good), 2)


def test_blocks_of_nothing_are_refused_without_a_hint_that_does_not_help():
    """`--batch 7 --block 0` was told to try 9."""
    refused(
        lambda: contrastive.Config.parse(["--batch", "7", "--block", "0"]), "--block 0 must be 1"
    )


# ------------------------------------------------------------------------ files, before the work


@pytest.mark.parametrize("where", ["folder", "folder/", "file/x.json", "pipe", "no/way/\0"])
def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    where, tmp_path, monkeypatch
):
    """evaluate's --json and search's --out: a folder, below a file, a pipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_for", pytest.fail)
    monkeypatch.setattr(model, "load_for", pytest.fail)
    Path("folder").mkdir()
    Path("file").write_text("whole")
    os.mkfifo("pipe")
    Path("a.png").write_bytes(b"")
    refused(lambda: evaluate.main(evaluate.Config(json=where)), "--json")
    refused(lambda: search.main(search.Config(images=".", text="x", out=where)), "--out")
    words = dict(images=".", model="toy", out=where)
    refused(lambda: generate.generate(generate.Config(**words)), "--out")
    equal(Path("file").read_text(), "whole", "what was there")
    equal(sorted(os.listdir()), ["a.png", "file", "folder", "pipe"], "and nothing new")


def test_no_command_writes_over_what_it_reads(tmp_path, monkeypatch):
    """evaluate's data, search's picture, generate's questions; also by another name. (check's data:
    test_tools.py.)"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_for", pytest.fail)
    monkeypatch.setattr(model, "load_for", pytest.fail)
    Path("read.png").write_text("whole")
    Path("link.png").symlink_to("read.png")
    mine = dict(images=".", model="toy", out="link.png")
    for stage, cfg, name in (
        (evaluate.main, evaluate.Config(data="read.png", json="link.png"), "--json"),
        (search.main, search.Config(**mine, query_image="read.png"), "--out"),
        (generate.generate, generate.Config(**mine, questions="read.png"), "--out"),
    ):
        refused(lambda run=stage, cfg=cfg: run(cfg), f"{name} link.png: would be written over")
    equal(Path("read.png").read_text(), "whole", "what was read")


# -------------------------------------------------------------------- flags that no code would read

# Who looks at all flags alike, and uses none of them.
CHECKERS = ("dataclasses", "plumbing.config", "plumbing.combinations", "plumbing.agreement")


def watched(cfg_class):
    """-> (a Config whose fields are watched, the names that were read)."""
    names = set()

    class Watched(cfg_class):
        def __getattribute__(self, name):
            if sys._getframe(1).f_globals["__name__"] not in CHECKERS:
                names.add(name)
            return super().__getattribute__(name)

    return Watched, names


def run_stages(folder):
    """Every script on the toy model, a step or a query of each. -> {command: names read}."""
    read = {}

    def run(command, main, **flags):
        cfg, names = watched(CONFIGS[command])
        try:
            main(cfg(**flags))
        except InputError:  # the run that finds a checkpoint, and no --resume
            pass
        read[command] = read.get(command, set()) | names

    small = dict(steps=2, workers=0, save_every=1, lora_rank=2)
    first, second = str(folder / "first"), str(folder / "second")
    run("pretrain", pretrain.main, batch=2, out=first, **small)
    run("contrastive", contrastive.main, batch=4, block=2, model=first, out=second, **small)
    whole = dict(model="toy-random", steps=0, workers=0, freeze_vision=True)
    run("pretrain", pretrain.main, out=str(folder / "whole"), **whole)
    for command, stage in (("pretrain", pretrain), ("contrastive", contrastive)):
        (folder / "begun" / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
        run(command, stage.main, model="toy", workers=0, out=str(folder / "begun"))
        run(command, stage.main, model="toy", workers=0, steps=0, out=str(folder / "all"))
    scores = str(folder / "scores.json")
    run("evaluate", evaluate.main, model="toy", subsets="vqa", limit=1, workers=0, json=scores)
    export.export(folder / "toy", 2)
    pictures, found = str(folder / "toy" / "captions"), str(folder / "x.png")
    run("search", search.main, model="toy", images=pictures, text="x", workers=0, out=found)
    for walk in (explain.explain_pretrain, explain.explain_contrastive):
        run("explain", lambda cfg, walk=walk: walk(cfg, "cpu"), model="toy")
    page = str(folder / "x.html")
    run("explain", lambda cfg: explain.write_html(cfg, "cpu"), model="toy-random", html=page)
    asked = folder / "asked.txt"
    asked.write_text("a?\nb?\nc?\n")
    for server in ("", "http://127.0.0.1:9/v1"):
        flags = dict(images=pictures, model="toy", out=str(folder / "d.jsonl"), wait=0.0)
        flags.update(server=server, questions=str(asked), max_tokens=3)
        run("generate", generate.generate, **flags)
    return read


def test_every_flag_is_read_by_the_command_that_takes_it(tmp_path, monkeypatch):
    """`--help` offers only what a command looks at: each is run, and what it reads is noted."""
    monkeypatch.chdir(tmp_path)
    read = run_stages(tmp_path)
    for command, names in read.items():
        fields = {f.name for f in dataclasses.fields(CONFIGS[command]) if f.init}
        equal(fields - names, set(), f"{command}: flags that nothing reads")


def test_a_flag_that_nothing_reads_would_be_found():
    """Negative control: a Config of which one flag is read, and then all are compared."""
    cfg, names = watched(search.Config)
    made = cfg(text="x")
    equal((made.text, dataclasses.asdict(made)["top"]), ("x", 8), "as given, and the default")
    equal(names & {"text", "top"}, {"text"}, "asdict reads everything, and uses nothing")


# -------------------------------------------------------------------------------- how they are said


def test_flags_are_declared_in_words_that_need_no_import():
    """`--help` reads them without running a line (torch takes seconds): literals, and the numbers
    in them are those of the code."""
    root = Path(config.__file__).parent.parent
    files = [root / "plumbing" / "config.py"]
    files += [Path(sys.modules[cfg.__module__].__file__) for cfg in CONFIGS.values()]
    calls = 0
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
                if getattr(node.value.func, "id", "") in ("flag", "word"):
                    for value in [*node.value.args, *(k.value for k in node.value.keywords)]:
                        ast.literal_eval(value)
                    calls += 1
    expect(calls > 70, calls, "> 70", "the form of a declaration")
    fields = {f.name: f.metadata for f in dataclasses.fields(contrastive.Config) if f.init}
    equal(fields["prompt"]["choices"], list(STYLES), "plumbing/template.py")
    equal(["eager", *fields["attn"]["choices"]], list(ATTENTION), "plumbing/weights.py")
    said = [int(x) for x in re.findall(r"\d+", fields["chunk_tokens"]["description"])]
    equal(said, list(CHUNK_TOKENS.values()), "chunk_tokens")


MANY = int(os.environ.get("FUZZ", 0))
ODD = st.sampled_from(["-1", "0", "1", "nan", "inf", "1e400", "", "x", "-", "--", "=", "9" * 400,
                       "\udce9", "\0", "a b", "{x}", "%s", "toy", "shapes", "1.5"])  # fmt: skip


@pytest.mark.parametrize("command", CONFIGS)
def test_any_words_become_a_config_or_one_line(command):
    """FUZZ=20000 by hand."""
    cfg = CONFIGS[command]
    names = [option(f.name) for f in dataclasses.fields(cfg) if f.init]
    word = st.sampled_from(names) | ODD | st.text(max_size=5)

    @settings(max_examples=MANY or 60, derandomize=not MANY, deadline=None, database=None)
    @given(st.lists(word, max_size=6))
    def check(words):
        try:
            made = cfg.parse(words)
        except InputError as e:
            assert len(str(e)) < 500 and "\n" not in str(e), e
        except SystemExit as e:
            assert e.code in (0, 2)
        else:
            assert made == dataclasses.replace(made)

    check()
