"""The small parts of an embedder: its new rows, its head, its adapter, its tower, what is saved and
by whom; and what differs between families, on stand-ins. (Whole models: test_embedder.py,
test_families.py.)"""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from checks import close, equal, expect, toy
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

import model
from data import Item
from plumbing import families, replay
from plumbing.config import TrainingFlags
from plumbing.errors import InputError
from plumbing.formats import IMAGE

# ------------------------------------------------------------------------------ rows of the tokens


class Table:
    """A model that is a table of embeddings, and what it is resized to."""

    def __init__(self, rows):
        torch.manual_seed(0)
        self.table, self.asked = nn.Embedding(rows, 8), []
        self.table.weight.data += 5

    def get_input_embeddings(self):
        return self.table

    def resize_token_embeddings(self, rows, mean_resizing):
        self.asked.append(rows)
        old, self.table = self.table, nn.Embedding(rows, 8)
        n = min(rows, len(old.weight))
        self.table.weight.data[:n] = old.weight.data[:n]
        return self.table


@pytest.fixture(scope="module")
def plain():
    """A toy-random without compression tokens."""
    return model.load("toy-random", compress_tokens=0, device="cpu")


@pytest.mark.parametrize(("spare", "rows"), [(0, 4), (2, 4), (4, 4), (9, 9)])
def test_rows_to_spare_stay_and_are_used_before_new_ones_are_made(plain, spare, rows):
    """Of a model with more rows than its tokenizer has tokens, as the Qwens are; no row of a token
    that was known changes."""
    tokenizer = copy.deepcopy(plain.collate.tokenizer)
    known = len(tokenizer)
    mllm = Table(known + spare)
    before = mllm.table.weight.data.clone()
    model.add_compression_tokens(mllm, tokenizer, 4)
    equal(mllm.asked, [known + rows], "rows of the table")
    equal(mllm.table.weight.data[:known], before[:known], "what was known")
    ids = tokenizer.convert_tokens_to_ids([f"<|compress_{i}|>" for i in range(4)])
    equal(sorted(ids), list(range(known, known + 4)), "the ids behind those that were there")
    new = mllm.table.weight.data[ids]
    expect(abs(new.mean() - 5) < 1, new.mean(), "about 5", "around the mean row")
    expect(torch.cdist(new, new).add(9 * torch.eye(4)).min() > 0.5, new, "four rows", "noise")
    kept = mllm.table.weight.data.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.ranks, "rank", lambda: 1)
        other = Table(known + spare)
        torch.manual_seed(1)  # whatever a rank has drawn before
        model.add_compression_tokens(other, copy.deepcopy(plain.collate.tokenizer), 4)
    equal(other.table.weight.data[ids], new, "the same on every rank")
    model.add_compression_tokens(mllm, tokenizer, 4)
    equal(mllm.table.weight.data, kept, "a second time nothing is new")


def test_new_rows_are_as_far_from_the_mean_as_known_ones_number_by_number(plain):
    """A model's embedding has numbers that hardly differ, and some that differ by a hundred."""
    tokenizer = copy.deepcopy(plain.collate.tokenizer)
    known, widths = len(tokenizer), torch.logspace(-2, 2, 8)
    mllm = Table(known)
    mllm.table.weight.data = 3 + torch.randn(known, 8) * widths
    model.add_compression_tokens(mllm, tokenizer, 400)
    spread = mllm.table.weight.data[known:].std(0) / widths
    expect((0.8 < spread).all() and (spread < 1.25).all(), spread, "about 1 each", "known.std(0)")


def test_compression_tokens_are_special_tokens():
    """Or a text that spells one would be taken for it, and the tokenizer could break one apart."""
    tokenizer = toy().collate.tokenizer
    for i in range(4):
        name = f"<|compress_{i}|>"
        token = tokenizer.added_tokens_decoder[tokenizer.convert_tokens_to_ids(name)]
        expect(token.special, token, "special", "add_tokens(..., special_tokens=True)")
    equal(model.compression_tokens(2), ["<|compress_0|>", "<|compress_1|>"], "from 0")


# ------------------------------------------------------------------------------ parts of the model


def test_the_head_has_weights_of_its_own(embedder):
    """Where it is not tied to the table: logits are the head's, bias and all."""
    D = embedder.mllm.get_input_embeddings().weight.shape[1]
    head = nn.Linear(D, 7)
    embedder.mllm.set_output_embeddings(head)
    h = torch.randn(3, D)
    close(embedder.logits(h), h @ head.weight.T + head.bias, "get_output_embeddings", 1e-6)


