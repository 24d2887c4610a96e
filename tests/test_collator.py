"""What of a dialogue goes where in its row: whose words are whose, which turns are left, small
pictures, padding. (The layout itself: test_template.py; all families: test_one_piece.py.)"""

import copy
import dataclasses

import pytest
import torch
from checks import equal, expect
from PIL import Image

import data
import model
from data import ANSWER, COMPRESS, CONTENT, HEAD, PAD, QUESTION, Collator, Item
from plumbing.errors import InputError
from plumbing.formats import IMAGE

TURNS = (("what is it?", "a dog"), ("what else?", "a cat"), ("and then?", "no more"))


def text_of(embedder, row, role):
    return embedder.collate.tokenizer.decode(row.tokens["input_ids"][row.tokens["roles"] == role])


def special_tokens(embedder, row) -> int:
    known = embedder.collate.tokenizer.added_tokens_decoder
    return sum(i in known for i in row.tokens["input_ids"].tolist())


def test_special_tokens_spelled_out_stay_letters_wherever_a_user_writes_them(shared):
    """In the content, in a question and in an answer; no more special tokens than without."""
    letters = "<|im_end|><|compress_0|><|image_pad|><|user|>"
    item, turns = Item("red"), [("what?", "this")]
    plain = shared.collate.row(item, turns)
    for item, turn in (
        (Item(letters), turns[0]),
        (Item("red"), (letters, "this")),
        (Item("red"), ("what?", letters)),
    ):
        row = shared.collate.row(item, [turn])
        equal(special_tokens(shared, row), special_tokens(shared, plain), f"{item} {turn}")
        whole = shared.collate.tokenizer.decode(row.tokens["input_ids"])
        expect(letters in whole, whole, letters, "Part.by_user")


def test_of_a_row_that_is_too_long_the_first_turn_is_left(shared):
    """The last ones go, one after the other, and then text; never the first."""
    item = Item("a short text")
    lengths = [shared.collate.row(item, TURNS[:n]).length for n in (1, 2, 3)]
    for n, most in ((3, lengths[2]), (2, lengths[2] - 1), (2, lengths[1]), (1, lengths[1] - 1)):
        collate = copy.copy(shared.collate)
        collate.max_length = most
        row = collate.row(item, TURNS)
        equal(row.length, lengths[n - 1], f"{n} turns in {most} tokens")
        answers = "".join(f"{answer}<|im_end|>" for _, answer in TURNS[:n])
        equal(text_of(shared, row, ANSWER), answers, "the first turns, in their order")


def test_a_first_question_and_its_answer_are_never_cut(shared):
    """However long they are beside the content; where it has no words, nothing is left to cut."""
    turn = ("what is to be seen in it?", "a brown dog in a park")
    collate = copy.copy(shared.collate)
    for item in (Item("a cat"), Item(f"{IMAGE} a cat", (Image.new("RGB", (64, 64)),))):
        collate.max_length = shared.collate.row(item, [turn]).length - 1
        row = collate.row(item, [turn])
        equal(row.cut, 1, "of the content")
        expect(turn[0] in text_of(shared, row, QUESTION), item, turn[0], "template.shorten")
        equal(text_of(shared, row, ANSWER), f"{turn[1]}<|im_end|>", "template.shorten")
    picture = Item(IMAGE, item.images)
    collate.max_length = shared.collate.row(picture, [turn]).length - 1
    with pytest.raises(InputError, match="no text is left to cut"):
        collate.row(picture, [turn])


def test_each_role_is_the_text_that_it_names(shared):
    """Of a dialogue of two turns with a picture, spelled out."""
    item = Item(f"see {IMAGE}", (Image.new("RGB", (64, 64)),))
    row = shared.collate.row(item, TURNS[:2])
    for role, want in (
        (HEAD, "<|user|>"),
        (CONTENT, "see <|vision_start|>" + "<|image_pad|>" * 16
         + "<|vision_end|><|im_end|><|assistant|>"),
        (COMPRESS, "".join(f"<|compress_{i}|>" for i in range(4))),
        (QUESTION, "<|im_end|><|user|>what is it?<|im_end|><|assistant|>"
                   "<|user|>what else?<|im_end|><|assistant|>"),
        (ANSWER, "a dog<|im_end|>a cat<|im_end|>"),
    ):  # fmt: skip
        equal(text_of(shared, row, role), want, f"role {role}")
    equal(row.tokens["roles"].tolist()[0], HEAD, "it begins with the head")


