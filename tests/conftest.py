"""Fixtures that the tests share. Everything runs on the CPU, on one thread, without a network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from checks import toy

torch.set_num_threads(1)


def pytest_configure(config):
    for noise in ("The PEFT config's `base_model_name_or_path`", ".*gradient_checkpointing"):
        config.addinivalue_line("filterwarnings", f"ignore:{noise}")


@pytest.fixture
def embedder():
    """A toy-random embedder of one's own."""
    return toy()


@pytest.fixture(scope="session")
def shared():
    """One toy-random embedder for all tests that only read it."""
    return toy()
