"""--fsdp in one process, FSDP itself replaced: what is a unit, which weights are gathered, how
ranks with unequal work keep in step. (The gradient on real ranks: test_gradcache.py.)"""

from types import SimpleNamespace

import pytest
import torch
from checks import equal, expect
from PIL import Image

from data import Item
from plumbing import sharding
from plumbing.families import vision_tower
from plumbing.formats import IMAGE


@pytest.fixture
def as_sharded(monkeypatch):
    """Every embedder is taken for a sharded one, on one of three ranks."""
    monkeypatch.setattr(sharding, "sharded", lambda _: True)
    monkeypatch.setattr(sharding, "world", lambda: 3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_layer_is_a_unit_and_the_rest_is_one(embedder, monkeypatch, device):
    """Layers first, or the whole would hold their weights; bfloat16 with sums in float32 on a GPU,
    the weights' own type on a CPU."""
    units = []
    monkeypatch.setattr(sharding, "fully_shard", lambda *args, **more: units.append((args, more)))
    monkeypatch.setattr(sharding, "init_device_mesh", lambda kind, size: (kind, size))
    monkeypatch.setattr(type(embedder), "device", torch.device(device))
    sharding.shard(embedder)
    layers = list(embedder.mllm.get_decoder().layers)
    equal([id(args[0]) for args, _ in units], [*map(id, layers), id(embedder)], "units")
    want = {"mp_policy": sharding.PRECISION} if device == "cuda" else {"mesh": ("cpu", (1,))}
    for _, more in units:
        equal(more, want, "precision, ranks")
    policy = sharding.PRECISION
    equal((policy.param_dtype, policy.reduce_dtype), (torch.bfloat16, torch.float32), "PRECISION")


def test_what_was_not_sharded_is_left_as_it_is(shared):
    """No zero is added, no weights are gathered, no chunk is put in front."""
    equal(sharding.sharded(shared), False, "sharded")
    z, embed, chunks = torch.randn(2, 3), torch.sin, [[0], [1]]
    expect(sharding.touch_tower(shared, z, {}) is z, "another z", "z", "touch_tower")
    equal(sharding.whole_weights(shared), None, "whole_weights")
    equal(sharding.in_lockstep(shared, embed, chunks), (embed, chunks), "in_lockstep")


def test_the_wrapper_of_fsdp_is_seen_on_the_embedder_itself():
    """Not on a part of it: the embedder is the last unit."""

    class Wrapped(sharding.FSDPModule):
        def __new__(cls, *args, **kwargs):
            return object.__new__(cls)

    equal(sharding.sharded(Wrapped()), True, "FSDPModule")
    equal(sharding.sharded(SimpleNamespace(mllm=Wrapped())), False, "its MLLM")


def test_a_chunk_without_a_picture_gives_the_tower_a_gradient_of_zero(embedder, as_sharded):
    """Of every weight of it, so that it sends what the others send; z is what it was."""
    tower = vision_tower(embedder.mllm)
    z = torch.randn(2, 3, requires_grad=True)
    touched = sharding.touch_tower(embedder, z, {"input_ids": None})
    equal(touched.detach(), z.detach(), "z")
    touched.sum().backward()
    equal(z.grad, torch.ones(2, 3), "the gradient goes through")
    grads = [p.grad for p in tower.parameters()]
    expect(all(g is not None for g in grads), grads, "a gradient each", "touch_tower")
    equal(sum(g.abs().sum().item() for g in grads), 0.0, "of zero")
    seen = sharding.touch_tower(embedder, z, {"pixel_values": None})
    expect(seen is z, seen, "z itself", "the tower has one already")


def test_the_forward_pass_touches_the_tower(embedder, monkeypatch):
    """With the embedding and the inputs that it is about."""
    seen = []
    monkeypatch.setattr(
        sharding, "touch_tower", lambda e, z, inputs: seen.append((e, inputs)) or 2 * z
    )
    inputs = embedder.collate([Item("red")])
    z = embedder(inputs)
    expect(seen[0][0] is embedder and seen[0][1] is inputs, seen, "these", "Embedder.forward")
    equal(round(z.norm().item(), 5), 1.0, "before it is normalised")


def test_whole_weights_are_those_of_the_model_a_tied_one_once(embedder, as_sharded, monkeypatch):
    """By the names that transformers saves them under; on the host: no GPU holds all."""
    asked = []
    make = sharding.dcp.StateDictOptions
    monkeypatch.setattr(sharding.dcp, "StateDictOptions", lambda **x: asked.append(x) or make(**x))
    embedder.mllm.config.tie_word_embeddings = True
    embedder.mllm.lm_head.weight = embedder.mllm.get_input_embeddings().weight
    whole = sharding.whole_weights(embedder)
    want = dict(embedder.mllm.named_parameters())
    equal(set(whole), set(want), "names")
    expect("lm_head.weight" not in whole, sorted(whole), "once", "a tied weight")
    for name, p in want.items():
        equal(whole[name], p.detach(), name)
    equal(asked, [{"full_state_dict": True, "cpu_offload": True}], "whole, and on the host")


class Rows:
    """Embeds rows by their numbers; notes when gradients are to be reduced."""

    def __init__(self):
        self.table = torch.arange(12.0).view(6, 2).requires_grad_()
        self.synced, self.calls = [], []

    def embed(self, chunk):
        self.calls.append(list(chunk))
        return self.table[chunk] * 1.0

    def set_requires_gradient_sync(self, is_last):
        self.synced.append(is_last)


@pytest.mark.parametrize("most", [2, 4])
def test_ranks_with_less_work_begin_with_empty_chunks(as_sharded, monkeypatch, most):
    """As many forwards as the rank with the most; the empty ones run the first chunk and keep no
    row of it. Gradients are reduced with the first chunk alone, which is the last to come back, and
    times the number of ranks, for FSDP takes their mean."""
    monkeypatch.setattr(sharding, "gather_objects", lambda n: [n, most, 1])
    rows = Rows()
    embed, chunks = sharding.in_lockstep(rows, rows.embed, [[4], [0, 2]])
    equal(chunks, [[]] * (most - 2) + [[4], [0, 2]], "as many as the others")
    parts = [embed(chunk) for chunk in chunks]
    equal([len(part) for part in parts], [len(chunk) for chunk in chunks], "rows")
    equal(rows.calls, [[4]] * (most - 2) + [[4], [0, 2]], "forward passes")
    for part in reversed(parts):  # as `two_passes` goes back
        part.sum().backward() if len(part) else part.backward(torch.zeros_like(part))
    equal(rows.synced, [False] * (most - 1) + [True], "reduced once, in the end")
    want = torch.zeros(6, 2)
    want[[0, 2, 4]] = 3.0
    equal(rows.table.grad, want, "3 ranks: three times its part")
    with torch.no_grad():
        equal(embed(chunks[-1]).tolist(), [[0.0, 1.0], [4.0, 5.0]], "pass 1: no hook")


def test_inputs_with_a_picture_are_known_by_their_pixels(shared):
    """What touch_tower looks for is what the collator writes."""
    with_one = shared.collate([Item(IMAGE, (Image.new("RGB", (64, 64)),))])
    equal("pixel_values" in with_one, True, "a picture")
    equal("pixel_values" in shared.collate([Item("red")]), False, "a text")
