"""Large calls give what transformers' many small ones give: in vision towers, norms, MLPs."""

import weakref

import families
import pytest
import torch
import torch.nn.functional as F
from checks import close, equal, expect
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText

import model
from data import Item
from plumbing.families import vision_tower
from plumbing.kernels import (
    NAME,
    EvenLinear,
    LeanMLP,
    OneKernel,
    PatchProjection,
    attention,
    in_large_calls,
    ours_before,
    pieces_of,
)

QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize("family", QWENS)
def test_a_tower_gives_what_it_gave(family, tmp_path, monkeypatch):
    """Pictures of three sizes, two of one; with their gradients. Qwen2.5-VL's have windows."""
    ours = model.load(families.build(family, tmp_path / "m"), 4, "mean", "chat", "cpu")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    towers = [vision_tower(mllm).double() for mllm in (ours.mllm, theirs)]
    calls = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *qkv, **kw: calls.append(1) or sdpa(*qkv, **kw)
    )
    sizes = ((64, 64), (100, 60), (64, 64), (60, 100))
    pictures = [Item("<image>", (Image.effect_noise(size, 50).convert("RGB"),)) for size in sizes]
    inputs = ours.collate(pictures)
    results, spent = [], []
    for tower in towers:
        calls.clear()
        out = tower(inputs["pixel_values"].double(), grid_thw=inputs["image_grid_thw"])
        spent.append(len(calls))
        out.pooler_output.pow(2).sum().backward()
        gradients = [
            p.grad.flatten() for _, p in sorted(tower.named_parameters()) if p.grad is not None
        ]
        results.append((out.pooler_output, torch.cat(gradients)))
    close(results[0][0], results[1][0], f"{family}: features", 1e-6)
    close(results[0][1], results[1][1], f"{family}: gradients", 1e-6)
    assert 0 < spent[0] < spent[1], f"{family}: calls {spent}"


def test_pieces_of_one_length_go_together():
    begins = torch.tensor([0, 2, 5, 7, 8])
    numbers, order, back = pieces_of(begins)
    equal(numbers, {2: 2, 3: 1, 1: 1}, "lengths")
    equal(order.tolist(), [0, 1, 5, 6, 2, 3, 4, 7], "places")
    equal(order[back].tolist(), list(range(8)), "and back")
    equal(pieces_of(begins) is pieces_of(begins), True, "once for all layers")


def test_the_places_of_a_batch_that_is_over_are_forgotten():
    """A run has as many batches as steps; on a GPU each one's places would stay there."""
    begins = torch.tensor([0, 2, 5])
    pieces_of(begins)
    is_there = weakref.ref(begins)
    del begins
    for end in (3, 4, 5, 6):
        pieces_of(torch.tensor([0, 2, end]))
    equal(is_there(), None, "kernels.pieces_of remembers two of them")


