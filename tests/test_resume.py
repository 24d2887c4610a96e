"""What --resume finds: a damaged checkpoint, a finished run, nothing, the same run with another
memory, a folder that another process writes. (Killed and resumed, bit for bit: test_checkpoint.py;
on two nodes: test_two_nodes.py.)"""

import copy
import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from checks import equal
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_safety import Bomb, exploded

import contrastive
import model
import pretrain
from plumbing import checkpoint, folders, hub, optim, outfolder, ranks
from plumbing.errors import InputError, OfAllRanks
from tools import condense

LINES = [
    json.dumps({"query": {"text": f"{i} red circles"}, "target": {"text": f"{i} of them"}}) + "\n"
    for i in range(6)
]
SIZE = dict(steps=3, batch=4, block=4, workers=0, save_every=1, muon_lr=0.0, chunk_tokens=256)


class Crash(Exception):
    pass


def crash_in(step_of_crash):
    """optim.end_step that takes the run down in this step, from 0."""
    end_step = optim.end_step

    def crash(embedder, optimizers, cfg, step, *rest):
        if step == step_of_crash:
            raise Crash
        return end_step(embedder, optimizers, cfg, step, *rest)

    return crash


@pytest.fixture(scope="module")
def config(once):
    """config(**flags) of a small run of stage 2 on pairs of one's own; with LoRA, whose files are
    small."""

    def fill(folder):
        (folder / "pairs.jsonl").write_text("".join(LINES))

    data = once("pairs_to_resume", fill) / "pairs.jsonl"
    cfg = contrastive.Config(model="toy-random", data=str(data), lora_rank=2, **SIZE)
    return lambda **flags: dataclasses.replace(cfg, **flags)


def train(cfg, **changes):
    """Stage 2; main changes its Config."""
    contrastive.main(dataclasses.replace(cfg, **changes))


@pytest.fixture(scope="module")
def runs(once, config):
    """A folder with a run that crashed in its third step, and the same one that did not."""

    def fill(folder):
        cfg = config()
        train(cfg, out=str(folder / "whole"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, "end_step", crash_in(2))
            with pytest.raises(Crash):
                train(cfg, out=str(folder / "broken"))

    return once("runs_to_resume", fill)


@pytest.fixture
def stopped(config, runs, tmp_path):
    """The flags that go on with a copy of the run that crashed."""
    shutil.copytree(runs / "broken", tmp_path / "out")
    return config(out=str(tmp_path / "out"), resume=True)


@pytest.fixture(scope="module")
def shapes(runs):
    """{name: shape} of the weights that it trains."""
    weights = load_file(runs / "broken/checkpoints/step-00000002/weights.safetensors")
    return {name: w.shape for name, w in weights.items()}


@pytest.fixture
def known(stopped, runs):
    """The same flags, as main completes them."""
    state = json.loads((runs / "broken/checkpoints/step-00000002/state.json").read_text())
    for name in ("model", "model_digest", "data_digest", "command"):
        setattr(stopped, name, state["config"][name])
    return stopped


def same_adapter(a, b):
    """Whether two runs ended in the same bytes, and logged the same steps."""
    names = ("adapter_model.safetensors", "log.jsonl")
    logs = [Path(out, names[1]).read_text().splitlines()[1:] for out in (a, b)]
    files = [Path(out, names[0]).read_bytes() for out in (a, b)]
    return logs[0] == logs[1] and files[0] == files[1]


# ---------------------------------------------------------------------------------- what is damaged


def change_state(**changes):
    def change(folder):
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | changes))

    return change


def change_optimizer(change):
    def write(folder):
        path = folder / "optimizer.pt"
        optimizer = torch.load(path, weights_only=True)
        torch.save(change(optimizer), path)

    return write


def shortened(name):
    def cut(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-999])

    return cut


def fewer_weights(folder):
    path = folder / "weights.safetensors"
    weights = load_file(path)
    save_file({k: w for k, w in weights.items() if "layers.0" not in k}, path)


def more_weights(folder):
    path = folder / "weights.safetensors"
    save_file({**load_file(path), "mllm.lm_head.weight": torch.zeros(3)}, path)


