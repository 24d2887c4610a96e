"""The optimiser's step where the numbers are not: nothing is trained with them."""

import math

import pytest
import torch
from checks import equal
from torch import nn

from plumbing import optim
from plumbing.config import TrainingFlags
from plumbing.errors import InputError


@pytest.mark.parametrize(
    ("loss", "gradient"), [(1.0, math.inf), (1.0, math.nan), (math.nan, 1.0), (math.inf, 1.0)]
)
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_step_with_a_number_that_is_not_finite_changes_no_weight(loss, gradient, clip):
    """A gradient that is not finite, the loss as it should be, or the other way round: the error
    names step, loss, norm and examples, and the weights are what they were."""
    net, cfg = nn.Linear(3, 2), TrainingFlags(clip=clip, muon_lr=0.0)
    before = net.weight.detach().clone()
    optimizers = optim.make_optimizers(net, cfg)
    optim.begin_step(optimizers, 6, cfg)
    for p in net.parameters():
        p.grad = torch.full_like(p, gradient)
    with pytest.raises(InputError, match=r"step 7.*loss .*gradient norm .*\['a', 'b'\]"):
        optim.end_step(net, optimizers, cfg, 6, loss, ["a", "b"])
    equal(net.weight.detach(), before, "no step was taken")
