"""One code path for eight families: Qwen2-VL, 2.5-VL and 3-VL, LLaVA-NeXT, Idefics3 (SmolVLM),
SmolVLM2, Gemma 3, InternVL. Tiny random models with the interface of the released ones
(tests/families.py).

    pytest tests/test_families.py            half a minute with one thread
    pytest tests/test_families.py -k gemma3  one family
"""

import copy
import math
from contextlib import nullcontext

import families
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_map_only
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available

import contrastive
import evaluate
import model
import pretrain
from data import COMPRESS, CONTENT, PAD, QUESTION, Item
from plumbing import last_layer
from plumbing.config import TrainingFlags
from plumbing.errors import InputError
from plumbing.families import FIRST_GUESS, checkpoint_activations, pixel_bytes
from plumbing.memory import Budget
from plumbing.template import STYLES
from plumbing.weights import Settings

K = 3
TAU = 0.05


@pytest.fixture(scope="session", params=families.FAMILIES)
def folder(request, family_folder):
    """A model folder of one family."""
    return family_folder(request.param)


@pytest.fixture(scope="session")
def loaded(folder):
    """The family's Embedder, as loaded. Read only: tests that train take a `fresh` one."""
    torch.set_num_threads(1)
    return model.load(folder, K, "mean", "coma", "cpu").eval()


@pytest.fixture
def fresh(loaded):
    """A copy of the Embedder that a test may train."""
    embedder = copy.deepcopy(loaded)
    embedder.collate = loaded.collate
    return embedder


def photo(seed, size=(64, 64)) -> Image.Image:
    """Noise in large blocks: a picture whose pixels matter at any resolution."""
    noise = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy()).resize(size, Image.NEAREST)


TURNS = (("What is on the left?", "a circle"), ("How many objects?", "two"))
ITEMS = [  # every kind of input that there is, of unequal lengths
    Item("a red circle above a blue square"),
    Item("<image>", (photo(0),)),
    Item("<image> Which shape is it?", (photo(1, (100, 60)),)),
    Item("<image> or <image>: which is larger?", (photo(2, (60, 100)), photo(3))),
]


def distance(a, b) -> float:
    """Largest absolute difference."""
    return float((a - b).detach().abs().max())


def examples(embedder, n=4) -> list:
    """n stage-1 rows about different pictures, with answers that tell them apart."""
    turns = [TURNS[:1], TURNS, (("Which colour?", "green and blue"),), TURNS[::-1]]
    rows = [embedder.collate.row(Item("<image>", (photo(i),)), turns[i % 4]) for i in range(n)]
    return [pretrain.Example(row) for row in rows]


def pairs(embedder, n=6) -> contrastive.Batch:
    """A stage-2 batch, n pictures and as many texts."""
    texts = ["one", "a circle", "two red squares", "the photo of a green triangle", "yes", "no one"]
    items = [Item("<image> find the caption", (photo(i, (56 + 4 * i, 60)),)) for i in range(n)]
    rows = [embedder.collate.row(x) for x in items + [Item(t) for t in texts[:n]]]
    return contrastive.Batch(rows, torch.arange(n)[:, None], torch.arange(n))


def steps(embedder, gradient, n=6, lr=3e-3) -> list:
    """n steps of AdamW; gradient() leaves a gradient and returns the loss. -> the losses."""
    trained = [p for p in embedder.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=lr), []
    for _ in range(n):
        losses.append(gradient())
        optimizer.step()
        optimizer.zero_grad()
    return losses


# ------------------------------------------------------------------------------------- one by one


def test_a_batch_gives_what_one_by_one_gives(loaded):
    """Text, picture, both, two pictures of different sizes: padding, and who else is in the batch,
    change no embedding; and the four inputs have four different ones."""
    with torch.no_grad():
        together = loaded(loaded.collate(ITEMS))  # (4, D)
        alone = torch.cat([loaded(loaded.collate([x])) for x in ITEMS])
    gap = distance(together, alone)
    assert gap < 1e-5, f"got {gap:.1e}, want < 1e-5: padding or another row's picture leaks in"
    near = (together @ together.T - torch.eye(len(ITEMS))).max()
    assert near < 0.99999, f"two different inputs have cosine {near:.6f}"


