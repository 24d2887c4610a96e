"""The scripts as users run them: the README's commands shortened, two ranks, killed, resumed."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import contrastive
import data
import evaluate
import model
import pretrain
import shapes

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT.parent / "shared" / "data" / "mmeb"
SMALL = ["--batch", "16", "--workers", "1"]


def command(*words, ranks=0, **more):
    """Runs a script (under torchrun where ranks > 0). -> its output; fails with it."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words = [sys.executable, *(launch if ranks else []), *map(str, words)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, **more)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def here(stage, *words):
    """Runs a script's main in this process, with the flags parsed as from the command line."""
    stage.main(stage.Config.parse([str(w) for w in words]))


def losses(out):
    """What log.jsonl says of each step."""
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()[1:]]


def test_the_three_commands_of_the_quick_start_run_through(tmp_path):
    """pretrain, contrastive on two ranks from its result, evaluate; the JSON has its fields."""
    p, c, scores = tmp_path / "p", tmp_path / "c", tmp_path / "scores.json"
    command("pretrain.py", "--steps", 2, "--batch", 8, "--out", p)
    said = command(
        "contrastive.py", "--model", p, "--steps", 2, *SMALL, "--block", 8, "--out", c, ranks=2
    )
    assert "loss sees N = 2 x 8 = 16 pairs (chance loss ln N = 2.77)" in said, said
    table = command("evaluate.py", "--model", c, "--limit", 2, "--json", scores, ranks=2)
    assert "Overall (partial: --limit 2)" in table, table
    found = json.loads(scores.read_text())
    assert (
        set(found) >= {"sets", "meta_tasks", "ind", "ood", "overall", "model"} and found["partial"]
    )
    row = found["sets"]["classify"]
    assert set(row) >= {"p_at_1", "chance", "queries", "meta_task", "ood"}, row
    assert set(found["meta_tasks"]) == {"Classification", "VQA", "Retrieval", "Grounding"}
    again = tmp_path / "again.json"
    here(evaluate, "--model", c, "--limit", 2, "--json", again)
    got, want = (json.loads(f.read_text())["sets"] for f in (again, scores))
    assert got == want, "one process and two must give the same numbers"


def test_two_ranks_train_like_one(tmp_path):
    """The batch is the same for any number of ranks, and so are the losses, in both stages."""
    small = dict(steps=2, batch=8, workers=0, muon_lr=0.0, model="toy-random")
    pretrain.main(pretrain.Config(**small, out=str(tmp_path / "p1")))
    contrastive.main(contrastive.Config(**small, block=4, out=str(tmp_path / "c1")))
    flags = ["--steps", 2, "--batch", 8, "--muon-lr", 0, "--model", "toy-random"]
    command("pretrain.py", *flags, "--out", tmp_path / "p2", ranks=2)
    command("contrastive.py", *flags, "--block", 4, "--out", tmp_path / "c2", ranks=2)
    for stage in "pc":
        one, two = (losses(tmp_path / f"{stage}{n}") for n in (1, 2))
        for a, b in zip(one, two, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-4), (stage, a, b)
            assert a["norm"] == pytest.approx(b["norm"], rel=2e-3), (stage, a, b)


def test_a_sharded_run_saves_what_an_unsharded_one_does(tmp_path):
    """FSDP2 on two ranks, full fine-tuning: the same losses, and a folder that loads unsharded."""
    flags = ["--model", "toy-random", "--steps", 2, "--batch", 8, "--block", 4, "--muon-lr", 0]
    flags += ["--chunk-tokens", 300]
    command("contrastive.py", *flags, "--out", tmp_path / "a", "--fsdp", ranks=2)
    here(contrastive, *flags, "--out", tmp_path / "b")
    for a, b in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4), (a, b)
        assert a["norm"] == pytest.approx(b["norm"], rel=2e-3), (a, b)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all(a[k].shape == b[k].shape for k in a)
    z = [model.load(tmp_path / n, device="cpu").encode(["a red circle", "two"]) for n in "ab"]
    assert abs(z[0] - z[1]).max() < 1e-2, "Adam's first steps turn 1e-7 into 1e-3, no more"