def weights_of_other_shapes(folder):
    path = folder / "weights.safetensors"
    save_file({k: w[:1].clone() for k, w in load_file(path).items()}, path)


def other_shapes(optimizer):
    for values in optimizer["state"].values():
        values["exp_avg"] = torch.zeros(3)
    return optimizer


def other_name(optimizer):
    optimizer["param_groups"][0]["params"][0] = "x"
    return optimizer


DAMAGE = {
    "an empty folder": lambda f: [path.unlink() for path in f.iterdir()],
    "a file in its place": lambda f: (shutil.rmtree(f), f.write_text("")),
    "no state": lambda f: (f / "state.json").unlink(),
    "an empty state": lambda f: (f / "state.json").write_text(""),
    "half a state": lambda f: (f / "state.json").write_text('{"step": 2, "wor'),
    "a list": lambda f: (f / "state.json").write_text("[1]"),
    "nested without end": lambda f: (f / "state.json").write_text("[" * 100_000),
    "a state that is a folder": lambda f: ((f / "state.json").unlink(), (f / "state.json").mkdir()),
    "no text": lambda f: (f / "state.json").write_bytes(b"\xff\xfe\x00"),
    "a step of text": change_state(step="2"),
    "a step of truth": change_state(step=True),
    "a step before the first": change_state(step=-1),
    "a step after the last": change_state(step=99),
    "flags of text": change_state(config="lr 0.1"),
    "no flags": change_state(config={}),
    "a world of text": change_state(world="1"),
    "no weights": lambda f: (f / "weights.safetensors").unlink(),
    "weights that are a pipe": lambda f: (
        (f / "weights.safetensors").unlink(),
        os.mkfifo(f / "weights.safetensors"),
    ),
    "half the weights": shortened("weights.safetensors"),
    "other weights": fewer_weights,
    "more weights": more_weights,
    "weights of other shapes": weights_of_other_shapes,
    "half an optimiser": shortened("optimizer.pt"),
    "an optimiser that runs code": lambda f: torch.save({"state": Bomb()}, f / "optimizer.pt"),
    "an optimiser that is a list": change_optimizer(lambda o: [o]),
    "an optimiser without state": change_optimizer(lambda o: o | {"state": {}}),
    "an optimiser without groups": change_optimizer(lambda o: {"state": o["state"]}),
    "an optimiser of other weights": change_optimizer(
        lambda o: {"state": o["state"], "param_groups": o["param_groups"][1:]}
    ),
    "an optimiser of a weight by another name": change_optimizer(other_name),
    "an optimiser of other shapes": change_optimizer(other_shapes),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(known, shapes, capsys, name):
    """Its folder is laid aside: it must not count as newer than what is saved from here on."""
    newest = Path(known.out, "checkpoints", "step-00000002")
    DAMAGE[name](newest)
    found = checkpoint.newest_whole(shapes, known)
    said = capsys.readouterr().out
    assert found.state.step == 1 and found.folder.name == "step-00000001"
    assert "damaged: " in said and "step-00000002" in said and "resumed " in said, said
    assert max(map(len, said.splitlines())) < 400
    assert not newest.exists() and newest.with_name("damaged-step-00000002").exists()
    assert not exploded()


def test_what_is_not_damaged_is_taken(known, shapes):
    """Negative control of the above: the newest one."""
    assert checkpoint.newest_whole(shapes, known).state.step == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        *(OSError(code, os.strerror(code)) for code in (errno.ESTALE, errno.EMFILE, errno.ENOMEM)),
    ],
)
def test_what_the_machine_lacks_is_no_damage(known, shapes, monkeypatch, error):
    """The user would be told to remove a whole checkpoint, or lose it when the run ends."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint, "load_file", fail)
    with pytest.raises(InputError, match="step-00000002 cannot be read now: .* It stays") as e:
        checkpoint.newest_whole(shapes, known)
    assert not isinstance(e.value, checkpoint.Damaged)
    assert len(checkpoint.checkpoints_in(known.out)) == 2


def test_where_no_file_may_be_opened_no_checkpoint_is_called_damaged(known, shapes):
    """`ulimit -n`."""
    folder = Path(known.out, "checkpoints", "step-00000002")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(InputError) as of_state:
            checkpoint.read_state(folder)
        with pytest.raises(InputError) as of_tensors:
            checkpoint.read_tensors(folder, shapes)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for error in (of_state, of_tensors):
        assert "step-00000002 cannot be read now" in str(error.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("can't allocate memory"), InputError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("[gloo] Connection closed by peer"), RuntimeError),
        (KeyError("a weight"), InputError),
    ],
)
def test_what_ends_while_a_checkpoint_is_sent_is_no_fault_of_it(monkeypatch, error, expected):
    """A rank that is killed meanwhile, a GPU that another program fills: not "Remove it"."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.dcp, "set_optimizer_state_dict", fail)
    monkeypatch.setattr(checkpoint, "world", lambda: 1)
    monkeypatch.setattr(ranks, "world", lambda: 2)
    with pytest.raises(expected) as e:
        checkpoint.load_checkpoint(None, None, None)
    equal("Remove it" in str(e.value), isinstance(error, KeyError), "advice")