def test_an_adapter_is_noted_and_no_part_of_the_module(embedder):
    """Its weights are the MLLM's: as a part they would count, and be saved, twice."""
    names = [name for name, _ in embedder.named_parameters()]
    model.choose_trained(embedder, TrainingFlags(model="toy-random", lora_rank=2))
    expect(embedder.adapter is not None, embedder.adapter, "peft's wrapper", "set_adapter")
    equal([name for name, _ in embedder.named_children()], ["mllm"], "parts")
    keys = set(embedder.state_dict())
    expect(all(key.startswith("mllm.") for key in keys), keys, "mllm. ...", "state_dict")
    expect(len(list(embedder.named_parameters())) > len(names), names, "LoRA's too", "peft")
    embedder.set_adapter(None)
    equal(embedder.adapter, None, "set_adapter(None)")


def test_an_adapter_takes_its_inputs_as_they_are(embedder):
    """Under autocast those are bfloat16; peft alone would make float32 of them, and the sums of the
    adapter would be of the same bfloat16 again."""
    model.choose_trained(embedder, TrainingFlags(model="toy-random", lora_rank=2))
    given = []
    for name, module in embedder.named_modules():
        if name.endswith("lora_A"):
            module["default"].register_forward_pre_hook(lambda _, args: given.append(args[0].dtype))
    embedder.mllm.bfloat16()
    for name, p in embedder.named_parameters():
        p.data = p.data.float() if "lora_" in name else p.data
    embedder.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    embedder(embedder.collate([Item("red")]))
    equal(set(given), {torch.bfloat16}, "adapters.without_casts")


def test_a_tower_rests_while_it_is_frozen_and_no_longer(embedder):
    """In every train(); and eval() is for all."""
    tower = families.vision_tower(embedder.mllm)
    modes = {}
    for frozen in (True, False):
        tower.requires_grad_(not frozen)
        expect(embedder.train() is embedder, embedder, "itself", "as nn.Module.train")
        modes[frozen] = tower.training, embedder.mllm.model.language_model.training
    equal(modes, {True: (False, True), False: (True, True)}, "families.rest_frozen_tower")
    next(iter(tower.parameters())).requires_grad_(False)
    equal(families.vision_tower(embedder.train().mllm).training, True, "a part of it is trained")
    embedder.eval()
    equal(any(part.training for part in embedder.modules()), False, "eval")


def test_what_is_frozen_is_the_tower_and_only_where_it_is_asked_for(embedder):
    """--freeze-vision; without it all is trained."""
    cfg = TrainingFlags(model="toy-random")
    model.choose_trained(embedder, cfg)
    equal([n for n, p in embedder.named_parameters() if not p.requires_grad], [], "all")
    model.choose_trained(embedder, TrainingFlags(model="toy-random", freeze_vision=True))
    for name, p in embedder.named_parameters():
        equal(p.requires_grad, ".visual." not in name, name)


def test_on_a_cpu_nothing_is_cast(shared):
    """bfloat16 is for GPUs."""
    with shared.autocast():
        equal(torch.is_autocast_enabled("cpu"), False, "Embedder.autocast")


def test_on_a_gpu_the_model_runs_in_bfloat16(shared, monkeypatch):
    """Not in float16, whose largest number is 65,504: hidden states go beyond."""
    monkeypatch.setattr(type(shared), "device", torch.device("cuda"))
    monkeypatch.setattr(torch, "autocast", lambda *asked, enabled: (*asked, enabled))
    equal(shared.autocast(), ("cuda", torch.bfloat16, True), "Embedder.autocast")


def test_on_a_gpu_what_is_frozen_is_bfloat16(embedder, monkeypatch):
    """Half the memory; what is trained is float32."""
    monkeypatch.setattr(type(embedder), "device", torch.device("cuda"))
    model.choose_trained(embedder, TrainingFlags(model="toy-random", freeze_vision=True))
    found = {(p.requires_grad, p.dtype) for p in embedder.parameters()}
    equal(found, {(True, torch.float32), (False, torch.bfloat16)}, "model.choose_trained")


