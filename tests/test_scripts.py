"""The scripts as users run them: the quick start, shortened; photographs; where flags of earlier
versions went; what stops a run. (Flags: test_flags.py; several ranks: test_torchrun.py; every
command that the documents name: test_readme.py.)"""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Fork, as_script

import contrastive
import data
import evaluate
import pretrain
from plumbing.config import MOVED
from plumbing.errors import InputError
from tools import search

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT.parent / "shared" / "data" / "mmeb"


def command(*words):
    """Runs a script in a process of its own, as a user does. -> the finished process."""
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)


def here(stage, *words):
    """Runs a script's main in this process, with the flags parsed as from the command line."""
    stage.main(stage.Config.parse([str(w) for w in words]))


# ------------------------------------------------------------------------------------ the whole way


def test_the_three_commands_of_the_quick_start_run_through(tmp_path, capsys):
    """pretrain, contrastive from its result, evaluate; the JSON has its fields. The first one as a
    process: it ends well, with its last line on the screen."""
    p, c, scores = tmp_path / "p", tmp_path / "c", tmp_path / "scores.json"
    done = command("pretrain.py", "--steps", 2, "--batch", 8, "--muon-lr", 0, "--out", p)
    assert done.returncode == 0 and done.stdout.endswith(f"saved {p}\n"), done
    small = ["--steps", 2, "--batch", 16, "--block", 8, "--workers", 0, "--muon-lr", 0]
    here(contrastive, "--model", p, *small, "--out", c)
    said = capsys.readouterr().out
    assert "loss sees N = 16 pairs (ln N = 2.77)" in said, said
    here(evaluate, "--model", c, "--limit", 2, "--json", scores)
    said = capsys.readouterr().out
    assert f"evaluating {c}" in said and "(partial: --limit 2)" in said, said
    result = json.loads(scores.read_text())
    fields = {"sets", "meta_tasks", "ind", "ood", "overall", "model"}
    assert set(result) >= fields and result["partial"], set(result)
    row = result["sets"]["classify"]
    assert set(row) >= {"p_at_1", "chance", "queries", "meta_task", "ood"}, row
    assert set(result["meta_tasks"]) == {"Classification", "VQA", "Retrieval", "Grounding"}
    ood = {name for name, row in result["sets"].items() if row["ood"]}
    assert ood == {name for name in result["sets"] if name.endswith(("-new", "-words"))}, ood
    assert len(ood) == 10 and len(result["sets"]) == 15


@pytest.mark.skipif(not PHOTOS.exists(), reason="the photographs are not beside this clone")
def test_real_photographs_in_mmebs_own_layout_go_through_all_three_stages(tmp_path):
    """LLaVA-style dialogues, MMEB-train with hard negatives, MMEB-eval with its candidates."""
    p, c, scores = tmp_path / "p", tmp_path / "c", tmp_path / "s.json"
    small = ["--steps", 2, "--batch", 16, "--workers", 0, "--muon-lr", 0]
    talks = ["--data", PHOTOS / "conversations.jsonl"]
    here(pretrain, *talks, "--image-root", PHOTOS / "MMEB-train/images", *small, "--out", p)
    pairs = ["--data", PHOTOS / "MMEB-train", "--block", 8]
    here(contrastive, *pairs, "--model", p, *small, "--out", c)
    tasks = ["--data", PHOTOS / "MMEB-eval", "--limit", 3]
    here(evaluate, *tasks, "--model", c, "--json", scores)
    sets = json.loads(scores.read_text())["sets"]
    assert sets["CIFAR10"]["chance"] == pytest.approx(0.1)
    assert sets["ImageNet-1K"]["meta_task"] == "Classification" and not sets["ImageNet-1K"]["ood"]
    pairs = data.read_pairs(str(PHOTOS / "MMEB-train"))["CIFAR10"]
    assert pairs[0].negatives and pairs[0].query.text.startswith("<image>\nRepresent")


@pytest.mark.parametrize("stage", [pretrain, contrastive])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_examples(tmp_path, stage):
    """At an absurd learning rate: the step, the rate and the examples are in the message."""
    cfg = stage.Config(model="toy", steps=30, batch=4, workers=0, lr=1e9, out=str(tmp_path))
    cfg = dataclasses.replace(cfg, muon_lr=0.0, clip=0.0, warmup=0.0)
    if stage is contrastive:
        cfg.block = 4
    with pytest.raises(InputError, match=r"step \d+, lr 1.0.e\+09.*(shapes-train-|\[\d+\])"):
        stage.main(cfg)


# --------------------------------------------------- where the commands of earlier versions went


@pytest.mark.parametrize("stage", [pretrain, contrastive, evaluate])
def test_a_flag_that_has_moved_says_where_it_went(stage):
    """`--explain`, `--search`, ...: the command that does it now, which is there."""
    for flag, now in MOVED.items():
        for words in ([flag, "x"], ["--model", "toy", f"{flag}=x"]):
            with pytest.raises(InputError, match=f"^{flag} has moved: {now} --help$"):
                stage.Config.parse(words)
        assert (ROOT / f"{now.split()[-1].replace('.', '/')}.py").exists(), now
    assert search.Config.parse(["--images", "x"]).images == "x", "where it lives now"


def test_a_command_that_has_moved_ends_with_one_line(tmp_path, monkeypatch):
    """Exit status 1, and nothing but that line: `python pretrain.py --explain`, in a process of its
    own; data.py and model.py, which had commands, with any words or none."""
    said = tmp_path / "stdout", tmp_path / "stderr"
    status = Fork(lambda: as_script(pretrain, ["--explain"]), *said).wait()
    out, err = (path.read_text() for path in said)
    assert status == 1 and not out, (status, out)
    (line,) = err.strip().splitlines()
    assert line == "pretrain.py: --explain has moved: python -m tools.explain --help", line
    for words, says in (
        (["data.py", "check", "talks.jsonl"], "data.py has no commands: python -m tools.look | "),
        (["data.py"], "data.py has no commands: python -m tools.look | "),
        (["model.py", "merge", "IN", "OUT"], "model.py has no commands: python -m tools.merge "),
    ):
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        line = end.value.code  # Python prints a text, and exits with status 1
        assert line.startswith(says) and "\n" not in line, line