def test_a_run_goes_on_from_the_one_before_to_the_same_bytes(stopped, runs):
    """From flags to the saved folder."""
    shortened("optimizer.pt")(Path(stopped.out, "checkpoints", "step-00000002"))
    train(stopped)
    assert same_adapter(stopped.out, runs / "whole")


def test_where_no_checkpoint_can_be_read_nothing_is_begun_and_nothing_removed(known, shapes):
    """Not silently from step 1."""
    for folder in checkpoint.checkpoints_in(known.out):
        (folder / "state.json").unlink()
    with pytest.raises(InputError, match="step-00000002 is damaged, .* none before.*begin again"):
        checkpoint.newest_whole(shapes, known)
    assert len(checkpoint.checkpoints_in(known.out)) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=9,
)


@settings(max_examples=int(os.environ.get("FUZZ", 60)), deadline=None)
@given(field=st.sampled_from(["step", "world", "config", "torch", "lr", "fitting"]), value=JSON)
def test_any_state_is_a_step_or_an_input_error(config, runs, field, value):
    """Any JSON in any field of state.json. FUZZ=3000 by hand."""
    state = json.loads((runs / "broken/checkpoints/step-00000002/state.json").read_text())
    where = state["config"] if field in ("lr", "fitting") else state
    where[field] = value
    folder = runs / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps(state))
    cfg = config()
    try:
        read = checkpoint.read_state(folder)
        checkpoint.refuse_another_run(read, cfg, but=("model", "model_digest", "data_digest"))
    except InputError as e:
        assert len(str(e)) < 600
    else:
        assert type(read.step) is int and 0 <= read.step <= 3 and read.world == 1


@settings(max_examples=int(os.environ.get("FUZZ", 60)), deadline=None)
@given(
    name=st.sampled_from(["optimizer.pt", "weights.safetensors"]),
    place=st.floats(0, 0.999),
    new=st.binary(min_size=1, max_size=40),
)
def test_any_bytes_in_a_checkpoint_are_one_of_this_run_or_damaged(runs, shapes, name, place, new):
    """Bytes of its files overwritten. FUZZ=3000 by hand."""
    folder = runs / "fuzzed_bytes"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(runs / "broken/checkpoints/step-00000002", folder)
    raw = bytearray((folder / name).read_bytes())
    at = int(place * len(raw))
    raw[at : at + len(new)] = new
    (folder / name).write_bytes(raw)
    try:
        weights, optimizer = checkpoint.read_tensors(folder, shapes)
    except checkpoint.Damaged as e:
        assert len(str(e)) < 600
    else:
        assert {name: w.shape for name, w in weights.items()} == shapes and optimizer["state"]


# ------------------------------------------------------------------------------ what is another run