def test_the_tokens_are_those_of_the_whole_text(loaded):
    """The row is tokenized as other programs tokenize the same prompt: in one piece, so that what
    stands next to the user's text may share a token with it."""
    collate, tokenizer, template = loaded.collate, loaded.collate.tokenizer, loaded.collate.template
    begin = tokenizer.decode([*template.start_ids, *template.head_ids]) + template.before_text
    answer = tokenizer.decode(template.answer_ids) + template.before_answer
    code = tokenizer.decode(collate.compress_ids)
    end = STYLES[loaded.style] + template.after_text + answer + code
    for text in ("a red circle.", "What is it? ", " two\n", "caf\u00e9 \u732b!"):
        want = tokenizer(begin + text + end, add_special_tokens=False).input_ids
        got = collate.row(Item(text)).tokens["input_ids"].tolist()
        assert got == want, repr(begin + text + end)


def test_a_row_is_as_long_as_max_length_says(loaded):
    """With the token that begins it, too, where the tokenizer brings one."""
    collate = copy.copy(loaded.collate)
    whole = collate.row(ITEMS[0]).length
    collate.max_length = whole - 3
    got = collate.row(ITEMS[0])
    assert (got.length, got.cut) == (whole - 3, 3)


# ------------------------------------------------------------------------------- compression mask


def two_pictures(embedder):
    """The same dialogue about two pictures of one size: inputs that differ in pixels alone.

    Trap: Gemma 3's first layer sees 16 tokens back, and there are two layers here; a long prompt
    between picture and C would hide the picture from C's first layer, and so from the questions."""
    settings = Settings(K, "mean", "chat")
    short = model.Embedder(embedder.mllm, embedder.processor, settings).collate
    a, b = (short([Item("<image>", (photo(s),)), ITEMS[0]], [TURNS, TURNS[:1]]) for s in (1, 2))
    assert torch.equal(a["input_ids"], b["input_ids"])
    return a, b


def influence(embedder, cut_code, compress=True) -> float:
    """How much other pixels change the hidden states of questions and answers. `cut_code`: the
    compression tokens see no content either; compress=False: plain causal attention otherwise."""
    a, b = two_pictures(embedder)
    roles = a["roles"]
    mask = pretrain.compression_mask(roles)  # (B, 1, L, L)
    if not compress:
        mask = pretrain.compression_mask(roles.clamp(max=COMPRESS))
    if cut_code:
        blind = (roles[:, :, None] == COMPRESS) & (roles[:, None, :] == CONTENT)
        mask = mask & ~blind[:, None]
    with torch.no_grad():
        h = [embedder.hidden(inputs, mask) for inputs in (a, b)]
    later = roles[0] >= QUESTION
    return distance(h[0][0, later], h[1][0, later])


def test_the_picture_reaches_the_questions_only_through_the_code(loaded):
    """CoMa, section 3.1. With C's view of the picture cut as well, other pixels change nothing at
    all behind C: exactly 0. With C's view, they do; and without the mask, they do with C cut."""
    got = influence(loaded, cut_code=True)
    assert got == 0, f"got {got:.1e}, want exactly 0: a question token sees the picture past C"
    got = influence(loaded, cut_code=False)
    assert got > 1e-3, f"got {got:.1e}: the picture does not reach the questions through C"
    got = influence(loaded, cut_code=True, compress=False)
    assert got > 1e-3, f"got {got:.1e}: this test would not notice a missing mask"