def test_a_second_pass_draws_what_the_first_drew_on_a_gpu_too(monkeypatch):
    """The current one's generator, beside the CPU's; and both are put back."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: "a state")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_rng_state", calls.append)
    fork_rng = torch.random.fork_rng

    def fork(devices):
        calls.append(devices)
        return fork_rng([])

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    state = replay.rng_state()
    first = torch.rand(3)
    after = torch.get_rng_state()
    with replay.replay(state):
        equal(torch.rand(3), first, "the CPU's")
    equal(calls, [[3], "a state"], "the GPU's")
    equal(torch.get_rng_state(), after, "put back")


@pytest.mark.parametrize("asked", [False, True])
def test_gradient_checkpointing_is_on_where_it_is_asked_for(embedder, asked):
    """In a layer of the language model."""
    model.choose_trained(embedder, TrainingFlags(model="toy-random", checkpointing=asked))
    equal(embedder.mllm.model.language_model.is_gradient_checkpointing, asked, "--checkpointing")


@pytest.mark.parametrize(
    ("size", "want"),
    [
        ({"shortest_edge": 56**2, "longest_edge": 100**2}, 100**2 * 3 * 2 * 4),
        ({"shortest_edge": 56**2, "longest_edge": 12_845_056}, families.FIRST_GUESS),
        ({"longest_edge": 1}, families.FIRST_GUESS),  # GLM-5-next's, which it does not mean
        (None, families.FIRST_GUESS),
    ],
)
def test_a_picture_is_expected_to_be_no_larger_than_its_processor_makes_it(size, want):
    """A processor that may make it huge says nothing about a usual one: it is guessed."""
    image_processor = SimpleNamespace(size=size, merge_size=2, temporal_patch_size=2)
    processor = SimpleNamespace(image_processor=image_processor)
    equal(families.pixel_bytes(processor), want, "bytes of float32 pixels, each in two frames")
    del image_processor.merge_size  # edges are edges then
    equal(families.pixel_bytes(processor), families.FIRST_GUESS, "no processor of the Qwen family")


@pytest.mark.parametrize("names", [["gradient"], ["gradient", "activation"]])
def test_gradient_checkpointing_takes_the_name_that_transformers_has_for_it(names):
    """The newest of them, for the older one warns; in the form that works with frozen inputs."""
    calls = []
    mllm = SimpleNamespace()
    for name in names:
        setattr(mllm, f"{name}_checkpointing_enable", lambda x, name=name: calls.append((name, x)))
    families.checkpoint_activations(mllm)
    (name, form), *others = calls
    equal((name, form["use_reentrant"], others), (names[-1], False, []), "its name, and one call")


def test_the_memory_of_a_dropped_model_is_free_at_once():
    """An embedder, its collator and its model are no circle, which would wait for the collector."""
    embedder = model.load("toy-random", device="cpu")
    gone = weakref.ref(embedder.mllm)
    gc.disable()
    try:
        del embedder
        assert gone() is None
    finally:
        gc.enable()


def test_arguments_of_a_forward_pass_are_the_models_and_none_of_ours(embedder, monkeypatch):
    """No roles, no cache; positions always given; what else is asked for goes along. Padding on the
    right needs no mask, on the left it does."""
    seen = {}
    monkeypatch.setattr(embedder.mllm.model, "forward", lambda **kwargs: seen.update(kwargs))
    inputs = embedder.collate([Item("red")])
    embedder.outputs(inputs, output_attentions=True)
    expect("roles" not in seen and seen["use_cache"] is False, seen.keys(), "", "outputs")
    equal(seen["output_attentions"], True, "**extra")
    equal(seen["attention_mask"], None, "without a mask")
    equal(seen["input_ids"], inputs["input_ids"], "the rest as it is")
    L = inputs["input_ids"].shape[1]
    equal(seen["position_ids"].shape, (3, 1, L), "M-RoPE")
    mask = torch.ones(1, 1, L, L, dtype=torch.bool).tril()
    embedder.outputs(inputs, mask)
    equal(seen["attention_mask"], mask, "with one")
    left = torch.ones(1, L, dtype=torch.long)
    left[0, 0] = 0
    embedder.outputs({**inputs, "attention_mask": left})
    equal(seen["attention_mask"], left, "padded on the left")


def test_an_item_that_cannot_be_read_is_a_row_of_nan_and_costs_no_other(tmp_path):
    """Where the caller has a list for the errors; else it is one."""
    items, bad = ["red", tmp_path / "nowhere.png", "blue"], []
    z = torch.from_numpy(toy().encode(items, bad=bad))
    equal(z.isfinite().all(1).tolist(), [True, False, True], "the rows that were read")
    expect(z[1].isnan().all(), z[1], "NaN", "what no one takes for a vector")
    expect(len(bad) == 1 and "nowhere.png" in bad[0], bad, "its error", "encode(..., bad=)")
    with pytest.raises(InputError, match="nowhere.png"):
        toy().encode(items)


def test_the_vlm2vec_style_counts_positions_and_pools_the_last_token():
    """Also where there is a picture; the others have positions of rows and columns."""
    item = Item(f"{IMAGE} what?", (Image.new("RGB", (64, 64)),))
    for style, counted in (("vlm2vec", True), ("chat", False), ("coma", False)):
        embedder = model.load("toy-random", prompt=style, device="cpu")
        inputs = embedder.collate([item])
        got = []
        embedder.mllm.model.register_forward_pre_hook(
            lambda _, __, kwargs, got=got: got.append(kwargs["position_ids"]), with_kwargs=True
        )
        with torch.no_grad():
            embedder(inputs)
        count = torch.arange(inputs["input_ids"].shape[1])
        equal(bool((got[0] == count).all()), counted, style)
        equal(embedder.pooling, "last" if counted else "mean", style)


def test_pooling_is_what_the_settings_say_whatever_K_is():
    """A code, and the last token alone."""
    inputs = None
    for pooling, K in (("mean", 4), ("last", 1)):
        embedder = model.load("toy-random", compress_tokens=4, pooling=pooling, device="cpu")
        inputs = embedder.collate([Item("red"), Item("a longer text")])
        with torch.no_grad():
            h, z = embedder.hidden(inputs), embedder(inputs)
        want = model.compression_pool(h, inputs["attention_mask"], K)
        close(z, nn.functional.normalize(want, dim=1), pooling, 1e-6)


# ---------------------------------------------------------------------------------- load and save


def test_options_of_load_reach_the_collator_and_the_processor():
    """The longest row; the smallest and the largest picture."""
    embedder = model.load("toy-random", max_length=33, max_pixels=56 * 56, device="cpu")
    equal(embedder.collate.max_length, 33, "max_length")
    equal(embedder.collate.row(Item("word " * 60)).length, 33, "max_length")
    size = dict(embedder.processor.image_processor.size)
    equal(size["longest_edge"], 56 * 56, "max_pixels")
    expect(size["shortest_edge"] <= 56 * 56, size, "a range", "min(low, high)")


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (dict(min_pixels=3000), (3000, None)),
        (dict(max_pixels=5000), (None, 5000)),
        (dict(min_pixels=3200, max_pixels=5000), (3200, 5000)),
        (dict(min_pixels=5000, max_pixels=5000), (5000, 5000)),
        (dict(max_pixels=100), (100, 100)),
    ],
)
def test_the_range_of_picture_sizes_is_one(good, flags, want):
    """What is not given is the model's own, but for a smallest above the largest that is."""
    config = AutoConfig.from_pretrained(good)
    own = dict(families.load_processor(good, config).image_processor.size)
    size = dict(families.load_processor(good, config, **flags).image_processor.size)
    low, high = want
    equal(size["shortest_edge"], low or own["shortest_edge"], f"{flags}, {own}")
    equal(size["longest_edge"], high or own["longest_edge"], f"{flags}, {own}")


