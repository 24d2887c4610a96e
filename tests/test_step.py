"""The optimiser's step: rates, seeds, what each optimiser trains, clipping; where a number is not
finite nothing is trained with it."""

import dataclasses
import math

import pytest
import torch
from checks import close, equal
from torch import nn

import pretrain
from plumbing import optim
from plumbing.config import TrainingFlags
from plumbing.errors import OfAllRanks


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
    with pytest.raises(OfAllRanks, match=r"step 7.*loss .*gradient norm .*\['a', 'b'\]"):
        optim.end_step(net, optimizers, cfg, 6, loss, ["a", "b"])
    equal(net.weight.detach(), before, "no step was taken")


# ---------------------------------------------------------------------------------- rates and seeds

RISE = [0.5, 1]  # a warm-up of two steps of ten
RATES = {
    "linear": [*RISE, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0],
    "cosine": [*RISE, 1, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.03806, 0],
}


@pytest.mark.parametrize("schedule", RATES)
def test_the_rate_rises_to_its_peak_and_ends_at_zero(schedule):
    """Of each of ten steps, and of the one behind the last; the first step trains, too."""
    cfg = TrainingFlags(steps=10, warmup=0.2, schedule=schedule)
    close([optim.rate_at(step, 0.3, cfg) / 0.3 for step in range(11)], RATES[schedule], schedule)
    at_once = TrainingFlags(steps=10, warmup=0.0, schedule=schedule)
    equal(optim.rate_at(0, 0.3, at_once), 0.3, "without a warm-up")
    equal(optim.rate_at(0, 0.3, TrainingFlags(steps=1)), 0.3, "a run of one step")


def test_dropout_is_another_one_in_each_step_on_each_rank_and_for_each_seed(monkeypatch):
    """begin_step seeds it, with a function of the three alone."""
    drawn = {}
    for seed in (0, 1):
        for rank in (0, 1):
            for step in (0, 1):
                monkeypatch.setattr(optim, "rank", lambda rank=rank: rank)
                optimizers = [torch.optim.SGD(nn.Linear(1, 1).parameters())]
                optim.begin_step(optimizers, step, TrainingFlags(seed=seed))
                drawn[seed, rank, step] = torch.rand(1).item()
    equal(len(set(drawn.values())), 8, f"eight numbers that differ: {drawn}")
    optim.begin_step(optimizers, 1, TrainingFlags(seed=1))
    equal(torch.rand(1).item(), drawn[1, 1, 1], "the same ones again")


# --------------------------------------------------------------------------------- the optimisers


