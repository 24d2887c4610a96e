"""Random numbers that are drawn twice: GradCache's second pass must drop what its first dropped."""

from contextlib import contextmanager

import torch


def rng_state() -> tuple:
    """The state of the random number generators that dropout may draw from: the CPU's and the
    current GPU's."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), cuda


@contextmanager
def replay(state):
    """Runs a block with the random numbers that followed `state`, and leaves the generators as they
    were. Without it dropout falls differently in the second pass, and the gradient is that of no
    loss at all."""
    cpu, cuda = state
    devices = [] if cuda is None else [torch.cuda.current_device()]
    with torch.random.fork_rng(devices):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        yield
