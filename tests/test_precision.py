"""Pooling, unit length, scores and losses are float32 whatever surrounds them: hidden states in
bfloat16, autocast, `torch.set_float32_matmul_precision`."""

import pytest
import torch
import torch.nn.functional as F
from checks import close, equal, expect
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive
import model
import pretrain
from data import Item
from model import choose_trained, compression_pool, last_token_pool
from plumbing import precision
from plumbing.config import TrainingFlags

TAU = 0.03  # the official code's
BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def bfloat16():
    """What a GPU does to the products inside."""
    return torch.autocast("cpu", torch.bfloat16)


# ----------------------------------------------------------------------------------------- pooling


def test_hidden_states_in_bfloat16_are_averaged_in_float32():
    """The mean of K = 32 numbers of bfloat16 to 7 digits, not 3; and float64 stays float64."""
    torch.manual_seed(0)
    h, mask = torch.randn(4, 40, 8).bfloat16(), torch.ones(4, 40, dtype=torch.long)
    for pool in (lambda h: compression_pool(h, mask, 32), lambda h: last_token_pool(h, mask)):
        got = pool(h)
        equal(got.dtype, torch.float32, "at_least_float32")
        close(got, pool(h.double()), "the mean of the K hidden states", 1e-6)
        equal(pool(h.double()).dtype, torch.float64, "wider stays wide")


def test_an_embedding_has_unit_length_in_float32_though_the_model_runs_in_bfloat16(
    embedder, monkeypatch
):
    """z is F.normalize of the float32 mean of what the last layer said in bfloat16."""
    monkeypatch.setattr(embedder, "autocast", bfloat16)
    inputs = embedder.collate([Item("a red circle"), Item("one"), Item("a longer text, too")])
    said = {}
    hidden = embedder.hidden

    def noted(*args):
        said["h"] = hidden(*args).bfloat16()  # as a model in bfloat16 says it
        return said["h"]

    monkeypatch.setattr(embedder, "hidden", noted)
    with torch.no_grad():
        z = embedder(inputs)
    equal(z.dtype, torch.float32, "the loss takes float32")
    close(z.double().norm(dim=1), torch.ones(3), "unit length", 1e-6)
    mean = compression_pool(said["h"].double(), inputs["attention_mask"], embedder.K)
    close(z, F.normalize(mean, dim=-1), "normalised after a mean in float32", 1e-6)


def test_the_head_runs_in_bfloat16_too(shared, monkeypatch):
    """On a GPU a frozen head is bfloat16 where hidden states are float32: PyTorch multiplies no two
    types but under autocast."""
    monkeypatch.setattr(shared, "autocast", bfloat16)
    h = torch.ones(2, shared.dim)
    equal(shared.logits(h).dtype, torch.bfloat16, "Embedder.logits")


# ------------------------------------------------------------------------------------ scores, loss


def unit_vectors(n, D=64):
    torch.manual_seed(n)
    return F.normalize(torch.randn(n, D), dim=1)


def loss_and_gradient(q, t):
    """InfoNCE of 8 queries and 20 targets; all of it, the backward pass too."""
    q, t = q.clone().requires_grad_(), t.clone().requires_grad_()
    loss, _ = contrastive.info_nce(q, t, TAU)
    loss.backward()
    return loss.detach(), torch.cat([q.grad, t.grad])


def check_in_bfloat16(step):
    want = step(unit_vectors(8).double(), unit_vectors(20).double())
    with bfloat16():
        got = step(unit_vectors(8), unit_vectors(20))
    close(got[0], want[0], "the loss, in nats", 1e-6)
    close(got[1], want[1], "d loss / d embeddings", 1e-5)


def test_scores_and_their_gradient_are_float32_inside_autocast():
    """Both products, of scores and of their gradient, keep 7 digits inside bfloat16 autocast."""
    check_in_bfloat16(loss_and_gradient)


def test_the_autocast_check_fails_for_plain_products(monkeypatch):
    """Negative control: q @ t.T inside autocast has 3 digits."""
    monkeypatch.setattr(contrastive, "products", lambda q, t: (q @ t.T).float())
    with pytest.raises(AssertionError, match="nats"):
        check_in_bfloat16(loss_and_gradient)


class Noted(TorchDispatchMode):
    """The precision in force at each product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.seen.append([backend.fp32_precision for backend in BACKENDS])
        return function(*args, **(kwargs or {}))


def precisions(setting) -> list:
    """Those of all products of a step, forward, backward and what the backward pass repeats."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with Noted() as noted:
            loss_and_gradient(unit_vectors(8), unit_vectors(20))
        equal(torch.get_float32_matmul_precision(), setting, "the global setting is put back")
    finally:
        torch.set_float32_matmul_precision(before)
    return noted.seen