def test_a_chunk_that_runs_out_of_memory_halves_the_budget_and_keeps_the_gradient(capsys):
    """In pass 1 and in pass 2 (backward included): the step begins again with smaller chunks."""
    embedder = model.load("toy-random", compress_tokens=4, device="cpu").double()
    batch = contrastive.local_batch(
        data.read_pairs(), embedder.collate, contrastive.Config(batch=16, block=4), 0, 0, 1
    )
    given = (batch["rows"], batch["labels"], batch["keys"], 0.05)
    want = contrastive.gradcache_step(embedder, *given, 10**6)
    right = [p.grad.clone() for p in embedder.parameters()]
    forward, passes = embedder.forward, []

    def small_machine(inputs):
        if inputs["input_ids"].numel() > 500 and torch.is_grad_enabled() == passes[0]:
            raise torch.OutOfMemoryError("planted")
        return forward(inputs)

    embedder.forward = small_machine
    for second in (False, True):
        passes[:] = [second]
        embedder.zero_grad()
        got = contrastive.gradcache_step(embedder, *given, 1600, keep=0)
        assert 250 <= got["chunk_tokens"] <= 500 and got["loss"] == pytest.approx(want["loss"])
        for p, g in zip(embedder.parameters(), right, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
        assert "out of memory: --chunk-tokens 1600 is halved" in capsys.readouterr().out
    passes[:] = [True]
    with pytest.raises(data.InputError, match="out of memory at --chunk-tokens"):
        embedder.forward = lambda inputs: (_ for _ in ()).throw(torch.OutOfMemoryError("planted"))
        contrastive.gradcache_step(embedder, *given, 1600)


class Crash(Exception):
    pass


@pytest.mark.parametrize("stage", [pretrain, contrastive])
@pytest.mark.parametrize("lora", [0, 4])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, stage, lora):
    """With dropout, accumulation over chunks, loader workers: the weights and the log are equal."""
    more = dict(lora_rank=lora, lora_dropout=0.1, muon_lr=0.0 if lora else 0.02)
    if stage is contrastive:
        more |= dict(block=4)
    cfg = stage.Config(
        model="toy", steps=5, batch=8, workers=2, chunk_tokens=300, save_every=2, keep=1, **more
    )
    whole, broken = (dataclasses.replace(cfg, out=str(tmp_path / n)) for n in ("whole", "broken"))
    stage.main(dataclasses.replace(whole))
    real = model.end_step

    def crash(embedder, optimizers, cfg, step, *rest):
        if step == 3:
            raise Crash
        return real(embedder, optimizers, cfg, step, *rest)

    monkeypatch.setattr(model, "end_step", crash)
    with pytest.raises(Crash):
        stage.main(dataclasses.replace(broken))
    monkeypatch.setattr(model, "end_step", real)
    with pytest.raises(data.InputError, match="--resume goes on with it"):
        stage.main(dataclasses.replace(broken))
    with pytest.raises(data.InputError, match="lr was 0.003, is 0.1"):
        stage.main(dataclasses.replace(broken, resume=True, lr=0.1))
    stage.main(dataclasses.replace(broken, resume=True))
    assert losses(whole.out) == losses(broken.out)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    a, b = (load_file(Path(c.out, name)) for c in (whole, broken))
    worst = max((a[k].float() - b[k].float()).abs().max() for k in a)
    assert a.keys() == b.keys() and worst == 0, f"largest difference {worst}, want exactly 0"


