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
from plumbing.template import Part, Tokens, cut_apart, shorten, side_by_side, tokenize, tokens_in

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


@pytest.mark.parametrize(
    ("max_length", "turns", "text"),
    [
        (0, 3, "0123456789"), (26, 3, "0123456789"), (25, 2, "0123456789"),
        (22, 2, "0123456789"), (21, 1, "0123456789"), (18, 1, "0123456789"),
        (17, 1, "012346789"), (16, 1, "01236789"), (9, 1, "0"), (8, 1, ""),
    ],
)  # fmt: skip
def test_later_turns_go_before_text_and_the_first_one_stays(max_length, turns, text):
    """Three turns of four tokens, a picture of three, a code of one, ten tokens of text."""
    parts = [Part(1, [-1] * 3), Part(1, list(range(10)), 0, True), Part(2, [-2])]
    parts += [Part(3, [-3] * 4, turn) for turn in (1, 2, 3)]
    short, cut = shorten(parts, max_length)
    equal(cut, 26 - tokens_in(short), "how many tokens it cost")
    equal(max(part.turn for part in short), turns, "turns that are left")
    equal("".join(str(i) for i in short[1].content), text, "from the middle")
    with pytest.raises(
        InputError, match="--max-length 7: 1 tokens too many, and no text is left to cut"
    ):
        shorten(parts, 7)


def test_tokens_have_their_places_in_the_text(shared):
    """Behind a special token or not; half a surrogate pair is no text."""
    collate, text = shared.collate, "a dog,\na cat"
    for begins_row in (True, False):
        tokens = tokenize(collate.tokenizer, collate.template, text, begins_row)
        equal((tokens.starts[0], tokens.ends[-1]), (0, len(text)), f"begins_row: {begins_row}")
        pieces = [text[a:b] for a, b in zip(tokens.starts, tokens.ends, strict=True)]
        equal("".join(pieces), text, "each character in one token")
    with pytest.raises(InputError, match="half a surrogate pair"):
        collate.row(Item("a \ud800 dog"))


def test_texts_side_by_side_are_tokenized_as_one():
    """But for two of a user's, a question and its answer; tokens stand by themselves."""
    user, plain, ids = Part(1, "bb", by_user=True), Part(2, "aa"), Part(1, [7, 8])
    for parts, sizes in (
        ([plain, user, plain], [3]), ([user, user], [1, 1]), ([plain, user, user, plain], [2, 2]),
        ([plain, ids, user], [1, 1, 1]), ([ids, ids], [1, 1]), ([], []),
    ):  # fmt: skip
        equal([len(group) for group in side_by_side(parts)], sizes, "groups")


def test_a_token_across_two_texts_belongs_to_the_users():
    """One token over all three, or over two of them; no text gets tokens of another."""
    user, plain = Part(1, "bb", by_user=True), Part(2, "aa")
    for parts, places, want in (
        ([plain, user, plain], [(0, 1), (1, 3), (3, 5), (5, 6)], [1, 2, 1]),
        ([plain, user, plain], [(0, 6)], [0, 1, 0]),
        ([plain, user, plain], [(0, 2), (2, 4), (4, 6)], [1, 1, 1]),
        ([plain, plain, user], [(0, 1), (1, 6)], [1, 0, 1]),
        ([user, plain], [(0, 3), (3, 4)], [1, 1]),
        ([user, plain, plain], [(0, 5), (5, 6)], [1, 0, 1]),
    ):
        ids = list(range(len(places)))
        tokens = Tokens(ids, [start for start, _ in places], [end for _, end in places])
        got = cut_apart(parts, tokens)
        equal([len(part.content) for part in got], want, f"{places}")
        equal([i for part in got for i in part.content], ids, "each once, in order")


def test_a_text_of_a_million_characters_goes_through(shared):
    """No step of the way is quadratic in the text."""
    equal(at_most(shared, 100).row(Item("a dog " * 170_000)).length, 100, "--max-length")
