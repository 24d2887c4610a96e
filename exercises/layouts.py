"""The reference of exercise 11: its signature around `data.Collator.row`, which is handed pieces of
text whose tokenizer makes one token of each character. So no second copy of the order exists."""

import dataclasses
from types import SimpleNamespace

from data import Collator, Item
from plumbing.inputs import refuse_empty

FIRST = 1000  # the first token's character: far from "\n", which `row` puts between two texts


class Characters:
    """Stands for a tokenizer. Tokens may be anything: each gets a character of its own."""

    def __init__(self):
        self.tokens = []

    def write(self, tokens) -> str:
        """Tokens as text."""
        for token in tokens:
            if token not in self.tokens:
                self.tokens.append(token)
        return "".join(chr(FIRST + self.tokens.index(token)) for token in tokens)

    def ids(self, tokens) -> list:
        """Tokens as the numbers that `__call__` makes of their text."""
        return [ord(character) for character in self.write(tokens)]

    def token(self, number):
        """The token with this number."""
        return self.tokens[number - FIRST]

    def __call__(self, text, **options):
        """As transformers' tokenizers are called by plumbing/template.py. A newline is no token: in
        the exercise the questions bring their own."""
        places = [i for i, character in enumerate(text) if character != "\n"]
        return SimpleNamespace(
            input_ids=[ord(text[i]) for i in places], offset_mapping=[(i, i + 1) for i in places]
        )


def layout(template, content, code, turns) -> list:
    """[(role, [token]), ...], as `Collator.row` puts them in a row."""
    characters = Characters()
    collate = object.__new__(Collator)  # __init__ would want a model's processor
    collate.tokenizer = characters
    collate.template = dataclasses.replace(
        template,
        head_ids=characters.ids(template.head_ids),
        answer_ids=characters.ids(template.answer_ids),
        end_ids=characters.ids(template.end_ids),
        turn_ids=characters.ids(template.turn_ids),
        before_text="",
        after_text="",
        before_question="",
        special={},
        behind="",
    )
    collate.compress_ids, collate.style, collate.max_length = characters.ids(code), "chat", 0
    collate.token_keys, collate.check = ["input_ids", "roles"], refuse_empty
    texts = [(characters.write(question), characters.write(answer)) for question, answer in turns]
    tokens = collate.row(Item(characters.write(content)), texts).tokens
    pairs = zip(tokens["roles"].tolist(), tokens["input_ids"].tolist(), strict=True)
    return [(role, [characters.token(number)]) for role, number in pairs]