@pytest.mark.parametrize("stage", [pretrain, contrastive, evaluate])
def test_a_family_whose_text_sees_pictures_past_the_mask_is_refused_by_every_stage(
    stage, once, tmp_path
):
    """A real Mllama (Llama 3.2 Vision), whose cross-attention looks at the picture itself: stage
    1's mask would not hold it back. Said when it is loaded, by each rank alike."""
    name = once("mllama", lambda folder: families.build("mllama", folder))
    flags = {"model": str(name)} if stage is evaluate else {"model": str(name), "steps": 1}
    if stage is not evaluate:
        flags["out"] = str(tmp_path / "out")
    with pytest.raises(InputError, match="mllama's text sees pictures by cross-attention"):
        stage.main(stage.Config(**flags))


def test_a_mask_that_hides_nothing_changes_nothing(loaded):
    """What a family adds to causal attention (Gemma 3: a sliding window, and image tokens that see
    one another both ways) stays when a mask is given."""
    inputs = loaded.collate(ITEMS)
    real = inputs["roles"] != PAD
    everything = pretrain.compression_mask(inputs["roles"])  # no questions here: nothing is hidden
    with torch.no_grad():
        gap = distance(loaded.hidden(inputs, everything)[real], loaded.hidden(inputs)[real])
    assert gap < 1e-5, f"got {gap:.1e}, want < 1e-5"


def test_both_stages_see_the_same_code(loaded):
    """The K tokens' hidden states under stage 1's mask, a dialogue behind them, are those of
    stage 2: what pre-training put into the code is what the embedding is made of."""
    items = ITEMS[1:]
    stage1, stage2 = loaded.collate(items, [TURNS] * len(items)), loaded.collate(items)
    with torch.no_grad():
        h1 = loaded.hidden(stage1, pretrain.compression_mask(stage1["roles"]))
        h2 = loaded.hidden(stage2)
    gap = distance(h1[stage1["roles"] == COMPRESS], h2[stage2["roles"] == COMPRESS])
    assert gap < 1e-5, f"got {gap:.1e}, want < 1e-5"


# ---------------------------------------------------------------------------------------- training


