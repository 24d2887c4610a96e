"""What only a GPU shows: `GPU=1 python -m pytest -q tests/test_gpu.py`. Else skipped."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import families
import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from checks import close, distance, equal, expect
from PIL import Image
from ranks import MOST

import contrastive
import model
import pretrain
from data import IMAGE, Item
from plumbing import replay
from plumbing.graphs import graph_bytes
from plumbing.kernels import NAME
from plumbing.memory import Budget, to_device

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "bench"))
from gpu import waits  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


def on_gpu(trained="all", dtype=torch.float64, **flags):
    """An embedder as in the tests of the gradient, without autocast."""
    embedder = ranks.build(trained, dtype, **flags).to(GPU)
    embedder.autocast = nullcontext
    return embedder


@pytest.mark.parametrize("trained", ["all", "frozen", "lora"])
@pytest.mark.parametrize(
    "budget", [Budget(60), Budget(250, 2, "device"), Budget(250, 0, "host"), Budget(MOST, MOST)]
)
def test_gradcache_has_the_gradient_of_the_whole_batch(trained, budget):
    """float64; and the CPU's, whose cosines of positions differ in the last digit of float32."""
    embedder = on_gpu(trained)
    want, there = ranks.whole_batch(embedder), ranks.whole_batch(ranks.build(trained))
    got = ranks.step(embedder, ranks.batch_of(embedder), budget)
    close(got.loss, want.loss, "loss", 1e-10)
    close(got.grad, want.grad, "gradient", 1e-8)
    close(got.loss, there.loss, "the CPU's loss", 1e-6)
    close(got.grad.cpu(), there.grad, "the CPU's gradient", 1e-5)


def test_stage_1_has_the_gradient_that_it_has_on_the_cpu():
    want, got = ranks.answers(ranks.build("all")), ranks.answers(on_gpu("all"))
    close(got.loss, want.loss, "loss", 1e-6)
    close(got.grad.cpu(), want.grad, "gradient", 1e-5)


def test_under_autocast_the_gradient_is_the_same_but_for_bfloat16():
    """Both stages, as they are trained."""
    for step in (ranks.answers, lambda e: ranks.step(e, ranks.batch_of(e), Budget(250))):
        want = step(ranks.build("all", torch.float32)).grad
        got = step(ranks.build("all", torch.float32).to(GPU)).grad.cpu()
        cosine = F.cosine_similarity(got, want, dim=0).item()
        expect(cosine > 0.99, cosine, "> 0.99", "bfloat16 has three digits")


def test_dropout_falls_alike_in_both_passes(monkeypatch):
    """Against all graphs kept, where there is one pass; without the replay it is another loss'."""
    embedder = on_gpu("lora", torch.float32, lora_dropout=0.3)

    def gradient(budget):
        torch.manual_seed(7)
        return ranks.step(embedder.train(), ranks.batch_of(embedder), budget).grad

    want = gradient(Budget(250, MOST))
    close(gradient(Budget(250)), want, "two passes", 1e-4)
    monkeypatch.setattr(contrastive, "replay", lambda state: nullcontext())
    gap = distance(gradient(Budget(250)), want)
    expect(gap > 0.01, gap, "> 0.01", "negative control: without plumbing.replay")
    equal(len(replay.rng_state()[1]) > 0, True, "the GPU's generator is in the state")


