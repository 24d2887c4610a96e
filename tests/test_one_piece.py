"""A row's tokens are those that its text has in one piece, for every family's chat template and
every kind of tokenizer: template, content, questions and answers, pictures and all."""

import re

import families
import pytest
from checks import equal
from PIL import Image

import model
from data import Collator, Item
from plumbing.families import load_processor
from plumbing.rendering import render
from plumbing.template import as_chat, chat_template

KINDS = ("bytes", "blanks", "first blank", "words")
PICTURE = Image.new("RGB", (100, 60))
CODE = "".join(model.compression_tokens(3))
SYSTEM = re.compile(r"<\|im_start\|>system\n.*?<\|im_end\|>\n")  # the Qwens' default


@pytest.fixture(scope="module", params=families.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=KINDS)
def collate(request, family, tmp_path_factory):
    """A Collator, K = 3, with a tokenizer of this kind; without a model."""
    folder = tmp_path_factory.mktemp("kind")
    spec = families.BUILDERS[family]()
    tokenizer = families.tokenizer(spec, request.param)
    families.write_processor(spec, tokenizer, folder)
    processor = load_processor(folder, families.configured(spec, tokenizer))
    names = model.compression_tokens(3)
    processor.tokenizer.add_tokens(names, special_tokens=True)
    return Collator(processor, processor.tokenizer.convert_tokens_to_ids(names))


def as_others_do(collate, contents, pictures) -> list:
    """Chat template, then processor, on the whole dialogue. contents: the turns' texts and
    pictures; the code is the assistant's first answer."""
    processor = collate.encode_picture.processor
    variables = processor.tokenizer.special_tokens_map
    (text,) = render(chat_template(processor), [as_chat(contents)], variables)
    text = SYSTEM.sub("", text)
    start = processor.tokenizer.bos_token  # a template may bring it, or leave it to the tokenizer
    options = {"add_special_tokens": not (start and text.startswith(start))}
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt", **options)
    return inputs.input_ids[0].tolist()


TEXTS = ("a red circle.", "What is it?", "café 猫!")
TURNS = (("Which colour?", "two"), ("How many?", "no one"))


def check_row(collate, item, turns):
    """The row is how the whole dialogue begins; what the template writes behind an end stays
    out."""
    text = [{"type": "text", "text": part} for part in item.text.split("<image>")]
    first = [text[0]] if text[0]["text"] else []
    for part in text[1:]:
        first += [{"type": "image"}, part] if part["text"] else [{"type": "image"}]
    said = [CODE, *(words for turn in turns for words in turn)]
    contents = [first, *([{"type": "text", "text": words}] for words in said)]
    want = as_others_do(collate, contents, list(item.images))
    got = collate.row(item, turns).tokens["input_ids"].tolist()
    name = collate.tokenizer.convert_ids_to_tokens
    equal(name(got), name(want[: len(got)]), item.text)


def test_a_rows_tokens_are_those_of_the_whole_text(collate):
    """Texts of several kinds, one picture, a picture and words; without a dialogue and with one."""
    for text in TEXTS:
        check_row(collate, Item(text), TURNS)
    check_row(collate, Item("a text"), ())
    check_row(collate, Item("<image>", (PICTURE,)), TURNS)
    check_row(collate, Item("<image>Which one?", (PICTURE,)), TURNS[:1])