def test_resume_where_there_is_nothing_says_so(config, tmp_path, capsys):
    """And begins: the same command serves from the first try on. A model without a checkpoint and
    without a mark is never replaced by it."""
    out = tmp_path / "new"
    train(config(out=str(out), resume=True))
    assert (
        f"--resume: {out} holds no checkpoint; the run begins at step 1" in capsys.readouterr().out
    )
    (out / "finished.json").unlink()  # a model of an older version, which had no mark
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a model, and no checkpoint to go on from"):
        train(config(out=str(out), resume=True, lr=0.1))
    assert (out / "adapter_model.safetensors").read_bytes() == before
    checkpoint.refuse_taken(config(out=str(out), lr=0.1))  # without --resume it is replaced


def test_a_finished_run_is_not_trained_again(config, runs, tmp_path, capsys):
    """--resume says that it is finished and ends with status 0, also where a kill left checkpoints
    behind the mark; with another flag or other data it is another run; without --resume it is
    replaced, and the mark goes first."""
    out = tmp_path / "out"
    shutil.copytree(runs / "whole", out)
    shutil.copytree(runs / "broken/checkpoints", out / "checkpoints")
    before = (out / "adapter_model.safetensors").stat().st_mtime_ns
    cfg = config(out=str(out), resume=True)
    with pytest.raises(InputError, match="not the same run: steps was 3, is 4"):
        train(cfg, steps=4)
    with pytest.raises(InputError, match="not the same run: data was"):
        train(cfg, data="shapes")
    with pytest.raises(SystemExit) as end:
        train(cfg)
    assert end.value.code == 0
    assert f"the run in {out} is finished" in capsys.readouterr().out
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert not (out / "checkpoints").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "end_step", crash_in(0))
        with pytest.raises(Crash):
            train(cfg, resume=False)
    assert not (out / "finished.json").exists()


# Flags that may be others in the run that goes on.
FREE = {"out", "resume", "workers", "save_every", "keep", "skip_bad", "graph_memory", "image_root"}
FREE |= {"chunk_tokens", "checkpointing"}  # they round
FREE |= {"max_length"}  # the way out where a row is too long


@pytest.mark.parametrize("stage", [pretrain, contrastive])
def test_another_value_of_any_flag_is_another_run(stage):
    """Each is refused by its name, with both values; so are other weights at the start, other data
    and another number of ranks. What an older version did not know was as it is by default."""
    cfg = stage.Config()
    flags = dataclasses.asdict(cfg)
    fields = {name: value for name, value in flags.items() if name != "fitting"}
    for name, default in fields.items():
        changed = checkpoint.State(1, {**flags, name: "other"}, 1, {})
        older = checkpoint.State(1, {k: v for k, v in flags.items() if k != name}, 1, {})
        checkpoint.refuse_another_run(older, cfg)
        mine = copy.copy(cfg)
        setattr(mine, name, "other")
        if name in FREE:
            checkpoint.refuse_another_run(changed, cfg)
            checkpoint.refuse_another_run(older, mine)
            continue
        with pytest.raises(InputError, match=f"not the same run: {name} was 'other', is "):
            checkpoint.refuse_another_run(changed, cfg)
        if name not in ("model_digest", "data_digest", "command"):
            was = re.escape(repr(default))
            with pytest.raises(InputError, match=f"not the same run: {name} was {was}, is 'other'"):
                checkpoint.refuse_another_run(older, mine)
    with pytest.raises(InputError, match="not the same run: the number of ranks was 2, is 1"):
        checkpoint.refuse_another_run(checkpoint.State(1, flags, 2, {}), cfg)


def test_another_command_does_not_go_on(stopped, monkeypatch):
    """It has the same flags, and another loss."""
    monkeypatch.setattr(contrastive, "load_for", pytest.fail)
    flags = {f.name: getattr(stopped, f.name) for f in dataclasses.fields(stopped) if f.init}
    with pytest.raises(InputError, match="command was 'contrastive', is 'condense'"):
        condense.main(condense.Config(**flags))


def test_another_run_is_refused_before_the_model_is_loaded(stopped, monkeypatch):
    """In time: stage 2 would have written OUT/merged by then."""
    monkeypatch.setattr(contrastive, "load_for", pytest.fail)
    with pytest.raises(InputError, match="not the same run: lr was 0.003, is 0.1"):
        train(stopped, lr=0.1)