def test_out_of_memory_halves_the_chunks_and_leaves_the_exact_gradient():
    """A real one: all rows at once, of more memory than this process may take."""
    embedder = on_gpu("all", torch.float32)
    batch = ranks.batch_of(embedder)
    rows = batch.rows * 200
    labels = torch.arange(len(rows) // 2)[:, None]
    large = contrastive.Batch(rows, labels, torch.arange(len(rows) // 2))
    want = ranks.step(embedder, large, Budget(4000))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_allocated() + 1.0 * 2**30
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        got = ranks.step(embedder, large, Budget(MOST))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    expect(got.chunk_tokens < MOST // 8, got.chunk_tokens, "halved", "until it fits")
    close(got.grad, want.grad, "gradient", 1e-4)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_embeds_as_on_the_cpu(family, tmp_path):
    """Text, pictures of several sizes, both; masked hidden states, too."""
    folder = families.build(family, tmp_path / family)
    rng = np.random.default_rng(0)
    items = ["a red circle", "the blue square on the left " * 5]
    for size in ((64, 64), (100, 60), (60, 100), (64, 64)):
        picture = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        items += [picture, Item(IMAGE + " what is this?", (picture,))]
    here, there = (model.load(folder, 4, "mean", "chat", name) for name in ("cpu", "cuda"))
    cosines = (here.encode(items) * there.encode(items)).sum(1)
    expect(cosines.min() > 0.999, cosines, "> 0.999", family)
    if family.startswith("qwen"):
        used = there.mllm.get_encoder(modality="image").blocks[0].attn.config._attn_implementation
        equal(used, NAME, "windows go together")
    talk = here.collate([Item(IMAGE, items[-1].images)], [[("What?", "a circle")]])
    want, got = (pretrain.answer_logits(e, talk)[0].float().cpu() for e in (here, there))
    cosine = F.cosine_similarity(got, want, dim=1).min().item()
    expect(cosine > 0.99, cosine, "> 0.99", "logits of the answers, behind the mask")


def test_a_graph_takes_what_is_counted():
    """graph_bytes against what PyTorch has given out once the forward pass is over."""
    embedder = on_gpu("all", torch.float32)
    inputs = to_device(embedder.collate.pad_rows(ranks.batch_of(embedder).rows), GPU)
    embedder(inputs)  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    with graph_bytes() as sizes:
        z = embedder(inputs)
    want, got = torch.cuda.memory_allocated() - before, sum(sizes.values())
    expect(0.9 * want < got < 1.1 * want, got, want, f"bytes of the graph of {len(z)} rows")


def test_the_host_does_not_wait_for_the_gpu_in_a_chunk():
    """Of all files here only those of a step's ends may wait: never once a chunk. (transformers
    waits where a chunk has pictures.)"""
    embedder = on_gpu("all", torch.float32)
    batch = ranks.batch_of(embedder)
    words = [row for row in batch.rows if not row.images]

    def step(n):
        rows = words[:1] * 2 * n
        keys = torch.arange(n)
        contrastive.gradcache_step(
            embedder, contrastive.Batch(rows, keys[:, None], keys), 0.05, Budget(1)
        )

    step(2)
    few, many = (sum(waits(lambda n=n: step(n)).values()) for n in (2, 8))
    equal(many, few, "waits of a step of 4 chunks and of one of 16")
    expect(few > 0, few, "> 0", "negative control: a step's loss is waited for")


def test_a_tensor_goes_from_pinned_memory_and_arrives_whole():
    x = {"a": torch.randn(1000, 1000), "b": None, "c": [torch.arange(5)]}
    torch.cuda._sleep(10**8)  # the copy waits behind it
    got = to_device(x, GPU)
    want = x["a"].clone()
    del x["a"]
    for _ in range(20):
        torch.randn(1000, 1000).pin_memory()  # must not take the place of what is still copied
    equal(got["a"].cpu(), want, "a large one")
    equal(got["c"][0].tolist(), list(range(5)), "in a list")


def command(*words):
    """A command of ours that must end well; what it said."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    equal(done.returncode, 0, done.stdout[-2000:] + done.stderr[-2000:])
    return done.stdout + done.stderr


SHORT = "--steps 6 --batch 16 --block 8 --workers 1 --save-every 2".split()


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "4"]])
def test_stage_2_trains_and_goes_on_where_it_was_stopped(flags, tmp_path):
    words = ["contrastive.py", "--model", "toy-random", *SHORT, *flags]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said = command(*words, "--out", str(whole))
    expect("on cuda" in said, said[-500:], "1 rank(s) on cuda", "where it runs")
    process = subprocess.Popen(
        [sys.executable, *words, "--out", str(parts)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.lstrip().startswith("step") and " 3/6" in line:
            process.terminate()
    equal(process.wait(), 143, "SIGTERM after step 3")
    command(*words, "--out", str(parts), "--resume")
    losses = []
    for folder in (whole, parts):
        lines = (folder / "log.jsonl").read_text().splitlines()
        losses.append([x["loss"] for x in map(json.loads, lines) if "loss" in x])
    close(losses[1], losses[0], "the losses, stopped and not", 1e-3)


def test_stage_1_and_evaluation_run(tmp_path):
    words = "--steps 3 --batch 16 --workers 1 --lora-rank 4".split()
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    command("pretrain.py", "--model", "toy", *words, "--out", first)
    words = ["--steps", "2", "--batch", "16", "--block", "8"]
    command("contrastive.py", "--model", first, *words, "--out", second)
    said = command("evaluate.py", "--model", second, "--subsets", "vqa:40")
    expect("Overall" in said, said[-800:], "a table", "evaluate.py")