class Net(nn.Module):
    """One weight of each kind that a model has, by the names they have there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = dict(
            embed_tokens=(7, 4), proj=(4, 4), norm=(4,), patch=(4, 3, 2, 2), lm_head=(7, 4)
        )
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(torch.randn(size)))
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)


def by_optimizer(net, cfg) -> dict:
    """{an optimiser's name: (names of what it trains, its group's settings)}."""
    found, names = {}, {p: name for name, p in net.named_parameters()}
    for optimizer in optim.make_optimizers(net, cfg):
        (group,) = optimizer.param_groups
        found[type(optimizer).__name__] = {names[p] for p in group["params"]}, group
    return found


def test_muon_trains_the_matrices_inside_and_adamw_all_else():
    """Not the rows of tables, of either end, nor what is no matrix; what is frozen neither. Without
    --muon-lr AdamW trains all. Both decay weights."""
    net = Net()
    found = by_optimizer(net, TrainingFlags(lr=0.1, muon_lr=0.2, weight_decay=0.3))
    equal(found["Muon"][0], {"proj"}, "Muon")
    equal(found["AdamW"][0], {"embed_tokens", "norm", "patch", "lm_head"}, "AdamW")
    equal([group["weight_decay"] for _, group in found.values()], [0.3, 0.3], "both decay")
    equal(found["AdamW"][1]["betas"], (0.9, 0.98), "AdamW's averages")
    alone = by_optimizer(net, TrainingFlags(muon_lr=0.0))
    equal({k: v[0] for k, v in alone.items()}, {"AdamW": {n for n, p in net.named_parameters()
          if p.requires_grad}}, "--muon-lr 0")  # fmt: skip


def test_what_no_row_went_through_stays_where_it_is():
    """A vision tower in steps without pictures: neither momentum nor decay moves it. In the first
    step every weight gets a state, without which it could not be resumed."""
    net, cfg = Net(), TrainingFlags(lr=0.1, muon_lr=0.1, weight_decay=0.1, warmup=0, clip=0.0)
    optimizers = optim.make_optimizers(net, cfg)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    for step, touched in enumerate([("proj", "norm"), ("lm_head",), ("proj", "norm")]):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optim.begin_step(optimizers, step, cfg)
        for name, p in parameters.items():
            p.grad = torch.ones_like(p) if name in touched else torch.zeros_like(p)
        optim.end_step(net, optimizers, cfg, step, 1.0, [])
        moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
        equal(moved, set(touched if step else parameters), f"step {step}")
    states = [p for optimizer in optimizers for p in optimizer.state]
    equal(len(states), len(parameters), "one each")


def test_of_a_sharded_model_the_whole_norm_counts_and_no_rank_leaves_its_part_out(monkeypatch):
    """One rank's part of a gradient may be zeros alone, where the others' are not; of the norm each
    rank holds a part, too."""

    class Sharded(torch.Tensor):
        def full_tensor(self):
            return torch.tensor(5.0)

    net, cfg = nn.Linear(2, 2, bias=False), TrainingFlags(lr=0.1, muon_lr=0.0, warmup=0)
    optimizers = optim.make_optimizers(net, cfg)
    part = torch.zeros(()).as_subclass(Sharded)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: part)
    moved = []
    for step, grad in enumerate([torch.ones(2, 2), torch.zeros(2, 2).as_subclass(Sharded)]):
        before = net.weight.detach().clone()
        optim.begin_step(optimizers, step, cfg)
        net.weight.grad = grad
        norm = optim.end_step(net, optimizers, cfg, step, 1.0, [])
        equal(norm, 5.0, "of the whole gradient")
        moved.append(not torch.equal(net.weight, before))
    equal(moved, [True, True], "by its momentum, as on the other ranks")


def test_each_optimiser_has_a_rate_of_its_own():
    """Of its own peak, along one schedule; begin_step says AdamW's."""
    cfg = TrainingFlags(lr=0.1, muon_lr=0.2, steps=10, warmup=0.2)
    optimizers = optim.make_optimizers(Net(), cfg)
    close(optim.begin_step(optimizers, 0, cfg), 0.05, "half of AdamW's peak")
    rates = {type(x).__name__: x.param_groups[0]["lr"] for x in optimizers}
    close([rates["AdamW"], rates["Muon"]], [0.05, 0.1], "half of each peak")


def matrices(cls, **settings):
    """-> (one matrix that never has a gradient, and three: tall, wide and square; Muon)."""
    torch.manual_seed(3)
    sizes = [(4, 4), (24, 8), (8, 24), (16, 16)]
    parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
    return parameters, cls(parameters, 0.02, **settings)


def take_steps(parameters, optimizer, steps, seed):
    """Steps along drawn gradients."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in parameters[1:]:
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()


def test_muon_takes_the_steps_of_pytorchs():
    """Up to bfloat16's three digits, in which PyTorch's multiplies; decay and momentum to the last
    bits of float32. A run that PyTorch's began goes on with its state."""
    ours, muon = matrices(optim.Muon, weight_decay=0.1)
    theirs, reference = matrices(torch.optim.Muon, weight_decay=0.1)
    start = [p.detach().clone() for p in theirs]
    take_steps(ours, muon, 3, 0)
    take_steps(theirs, reference, 3, 0)
    for mine, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert (mine - other).norm() <= 0.04 * moved, (mine.shape, "another step")
    states = zip(muon.state.values(), reference.state.values(), strict=True)
    for mine, other in states:
        close(mine["momentum_buffer"], other["momentum_buffer"], "momentum", 1e-6)
    equal(ours[0].tolist(), start[0].tolist(), "without a gradient nothing is decayed")
    muon.load_state_dict(reference.state_dict())
    take_steps(ours, muon, 1, 1)
    close(len(muon.state), 3, "the states of three matrices")


