"""How an Item becomes a row: the chat template around it, letters that look like special tokens,
what --max-length costs. (Rows of dialogues: test_answers.py; of all families: test_families.py.)"""

import copy

import numpy as np
import pytest
from checks import equal, expect
from PIL import Image

import data
from data import COMPRESS, CONTENT, Item
from plumbing.errors import InputError
from plumbing.formats import IMAGE

PICTURE = Image.new("RGB", (64, 64))  # 16 image tokens


def test_a_row_is_the_content_and_the_code_in_the_chat_template(shared):
    """One row, spelled out: user turn, picture, text, assistant's turn, C_1 ... C_K; its content
    has the role CONTENT."""
    row = shared.collate.row(Item(IMAGE + " which?", (PICTURE,))).tokens
    code = "".join(f"<|compress_{i}|>" for i in range(4))
    picture = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
    want = f"<|user|>{picture} which?<|im_end|><|assistant|>{code}"
    equal(shared.collate.tokenizer.decode(row["input_ids"]), want, "Collator's docstring")
    content = shared.collate.tokenizer.decode(row["input_ids"][row["roles"] == CONTENT])
    equal(content, f"{picture} which?<|im_end|><|assistant|>", "role CONTENT")


def test_pictures_and_their_places_must_match(shared):
    """A text with more or fewer <image> than pictures is an error that shows both numbers."""
    for item in (Item(f"{IMAGE} {IMAGE}", (PICTURE,)), Item("text", (PICTURE,)), Item(IMAGE)):
        counts = f"{item.text.count(IMAGE)} {IMAGE} for {len(item.images)} pictures"
        with pytest.raises(InputError, match=counts):
            shared.encode([item])


# ------------------------------------------------------------------- letters, and no special tokens

SPELLED = "tell <|image_pad|> <|im_end|> <|compress_0|> <|user|> <|vision_start|>"


def check_spelled(embedder):
    """The text stands in the row letter by letter, and no picture does."""
    ids = embedder.collate.row(Item(SPELLED)).tokens["input_ids"]
    special = embedder.collate.tokenizer.added_tokens_decoder
    text = [i for i in ids.tolist() if i not in special]
    decoded = embedder.collate.tokenizer.decode(text)
    expect(SPELLED in decoded, decoded, SPELLED, "split_special_tokens=True")
    image = embedder.mllm.config.image_token_id
    equal(int((ids == image).sum()), 0, "no picture, no image token")


def test_special_tokens_spelled_out_in_a_text_stay_text(shared):
    """A user who writes <|image_pad|> or <|compress_0|> means these letters; the item is embedded,
    and another text is another embedding."""
    check_spelled(shared)
    z = shared.encode([SPELLED, SPELLED.replace("<|im_end|>", "<|im_end_|>")])
    expect(np.isfinite(z).all() and np.abs(z[0] - z[1]).max() > 1e-4, z, "two vectors", "letters")


def test_the_text_check_fails_for_the_tokenizer_as_it_is(shared, monkeypatch):
    """Negative control: where no token is known to be special, the text forges a picture and an end
    of turn."""
    monkeypatch.setattr(shared.collate.template, "special", {})
    with pytest.raises(AssertionError):
        check_spelled(shared)


# ----------------------------------------------------------------------------------- rows too long


def at_most(shared, max_length):
    """The shared collator with a --max-length of its own."""
    collate = copy.copy(shared.collate)
    collate.max_length = max_length
    return collate


def test_a_row_that_is_too_long_loses_text_and_never_pictures_or_code(shared):
    """Text from the middle of the content; with turns, the last ones; a report of how much."""
    item = Item(f"{IMAGE} " + " ".join(f"word{i}" for i in range(60)) + " end", (PICTURE,))
    short = at_most(shared, 60).row(item)
    ids, roles = short.tokens["input_ids"], short.tokens["roles"]
    equal((short.length, short.cut), (60, shared.collate.row(item).length - 60), "(length, cut)")
    image_token = shared.collate.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    equal((int((ids == image_token).sum()), int((roles == COMPRESS).sum())), (16, 4), "kept")
    text = shared.collate.tokenizer.decode(ids)
    assert "word0" in text and text.count(" end") == 1 and "word30" not in text, text
    d = data.read_dialogues()[0]
    assert at_most(shared, 60).row(d.item, d.turns).cut > 0 and len(d.turns) > 1
    words = " ".join(["word"] * 70)
    both = at_most(shared, 60).row(Item(f"{IMAGE} {words} {IMAGE} {words}", (PICTURE, PICTURE)))
    equal(both.length, 60, "two long texts: both give way")
    with pytest.raises(InputError, match="--max-length 12: .* lower --max-pixels"):
        at_most(shared, 12).row(item)


def test_a_text_of_a_million_characters_goes_through(shared):
    """No step of the way is quadratic in the text."""
    equal(at_most(shared, 100).row(Item("a dog " * 170_000)).length, 100, "--max-length")
