"""A disk that is full, read-only or gone while a run trains. Really: a small file system in memory
(skipped where this user may not mount one), and /dev/full."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest

import model
import pretrain
from plumbing import checkpoint, optim
from plumbing.errors import InputError
from plumbing.log import Log, earlier_lines

# Full training of the toy: 4.9 MiB of model and tokenizer, 14.5 MiB a checkpoint.
CONFIG = pretrain.Config(
    model="toy-random", steps=3, batch=2, turns=1, workers=0, save_every=1, keep=1, muon_lr=0.0
)


def train(**changes):
    pretrain.main(dataclasses.replace(CONFIG, **changes))


@pytest.fixture(scope="module")
def whole(once):
    """The run on a disk with room."""
    return once("whole_disk", lambda folder: train(out=str(folder)))


class Disk:
    """A file system of its own, as large as it is told."""

    def __init__(self, folder):
        self.folder = folder

    def mount(self, *options) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(self.folder)]
        return subprocess.run(words, capture_output=True).returncode == 0

    def resize(self, size):
        assert self.mount("remount", "rw", f"size={size}m")


@pytest.fixture
def disk(tmp_path):
    """A small disk; OUT is a folder in it."""
    small = Disk(tmp_path)
    if not shutil.which("mount") or not small.mount("size=64m"):
        pytest.skip("this user may not mount a file system")
    yield small
    # -l: this process still holds files of the runs on it.
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def at_step(monkeypatch, number, act):
    """act() at the end of step `number`, from 1, before it is logged and saved."""
    end_step = optim.end_step

    def end(embedder, optimizers, cfg, step, *rest):
        norm = end_step(embedder, optimizers, cfg, step, *rest)
        if step + 1 == number:
            act()
        return norm

    monkeypatch.setattr(optim, "end_step", end)


def steps(out):
    """Numbers of the steps that log.jsonl has."""
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()[1:]]


def test_a_model_that_does_not_fit_beside_the_checkpoint_costs_no_step(disk, whole, capsys):
    """The newest checkpoint stays, the error says how much is needed; with room --resume ends in
    the bytes of the run that had it from the start."""
    out = disk.folder / "out"
    disk.resize(18)
    with pytest.raises(InputError, match=r"model is not saved: .*No space left.* MiB are needed"):
        train(out=str(out))
    assert [c.name for c in checkpoint.checkpoints_in(out)] == ["step-00000001"]
    assert "no checkpoint at step 2: " in capsys.readouterr().out
    assert not (out / "finished.json").exists() and not (out / "model.safetensors").exists()
    disk.resize(64)
    train(out=str(out), resume=True)
    names = ("model.safetensors", "log.jsonl")
    ours, theirs = ([(f / n).read_bytes() for n in names] for f in (out, whole))
    assert ours[0] == theirs[0] and steps(out) == [1, 2, 3]
    assert (out / "finished.json").exists() and not (out / "checkpoints").exists()


def test_older_checkpoints_make_room_for_the_model(disk, whole):
    """Two of them fill the disk: the older one goes."""
    out = disk.folder / "out"
    disk.resize(32)
    train(out=str(out), keep=2)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_full_disk_costs_log_lines_and_not_the_run(disk, whole, monkeypatch, capsys):
    """From the second step on not a byte is free: said once, and the lines that are there are
    whole. Room is made before the model is saved."""
    out = disk.folder / "out"
    filler = disk.folder / "filler"

    def fill():
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        # The last page of the log takes what still fits in it.
        log = out / "log.jsonl"
        with open(log, "ab") as file:
            file.write(b" " * (-log.stat().st_size % 4096))

    at_step(monkeypatch, 2, fill)
    at_step(monkeypatch, 3, filler.unlink)
    train(out=str(out), save_every=0, keep=2)
    said = capsys.readouterr().out
    assert said.count("lacks lines from here on") == 1 and "No space left" in said, said
    lines = (out / "log.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["step"] for line in lines] == [1, 3]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_read_only_disk_is_refused_before_any_work(disk):
    """Before a model is looked for: there is none of this name."""
    assert disk.mount("remount", "ro")
    with pytest.raises(InputError, match="--out .* cannot be written .*Read-only file system"):
        train(out=str(disk.folder / "out"), model="./nowhere")


def test_an_out_that_vanishes_costs_what_was_in_it(tmp_path, whole, monkeypatch):
    """Removed while the run trains: it ends with its model all the same."""
    out = tmp_path / "out"
    at_step(monkeypatch, 2, lambda: shutil.rmtree(out))
    train(out=str(out))
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (out / "finished.json").exists()


def test_the_room_that_is_said_is_that_of_what_is_saved(embedder):
    """All weights, also those that are frozen; of an adapter its own."""
    whole = sum(p.nbytes for p in embedder.parameters())
    model.choose_trained(embedder, dataclasses.replace(CONFIG, freeze_vision=True))
    assert checkpoint.weight_of(embedder) == whole
    model.choose_trained(embedder, dataclasses.replace(CONFIG, lora_rank=2))
    trained = sum(p.nbytes for p in embedder.parameters() if p.requires_grad)
    assert checkpoint.weight_of(embedder) == trained < whole / 10


def test_that_rank_0_cannot_write_is_known_to_all(monkeypatch):
    """It alone writes; the others could."""
    monkeypatch.setattr(checkpoint, "gather_objects", lambda mine: ["No space left", mine])
    assert checkpoint.try_to_save(lambda *_: None, None, CONFIG, {}) == "No space left"


def test_a_line_that_the_disk_refuses_is_said_once(tmp_path, capsys):
    """/dev/full takes nothing; any user has it."""
    log = Log(dataclasses.replace(CONFIG, out=str(tmp_path)), 0)
    log.file = open("/dev/full", "ab", buffering=0)
    for step in range(3):
        log.write({"step": step})
    assert capsys.readouterr().out.count("/dev/full lacks lines") == 1


def test_a_resumed_log_keeps_what_is_whole_up_to_the_checkpoint(tmp_path):
    """By the steps' numbers, not by counting lines: some may be missing, the last one half."""
    log = tmp_path / "log.jsonl"
    header, record = '{"config": {}}\n', '{"step": %d}\n'
    log.write_text(header + record % 1 + record % 3 + "[1]\n5\n\xff\n" + record % 4 + '{"step": 5')
    assert earlier_lines(log, 3) == [header, record % 1, record % 3]
    log.write_text("")
    assert earlier_lines(log, 3) == []


def test_what_cannot_be_removed_of_a_checkpoint_costs_nothing(tmp_path, whole, monkeypatch):
    """NFS keeps a file that is open, and its folder with it: planted as a removal that leaves one.
    What is left is no checkpoint any more."""

    def leave_a_file(folder, ignore_errors=False):
        folder = Path(folder)
        if folder.name == "part" or not folder.exists():
            return
        for path in folder.iterdir():
            if path.is_file() and path.name != "lock":
                path.rename(folder / ".nfs0001")
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", leave_a_file)
    out = tmp_path / "out"
    train(out=str(out))
    assert checkpoint.checkpoints_in(out)[:-1] == []
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert list(out.glob("checkpoints/removed-step-*/.nfs0001")), "the plant did what NFS does"