@pytest.mark.parametrize("size", [(24, 8), (8, 24), (16, 16), (1, 5)])
def test_an_orthogonal_update_has_singular_values_around_one(size):
    """And the gradient's own directions; on a CPU in float32, elsewhere in bfloat16."""
    torch.manual_seed(0)
    g = torch.randn(size)
    coefficients = torch.optim.Muon([nn.Parameter(g)]).defaults["ns_coefficients"]
    update = optim.orthogonal(g, coefficients)
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.3 and values.max() < 1.3, values
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    along = (u.T @ update @ v.T).diagonal()  # the update in the gradient's own basis
    close(along.sort().values, values.sort().values, "the same directions", 1e-4)
    equal(update.dtype, torch.float32, "on a CPU")
    elsewhere = optim.orthogonal(torch.empty(size, device="meta"), coefficients)
    equal(elsewhere.dtype, torch.bfloat16, "elsewhere")
    zero = optim.orthogonal(torch.zeros(size), coefficients)  # a first step without pictures
    equal(zero, torch.zeros(size), "a gradient of zeros moves nothing, and is no NaN")


@pytest.mark.parametrize(("clip", "factor"), [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)])
def test_a_step_clips_the_gradient_says_its_norm_and_leaves_none(clip, factor):
    """A gradient (3, 4), of norm 5: cut to norm 1, or left where it is small, or clip is 0."""
    net = nn.Linear(2, 1, bias=False)
    before = net.weight.detach().clone()
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizers = [torch.optim.SGD(net.parameters(), lr=1.0)]
    norm = optim.end_step(net, optimizers, TrainingFlags(clip=clip), 0, 1.0, [])
    close(norm, 5.0, "before clipping")
    close(before - net.weight, factor * torch.tensor([[3.0, 4.0]]), "what SGD took", 1e-4)
    equal(net.weight.grad, None, "the next backward pass begins with none")


@pytest.mark.parametrize(("warmup", "rise"), [(0.14, 1), (0.16, 2), (1.0, 10)])
def test_a_warm_up_of_broken_steps_is_rounded(warmup, rise):
    """Of ten steps 1.4 are one, and 1.6 two; a warm-up of all has its peak in the last."""
    cfg = TrainingFlags(steps=10, warmup=warmup)
    close(optim.rate_at(0, 0.3, cfg), 0.3 / rise, "the first step")
    close(optim.rate_at(rise - 1, 0.3, cfg), 0.3, "the peak")


def test_the_rate_of_loras_matrices_is_divided_by_their_scale():
    """Where no flag says it: a step of theirs moves the weight by alpha / rank times as much. What
    is said is taken as it is."""
    for flags, want in (
        ({}, 0.02), (dict(lora_rank=16), 0.005), (dict(lora_rank=8, lora_alpha=40), 0.004),
        (dict(lora_rank=16, muon_lr=0.02), 0.02), (dict(lora_rank=16, muon_lr=0.0), 0.0),
    ):  # fmt: skip
        equal(TrainingFlags(**flags).muon_lr, want, f"{flags}")
    words = ["--lora-rank", "16"]
    equal(pretrain.Config.parse(words).muon_lr, 0.005, "on a command line")
    equal(dataclasses.replace(pretrain.Config.parse(words), seed=1).muon_lr, 0.005, "once")


def test_muon_has_its_own_rate_where_it_trains_all():
    """With LoRA and K = 0: its weights are all matrices, and AdamW's peak is no one's."""
    cfg = TrainingFlags(muon_lr=0.2, steps=10, warmup=0.2)
    (muon,) = optim.make_optimizers(nn.Linear(4, 4, bias=False), cfg)
    close(optim.begin_step([muon], 0, cfg), 0.1, "half of Muon's peak")
    close(muon.param_groups[0]["lr"], 0.1, "what it takes")