def test_under_autocast_the_vectors_are_the_same_but_for_bfloat16(loaded, monkeypatch):
    """As on a GPU, float32 weights: where texts and pictures are joined their types must agree."""
    embedder = loaded
    items = [Item("red"), Item("<image> what is it?", (photo(0),))]
    want = embedder.encode(items)
    monkeypatch.setattr(embedder, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    cosines = (embedder.encode(items) * want).sum(1)
    assert 0.995 < cosines.min() < 1 - 1e-7, f"{cosines}: want > 0.995, and not the same"


def test_smolvlms_pictures_have_the_type_of_its_weights(family_folder, monkeypatch):
    """Under autocast, too: up to some version the library joins only what has one type."""
    embedder = model.load(family_folder("smolvlm"), K, "mean", "coma", "cpu")
    monkeypatch.setattr(embedder, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    seen = []
    embedder.mllm.model.connector.register_forward_hook(lambda part, x, z: seen.append(z.dtype))
    embedder.encode([photo(0)])
    assert seen == [torch.float32], f"got {seen}, want its weights' float32"


def test_stage_1_learns(fresh):
    """A few steps on four dialogues: the answers' loss falls, from near ln V."""
    batch = examples(fresh)
    losses = steps(fresh, lambda: pretrain.accumulate(fresh, batch, 200)[0])
    chance = math.log(fresh.mllm.get_input_embeddings().weight.shape[0])
    assert losses[0] > 0.5 * chance, f"first loss {losses[0]:.2f}, chance {chance:.2f}"
    assert losses[-1] < 0.8 * losses[0], f"no fall: {[round(x, 2) for x in losses]}"


def test_stage_2_learns(fresh):
    """A few steps on six pairs: InfoNCE falls from about ln 6 or more."""
    batch, budget = pairs(fresh), Budget(400)  # two chunks or more
    losses = steps(fresh, lambda: contrastive.gradcache_step(fresh, batch, 0.3, budget).loss, n=10)
    assert losses[0] > 0.7 * math.log(6), f"first loss {losses[0]:.2f}, ln 6 = {math.log(6):.2f}"
    assert losses[-1] < 0.8 * losses[0], f"no fall: {[round(x, 2) for x in losses]}"


def gradient(embedder) -> torch.Tensor:
    """All of it in one vector; zero where there is none."""
    parts = []
    for p in embedder.parameters():
        if p.requires_grad:
            parts.append((torch.zeros_like(p) if p.grad is None else p.grad).flatten())
    return torch.cat(parts).clone()


def test_checkpointing_changes_no_gradient(fresh):
    """Layers that run again in the backward pass see the same mask: stage 1's gradient stays."""
    batch = examples(fresh, 2)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(fresh.train().mllm)
        fresh.zero_grad()
        pretrain.accumulate(fresh, batch, 8192)
        grads.append(gradient(fresh))
    gap = distance(*grads) / float(grads[0].abs().max())
    assert gap < 1e-5, f"got {gap:.1e}, want < 1e-5"


def test_the_last_mlp_meets_only_what_is_read(fresh, monkeypatch):
    """The embeddings and gradients are those of a model that leaves nothing out; so they are where
    layers run again in the backward pass."""
    fresh.double().train()
    met, results = [], []
    down = fresh.mllm.get_decoder().layers[-1].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: met.append(args[0].shape[:-1].numel()))
    inputs = tree_map_only(torch.Tensor, to_double, fresh.collate(ITEMS))
    B, L = inputs["attention_mask"].shape
    for way in ("where read", "run again", "everywhere"):
        if way == "run again":
            checkpoint_activations(fresh.mllm)
        if way == "everywhere":
            monkeypatch.setattr(last_layer, "OnlyAt", lambda tokens: nullcontext())
        fresh.zero_grad()
        z = fresh(inputs)
        (z * torch.arange(z.numel()).view_as(z)).sum().backward()
        results.append((z.detach(), gradient(fresh)))
    rows = [B * K] * 3 + [B * L] * 2
    assert met == rows, f"tokens that the last MLP met: got {met}, want {rows}"
    limit = 1e-6 if fresh.mllm.config.model_type == "gemma3" else 1e-10
    for got in results[:2]:
        for x, want in zip(got, results[2], strict=True):
            gap = distance(x, want) / float(want.abs().max())
            assert gap < limit, f"got {gap:.1e}, want < {limit}"


def test_gradcache_with_remembered_pictures_is_exact(fresh):
    """In float64 the gradient is that of the whole batch in one graph; so it is when a frozen
    vision tower's output is kept from the first pass, which then runs half as often. (Gemma 3's
    norms compute in float32 whatever the weights are: 1e-6 there, between one graph and chunks.)"""
    fresh.double().train()
    tower = fresh.mllm.get_encoder(modality="image").requires_grad_(False)
    batch = pairs(fresh)  # its ids stay whole numbers
    rows = [r._replace(images=tree_map_only(torch.Tensor, to_double, r.images)) for r in batch.rows]
    batch = batch._replace(rows=rows)
    runs = []
    first = next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))
    first.register_forward_pre_hook(lambda *_: runs.append(1))

    fresh.zero_grad()
    z = fresh(fresh.collate.pad_rows(batch.rows))
    contrastive.info_nce(z[:6], z[6:], TAU)[0].backward()
    grads, counts = {"one graph": gradient(fresh)}, {}
    for where in ("off", "device", "host"):
        runs.clear()
        fresh.zero_grad()
        contrastive.gradcache_step(fresh, batch, TAU, Budget(120, 0, where))
        grads[where] = gradient(fresh)
        counts[where] = len(runs)
    loose = fresh.mllm.config.model_type == "gemma3"
    for got, want, limit in (
        ("off", "one graph", 1e-6 if loose else 1e-10),
        ("device", "off", 1e-10),
        ("host", "off", 1e-10),
    ):
        gap = distance(grads[got], grads[want]) / float(grads["one graph"].abs().max())
        assert gap < limit, f"cache {got} against {want}: {gap:.1e} apart, want < {limit}"
    assert counts["off"] == 2 * counts["device"] == 2 * counts["host"] > 0, counts