def test_a_finished_run_with_other_data_is_another_run(config, runs):
    """They are read last."""
    cfg = config(out=str(runs / "whole"), resume=True)
    flags = json.loads((runs / "whole" / "finished.json").read_text())["config"]
    for name in ("model", "model_digest", "data_digest", "command"):
        setattr(cfg, name, flags[name])
    assert checkpoint.is_finished(cfg)
    cfg.data_digest += 1
    with pytest.raises(InputError, match="not the same run: data_digest was"):
        checkpoint.is_finished(cfg)


def test_a_model_that_was_trained_again_in_between_is_refused(tmp_path, config):
    """The weights that a run starts from are part of it: stage 1 anew, then stage 2's --resume."""
    start = tmp_path / "pretrain"
    model.save(model.load("toy-random", device="cpu"), start)
    cfg = config(model=str(start), out=str(tmp_path / "out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "end_step", crash_in(1))
        with pytest.raises(Crash):
            train(cfg)
    again = model.load("toy-random", device="cpu")
    again.mllm.get_input_embeddings().weight.data += 0.01
    model.save(again, start)
    with pytest.raises(InputError, match="not the same run: model_digest was"):
        train(cfg, resume=True)


def test_of_a_finished_run_the_base_of_its_adapter_is_left_alone(tmp_path, config):
    """Stage 2 after LoRA: OUT's adapter needs the bytes of OUT/merged. --resume writes it again
    where the run goes on, and not where it is over; an error of rank 0 is one of all ranks."""
    written = []

    def save(embedder, path):
        written.append(path)

    cfg = config(out=str(tmp_path / "out"), lora_rank=2)
    checkpoint.keep_base(save, None, cfg)
    checkpoint.keep_base(save, None, dataclasses.replace(cfg, resume=True))
    checkpoint.keep_base(save, None, dataclasses.replace(cfg, lora_rank=0))
    assert written == [tmp_path / "out" / "merged"] * 2
    (tmp_path / "out").mkdir()
    checkpoint.mark_finished(cfg)
    checkpoint.keep_base(save, None, dataclasses.replace(cfg, resume=True))
    assert len(written) == 2, "finished"
    checkpoint.keep_base(save, None, cfg)
    assert len(written) == 3, "a new run in its place"

    def fail(embedder, path):
        raise InputError("no room")

    with pytest.raises(OfAllRanks, match="no room"):
        checkpoint.keep_base(fail, None, cfg)


def test_the_digest_of_an_adapter_changes_with_its_base(tmp_path, runs, monkeypatch):
    """Wherever the base is named from: the working folder, or the adapter's own."""
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(runs / "whole", adapter)
    base.mkdir()
    monkeypatch.chdir(tmp_path)
    for name, folder in (("base", base), ("merged", adapter / "merged")):
        folder.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
        digests = set()
        for value in (0.0, 1.0):
            save_file({"w": torch.full((9,), value)}, folder / "model.safetensors")
            digests.add(checkpoint.digest_of_model(str(adapter)))
        assert len(digests) == 2, name
    toy, drawn = checkpoint.digest_of_model("toy"), checkpoint.digest_of_model("toy-random")
    monkeypatch.setattr(folders, "TOY", base)
    assert checkpoint.digest_of_model("toy") != toy
    assert checkpoint.digest_of_model("toy-random") == drawn, "its weights are drawn, and not read"


def test_the_digest_of_a_model_changes_with_all_that_is_read_of_it(tmp_path):
    """Its sizes, tokenizer, template, what is done to pictures, the adapter's flags; but neither
    with its card, nor with where it or its base lies."""
    folder = tmp_path / "m"
    shutil.copytree(folders.TOY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    digests = [checkpoint.digest_of_model(str(folder))]
    files = ("config.json", "nanocoma.json", "tokenizer.json", "processor_config.json", "x.jinja")
    files += ("vocab.json", "merges.txt", "added_tokens.json", "chat_template.json")
    files += ("tokenizer_config.json", "preprocessor_config.json", "special_tokens_map.json")
    for name in files:
        before = folder / name
        text = before.read_text() if before.exists() else ""
        before.write_text(text + " ")
        digests.append(checkpoint.digest_of_model(str(folder)))
        assert digests[-1] not in digests[:-1], name
    (folder / "x.jinja").rename(folder / "y.jinja")
    digests.append(checkpoint.digest_of_model(str(folder)))
    assert digests[-1] not in digests[:-1], "another template of the same words"
    (folder / "README.md").write_text("a card")
    (folder / "scores.json").write_text("{}")
    moved = folder.rename(tmp_path / "elsewhere")
    assert checkpoint.digest_of_model(str(moved)) == digests[-1], "the same model"
    one, two, three = (
        folders.digest_of_settings(moved, {"base_model_name_or_path": base, "lora_alpha": alpha})
        for base, alpha in (("a", 1), ("b", 1), ("a", 2))
    )
    assert one == two != three


def test_chunks_and_checkpointing_may_change_and_it_is_said(stopped, capsys):
    """The advice after running out of memory is taken by --resume."""
    train(stopped, chunk_tokens=128, checkpointing=True)
    said = capsys.readouterr().out
    line = "the run began with another --chunk-tokens, --checkpointing: the last bits may differ"
    assert line in said, said
    assert "resumed" in said and Path(stopped.out, "finished.json").exists()


def test_texts_may_be_cut_from_here_on_and_it_is_said(stopped, capsys):
    """The advice after a row that is too long is taken by --resume."""
    train(stopped, max_length=64)
    line = "the run began with another --max-length: from here on other texts are cut"
    assert line in (said := capsys.readouterr().out), said
    assert "resumed" in said and "last bits" not in said, said


def test_another_version_of_the_libraries_is_said(stopped, capsys):
    """It may move the last bits, and refuses nothing."""
    for folder in checkpoint.checkpoints_in(stopped.out):
        change_state(torch="2.0.1")(folder)
    train(stopped)
    assert "began with another torch: the last bits may differ" in capsys.readouterr().out


def test_a_state_of_fewer_libraries_is_of_no_other_ones(stopped, capsys):
    """An older version of ours did not note all that it notes now."""
    for folder in checkpoint.checkpoints_in(stopped.out):
        change_state(PIL=None)(folder)
    train(stopped)
    said = capsys.readouterr().out
    assert "resumed" in said and "last bits" not in said, said


@pytest.fixture
def small_memory(monkeypatch):
    """A machine on which 40 padded tokens fit at a time, and no more."""
    forward = model.Embedder.forward

    def forward_or_not(self, inputs):
        if inputs["input_ids"].numel() > 40:
            raise torch.OutOfMemoryError("no memory")
        return forward(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(model.Embedder, "forward", forward_or_not)
        yield patch


def test_out_of_memory_then_resumed_is_the_same_run_bit_for_bit(small_memory, config, tmp_path):
    """What was halved stays so: dropout falls chunk by chunk. (That it shows: forgotten, the same
    run ends in other weights.)"""
    outs = {name: str(tmp_path / name) for name in ("whole", "broken", "forgotten")}
    train(config(out=outs["whole"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "end_step", crash_in(2))
        with pytest.raises(Crash):
            train(config(out=outs["broken"]))
    shutil.copytree(outs["broken"], outs["forgotten"])
    small_memory.undo()
    train(config(out=outs["broken"], resume=True))
    assert same_adapter(outs["whole"], outs["broken"])
    for folder in checkpoint.checkpoints_in(outs["forgotten"]):
        state = json.loads((folder / "state.json").read_text())
        assert 0 < state["config"].pop("fitting") <= 40
        (folder / "state.json").write_text(json.dumps(state))
    train(config(out=outs["forgotten"], resume=True))
    assert not same_adapter(outs["whole"], outs["forgotten"])


def test_no_steps_save_the_model_as_it_is(config, tmp_path):
    """--steps 0: the toy's own vectors, from a folder of one's own."""
    out = tmp_path / "out"
    cfg = config(out=str(out), steps=0, lora_rank=0)
    train(cfg)
    z = [model.load(name, device="cpu").encode(["two"]) for name in (str(out), "toy-random")]
    assert abs(z[0] - z[1]).max() < 1e-6 and (out / "finished.json").exists()


# -------------------------------------------------------------------------------------------- --out


def test_a_second_run_into_the_same_out_is_refused_while_the_first_lives(tmp_path):
    """And no longer, though a loader worker of the first, a process of its own, is still there."""
    cfg = contrastive.Config(model="toy-random", out=str(tmp_path / "out"))
    reading, writing = os.pipe()
    first = os.fork()
    if first == 0:
        outfolder.take(cfg)
        if os.fork() == 0:  # the worker
            time.sleep(20)
            os._exit(0)
        os.write(writing, b"taken")
        time.sleep(20)
        os._exit(0)
    os.read(reading, 5)
    with pytest.raises(InputError, match=f"out is in use by another command .process {first} on "):
        outfolder.take(cfg)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    outfolder.take(cfg)
    outfolder.take(cfg)  # this process' own: a run after a run
    second = os.fork()
    if second == 0:
        try:
            outfolder.take(cfg)
        except InputError as e:
            os.write(writing, str(e).encode())
        os._exit(0)
    os.waitpid(second, 0)
    os.write(writing, b"end")
    assert f"in use by another command (process {os.getpid()} on " in os.read(reading, 999).decode()


OUTS = {
    "": "is empty",
    "  ": "is empty",
    "file": "cannot be written",
    "file/below": "cannot be written",
    "log_is_a_folder": "is a folder",
    "checkpoints_is_a_file": "cannot be written",
    "/dev/null": "cannot be written",
    "/proc/nowhere": "cannot be written",
    "x" * 300: "cannot be written",
    "nul\0": "is no text",
    "start": "would overwrite start",
    "link_to_start": "would overwrite start",
    "link_to_nowhere": "link_to_nowhere: is a symbolic link to gone, which is not there",
    "adapter": "would overwrite adapter",
}


@pytest.mark.parametrize("out", OUTS)
def test_an_out_that_cannot_be_is_refused_before_any_work(out, tmp_path, monkeypatch):
    """Before a model is looked for: there is none of this name."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("log_is_a_folder/log.jsonl").mkdir(parents=True)
    Path("checkpoints_is_a_file").mkdir()
    Path("checkpoints_is_a_file/checkpoints").touch()
    Path("start").mkdir()
    Path("link_to_start").symlink_to("start")
    Path("link_to_nowhere").symlink_to("gone")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "start"}')
    start = out if out == "adapter" else "start"
    cfg = contrastive.Config(model=start)
    with pytest.raises(InputError, match=OUTS[out]) as refused:
        contrastive.main(dataclasses.replace(cfg, out=out))
    assert len(str(refused.value)) < 600


def test_the_base_of_an_adapter_is_not_overwritten_either(tmp_path, monkeypatch):
    """Neither as OUT, nor as OUT/merged, where stage 2 writes the base of its own adapter."""
    monkeypatch.chdir(tmp_path)
    Path("adapter").mkdir()
    for base, out in (("base", "base"), ("run/merged", "run"), ("../base", "base")):
        Path(base).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"base_model_name_or_path": base})
        Path("adapter/adapter_config.json").write_text(text)
        with pytest.raises(InputError, match="would overwrite"):
            outfolder.take(contrastive.Config(model="adapter", out=out))
    outfolder.take(contrastive.Config(model="adapter", out="another"))


def test_rank_0_alone_never_asks_the_hub(tmp_path, monkeypatch):
    """Where an adapter's base is a hub id. Trap: of the ranks of a node one downloads for all, and
    waits for them; the others are not there while rank 0 takes OUT."""
    monkeypatch.chdir(tmp_path)
    Path("adapter").mkdir()
    text = json.dumps({"base_model_name_or_path": "team/base"})
    Path("adapter/adapter_config.json").write_text(text)
    asked = []
    monkeypatch.setattr(hub, "fetch_together", lambda *args: asked.append(args))
    outfolder.take(contrastive.Config(model="adapter", out="another"))
    assert asked == [], "the hub"