def test_killed_at_random_it_resumes_to_the_same_bytes(tmp_path):
    """`kill -9` at random moments, while saving too (it does so every step). KILLS=30 by hand."""
    kills, rng = int(os.environ.get("KILLS", 2)), random.Random(0)
    flags = ["--model", "toy", "--steps", 8, *SMALL, "--block", 8, "--save-every", 1]
    words = [sys.executable, "contrastive.py", *map(str, flags)]
    command("contrastive.py", *flags, "--out", tmp_path / "whole")
    done = while_saving = 0
    log = tmp_path / "killed" / "log.jsonl"
    while done < kills:
        before = log.stat().st_mtime_ns if log.exists() else 0
        run = subprocess.Popen(
            [*words, "--out", tmp_path / "killed", "--resume"],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        started = time.time()
        while run.poll() is None and (log.stat().st_mtime_ns if log.exists() else 0) == before:
            time.sleep(0.01)  # until it trains
        time.sleep(rng.uniform(0, 1))  # of the second or two that the steps take
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            done += 1
        run.wait()
        while_saving += (tmp_path / "killed" / "checkpoints" / "part").exists()
        if (tmp_path / "killed" / "model.safetensors").exists() and done < kills:
            same(tmp_path / "whole", tmp_path / "killed")  # it got through: begin again
            shutil.rmtree(tmp_path / "killed")
        assert time.time() - started < 120
    command("contrastive.py", *flags, "--out", tmp_path / "killed", "--resume")
    same(tmp_path / "whole", tmp_path / "killed")
    print(f"{done} kills, {while_saving} of them while saving: 0 differing bytes")


def test_one_rank_killed_ends_the_others_and_the_run_can_be_resumed(tmp_path):
    """`kill -9` of one rank of two: within a minute (here: seconds) the other says what happened,
    nobody is left behind, and the resumed run ends in the same bytes."""
    flags = ["contrastive.py", "--model", "toy", "--steps", 8, *SMALL, "--block", 8]
    flags = [*map(str, flags), "--save-every", "1", "--resume"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*launch, "--nproc-per-node", "2", *flags, "--out", str(tmp_path / "killed")]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    saved = tmp_path / "killed" / "checkpoints" / "step-00000002"
    while run.poll() is None and not saved.exists():
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    said = run.communicate(timeout=60)[0].decode()
    assert run.returncode and re.search("rank . lost the others .*--resume goes on", said), said
    time.sleep(1.5)
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
    assert not left, f"processes of the dead run: {left}"
    command(*flags, "--out", tmp_path / "killed", ranks=2)
    command(*flags, "--out", tmp_path / "whole", ranks=2)
    same(tmp_path / "whole", tmp_path / "killed")


def same(a, b):
    """The same weights, byte for byte, and the same log."""
    got, want = (Path(p, "model.safetensors").read_bytes() for p in (b, a))
    assert got == want, "the weights differ from the uninterrupted run's"
    assert losses(a) == losses(b)


def test_a_signal_saves_a_checkpoint_and_ends_the_run(tmp_path):
    """SIGTERM to all its processes, loader workers too, as on a preempted cluster: at most one step
    later the run has saved and ended."""
    words = [sys.executable, "contrastive.py", "--model", "toy", "--steps", "500", *SMALL]
    how = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    run = subprocess.Popen([*words, "--block", "8", "--out", tmp_path], **how)
    log = tmp_path / "log.jsonl"
    while run.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 143 and "--resume goes on from there" in said, (run.returncode, said)
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert len(saved) == 1 and len(losses(tmp_path)) == int(saved[0].name[5:])


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys):
    """Saving fails at every step: the run says so and ends with its model."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_file", full)
    cfg = dict(model="toy", steps=3, batch=4, workers=0, save_every=1, out=str(tmp_path))
    pretrain.main(pretrain.Config(**cfg))
    assert capsys.readouterr().out.count("No space left on device") == 2
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("stage", [pretrain, contrastive])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_examples(tmp_path, stage):
    """At an absurd learning rate: the step, the rate and the examples are in the message."""
    cfg = dict(model="toy", steps=30, batch=4, workers=0, muon_lr=0.0, clip=0.0, warmup=0.0)
    cfg |= dict(lr=1e30, out=str(tmp_path)) | (dict(block=4) if stage is contrastive else {})
    with pytest.raises(data.InputError, match=r"step \d+, lr 1.0.e\+30.*(shapes-train-|\[\d+\])"):
        stage.main(stage.Config(**cfg))


def test_an_error_in_a_worker_is_one_clear_line(tmp_path):
    """A broken picture is met during training, on two ranks: exit status 1, the file, no trace."""
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dog"}]
    line = json.dumps(dict(id="x", image="bad.png", conversations=talk)) + "\n"
    (tmp_path / "talks.jsonl").write_text(line * 8)
    words = ["pretrain.py", "--data", tmp_path / "talks.jsonl", "--batch", "4", "--out", tmp_path]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "pretrain.py: " in done.stderr and "bad.png (13 bytes): not a readable" in done.stderr
    assert "Original Traceback" not in done.stderr, done.stderr


def test_flags_that_cannot_be_are_refused(tmp_path):
    """Unknown, abbreviated and impossible flags end before any work, with the way out."""
    for words in (["--nonsense", "1"], ["--step", "3"], ["--pooling", "max"]):
        with pytest.raises(SystemExit):
            contrastive.Config.parse(words)
    for stage in (pretrain, contrastive, evaluate):  # each flag, as a user spells it, arrives
        for f in filter(lambda f: f.init, dataclasses.fields(stage.Config)):
            kind = getattr(f.type, "__args__", [f.type])[0]
            value = (f.metadata["choices"] or [3 if kind in (int, float) else "x"])[-1]
            name = f.name.replace("_", "-")
            cases = [(f"--{name}", [str(value)], value)]
            if kind is bool:
                cases = [(f"--{name}", [], True), (f"--no-{name}", [], False)]
            for word, rest, want in cases:
                assert getattr(stage.Config.parse([word, *rest]), f.name) == want, word
    assert contrastive.Config.parse([]) == contrastive.Config()
    for more, says in (
        (dict(batch=30, block=8), "--batch 30 is not a multiple of --block 8; try 32"),
        (dict(temperature=0.0), "must be positive"),
        (dict(model=str(tmp_path / "nothing")), "no such folder"),
        (dict(data=str(tmp_path / "x.jsonl")), "no such file"),
    ):
        with pytest.raises(data.InputError, match=says):
            contrastive.main(contrastive.Config(**dict(model="toy", out=str(tmp_path)) | more))


def test_every_flag_is_read_by_some_line_of_code():
    """A flag that does nothing is a defect."""
    source = "".join((ROOT / f"{n}.py").read_text() for n in ("model", "pretrain", "contrastive"))
    source += (ROOT / "evaluate.py").read_text() + (ROOT / "search.py").read_text()
    for config in (pretrain.Config, contrastive.Config, evaluate.Config):
        for f in dataclasses.fields(config):
            assert f"cfg.{f.name}" in source or f'"{f.name}"' in source, f"--{f.name} does nothing"


def test_the_toy_mllm_answers_nine_of_ten_held_out_questions_word_for_word():
    """A sample of scenes that training never showed, one question each, greedy decoding."""
    embedder = model.load("toy", compress_tokens=0, pooling="last", device="cpu").eval()
    world, asked = data.Shapes("test", seed=1), []
    for i in range(240):
        d = world.dialogue(i)
        asked.append((d.item, d.turns[:1]))
    right = 0
    with torch.no_grad():
        for i in range(0, 240, 60):
            inputs = embedder.collate(*map(list, zip(*asked[i : i + 60], strict=True)))
            logits, labels = pretrain.answer_logits(embedder, inputs, compress=False)
            right += pretrain.exact_answers(logits, labels, inputs)[0]
    assert right >= 0.9 * 240, f"{right} of 240 right, want 216"


def test_the_toy_world_as_files_reads_back_to_the_same_examples(tmp_path):
    """Dialogue JSONL, MMEB's two parquet layouts and PNG: the same texts, the same pixels."""
    shapes.export(str(tmp_path), n=3)

    def same_item(a, b):
        assert a.text == b.text and len(a.images) == len(b.images), (a, b)
        for x, y in zip(a.images, b.images, strict=True):
            assert data.open_image(x).tobytes() == data.open_image(y).tobytes()

    made, read = data.read_dialogues(), data.read_dialogues(str(tmp_path / "dialogues.jsonl"))
    assert len(read) == 3
    for i in range(3):
        same_item(made[i].item, read[i].item)
        assert made[i].turns == read[i].turns and made[i].id == read[i].id
    made, read = data.read_pairs(), data.read_pairs(str(tmp_path / "MMEB-train"))
    assert sorted(made) == sorted(read)
    for name in made:
        for i in range(3):
            same_item(made[name][i].query, read[name][i].query)
            same_item(made[name][i].targets[0], read[name][i].targets[0])
    made, read = data.read_tasks(limit=3), data.read_tasks(str(tmp_path / "MMEB-eval"))
    read = {t.name: t for t in read}
    for task in made:
        for (q, cs), (q2, cs2) in zip(task.queries, read[task.name].queries, strict=True):
            same_item(q, q2)
            for c, c2 in zip(cs, cs2, strict=True):
                same_item(c, c2)


