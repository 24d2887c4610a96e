"""Fixtures that the tests share. Everything runs without a network, on one thread of a CPU, but for
GPU=1 python -m pytest tests/test_gpu.py."""

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.environ.get("GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from checks import shorten, toy

from plumbing.ending import forget_signals

torch.set_num_threads(1)


def pytest_configure(config):
    for noise in ("The PEFT config's `base_model_name_or_path`", ".*gradient_checkpointing"):
        config.addinivalue_line("filterwarnings", f"ignore:{noise}")


@pytest.fixture(autouse=True)
def signals_of_ones_own():
    """A run that ended in an error between two steps has left its handlers."""
    yield
    forget_signals()


@pytest.fixture
def embedder():
    """A toy-random embedder of one's own."""
    return toy()


@pytest.fixture(scope="session")
def shared():
    """One short toy-random embedder for all tests that only read it."""
    return shorten(toy())


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A folder with a saved embedder."""
    import model  # here: a student's file is graded without it, and each import takes seconds

    folder = tmp_path_factory.mktemp("good") / "m"
    model.save(toy(), folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it, of one's own."""
    return shutil.copytree(good, tmp_path / "m")


@pytest.fixture
def started(monkeypatch):
    """The programs that were started; none is."""
    programs = []
    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *args, **_: programs.append(args))
    return programs


@pytest.fixture
def no_waiting():
    """What would wait for ever, or never end, fails after twenty seconds."""
    old = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it does not end"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope="session")
def once(request, tmp_path_factory):
    """once(name, fill) -> a folder that fill(folder) has filled, once for all of `pytest -n`'s
    processes: whoever asks second waits for the first."""
    top = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # one of several: the folder of them all
        top = top.parent

    def folder_of(name, fill):
        import fcntl  # not at the top: Windows has none, and most tests need none

        folder = top / name
        with open(top / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                part = Path(tempfile.mkdtemp(dir=top))
                fill(part)
                part.rename(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def family_folder(once):
    """family_folder(family) -> the folder of a tiny model of tests/families.py, to be read only."""
    import families  # here: what has no model of its own needs none

    return lambda name: once(f"family-{name}", lambda folder: families.build(name, folder))
