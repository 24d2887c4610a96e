"""Exercise 11: the order of a row, and its roles, against `data.Collator.row` and written out."""

import copy

import pytest
from checks import equal, expect

from data import CONTENT, Collator, Dialogue
from plumbing.template import Template
from tools.explain import LETTER
from toy.world import Shapes

pytestmark = pytest.mark.ex11

# Words in place of token ids, so that a failure can be read. As in Qwen's and Gemma's templates a
# turn ends in two tokens, and a later one begins otherwise than the first.
WORDS = Template(
    head_ids=["<begin>", "<user>"],
    before_text="",
    after_text="",
    answer_ids=["<end>", "<assistant>"],
    end_ids=["<end>", "<line>"],
    turn_ids=["<end>", "<line>", "<line>", "<user>"],
    before_question="",
    picture="",
)
PICTURE = ["pixels", "pixels"]
TURNS = [(["how", "many", "?"], ["two"]), (["color", "?"], ["dark", "red"])]
WITH_A_CODE = (
    "h <begin> <user> | x pixels pixels <end> <assistant> | C C1 C2 |"
    " Q <end> <line> <line> <user> how many ? <end> <assistant> | A two <end> <line> |"
    " Q <line> <user> color ? <end> <assistant> | A dark red <end> <line>"
)
WITHOUT = (
    "h <begin> <user> | x pixels pixels | Q how many ? <end> <assistant> | A two <end> <line> |"
    " Q <line> <user> color ? <end> <assistant> | A dark red <end> <line>"
)


def tokens_of(parts):
    """[(role, ids), ...] -> [(role's letter, token), ...], one a token."""
    expect(isinstance(parts, list | tuple), type(parts), "a list of (role, ids)", "your file")
    tokens = []
    for part in parts:
        pair = isinstance(part, list | tuple) and len(part) == 2
        expect(pair, part, "a pair (role, ids)", "your file")
        role, ids = part
        expect(role in LETTER, repr(role), "HEAD ... ANSWER", "the numbers of data.py, no words")
        tokens += [(LETTER[role], token) for token in ids]
    return tokens


def text_of(tokens):
    """As WITH_A_CODE is written: a letter where the role changes, then its tokens."""
    words, last = [], ""
    for letter, token in tokens:
        if letter != last:
            words += ["|", letter] if last else [letter]
        words.append(str(token))
        last = letter
    return " ".join(words)


def check_words(student, code, turns, want):
    pieces = copy.deepcopy((WORDS, PICTURE, code, turns))  # whatever becomes of them
    got = text_of(tokens_of(student.layout(*pieces)))
    equal(got, want, f"the row of {len(turns)} turn(s) with the code {code}")


def test_with_a_code(student):
    """head, content, C, Q_1 A_1, Q_2 A_2; one turn; none: what stage 2 embeds."""
    check_words(student, ["C1", "C2"], TURNS, WITH_A_CODE)
    parts = WITH_A_CODE.split(" | ")
    check_words(student, ["C1", "C2"], TURNS[:1], " | ".join(parts[:5]))
    check_words(student, ["C1", "C2"], [], " | ".join(parts[:3]))


def test_without_a_code(student):
    """K = 0: the first question follows the content in one user turn."""
    check_words(student, [], TURNS, WITHOUT)
    check_words(student, [], TURNS[:1], " | ".join(WITHOUT.split(" | ")[:4]))


@pytest.mark.parametrize("K", [4, 0])
def test_the_toy_models_rows(student, shared, K):
    """Token by token what `Collator.row` makes of three dialogues, pictures and all."""
    collate = Collator(shared.processor, shared.collate.compress_ids[:K])
    template, tokenizer = collate.template, collate.tokenizer
    for i in range(3):
        dialogue = Dialogue.of(Shapes().dialogue(i))
        row = collate.row(dialogue.item, dialogue.turns)
        want = list(
            zip(row.tokens["roles"].tolist(), row.tokens["input_ids"].tolist(), strict=True)
        )
        content = [token for role, token in want if role == CONTENT]
        if K:
            content = content[: -len(template.answer_ids)]
        first = template.before_question if K else "\n"  # what parts it from the content
        turns = [tuple(tokenizer(list(turn)).input_ids) for turn in dialogue.turns]
        turns[0] = (tokenizer(first + dialogue.turns[0][0]).input_ids, turns[0][1])
        got = tokens_of(student.layout(template, content, collate.compress_ids, turns))
        want = [(LETTER[role], token) for role, token in want]
        equal(text_of(got), text_of(want), f"dialogue {i}, K = {K}, ids as data.py writes them")


def test_the_pieces_stay_as_they_are(student):
    """`ids = template.turn_ids; ids += question` would change the template for every later row."""
    for code in (["C1"], []):
        pieces = copy.deepcopy([WORDS, PICTURE, code, TURNS])
        tokens_of(student.layout(*pieces))
        hint = "the lists are not yours: a + b makes a new one"
        equal(pieces, [WORDS, PICTURE, code, TURNS], hint)