@pytest.mark.skipif(not PHOTOS.exists(), reason="the photographs are not beside this clone")
def test_real_photographs_in_mmebs_own_layout_go_through_all_three_stages(tmp_path):
    """LLaVA-style dialogues, MMEB-train with hard negatives, MMEB-eval with its candidates."""
    talks, images = PHOTOS / "conversations.jsonl", PHOTOS / "MMEB-train" / "images"
    p, c, scores = tmp_path / "p", tmp_path / "c", tmp_path / "s.json"
    small = ["--steps", 2, *SMALL]
    here(pretrain, "--data", talks, "--image-root", images, *small, "--out", p)
    train = ["--data", PHOTOS / "MMEB-train", "--model", p, "--block", 8, "--out", c]
    command("contrastive.py", *train, *small, ranks=2)
    command(
        "evaluate.py", "--data", PHOTOS / "MMEB-eval", "--model", c, "--limit", 3, "--json", scores
    )
    found = json.loads(scores.read_text())["sets"]
    assert found["CIFAR10"]["chance"] == pytest.approx(0.1)
    assert found["ImageNet-1K"]["meta_task"] == "Classification" and not found["ImageNet-1K"]["ood"]
    pairs = data.read_pairs(str(PHOTOS / "MMEB-train"))["CIFAR10"]
    assert pairs[0].negatives and pairs[0].query.text.startswith("<image>\nRepresent")