def to_double(x):
    return x.double() if x.is_floating_point() else x


def test_no_picture_takes_more_than_is_expected(loaded):
    """`encode` makes as many pictures into rows at a time as fit by this; where the settings do not
    say how large one becomes, it guesses."""
    limit = pixel_bytes(loaded.processor)
    if "qwen" not in loaded.mllm.config.model_type:
        assert limit == FIRST_GUESS
        return
    images = loaded.collate.row(Item("<image>", (photo(0, (2000, 1500)),))).images
    size = images["pixel_values"].nbytes
    assert limit / 2 < size <= limit, f"{size:,} bytes, expected at most {limit:,}"


# ------------------------------------------------------------------------------------ save and load


def embed_all(embedder) -> torch.Tensor:
    """The embeddings of `ITEMS`: (4, D)."""
    with torch.no_grad():
        return embedder.eval()(embedder.collate(ITEMS))


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
def test_with_torchvision_the_fast_processor_is_used_and_auto_processor_agrees(loaded, tmp_path):
    """The picture goes through torchvision; a saved folder loads with AutoProcessor, video part and
    all, and writes the same tokens and pixels."""
    kinds = [c.__name__ for c in type(loaded.processor.image_processor).__mro__]
    assert any("Torchvision" in name or name.endswith("Fast") for name in kinds), kinds
    model.save(loaded, tmp_path)
    auto, picture = AutoProcessor.from_pretrained(tmp_path), photo(1, (100, 60))
    theirs = auto(text=[loaded.collate.template.picture], images=[picture], return_tensors="pt")
    ours = loaded.collate.row(Item("<image>", (picture,)))
    for key, x in ours.images.items():
        assert x.shape == theirs[key].shape and (x - theirs[key]).abs().max() == 0, key


def test_lora_trains_its_own_weights_and_merges_without_a_trace(folder, fresh, tmp_path):
    """LoRA with DoRA on the language model: nothing else is trained but the K token rows; after
    some steps the adapter loaded from disk, and the model it is merged into, saved and loaded,
    embed alike, with the K, pooling and prompt that were saved."""
    base, batch = embed_all(fresh), pairs(fresh)
    cfg = TrainingFlags(model=str(folder), lora_rank=4, dora=True, lora_dropout=0.0)
    model.choose_trained(fresh, cfg)
    trained = {n: p for n, p in fresh.named_parameters() if p.requires_grad}
    rows = {n: p for n, p in trained.items() if "trainable_tokens" in n}
    strangers = [n for n in trained if "lora_" not in n and n not in rows]
    assert not strangers, f"also trained: {strangers}"
    assert {tuple(p.shape) for p in rows.values()} == {(K, base.shape[1])}, rows.keys()
    wrapped = {n.split(".lora_")[0].rpartition(".")[2] for n in trained if ".lora_" in n}
    assert wrapped == {"q_proj", "k_proj", "v_proj", "o_proj"}, wrapped
    assert len({n.split(".lora_")[0] for n in trained if ".lora_" in n}) == 4 * families.LAYERS

    budget = Budget(400)
    steps(fresh, lambda: contrastive.gradcache_step(fresh, batch, TAU, budget).loss, n=3, lr=0.03)
    after = embed_all(fresh)
    assert (after * base).sum(1).min() < 0.999, "training moved nothing: the test would be empty"

    model.save(fresh, tmp_path / "adapter")
    again = embed_all(model.load(tmp_path / "adapter", device="cpu"))
    merged = embed_all(model.merge(fresh))
    model.save(fresh, tmp_path / "merged")
    loaded = model.load(tmp_path / "merged", device="cpu")
    assert (loaded.K, loaded.pooling, loaded.style) == (K, "mean", "coma")
    plain = embed_all(loaded)
    for name, z in (("loaded adapter", again), ("merged", merged), ("merged, loaded", plain)):
        cosine = float((z * after).sum(1).min())
        assert cosine > 0.99999, f"{name}: cosine {cosine:.6f} to the trained model"
