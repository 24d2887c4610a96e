"""Batches made ahead: the same for any number of workers, few at a time, and nothing is left of
them. (What ends a worker, or its rank: test_ending.py.)"""

import os
import time
from pathlib import Path

import families
import pytest
import torch
from checks import equal, expect
from PIL import Image

import model
from plumbing import loader
from plumbing.errors import InputError


def batch(i):
    """Three rows of floats, two numbers, and what is no tensor."""
    rows = loader.each(lambda x: {"x": torch.full((2, 3), float(x)), "n": x}, range(i, i + 3))
    return {"rows": rows, "label": torch.tensor([i, 1]), "nothing": torch.empty(0, 4), "id": f"{i}"}


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_batches_are_the_same_for_any_number_of_workers(workers):
    """In order, whole, each once; a tensor keeps its shape and type; and writable."""
    got = list(loader.prefetch(batch, range(4), workers))
    for i, made in enumerate(got):
        want = batch(i)
        equal(made["id"], want["id"], "order")
        for key in ("label", "nothing"):
            equal(made[key].tolist(), want[key].tolist(), key)
            equal((made[key].shape, made[key].dtype), (want[key].shape, want[key].dtype), key)
        for a, b in zip(made["rows"], want["rows"], strict=True):
            equal((a["n"], a["x"]), (b["n"], a["x"]), "rows")
            equal(a["x"], b["x"], "rows")
            a["x"] += 1


@pytest.mark.parametrize("workers", [1, 3])
def test_two_batches_are_ahead_whatever_the_number_of_workers(workers, tmp_path):
    """Two a worker were: 28 batches of a gigabyte."""

    def make(i):
        (tmp_path / f"{i}").touch()
        return i

    batches = loader.prefetch(make, range(20), workers)
    for i in range(4):
        equal(next(batches), i, "order")
        time.sleep(0.2)
        expect(len(list(tmp_path.iterdir())) <= i + 1 + loader.AHEAD, i, "AHEAD", "loader.AHEAD")
    batches.close()


def holdings() -> tuple:
    """How many descriptors this process has, and its children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(os.listdir("/proc/self/fd")), set(children)


def test_a_batch_has_no_name_and_leaves_nothing():
    """Nothing in /dev/shm, which may be small; no descriptor and no process when it is over."""
    names, there = set(os.listdir("/dev/shm")), holdings()
    batches = loader.prefetch(lambda i: torch.zeros(10**6), range(30), 2)
    held = next(batches)
    equal(set(os.listdir("/dev/shm")), names, "memfd_create")
    expect(holdings() != there, there, "pipes and workers", "negative control")
    for x in batches:
        assert not x.any()
    del held, x
    equal(holdings(), there, "Team.close")


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_first_error_counts(workers):
    """Of several bad rows of a batch the first is named, whichever worker met its own earlier."""

    def make(i):
        return loader.each(bad, range(8))

    def bad(x):
        if x >= 3:
            time.sleep(0.1 if x == 3 else 0)
            raise InputError(f"row {x}")

    with pytest.raises(InputError, match="row 3"):
        list(loader.prefetch(make, range(2), workers))
    tried = loader.prefetch(lambda i: loader.try_each(bad, range(5), True), range(1), workers)
    equal([str(x) for x in next(tried)], ["None"] * 3 + ["row 3", "row 4"], "try_each")


def test_an_error_of_another_kind_in_a_worker_shows_where_it_was():
    """A mistake of ours, or a student's."""
    with pytest.raises(RuntimeError, match="(?s)in a loader process:.*ZeroDivisionError"):
        list(loader.prefetch(lambda i: 1 // 0, range(2), 1))


def test_pictures_travel_in_bfloat16_to_a_gpu_only():
    """Where the model would round them so, before all else; numbers of tokens stay as they are."""
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32), (None, torch.float32)):
        for workers in (0, 2):
            where = device and torch.device(device)
            made = next(loader.prefetch(batch, range(1), workers, where))
            equal((made["rows"][0]["x"].dtype, made["label"].dtype), (dtype, torch.int64), device)


def test_windows_of_encode_are_cut_by_bytes(monkeypatch):
    """256 texts a window; of pictures what fits into WINDOW_BYTES, by the largest one so far."""
    monkeypatch.setattr(loader, "WINDOW_BYTES", 1000)
    monkeypatch.setattr(loader, "FIRST_GUESS", 100)

    class Row:
        images = {"pixel_values": torch.zeros(50, dtype=torch.uint8)}

    windows = loader.Windows([0] * 300 + [1] * 40 + [30])
    sizes = []
    for window in windows:
        sizes.append(len(window))
        if any(windows.pictures[i] for i in window):
            windows.saw(window, [Row()] * len(window))
    equal(sizes, [256, 54, 20, 10, 1], "texts, then 10 pictures by the guess, then 20, one of 30")


@torch.no_grad()
@pytest.mark.parametrize("family", families.BUILDERS)
def test_bfloat16_pictures_give_the_same_bits_under_autocast(family, tmp_path, monkeypatch):
    """As on a GPU: what the model does first with the pixels is to round them. Both towers: one
    that is trained (float32), and a frozen one (bfloat16)."""
    embedder = model.load(families.build(family, tmp_path), 4, device="cpu").eval()
    picture = Image.frombytes("RGB", (60, 60), os.urandom(60 * 60 * 3))
    inputs = embedder.collate([model.Item.of(picture)])
    small = {key: loader.halved(x) for key, x in inputs.items()}
    expect(small["pixel_values"].dtype == torch.bfloat16, small, "bfloat16", "loader.halved")
    exact = embedder(small)
    assert not torch.equal(embedder(inputs), exact), "negative control: in float32 they differ"
    autocast = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(model.Embedder, "autocast", lambda embedder: autocast)
    for tower in (torch.float32, torch.bfloat16):
        embedder.mllm.model.to(tower)
        a, b = (embedder(x).float() for x in (inputs, small))
        equal(a, b, f"{family}: the pixels are used in float32 somewhere")
