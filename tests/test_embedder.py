"""The embedder: what goes in is one vector, whatever stands beside it, before and after saving."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checks import close, equal, expect, toy
from PIL import Image
from transformers import AutoModelForImageTextToText

import contrastive
import model
import pretrain
from data import Item
from plumbing import families as families_of_models
from plumbing import loader
from plumbing.config import TrainingFlags
from plumbing.errors import InputError
from plumbing.formats import IMAGE
from toy.world import Scene, Shapes

SCENES = [Shapes().dialogue(i)[0][1][0] for i in range(4)]
ITEMS = [  # of unequal lengths, text only, picture only, both, two pictures, a small picture
    Item("red"),
    Item("a picture of a large red circle at the top left and nothing else at all"),
    Item(IMAGE, (SCENES[0],)),
    Item(IMAGE + " what color is the circle?", (SCENES[1],)),
    Item(f"{IMAGE} or {IMAGE}?", (SCENES[0], SCENES[2])),
    Item(f"tell {IMAGE} {IMAGE}", (SCENES[3], Scene(SCENES[0].objects, view="top left"))),
]


def alone(embedder, items=ITEMS):
    """Each item in a batch of its own: (n, D)."""
    with torch.no_grad():
        return torch.cat([embedder(embedder.collate([x])) for x in items])


# ------------------------------------------------------------------------------------------ batches


def check_batch(batch_of, embedder):
    want = alone(embedder)
    for order in (range(6), (5, 0, 3), (4, 2, 1)):
        with torch.no_grad():
            got = batch_of(embedder, [ITEMS[i] for i in order])
        for i, z in zip(order, got, strict=True):
            close(z, want[i], f"item {i} of the batch {list(order)}: {ITEMS[i].text!r}", 1e-5)


def right_batch(embedder, items):
    return embedder(embedder.collate(items))


def forgets_the_mask(embedder, items):
    inputs = embedder.collate(items)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    return embedder(inputs)


def swaps_pictures(embedder, items):
    inputs = embedder.collate(items)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].flip(0)
    return embedder(inputs)


def test_a_batch_is_its_items_one_by_one(shared):
    """To 1e-5: text only, picture only, both, two pictures in one item, a picture of another
    size."""
    check_batch(right_batch, shared)
    want = alone(shared)
    gaps = torch.cdist(want, want) + torch.eye(6)
    expect(gaps.min() > 0.01, gaps.min(), "> 0.01", "six different embeddings")
    close(want.norm(dim=1), torch.ones(6), "unit length", 1e-6)


@pytest.mark.parametrize("wrong", [forgets_the_mask, swaps_pictures])
def test_the_batch_check_fails_for_a_wrong_batch(shared, wrong):
    """Negative control: padding taken for text, pictures given to the wrong items."""
    with pytest.raises(AssertionError):
        check_batch(wrong, shared)


def test_a_batch_of_pictures_leaves_no_state_behind(shared):
    """Trap: Qwen-VL models remember the last picture batch's positions. A text embedded after a
    batch of pictures is what it was before."""
    before = alone(shared, ITEMS[:2])
    alone(shared, ITEMS[2:])
    equal(alone(shared, ITEMS[:2]), before, "rope_deltas of the last batch")


# ------------------------------------------------------------------------------------------- encode


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """(what a user may pass, the Items it stands for)."""
    path = tmp_path_factory.mktemp("pictures") / "a b.png"
    SCENES[2].render().save(path)
    text, red = "a longer text about a square", Item("red")
    passed = [text, SCENES[1].render(), path, "red", *ITEMS[3:5], "red"]
    pictures = [Item(IMAGE, (SCENES[1],)), Item(IMAGE, (SCENES[2],))]
    return passed, [Item(text), *pictures, red, *ITEMS[3:5], red]


def test_encode_keeps_the_order_and_takes_strings_pictures_paths_and_items(shared, mixed):
    """encode: float32 numpy (n, D), row i is item i, for strings, PIL images, pathlib.Path and
    Items mixed; a string is always text, even one that looks like a path."""
    passed, items = mixed
    z = shared.encode(passed)
    equal((z.dtype, z.shape), (np.dtype("float32"), (7, 128)), "(len(items), D)")
    close(z, alone(shared, items), "each row is its item")
    equal(z[3].tolist(), z[6].tolist(), "the same string twice")
    text = shared.encode([str(passed[2])])
    expect(np.abs(text[0] - z[2]).max() > 0.01, "equal", "different", "a string is text")
    equal(shared.encode([]).shape, (0, 128), "nothing in, nothing out")


def test_no_bar_is_drawn_where_nobody_looks(shared, capsys):
    """A cluster's log would hold a line for each of its updates."""
    shared.encode(["a", "b"], progress="embedding")
    equal(capsys.readouterr().err, "", "stderr is no terminal here")