def test_full_precision_is_in_force_inside_and_what_was_before_it_after():
    """Of both backends, each its own, after an error too; and no autocast inside."""
    torch.set_float32_matmul_precision("high")
    try:
        before = [backend.fp32_precision for backend in BACKENDS]
        expect("ieee" not in before, before, "less than full precision", "too easy")
        for error in (None, ZeroDivisionError):
            try:
                with bfloat16(), precision.full_float32("cpu"):
                    inside = [backend.fp32_precision for backend in BACKENDS]
                    cast = torch.is_autocast_enabled("cpu")
                    if error:
                        raise error
            except ZeroDivisionError:
                pass
            equal((inside, cast), (["ieee", "ieee"], False), "inside")
            equal([backend.fp32_precision for backend in BACKENDS], before, f"after {error}")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_of_bfloat16_numbers_are_float32():
    """Seven digits of what their numbers are; of float64 fifteen."""
    q, t = unit_vectors(8).bfloat16(), unit_vectors(20).bfloat16()
    got = precision.products(q, t)
    equal(got.dtype, torch.float32, "at_least_float32")
    close(got, q.double() @ t.double().T, "seven digits", 1e-6)
    equal(precision.products(q.double(), t.double()).dtype, torch.float64, "wider stays wide")
    mixed = precision.products(q, t.float())
    equal(mixed, got, "one of them alone")


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_no_product_of_the_loss_is_tf32(setting):
    """Whatever `torch.set_float32_matmul_precision` says: IEEE float32 at each of the three
    products (scores, two of the gradient), seen by the precision in force."""
    seen = precisions(setting)
    equal(seen, [["ieee", "ieee"]] * 3, "precision.full_float32")


def test_the_check_of_tf32_fails_for_plain_products(monkeypatch):
    """Negative control: q @ t.T takes what is set."""
    monkeypatch.setattr(contrastive, "products", lambda q, t: q @ t.T)
    expect("tf32" in precisions("high")[0], precisions("high"), "tf32", "is anything seen?")


def test_the_products_are_those_of_plain_tensors_bit_for_bit():
    """With full precision in force nothing changes: q @ t.T and its gradient."""
    results = []
    for products in (precision.products, lambda q, t: q @ t.T):
        q, t = unit_vectors(8).requires_grad_(), unit_vectors(20).requires_grad_()
        out = products(q, t)
        out.square().sum().backward()
        results.append(torch.cat([out.detach().flatten(), q.grad.flatten(), t.grad.flatten()]))
    equal(results[0], results[1], "the same order of sums")


# ---------------------------------------------------------------------------------------- stage 1


def test_the_losses_of_stage_1_are_float32_though_logits_are_bfloat16():
    """Cross-entropy and the divergence from the teacher: 6 digits, not 3."""
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 64, 400).bfloat16()
    labels = torch.randint(400, (64,))
    for loss in (
        lambda x: pretrain.answer_loss(x, labels),
        lambda x: pretrain.distillation_loss(x, reference.to(x.dtype)),
    ):
        got = loss(logits)
        equal(got.dtype, torch.float32, "a sum of many numbers")
        close(got, loss(logits.float()), "the loss of the same logits", 1e-6)


def test_what_is_trained_is_float32_and_what_is_frozen_is_left(embedder):
    """Of a checkpoint in bfloat16: steps of 1e-4 would be lost in its 3 digits. On a CPU, where a
    model is float32, what is frozen stays so."""
    for frozen in (torch.float32, torch.bfloat16):
        choose_trained(embedder.to(frozen), TrainingFlags(freeze_vision=True))
        found = {(p.requires_grad, p.dtype) for p in embedder.parameters()}
        equal(found, {(True, torch.float32), (False, frozen)}, "model.choose_trained")


def test_what_is_trained_beside_a_frozen_part_is_saved_and_read_as_it_is(embedder, tmp_path):
    """On a GPU a frozen tower stays in bfloat16. Trap: transformers writes the type of the first
    weight into config.json, the tower's, and all would be read in it, rounded to 3 digits."""
    choose_trained(embedder.bfloat16(), TrainingFlags(freeze_vision=True))
    trained = {name: p for name, p in embedder.mllm.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data += 1e-4 * torch.randn_like(p)
    model.save(embedder, tmp_path)
    read = dict(model.load(tmp_path, device="cpu").mllm.named_parameters())
    for name, p in trained.items():
        equal(torch.equal(read[name], p), True, name)