def test_a_piece_sees_itself_alone():
    """By hand, a piece at a time, with a scale of its own."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 8, 4, dtype=torch.float64) for _ in range(3))
    begins = [0, 2, 5, 7, 8]
    got, no_weights = attention(None, q, k, v, torch.tensor(begins), 0.3, attention_mask=None)
    want = torch.empty(1, 8, 3, 4, dtype=torch.float64)
    for a, b in zip(begins, begins[1:], strict=False):
        weights = (0.3 * q[..., a:b, :] @ k[..., a:b, :].transpose(-1, -2)).softmax(-1)
        want[:, a:b] = (weights @ v[..., a:b, :]).transpose(1, 2)
    close(got, want, "attention", 1e-10)
    equal(no_weights, None, "as flash kernels")


def test_patches_are_the_convolution():
    for bias in (True, False):
        conv = nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 4, 4), bias=bias).double()
        patches = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64)
        want = conv(patches).view(-1, 5)
        conv.__class__ = PatchProjection
        close(conv(patches), want, "patches", 1e-10)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next"])
def test_what_is_no_tower_of_pieces_stays(family, tmp_path):
    """Another kernel than sdpa, another family; the config, of which new models are made."""
    folder = families.build(family, tmp_path / "m")
    for attn in ("sdpa", "eager"):
        mllm = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attn)
        mllm = in_large_calls(in_large_calls(mllm))  # twice is once
        used = {m.config._attn_implementation for m in mllm.modules() if hasattr(m, "config")}
        wanted = {attn, NAME} if (family, attn) == ("qwen2_5_vl", "sdpa") else {attn}
        equal(used, wanted, f"{family}, {attn}")
        equal(vision_tower(mllm).config._attn_implementation, attn, "the tower's own")


def test_what_is_in_the_way_is_found_by_its_shape(tmp_path):
    """Overlapping patches stay a convolution, even widths as they are."""
    mllm = AutoModelForImageTextToText.from_pretrained(families.build("qwen2_vl", tmp_path / "m"))
    patches = vision_tower(mllm).patch_embed
    patches.other = nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 2, 2))
    patches.even, patches.out, patches.into = nn.Linear(8, 16), nn.Linear(8, 9), nn.Linear(9, 8)
    in_large_calls(mllm)
    equal([type(patches.proj), type(patches.other)], [PatchProjection, nn.Conv3d], "by its stride")
    kinds = [type(x) for x in (patches.even, patches.out, patches.into)]
    equal(kinds, [nn.Linear, EvenLinear, EvenLinear], "by the widths")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(5, 16), (16, 5), (3, 9)])
def test_zeros_beside_a_layer_add_nothing(widths, bias):
    """The layer, and its gradients."""
    layer = nn.Linear(*widths, bias=bias).double()
    h = torch.randn(2, 4, widths[0], dtype=torch.float64, requires_grad=True)
    results = []
    for kind in (nn.Linear, EvenLinear):
        layer.__class__ = kind
        z = layer(h)
        results.append([z, *torch.autograd.grad(z.pow(2).sum(), [h, *layer.parameters()])])
    for want, got in zip(*results, strict=True):
        close(got, want, f"widths {widths}", 1e-10)


@pytest.mark.parametrize("widths", [(5, 16), (16, 5), (3, 9)])
def test_what_a_gpu_multiplies_has_widths_of_whole_eights(widths, monkeypatch):
    shapes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: shapes.append(args[1].shape) or linear(*args))
    EvenLinear(*widths)(torch.randn(2, widths[0]))
    equal(shapes, [tuple(-(-width // 8) * 8 for width in reversed(widths))], "the weight's")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_norm_in_one_kernel_is_the_norm(family, tmp_path):
    """Each of a family's, with random weights; its gradient; bfloat16 stays bfloat16. Gemma's are
    other norms, and stay."""
    mllm = model.load(families.build(family, tmp_path / "m"), 4, "mean", "chat", "cpu").mllm
    norms = [m for m in mllm.modules() if type(m).__name__.endswith("RMSNorm")]
    ours = [m for m in norms if isinstance(m, OneKernel)]
    equal(len(ours), 0 if family == "gemma3" else len(norms), "norms in one kernel")
    expect(norms, len(norms), "some", "the family has none?")
    for norm in ours:
        norm.weight.data.normal_()
        h = torch.randn(2, 3, len(norm.weight), requires_grad=True)
        want, got = norm(h), norm.ours(h)  # on a CPU it is the library's
        close(got, want, "norm", 1e-6)
        wanted, given = (torch.autograd.grad(z.pow(3).sum(), [h, norm.weight]) for z in (want, got))
        for a, b in zip(given, wanted, strict=True):
            close(a, b, "gradient", 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half = norm.ours(h.detach().bfloat16())
        equal(half.dtype, torch.bfloat16, "the stream's type")
        close(half.float(), want, "in bfloat16", 0.02)


def test_a_norm_is_one_kernel_in_the_type_of_the_stream(tmp_path, monkeypatch):
    """A weight of another type, or autocast, would make several of it, in float32."""
    mllm = AutoModelForImageTextToText.from_pretrained(families.build("qwen2_vl", tmp_path / "m"))
    norm, seen, rms_norm = in_large_calls(mllm).get_decoder().norm, [], F.rms_norm

    def watched(h, shape, weight, epsilon):
        seen.append((h.dtype, weight.dtype, torch.is_autocast_enabled("cpu")))
        return rms_norm(h, shape, weight, epsilon)

    monkeypatch.setattr(F, "rms_norm", watched)
    with torch.autocast("cpu", torch.bfloat16):
        norm.ours(torch.randn(2, len(norm.weight), dtype=torch.bfloat16))
    equal(seen, [(torch.bfloat16, torch.bfloat16, False)], "stream, weight, autocast")


def test_a_cpu_takes_the_librarys_norm(tmp_path, monkeypatch):
    mllm = AutoModelForImageTextToText.from_pretrained(families.build("qwen2_vl", tmp_path / "m"))
    norm = in_large_calls(in_large_calls(mllm)).get_decoder().norm  # twice is once
    equal(ours_before(type(norm), OneKernel), type(norm), "no class within a class")
    monkeypatch.setattr(norm, "ours", None)
    norm(torch.randn(2, len(norm.weight)))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_an_mlp_keeps_two_tensors_of_its_full_width_and_gives_the_same_bits(family, tmp_path):
    """Its output and its gradients, the weights' too; autograd keeps three of frozen weights."""
    mllm = model.load(families.build(family, tmp_path / "m"), 4, "mean", "chat", "cpu").mllm
    wide = [m for m in mllm.modules() if isinstance(m, LeanMLP)]
    expect(wide, len(wide), "some", "the family has none?")
    for mlp in wide:
        gate = mlp.gate_proj
        h = torch.randn(2, 3, gate.in_features, requires_grad=True)
        results, kept = [], []
        for way in (mlp, mlp.ours):  # on a CPU the module itself is the library's
            z = way(h)
            results.append([z, *torch.autograd.grad(z.pow(3).sum(), [h, *mlp.parameters()])])
            kept.append(kept_by(lambda way=way, h=h: way(h), mlp, gate.out_features))
        for want, got in zip(*results, strict=True):
            equal(torch.equal(want, got), True, "the same bits")
        equal(kept, [3, 2], "tensors of its full width")