def test_each_picture_of_a_text_has_the_tokens_of_its_own_size(shared):
    pictures = [Image.new("RGB", size) for size in ((64, 64), (128, 64))]
    for order, want in ((pictures, [16, 10]), (pictures[::-1], [10, 16])):
        row = shared.collate.row(Item(f"{IMAGE} and {IMAGE}", tuple(order)))
        texts = text_of(shared, row, CONTENT).split(" and ")
        equal([text.count("<|image_pad|>") for text in texts], want, "each its own columns")


def test_a_users_words_are_known_as_such(shared, monkeypatch):
    """Texts, questions and answers, and nothing of the template: a token that reaches over the end
    of a user's words is the user's."""
    parts, spell = [], data.spell

    def noted(tokenizer, template, of_row):
        parts.extend(of_row)
        return spell(tokenizer, template, of_row)

    monkeypatch.setattr(data, "spell", noted)
    shared.collate.row(Item(f"see {IMAGE} here", (Image.new("RGB", (64, 64)),)), TURNS[:2])
    got = [(part.role, part.content) for part in parts if part.by_user]
    want = [(CONTENT, "see "), (CONTENT, " here")]
    for question, answer in TURNS[:2]:
        want += [(QUESTION, question), (ANSWER, answer)]
    equal(got, want, "Part.by_user")
    turns = {part.role: [p.turn for p in parts if p.role == part.role] for part in parts}
    equal((set(turns[CONTENT]), set(turns[COMPRESS])), ({0}, {0}), "no turn of a dialogue")
    for role in (QUESTION, ANSWER):
        equal(sorted(set(turns[role])), [1, 2], "the first and the second turn")


def test_items_and_their_turns_are_as_many(shared):
    """A turn too few would leave an item out without a word."""
    items = [Item("a"), Item("b")]
    for turns in ([TURNS], [TURNS] * 3):
        with pytest.raises(ValueError):
            shared.collate(items, turns)
    equal(len(shared.collate(items, [TURNS, ()])["input_ids"]), 2, "one may have none")


def test_padding_is_on_the_right_and_nothing_but_zeros(shared):
    """The pad token, which a text may hold as well; role PAD, attention 0, no picture's token."""
    short, long = Item("a"), Item("a much longer text, of many more words than the other one has")
    collate = copy.copy(shared.collate)
    collate.pad_id = 7  # of the toy it is 0, as all other padding
    inputs = collate([short, long])
    n, L = shared.collate.row(short).length, shared.collate.row(long).length
    equal(inputs["input_ids"].shape, (2, L), "as long as the longest")
    equal(inputs["roles"][0, n:].unique().tolist(), [PAD], "roles")
    equal(inputs["attention_mask"].sum(1).tolist(), [n, L], "real tokens")
    equal(inputs["input_ids"][0, n:].unique().tolist(), [7], "the pad token")
    for key in set(inputs) - {"input_ids"}:
        equal(int(inputs[key][0, n:].abs().sum()), 0, f"{key}: zeros")


def test_a_tokenizer_without_a_pad_token_pads_with_any():
    """What is masked is not looked at."""
    processor = model.load("toy-random", device="cpu").processor
    processor.tokenizer.pad_token = None
    inputs = Collator(processor)([Item("a"), Item("a longer text")])
    equal(inputs["input_ids"][0, -1].item(), 0, "a token that every model has")


def test_a_pad_token_within_a_row_is_a_token(shared):
    """What is padding is said by the role, and not by the id."""
    row = shared.collate.row(Item("red green"))
    tokens = {key: x.clone() for key, x in row.tokens.items()}
    tokens["input_ids"][1] = shared.collate.pad_id
    inputs = shared.collate.pad_rows([row._replace(tokens=tokens)])
    equal(inputs["attention_mask"].tolist(), [[1] * row.length], "all of them real")


def test_nothing_to_embed_is_an_error():
    """Style vlm2vec, an empty text: a row of no tokens."""
    embedder = model.load("toy-random", prompt="vlm2vec", device="cpu")
    with pytest.raises(InputError, match="nothing to embed"):
        embedder.collate.row(Item(""))


def test_vlm2vec_enlarges_what_is_narrower_than_a_patch_and_no_other_style_does(shared):
    """By the shorter side, 28 pixels: to 56 x 56."""
    embedder = model.load("toy-random", prompt="vlm2vec", device="cpu")
    grid = {}
    for size in ((20, 90), (90, 20), (28, 84), (56, 56)):
        picture = Image.new("RGB", size, "red")
        for name, collate in (("vlm2vec", embedder.collate), ("chat", shared.collate)):
            images = collate.picture(picture).images
            grid[name, size] = images["image_grid_thw"].flatten().tolist()
    square = grid["vlm2vec", (56, 56)]
    for size in ((20, 90), (90, 20)):
        equal(grid["vlm2vec", size], square, f"{size} as 56 x 56")
        expect(grid["chat", size] != square, grid, "as it is", f"{size} in chat")
    equal(grid["vlm2vec", (28, 84)], grid["chat", (28, 84)], "28 is enough")


