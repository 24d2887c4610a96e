"""The stages on two ranks: what only several processes show. One run is started by torchrun itself,
and a rank of it killed. (The gradient of each step over ranks: test_gradcache.py; six steps on two
ranks, as ever: test_golden.py; other ends: test_ending.py.)"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stages_on_ranks as stages
from forked import as_script, on_ranks, said_on
from PIL import Image
from safetensors.torch import load_file

import model
import pretrain
from plumbing.sampling import epoch_batch

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(*words):
    """A script on two ranks, in the background."""
    return subprocess.Popen(
        [*TORCHRUN, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_a_rank(folder):
    """Starts the longer run, and ends its second rank by `kill -9` when it has saved twice."""
    out = folder / "killed"
    run = start("contrastive.py", *stages.LONGER, "--out", out)
    while run.poll() is None and not (out / "checkpoints" / "step-00000002").exists():
        time.sleep(0.02)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    said = run.communicate(timeout=60)[0]
    for _ in range(20):  # a worker looks every second whether its rank is there
        left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout
        if not left:
            break
        time.sleep(0.1)
    saved = sorted(path.name for path in (out / "checkpoints").iterdir())
    outcome = {"status": run.returncode, "said": said, "left": left, "saved": saved}
    (folder / "killed.json").write_text(json.dumps(outcome))


@pytest.fixture(scope="module")
def two_ranks(once):
    """A folder with the results of `stages_on_ranks.py`, after a rank of its "killed" was killed;
    started once for all tests."""

    def fill(folder):
        kill_a_rank(folder)
        assert on_ranks(2, lambda: stages.main(folder), folder) == [0, 0], said_on(folder)

    return once("two_ranks", fill)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """A folder with the same runs of both stages, on one rank, in this process."""
    folder = tmp_path_factory.mktemp("one_rank")
    for name, stage, flags in stages.RUNS[:2]:
        stages.run(stage, flags, folder / name)
    return folder


def losses(out):
    """What log.jsonl says of each step."""
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()[1:]]


def check_alike(one, two):
    """The same loss and norm at each step, but for rounding."""
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4), (a, b)
        assert a["norm"] == pytest.approx(b["norm"], rel=2e-3), (a, b)


def test_two_ranks_train_like_one(one_rank, two_ranks, tmp_path):
    """The batch is the same for any number of ranks, and so are the losses, in both stages; and not
    as if each rank saw its own share of the batch alone."""
    for stage in ("pretrain", "contrastive"):
        check_alike(one_rank / stage, two_ranks / stage)
    said = (two_ranks / "said-0.txt").read_text()
    assert "loss sees N = 8 pairs (ln N = 2.08)" in said, said
    _, stage, flags = stages.RUNS[1]
    stages.run(stage, [*flags, "--batch", "4"], tmp_path / "half")  # negative control
    with pytest.raises(AssertionError):
        check_alike(tmp_path / "half", two_ranks / "contrastive")


def test_a_sharded_run_saves_what_an_unsharded_one_does(one_rank, two_ranks):
    """FSDP2 on two ranks, full fine-tuning: the same losses, and a folder that loads unsharded."""
    folders = [one_rank / "contrastive", two_ranks / "sharded"]
    check_alike(*folders)
    said = (two_ranks / "said-0.txt").read_text()
    assert "sharded: sharded 1 times" in said and "contrastive: sharded 0 times" in said, said
    a, b = (load_file(folder / "model.safetensors") for folder in folders)
    assert a.keys() == b.keys() and all(a[k].shape == b[k].shape for k in a)
    z = [model.load(f, device="cpu").encode(["a red circle", "two"]) for f in folders]
    assert abs(z[0] - z[1]).max() < 1e-2, "Adam's first steps turn 1e-7 into 1e-3, no more"


def test_evaluation_gives_the_same_numbers_on_two_ranks(two_ranks, tmp_path):
    """Of the same model, set by set."""
    stages.score(two_ranks / "contrastive", tmp_path / "scores.json")
    files = (tmp_path / "scores.json", two_ranks / "scores.json")
    one, two = (json.loads(f.read_text())["sets"] for f in files)
    assert one == two
    last = (two_ranks / "said-0.txt").read_text().splitlines()[-1]
    assert last.startswith("Overall") and last.endswith("(partial: --limit 2)"), last


def test_one_rank_killed_ends_the_others_and_the_run_can_be_resumed(two_ranks):
    """`kill -9` of one rank of two: within a minute (here: seconds) the other says what happened,
    nobody is left behind, and the resumed run ends in the same bytes."""
    end = json.loads((two_ranks / "killed.json").read_text())
    lost = re.search("contrastive.py: rank . lost the others .*goes on with --resume", end["said"])
    assert end["status"] and lost, end
    assert not end["left"], f"processes of the dead run: {end['left']}"
    assert end["saved"][-1] < "step-00000006", "it was killed before its end"
    assert f"/checkpoints/{end['saved'][-1]}" in (two_ranks / "said-0.txt").read_text(), "resumed"
    whole, killed = two_ranks / "whole", two_ranks / "killed"
    assert losses(whole) == losses(killed)
    a, b = (Path(out, "model.safetensors").read_bytes() for out in (whole, killed))
    assert a == b, "the weights differ from the uninterrupted run's"


def test_an_error_in_a_worker_is_one_clear_line(tmp_path):
    """A broken picture is met in the third step, by one of two ranks: exit status 1 of both, the
    file, no trace; and the two steps before are saved."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    words = ["--data", f"{tmp_path}/talks.jsonl", "--batch", "4", "--out", f"{tmp_path}/o"]
    broken = epoch_batch(16, pretrain.Config.parse(words), step=2, rank=1, world=2)[0]
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dog"}]
    lines = []
    for i in range(16):
        name = "bad.png" if i == broken else "good.png"
        lines.append(json.dumps({"id": "x", "image": name, "conversations": talk}) + "\n")
    (tmp_path / "talks.jsonl").write_text("".join(lines))
    assert on_ranks(2, lambda: as_script(pretrain, words), tmp_path) == [1, 1]
    said = said_on(tmp_path)
    assert re.search(r"^pretrain.py: .*bad.png \(13 bytes\): not a readable", said, re.M), said
    assert "--resume goes on from step-00000002" in said, said
    assert "Traceback" not in said, said
