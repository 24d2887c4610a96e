"""Checkpoints: a run that was killed, stopped or resumed ends in the same bytes. (One rank of two
is killed: test_torchrun.py; what --resume may find: test_resume.py; disks: test_full_disk.py.)"""

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import Fork, as_script

import contrastive
import pretrain
from plumbing import checkpoint, optim
from plumbing.errors import InputError

SMALL = "--model toy --batch 8 --block 4 --workers 1 --muon-lr 0".split()


def losses(out):
    """What log.jsonl says of each step."""
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()[1:]]


def check_same(a, b, name="model.safetensors"):
    """The same weights, byte for byte, and the same log."""
    assert losses(a) == losses(b)
    got, want = (Path(out, name).read_bytes() for out in (b, a))
    assert got == want, "the weights differ from the uninterrupted run's"


class Crash(Exception):
    pass


@pytest.mark.parametrize("stage", [pretrain, contrastive])
@pytest.mark.parametrize("lora", [0, 4])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, stage, lora):
    """With dropout, accumulation over chunks, loader workers, Muon (on LoRA's matrices: on whole
    ones it is slow): the weights and the log are equal.
    Without --resume, or with another flag, the unfinished run is not touched."""
    cfg = stage.Config(model="toy", steps=4, batch=4, workers=2, chunk_tokens=200, save_every=2)
    cfg = dataclasses.replace(cfg, lora_rank=lora, muon_lr=0.02 if lora else 0.0, keep=1)
    if stage is contrastive:
        cfg.block = 2
    whole, broken = (dataclasses.replace(cfg, out=str(tmp_path / n)) for n in ("whole", "broken"))
    stage.main(dataclasses.replace(whole))
    end_step = optim.end_step

    def crash(embedder, optimizers, cfg, step, *rest):
        if step == 3:
            raise Crash
        return end_step(embedder, optimizers, cfg, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(optim, "end_step", crash)
        with pytest.raises(Crash):
            stage.main(dataclasses.replace(broken))
    with pytest.raises(InputError, match="--resume goes on with it"):
        stage.main(dataclasses.replace(broken))
    with pytest.raises(InputError, match="lr was 0.003, is 0.1"):
        stage.main(dataclasses.replace(broken, resume=True, lr=0.1))
    stage.main(dataclasses.replace(broken, resume=True))
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    check_same(whole.out, broken.out, name)


def test_killed_at_random_it_resumes_to_the_same_bytes(tmp_path):
    """`kill -9` at random moments, while saving too (it does so every step). KILLS=30 by hand."""
    kills, rng = int(os.environ.get("KILLS", 2)), random.Random(0)
    flags = [*SMALL, "--steps", "8", "--save-every", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    contrastive.main(contrastive.Config.parse([*flags, "--out", str(whole)]))
    words = [*flags, "--out", str(killed), "--resume"]
    done = while_saving = 0
    log = killed / "log.jsonl"
    while done < kills:
        before = log.stat().st_mtime_ns if log.exists() else 0
        run = Fork(lambda: as_script(contrastive, words), tmp_path / "said")
        started = time.time()
        while run.poll() is None and (log.stat().st_mtime_ns if log.exists() else 0) == before:
            time.sleep(0.01)  # until it trains
        time.sleep(rng.uniform(0, 0.5))  # of the second that the steps take
        done += run.poll() is None
        run.kill()
        while_saving += (killed / "checkpoints" / "part").exists()
        if (killed / "model.safetensors").exists() and done < kills:
            check_same(whole, killed)  # it got through: begin again
            shutil.rmtree(killed)
        assert time.time() - started < 120
    contrastive.main(contrastive.Config.parse([*flags, "--out", str(killed), "--resume"]))
    check_same(whole, killed)
    print(f"{done} kills, {while_saving} of them while saving: 0 differing bytes")


def test_a_signal_saves_a_checkpoint_and_ends_the_run(tmp_path):
    """SIGTERM to all its processes, loader workers too, as on a preempted cluster: at most one step
    later the run has saved and ended."""
    words = [*SMALL, "--steps", "500", "--out", str(tmp_path)]
    run = Fork(lambda: as_script(contrastive, words), tmp_path / "said")
    log = tmp_path / "log.jsonl"
    while run.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.05)
    run.send(signal.SIGTERM)
    status, said = run.wait(), (tmp_path / "said").read_text()
    assert status == 143 and "--resume goes on from step-" in said, (status, said)
    saved = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert len(saved) == 1 and len(losses(tmp_path)) == int(saved[0].name[5:])


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys):
    """Saving fails at every step: the run says so and ends with its model."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    cfg = pretrain.Config(model="toy", steps=3, batch=4, workers=0, save_every=1, out=str(tmp_path))
    cfg.muon_lr = 0.0
    pretrain.main(cfg)
    assert capsys.readouterr().out.count("No space left on device") == 2
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(shared, tmp_path, monkeypatch):
    """All of its files; what a kill left half of an earlier one is no hindrance."""
    folder = tmp_path / "checkpoints"
    (folder / "part" / "weights.safetensors").mkdir(parents=True)
    done, fsync, replace = [], os.fsync, os.replace

    def flush(fd):
        done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def rename(old, new):
        done.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    sgd = torch.optim.SGD(shared.parameters(), 0.1)
    checkpoint.save_checkpoint(shared, [sgd], pretrain.Config(out=str(tmp_path)), 3)
    names = sorted(path.name for path in (folder / "step-00000003").iterdir())
    assert names == ["optimizer.pt", "state.json", "weights.safetensors"]
    assert sorted(done[-4:-1]) == names and done[-1] == "step-00000003", done


def test_other_data_are_not_resumed_with(tmp_path, monkeypatch):
    """The same name, the same number of lines, another word: not the same run."""
    pairs = tmp_path / "pairs.jsonl"
    line = '{"query": {"text": "q"}, "target": {"text": "t"}}\n'
    pairs.write_text(line + line.replace('"t"', '"u"').replace('"q"', '"p"'))
    cfg = contrastive.Config(model="toy-random", steps=2, batch=4, block=4, workers=0, save_every=1)
    cfg = dataclasses.replace(cfg, muon_lr=0.0, data=str(pairs), out=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "finish", lambda *rest: None)
        contrastive.main(dataclasses.replace(cfg))
    pairs.write_text(pairs.read_text().replace('"q"', '"r"'))
    with pytest.raises(InputError, match="not the same run: data_digest was"):
        contrastive.main(dataclasses.replace(cfg, resume=True))