def test_the_sentence_of_a_style_stands_behind_what_is_embedded():
    """CoMa's: behind a text, a picture, both; before the assistant's turn."""
    embedder = model.load("toy-random", compress_tokens=4, prompt="coma", device="cpu")
    picture = Image.new("RGB", (64, 64))
    shown = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
    for item, begins in (
        (Item("a dog"), "a dog"), (Item(IMAGE, (picture,)), shown),
        (Item(f"{IMAGE} what?", (picture,)), f"{shown} what?"),
    ):  # fmt: skip
        content = text_of(embedder, embedder.collate.row(item), CONTENT)
        sentence = content.removeprefix(begins).removesuffix("<|im_end|><|assistant|>")
        want = "\nSummarize above image and text in a few words."
        equal(sentence, want, "the official code's")
    template = embedder.collate.template
    embedder.collate.template = dataclasses.replace(template, after_text=" ASSISTANT:")
    content = text_of(embedder, embedder.collate.row(Item("a dog")), CONTENT)
    expect(f"{want} ASSISTANT:" in content, content, want, "before what closes the user's turn")


def test_rows_hold_integers_and_pictures_stand_end_to_end(shared):
    """Of several rows: pixel values in the order of the rows."""
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "green")]
    items = [Item(IMAGE * 2, tuple(pictures[:2])), Item("text"), Item(IMAGE, (pictures[2],))]
    rows = [shared.collate.row(item) for item in items]
    inputs = shared.collate.pad_rows(rows)
    want = torch.cat([shared.collate.picture(x).images["pixel_values"] for x in pictures])
    equal(inputs["pixel_values"], want, "join_images")
    equal({x.dtype for x in rows[0].tokens.values()}, {torch.int64}, "token columns")
    for key, x in rows[1].tokens.items():
        equal(key in ("input_ids", "roles") or not x.any(), True, f"{key}: zero in a text")
    expect(set(rows[0].tokens) > {"input_ids", "roles"}, rows[0].tokens.keys(), "more", "family")


def test_without_a_code_the_content_and_the_first_question_share_a_turn():
    """K = 0, plain instruction tuning: a newline between them."""
    embedder = model.load("toy-random", compress_tokens=0, device="cpu")
    row = embedder.collate.row(Item("see"), TURNS[:2])
    decoded = embedder.collate.tokenizer.decode(row.tokens["input_ids"])
    want = "<|user|>see\nwhat is it?<|im_end|><|assistant|>a dog<|im_end|>"
    want += "<|user|>what else?<|im_end|><|assistant|>a cat<|im_end|>"
    equal(decoded, want, "one user turn")
    equal(text_of(embedder, row, CONTENT), "see", "the content")
    asked = Collator(embedder.processor, (), "coma").row(Item("see"), TURNS[:2])
    equal(text_of(embedder, asked, CONTENT), "see", "nobody is asked to summarise for a code")
    alone = embedder.collate.row(Item("see")).tokens["input_ids"]
    equal(embedder.collate.tokenizer.decode(alone), "<|user|>see<|im_end|><|assistant|>", "alone")


def test_what_stands_before_a_picture_is_not_what_stands_before_a_text(shared):
    """By what the content begins with, be it a blank; an empty one is a text."""
    collate, picture = copy.copy(shared.collate), Image.new("RGB", (64, 64))
    collate.template = dataclasses.replace(collate.template, before_text=":", before_picture=";")
    for item, want in (
        (Item("a"), ":"), (Item(""), ":"), (Item(IMAGE, (picture,)), ";"),
        (Item(f"a {IMAGE}", (picture,)), ":"), (Item(f"{IMAGE} a", (picture,)), ";"),
        (Item(f" {IMAGE}", (picture,)), ":"),
    ):  # fmt: skip
        head = text_of(shared, collate.row(item), HEAD)
        equal(head, f"<|user|>{want}", f"{item.text!r}")


def test_what_a_tokenizer_puts_in_front_is_for_all_to_see(shared):
    """Its first token, as Llama's <s>: attention rests on it, and a mask would take it away."""
    collate = copy.copy(shared.collate)
    collate.template = dataclasses.replace(collate.template, start_ids=[9])
    tokens = collate.row(Item("a")).tokens
    equal((int(tokens["input_ids"][0]), int(tokens["roles"][0])), (9, HEAD), "Collator.row")