def test_a_range_that_is_none_is_refused(good):
    """The smallest above the largest; a model that takes no range."""
    config = AutoConfig.from_pretrained(good)
    with pytest.raises(InputError, match="--min-pixels 5000 is above --max-pixels 4999"):
        families.load_processor(good, config, 5000, 4999)
    with pytest.raises(InputError, match="above the model's own largest picture"):
        families.load_processor(good, config, 10**9)


def test_only_rank_0_writes_a_model_and_all_take_part(embedder, tmp_path, monkeypatch):
    """A sharded one is gathered from every rank, so that none may return before."""
    gathered = []
    monkeypatch.setattr(model.sharding, "whole_weights", lambda x: gathered.append(x))
    for rank, there in ((1, False), (0, True)):
        monkeypatch.setattr(model.ranks, "rank", lambda rank=rank: rank)
        model.save(embedder, tmp_path / f"{rank}")
        equal((tmp_path / f"{rank}").exists(), there, f"rank {rank}")
    equal(gathered, [embedder, embedder], "whole_weights on both")


def test_of_a_sharded_model_the_gathered_weights_are_saved(embedder, tmp_path, monkeypatch):
    """Its own are parts of them."""
    name = "model.language_model.norm.weight"
    whole = {k: p.detach() for k, p in embedder.mllm.named_parameters() if k != "lm_head.weight"}
    whole[name] = torch.full_like(whole[name], 7.0)
    monkeypatch.setattr(model.sharding, "whole_weights", lambda _: whole)
    model.save(embedder, tmp_path / "m")
    saved = load_file(tmp_path / "m" / "model.safetensors")
    sevens = [k for k, x in saved.items() if x.unique().tolist() == [7.0]]  # by whatever name
    equal(len(sevens), 1, "write_model(..., weights)")


