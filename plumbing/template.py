"""Chat templates: what a model's own template writes around a user's words, found by rendering it;
the parts of a row, and how one that is too long is shortened.

A row is tokenized as other programs would: template text and user text in one piece, for "." and a
newline may be one token; but a special token that a user spells out stays text."""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from plumbing.errors import InputError

SUMMARIZE = "\nSummarize above image and text in a few words."  # the official code's prompt
# --prompt: what follows the content. "vlm2vec": the text as it stands, no template, no code.
STYLES = {"coma": SUMMARIZE, "chat": "", "vlm2vec": ""}
MARK = "\u2460"  # stands for a turn's text while a template is rendered


@dataclass
class Template:
    """What stands around the user's words: ids up to a special token, text where it is plain.

        head_ids before_text USER after_text answer_ids ASSISTANT end_ids
        turn_ids before_question USER after_text answer_ids ASSISTANT end_ids ...

    turn_ids begin with end_ids: they also close the turn before. picture: the text around and for
    one picture."""

    head_ids: list
    before_text: str
    after_text: str
    answer_ids: list
    end_ids: list
    turn_ids: list
    before_question: str
    picture: str


class Pieces(NamedTuple):
    """Token ids of a user's text, and of what the template writes around it."""

    before: list
    text: list
    after: list


def spell(tokenizer, text, before="", after="") -> Pieces:
    """Tokenizes before + text + after as one, and cuts the ids where the text begins and ends."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"no text, but half a surrogate pair in it: {e}") from None
    tokens = tokenizer(
        before + text + after,
        add_special_tokens=False,
        split_special_tokens=True,  # Trap: a special token spelled out in the text must stay text
        return_offsets_mapping=True,
    )
    pieces = Pieces([], [], [])
    text_begins, text_ends = len(before), len(before) + len(text)
    for token_id, (start, end) in zip(tokens.input_ids, tokens.offset_mapping, strict=True):
        if end <= text_begins:
            pieces.before.append(token_id)
        elif start >= text_ends:
            pieces.after.append(token_id)
        else:
            pieces.text.append(token_id)
    return pieces


def read_template(processor, style) -> Template:
    """What the model's chat template writes before, between and after two questions and answers:
    rendered with marks for the texts, and split there."""
    tokenizer = processor.tokenizer
    if style == "vlm2vec":
        return Template([], "", "", [], [], [], "", processor.image_token)
    template = processor.chat_template or tokenizer.chat_template
    if not template:
        raise InputError("the model has no chat template; take its instruction-tuned version")

    def render(*turns):
        chat = []
        for role, content in zip(itertools.cycle(("user", "assistant")), turns, strict=False):
            chat.append({"role": role, "content": content})
        return tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    mark = {"type": "text", "text": MARK}
    head, middle, between, _, tail = render([mark], [mark], [mark], [mark]).split(MARK)
    if between.startswith(tail):  # no default system prompt, as in the official code
        head = between.removeprefix(tail)
    with_picture = render([{"type": "image"}, mark]).split(MARK)[0]
    without = render([mark]).split(MARK)[0]
    head, before_text = after_last_special(tokenizer, head)
    after_text, answer = before_first_special(tokenizer, middle)
    turn, before_question = after_last_special(tokenizer, between)
    start = tokenizer("").input_ids  # what the tokenizer itself puts in front, as <s>
    head_ids = ids_of(head)
    return Template(
        head_ids=head_ids if head_ids[: len(start)] == start else start + head_ids,
        before_text=before_text,
        after_text=after_text,
        answer_ids=ids_of(answer),
        end_ids=ids_of(tail)[:1] or [tokenizer.eos_token_id],
        turn_ids=ids_of(turn),
        before_question=before_question,
        picture=with_picture[len(os.path.commonprefix([with_picture, without])) :],
    )


def special_spans(tokenizer, text) -> list:
    """Where special tokens stand in a text: [(start, end)]."""
    names = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return [m.span() for m in re.finditer("|".join(map(re.escape, names)), text)]


def after_last_special(tokenizer, text) -> tuple:
    """Template text cut behind its last special token: (the part with them, plain text)."""
    spans = special_spans(tokenizer, text)
    cut = spans[-1][1] if spans else 0
    return text[:cut], text[cut:]


def before_first_special(tokenizer, text) -> tuple:
    """Template text cut before its first special token: (plain text, the part with them)."""
    spans = special_spans(tokenizer, text)
    cut = spans[0][0] if spans else len(text)
    return text[:cut], text[cut:]


# ------------------------------------------------------------------------- a row, part after part


class Part(NamedTuple):
    """A stretch of a row with one role. `columns`: what else a picture's tokens carry, as
    mm_token_type_ids. `may_shrink`: text of the user's."""

    ids: Sequence
    role: int
    columns: dict = {}
    may_shrink: bool = False


def shorten(parts, turns, max_length) -> int:
    """Makes a row fit max_length (0: any), in place: its last turns go, but the first, then text
    from the middle of the content's longest piece; never a picture's tokens or the code. turns: how
    many (question, answer) the row ends with. -> how many tokens it cost."""
    length = before = sum(len(part.ids) for part in parts)
    while max_length and length > max_length:
        if turns > 1:
            del parts[-2:]
            turns -= 1
        else:
            texts = [i for i, part in enumerate(parts) if part.may_shrink]
            longest = max(texts, key=lambda i: len(parts[i].ids))
            ids, over = parts[longest].ids, length - max_length
            if not ids:
                over = f"{over} tokens too many without any text"
                raise InputError(f"--max-length {max_length}: {over}; lower --max-pixels")
            over = min(over, len(ids))
            keep = (len(ids) - over + 1) // 2  # of its beginning
            parts[longest] = parts[longest]._replace(ids=ids[:keep] + ids[keep + over :])
        length = sum(len(part.ids) for part in parts)
    return before - length