def kept_by(call, module, width) -> int:
    """How many different tensors of this width a call keeps, its weights frozen."""
    kept = set()

    def note(x):
        if x.ndim == 3 and x.shape[-1] == width:
            kept.add(x.data_ptr())
        return x

    module.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        call()
    module.requires_grad_(True)
    return len(kept)


def test_what_only_looks_like_an_mlp_with_a_gate_stays(tmp_path):
    """Its forward pass does something else, or is not written in Python."""
    mllm = AutoModelForImageTextToText.from_pretrained(families.build("qwen2_vl", tmp_path / "m"))
    mlp = mllm.get_decoder().layers[0].mlp

    class Dropping(type(mlp)):
        def forward(self, h):
            return self.down_proj(F.dropout(self.act_fn(self.gate_proj(h))) * self.up_proj(h))

    class Compiled(nn.Module):
        forward = len

    other, compiled = nn.Linear(2, 2), Compiled()
    other.__class__, other.compiled = Dropping, compiled
    mlp.other = other
    in_large_calls(in_large_calls(mllm))  # twice is once
    equal([type(other), type(compiled)], [Dropping, Compiled], "stay")
    equal(type(mlp).__mro__.count(LeanMLP), 1, "is ours, once")


def test_a_cpu_takes_the_librarys_mlp(tmp_path, monkeypatch):
    mllm = AutoModelForImageTextToText.from_pretrained(families.build("qwen2_vl", tmp_path / "m"))
    mlp = in_large_calls(mllm).get_decoder().layers[0].mlp
    monkeypatch.setattr(mlp, "ours", None)
    mlp(torch.randn(2, mlp.gate_proj.in_features))