def test_a_bar_counts_the_items_and_is_gone_in_the_end(shared, monkeypatch):
    """Items, not chunks; a table's lines stand without the bars of its sets."""
    seen, updates = {}, []

    def bar(**options):
        seen.update(options)
        return nullcontext(SimpleNamespace(update=updates.append))

    monkeypatch.setattr(model, "tqdm", bar)
    shared.encode(["a", "b", "c"], progress="embedding")
    equal((seen["desc"], seen["total"], sum(updates)), ("embedding", 3, 3), "items")
    equal(seen["leave"], False, "tqdm")


def test_encode_does_not_depend_on_the_chunks(shared, mixed):
    """chunk_tokens 1 (each item alone), 60, everything; items in another order; with a worker."""
    passed, _ = mixed
    want = shared.encode(passed)
    for budget in (1, 60, 10**6):
        close(shared.encode(passed, chunk_tokens=budget), want, f"chunk_tokens={budget}")
    order = [3, 1, 6, 0, 5, 2, 4]
    close(shared.encode([passed[i] for i in order]), want[order], "permuted")
    close(shared.encode(passed, workers=1), want, "a loader process")


def test_workers_do_not_share_the_place_in_a_picture_s_file(shared, tmp_path):
    """PIL reads an opened file when its pixels are first wanted. One of 75 KB, which is read in
    parts, by two workers at the same time; afterwards it is as whole as before."""
    noise = np.random.default_rng(0).integers(256, size=(160, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    want = shared.encode([Image.fromarray(noise)])
    opened = Image.open(tmp_path / "a.png")
    for workers in (2, 0):
        close(shared.encode([opened] * 6, workers=workers), want.repeat(6, 0), f"workers={workers}")


def test_encode_goes_over_more_items_than_one_window(shared, monkeypatch):
    """300 items: rows of the second window stand where they belong."""
    monkeypatch.setattr(loader, "WINDOW_ITEMS", 256)
    words = [f"{'very ' * (i % 3)}large {i}" for i in range(300)]
    z = shared.encode(words)
    for i in (0, 255, 256, 299):
        close(z[i : i + 1], alone(shared, [Item(words[i])]), f"item {i}")


def test_encode_learns_how_large_pictures_are(shared, monkeypatch):
    """After the first window the next ones hold as many as fit into WINDOW_BYTES: large pictures
    come in smaller windows, whatever was guessed."""
    made = []

    def watched(rows_of, windows, workers, device):
        equal(device, shared.device, "to a GPU pictures travel in half the bytes")
        for window in windows:
            made.append(len(window))
            yield rows_of(window)

    monkeypatch.setattr(model, "prefetch", watched)
    size = sum(x.nbytes for x in shared.collate.row(ITEMS[4]).images.values())
    count = len(ITEMS[4].images)
    monkeypatch.setattr(model.families, "pixel_bytes", lambda processor: size // count // 4)
    monkeypatch.setattr(loader, "WINDOW_BYTES", size)
    shared.encode([ITEMS[4]] * 6)
    equal(made, [4, 1, 1], "four by the guess, then one at a time")


def test_encode_leaves_no_trace(embedder):
    """Dropout is off in encode and the mode is as it was after it; no gradient is made."""
    for part in embedder.mllm.model.language_model.modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.5
    want = embedder.eval().encode(["red"])
    equal(embedder.train().encode(["red"]).tolist(), want.tolist(), "no dropout in encode")
    equal(embedder.training, True, "the mode is restored")
    with torch.no_grad():
        dropped = embedder(embedder.collate([Item("red")]))
    expect(np.abs(dropped[0].numpy() - want[0]).max() > 1e-3, "equal", "different",
           "negative control: in training mode dropout matters")  # fmt: skip


def test_all_that_is_made_on_the_way_is_made_where_the_model_is(monkeypatch):
    """As on a GPU: the device "meta" holds shapes alone, and takes no tensor from another one. What
    the collator makes stays on the host until the model takes it."""
    embedder = model.load("toy-random", compress_tokens=4, prompt="vlm2vec", pooling="mean")
    embedder.to("meta")
    equal(embedder.device.type, "meta", "where its weights are")
    # There is no autocast for meta, and the library reads numbers of a mask of padding.
    monkeypatch.setattr(embedder, "autocast", nullcontext)
    mask_of = pretrain.compression_mask
    monkeypatch.setattr(
        families_of_models, "attention_mask", lambda _, x, mask: mask_of(x["roles"])
    )
    rows = [embedder.collate.row(Item(text)) for text in ("red", "a longer one")]
    inputs = embedder.collate.pad_rows(rows)
    z = embedder(inputs)
    equal((z.device.type, z.shape), ("meta", (2, 128)), "the embeddings")
    equal({x.device.type for x in inputs.values()}, {"cpu"}, "the collator's")
    talk = embedder.collate([Item("red")], [[("What?", "a circle")]])
    for compress in (True, False):
        logits, labels = pretrain.answer_logits(embedder, talk, compress)
        equal((logits.device.type, labels.device.type), ("meta", "meta"), "stage 1")
        equal(len(logits), len(labels), "the answer's tokens")
    equal(contrastive.paper_info_nce(z, z, 0.03).device.type, "meta", "stage 2")


# ------------------------------------------------------------------------------------ save and load


def nudge(embedder):
    """Moves all trained weights, so that the model is none that `load` could make up."""
    torch.manual_seed(3)
    for p in embedder.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    return embedder


def test_a_saved_model_is_the_same_model(embedder, tmp_path):
    """save, then load without any flag: identical embeddings (all weights, the K rows, the pooling
    and the prompt style), from plain transformers files."""
    embedder = nudge(embedder)
    want = embedder.encode(ITEMS)
    model.save(embedder, tmp_path / "m")
    again = model.load(tmp_path / "m", device="cpu")
    equal(again.encode(ITEMS).tolist(), want.tolist(), "bit for bit")
    equal((again.K, again.pooling, again.style), (4, "mean", "chat"), "nanocoma.json")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    for name in ("config.json", "model.safetensors", "tokenizer.json", "nanocoma.json"):
        expect(name in names, names, name, "what transformers reads")
    expect(not list(tmp_path.glob("*.part")), list(tmp_path.iterdir()), "m", "written and renamed")
    model.save(again, tmp_path / "m")  # over itself
    equal(model.load(tmp_path / "m", device="cpu").encode(ITEMS).tolist(), want.tolist(), "twice")


@pytest.mark.parametrize(
    "flags", [dict(pooling="last"), dict(prompt="coma"), dict(compress_tokens=7)]
)
def test_other_settings_are_saved_too(flags, tmp_path):
    """Pooling, prompt style and K come back from the folder."""
    embedder = model.load("toy-random", device="cpu", **flags)
    want = embedder.encode(ITEMS[:3])
    model.save(embedder, tmp_path / "m")
    again = model.load(tmp_path / "m", device="cpu")
    equal(again.encode(ITEMS[:3]).tolist(), want.tolist(), str(flags))
    plain = model.load("toy-random", device="cpu").encode(ITEMS[:3])
    expect(np.abs(plain - want).max() > 1e-3, "no difference", "a difference", f"{flags} is read")


@pytest.mark.parametrize(("base", "dora"), [("toy-random", True), ("a folder", False)])
def test_a_saved_adapter_is_the_same_adapter_and_merges(tmp_path, base, dora):
    """LoRA on a saved embedder, as stage 2 is on stage 1, and DoRA on the untouched toy-random: the
    folder holds the adapter alone, loads to identical embeddings on its base; merged it is a plain
    model with the same ones (cosine > 0.99999)."""
    if base == "a folder":
        base = str(tmp_path / "base")
        model.save(toy(), base)
    embedder = model.load(base, compress_tokens=4, device="cpu").eval()
    bare = embedder.encode(ITEMS)
    cfg = TrainingFlags(model=base, lora_rank=4, dora=dora, lora_dropout=0.0)
    model.choose_trained(embedder, cfg)
    same = embedder.encode(ITEMS)
    expect((same * bare).sum(1).min() > 0.99999, (same * bare).sum(1), 1, "B = 0: nothing changes")
    want = nudge(embedder).encode(ITEMS)
    expect((want * bare).sum(1).min() < 0.999, "unchanged", "changed", "is the adapter used?")
    model.save(embedder, tmp_path / "a")
    names = {p.name for p in (tmp_path / "a").iterdir()}
    expect("adapter_model.safetensors" in names, names, "peft's file", "model.save")
    expect("model.safetensors" not in names, names, "no whole model", "only the adapter")
    again = model.load(tmp_path / "a", device="cpu").eval()
    close(again.encode(ITEMS), want, "loaded adapter", 1e-6)
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    equal(trained, {n for n, p in embedder.named_parameters() if p.requires_grad}, "still trained")
    merged = model.merge(again)
    frozen = [name for name, p in merged.named_parameters() if not p.requires_grad]
    equal(frozen, [], "stage 2 may train all of a merged model, as it may of any other")
    cosine = (merged.encode(ITEMS) * want).sum(1)
    expect(cosine.min() > 0.99999, cosine, "> 0.99999", "the K rows and DoRA's magnitudes too")
    model.save(merged, tmp_path / "m")
    plain = model.load(tmp_path / "m", device="cpu")
    cosine = (plain.encode(ITEMS) * want).sum(1)
    expect(cosine.min() > 0.99999, cosine, "> 0.99999", "merged, saved, loaded")
    equal([n for n, _ in plain.named_parameters() if "lora" in n], [], "a plain model")


def test_only_the_adapter_and_the_new_rows_are_trained():
    """With LoRA: the matrices on q, k, v, o of the language model and the K embedding rows; not the
    vision tower, not the other rows."""
    embedder = model.load("toy-random", compress_tokens=4, device="cpu")
    model.choose_trained(embedder, TrainingFlags(model="toy-random", lora_rank=2))
    names = [n for n, p in embedder.named_parameters() if p.requires_grad]
    rows = [n for n in names if "lora" not in n]
    equal(len(rows), 1, f"the K rows beside LoRA: {rows}")
    equal(dict(embedder.named_parameters())[rows[0]].shape[0], 4, "K rows of the table")
    equal(
        {n.split(".")[-4] for n in names if "lora" in n}, {f"{x}_proj" for x in "qkvo"}, "q k v o"
    )
    expect(not any("visual" in n for n in names), names, "no vision tower", "it stays as it is")


def test_flags_that_say_what_the_checkpoint_says_are_fine(tmp_path):
    """load: K, pooling and prompt may be said again. (Where they contradict it: test_golden.py.)"""
    model.save(toy(), tmp_path / "m")
    again = model.load(tmp_path / "m", 4, "mean", "chat", device="cpu")
    equal((again.K, again.pooling, again.style), (4, "mean", "chat"), "as stored")


@pytest.mark.parametrize(
    "flags", [dict(prompt="loud"), dict(pooling="max"), dict(compress_tokens=-1)]
)
def test_an_impossible_setting_is_an_error(flags):
    """An unknown prompt style or pooling, a K that is no count."""
    with pytest.raises(InputError, match=str(list(flags.values())[-1])):
        model.load("toy-random", device="cpu", **flags)


def test_a_missing_folder_is_an_error_that_names_it():
    """No traceback of the library, and no look-up on the hub for what cannot be a hub id."""
    for name in ("no-such-model", "./a/b", "out/not/there"):
        with pytest.raises(InputError, match=name):
            model.load(name, device="cpu")


# ---------------------------------------------------------------------------------------- positions


@pytest.fixture(scope="module")
def qwen(family_folder):
    return model.load(family_folder("qwen2_5_vl"), compress_tokens=4, device="cpu").eval()


def positions_of(embedder, inputs):
    """The position ids that the MLLM is given."""
    seen = []

    def note(mllm, args, kwargs):
        seen.append(kwargs["position_ids"])

    hook = embedder.mllm.model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        embedder(inputs)
    hook.remove()
    return seen[0]


def check_positions(embed, embedder):
    """M-RoPE: each item's embedding is that under get_rope_index, the model's own positions."""
    inputs = embedder.collate(ITEMS[:4])
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    want = embedder.mllm.model.get_rope_index(**{k: inputs[k] for k in keys})[0]
    others = {k: v for k, v in inputs.items() if k not in ("roles", "mm_token_type_ids")}
    with torch.no_grad():
        h = embedder.mllm.model(**others, position_ids=want, use_cache=False).last_hidden_state
        got = embed(embedder, inputs)
    ends = inputs["attention_mask"].sum(1)
    z = torch.stack([row[n - 4 : n].mean(0) for row, n in zip(h, ends, strict=True)])
    close(got, z / z.norm(dim=1, keepdim=True), "positions of a picture's rows and columns", 1e-5)


def test_positions_follow_the_rows_and_columns_of_a_picture(qwen, shared):
    """M-RoPE, (3, B, L), equal to the model's get_rope_index and unlike a count of tokens where
    there is a picture; the same as a count in a text."""
    for embedder in (qwen, shared):
        inputs = embedder.collate(ITEMS[:4])
        got = positions_of(embedder, inputs)
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        want = embedder.mllm.model.get_rope_index(**{k: inputs[k] for k in keys})[0]
        equal(got, want, "get_rope_index with mm_token_type_ids")
        count = inputs["attention_mask"].cumsum(1) - 1
        real = inputs["attention_mask"] == 1
        same = [(got[:, b, real[b]] == count[b, real[b]]).all().item() for b in range(4)]
        equal(same, [True, True, False, False], "sequential in text, not in a picture")
        check_positions(lambda e, x: e(x), embedder)


def test_forgetting_the_token_types_changes_the_embeddings(qwen):
    """Trap: Qwen2.5-VL falls back to 1-D positions without a word where mm_token_type_ids is
    missing and no positions are given. Negative control of the check above."""

    def forgets(embedder, inputs):
        others = {k: v for k, v in inputs.items() if k not in ("roles", "mm_token_type_ids")}
        embedder.mllm.model.rope_deltas = None
        h = embedder.mllm.model(**others, use_cache=False).last_hidden_state
        z = model.compression_pool(h, inputs["attention_mask"], 4)
        return z / z.norm(dim=1, keepdim=True)

    inputs = qwen.collate(ITEMS[:4])
    with torch.no_grad():
        gaps = (forgets(qwen, inputs) - qwen(inputs)).norm(dim=1).tolist()
    expect(max(gaps[:2]) < 1e-5, gaps, "texts as they were", "positions of text are 1-D anyway")
    expect(min(gaps[2:]) > 1e-3, gaps, "pictures changed", "the trap is real")
    with pytest.raises(AssertionError):
        check_positions(forgets, qwen)


def test_the_k_new_rows_differ_from_each_other(shared):
    """New compression tokens: K rows, none equal to another (equal ones would learn much the same),
    of the size of the other rows; the same for every process."""
    table = model.load("toy-random", compress_tokens=4, device="cpu").mllm.get_input_embeddings()
    rows = table.weight[shared.collate.compress_ids]
    gaps = torch.cdist(rows, rows) + 9 * torch.eye(4)
    expect(gaps.min() > 0.05, gaps, "> 0.05", "noise around the mean row")
    size = rows.norm(dim=1) / table.weight[:400].norm(dim=1).mean()
    expect(((size > 0.5) & (size < 2)).all(), size, "0.5 to 2", "of the size of the other rows")
    again = model.load("toy-random", compress_tokens=4, device="cpu").mllm.get_input_embeddings()
    equal(again.weight, table.weight, "a fixed seed")


def test_paths_and_pictures_are_told_apart_from_text():
    """Item.of: strings are text, everything else is a picture."""
    equal(Item.of("a.png"), Item("a.png"), "a string is text")
    equal(Item.of(Path("a.png")), Item(IMAGE, (Path("a.png"),)), "a path is a picture")
    image = Image.new("RGB", (4, 4))
    equal(Item.of(image), Item(IMAGE, (image,)), "a PIL image")
    equal(Item.of(ITEMS[4]), ITEMS[4], "an Item is itself")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_the_vlm2vec_style_is_what_its_code_feeds_the_model(family, family_folder):
    """Another route: its prompt as one string through transformers' own processor and model, with
    positions 0, 1, 2, ...; the last token, unit length. The same ids, and cosine > 0.99999."""
    folder = family_folder(family)
    ours = model.load(folder, prompt="vlm2vec", device="cpu").eval()
    equal((ours.K, ours.pooling), (0, "last"), "VLM2Vec pools the last token, without a code")
    mllm = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor, token = ours.processor, ours.processor.image_token
    small, photo = Image.new("RGB", (20, 90), "red"), SCENES[0].render()
    ask = " Represent the given image with the following question: what?\n"
    for text, picture in (("a red circle.\n", None), (IMAGE + ask, photo), (IMAGE + "\n", small)):
        item = Item(text, (picture,) if picture else ())
        if picture:  # as its code does with a side of less than 28 pixels
            picture = picture.resize((56, 56)) if min(picture.size) < 28 else picture
        given = processor(
            text=[text.replace(IMAGE, token)], images=[picture] if picture else None,
            return_tensors="pt",
        )  # fmt: skip
        equal(ours.collate([item])["input_ids"], given["input_ids"], f"the ids of {text!r}")
        L = given["input_ids"].shape[1]
        given["position_ids"] = torch.arange(L).expand(3, 1, L)
        with torch.no_grad():
            h = mllm.model(**given).last_hidden_state  # (1, L, D)
        want = torch.nn.functional.normalize(h[0, -1], dim=0).numpy()
        cosine = float((ours.encode([item])[0] * want).sum())
        expect(cosine > 0.99999, cosine, "> 0.99999", f"{family}: {text!r}")


def test_without_a_code_lora_trains_its_matrices_alone():
    """VLM2Vec's: K = 0 has no rows of the table."""
    embedder = model.load("toy-random", compress_tokens=0, pooling="last", device="cpu")
    model.choose_trained(embedder, TrainingFlags(model="toy-random", lora_rank=2))
    names = [n for n, p in embedder.named_parameters() if p.requires_grad and "lora_" not in n]
    equal(names, [], "beside LoRA")
    equal(embedder.adapter.active_peft_config.trainable_token_indices, None, "in its config")