def test_a_model_that_is_no_embedder_yet_has_no_settings(embedder, tmp_path):
    """nanocoma.json is an embedder's."""
    for embedding in (True, False):
        model.save(embedder, tmp_path / f"{embedding}", embedding)
        there = (tmp_path / f"{embedding}" / "nanocoma.json").exists()
        equal(there, embedding, "save(..., embedding)")


def test_on_a_cpu_all_of_a_model_is_float32(tmp_path):
    """Of a checkpoint in bfloat16, too, which is slow there."""
    model.save(toy().bfloat16(), tmp_path / "m")
    again = model.load(tmp_path / "m", device="cpu")
    equal({p.dtype for p in again.parameters()}, {torch.float32}, "load")


# ------------------------------------------------------------------------------- families, alone


@pytest.mark.parametrize("name", ["cross_attn", "crossattention"])
def test_layers_that_look_at_the_picture_itself_are_refused(name):
    """By both names that they have; plain attention by no name."""
    for part, refused in ((name, True), ("self_attn", False), ("cross_attn_norm", False)):
        decoder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({part: nn.Identity()})])})
        config = SimpleNamespace(model_type="mllama")
        mllm = SimpleNamespace(get_decoder=lambda d=decoder: d, config=config)
        if refused:
            with pytest.raises(InputError, match="sees pictures by cross-attention"):
                families.refuse_cross_attention(mllm)
        else:
            families.refuse_cross_attention(mllm)


@pytest.mark.parametrize("kernel", ["eager", "flash_attention_2", "flex_attention"])
def test_a_kernel_that_would_not_take_the_mask_is_refused(kernel):
    """sdpa takes booleans; eager would add them, flash attention leave them out."""
    config = SimpleNamespace(model_type="x", _attn_implementation=kernel)
    mllm = SimpleNamespace(get_decoder=lambda: nn.Identity(), config=config)
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(InputError, match="the compression mask needs --attn sdpa"):
        families.attention_mask(mllm, {"attention_mask": mask[:, 0, 0]}, mask)
    equal(families.attention_mask(mllm, {"attention_mask": torch.ones(1, 2)}, None), None, "none")


def test_the_vision_tower_is_asked_for_as_that_of_pictures():
    """A model may have encoders for sounds and videos, too."""
    asked = []
    mllm = SimpleNamespace(get_encoder=lambda modality="all": asked.append(modality))
    families.vision_tower(mllm)
    equal(asked, ["image"], "families.vision_tower")


def test_positions_without_rope_of_its_own_count_real_tokens():
    """From 0, whatever stands in front, and on into what stands behind; a family's own are asked
    for with all that they need."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    config = SimpleNamespace(get_text_config=lambda: None)
    plain = SimpleNamespace(model=SimpleNamespace(), config=config)
    want = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    equal(families.position_ids(plain, {"attention_mask": mask}, False).tolist(), want, "a count")
    seen = []

    def rope(**kwargs):
        seen.append(kwargs)
        return torch.full((3, 2, 5), 7), None

    mllm = SimpleNamespace(model=SimpleNamespace(get_rope_index=rope), config=config)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    inputs = {name: torch.tensor(i) for i, name in enumerate(names)} | {"attention_mask": mask}
    equal(families.position_ids(mllm, inputs, True).tolist(), want, "sequential: a count")
    equal(seen, [], "sequential")
    equal(families.position_ids(mllm, inputs, False).unique().tolist(), [7], "the family's own")
    for name in inputs:
        expect(seen[0][name] is inputs[name], seen[0], name, "get_rope_index")


def test_a_processor_keeps_all_of_its_parts_but_that_for_videos():
    """Which needs a package of its own."""

    class Base:
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer", "video_processor"]

    kept = families.images_only(Base)
    equal(kept.get_attributes(), ["image_processor", "tokenizer"], "images_only")
    equal((kept.__name__, issubclass(kept, Base)), ("Base", True), "its class in all else")
