"""Chat templates: what a model's own template writes around a user's words, found by rendering it;
the parts of a row, and how one that is too long is shortened.

A row is tokenized as other programs would: what stands between two special tokens in one piece, be
it the template's or the user's, for "." and a newline may be one token; but a special token that a
user spells out stays text."""

import itertools
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from plumbing.errors import InputError, brief
from plumbing.rendering import render

SUMMARIZE = "\nSummarize above image and text in a few words."  # the official code's prompt
# --prompt: what follows the content. "vlm2vec": the text as it stands, no template, no code.
STYLES = {"coma": SUMMARIZE, "chat": "", "vlm2vec": ""}
EXPORTED = "{# nanoCoMa: for sentence-transformers #}"  # begins a template that is no model's own
MARK = "\u2460"  # stands for a turn's text while a template is rendered


@dataclass
class Template:
    """What stands around the user's words: ids up to a special token, text where it is plain.

        head_ids before_text USER after_text answer_ids before_answer ASSISTANT after_answer end_ids
        turn_ids before_question USER after_text answer_ids before_answer ASSISTANT ...

    turn_ids begin with end_ids: they also close the turn before. start_ids: what the tokenizer
    itself puts in front of a text, as <s>. before_picture: stands in the place of before_text where
    a picture comes first. picture: the text around and for one picture. special {id: name}: tokens
    that a user's text never becomes. behind: the name of one of them, put in front of a text while
    it is tokenized, so that the tokenizer does not take it for the beginning of a row."""

    head_ids: list = field(default_factory=list)
    before_text: str = ""
    after_text: str = ""
    answer_ids: list = field(default_factory=list)
    end_ids: list = field(default_factory=list)
    turn_ids: list = field(default_factory=list)
    before_question: str = ""
    picture: str = ""
    before_answer: str = ""
    after_answer: str = ""
    before_picture: str = ""
    start_ids: Sequence = ()
    special: dict = field(default_factory=dict)
    behind: str = ""


# ------------------------------------------------------------------------- what a template writes


class Written(NamedTuple):
    """What a template writes around four texts: head USER middle ASSISTANT between USER middle
    ASSISTANT tail; in front of one text alone; in front of a picture and a text."""

    head: str
    middle: str
    between: str
    tail: str
    before_one: str
    before_picture: str  # and for it


def chat_template(processor) -> str:
    """The model's own; of several the one called "default"."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InputError("the model has no chat template; take its instruction-tuned version")
    if isinstance(template, str) and template.startswith(EXPORTED):
        text = "its chat template is one for sentence-transformers, which saved this folder anew"
        raise InputError(f"{text}; load the folder that `tools.merge --export` wrote")
    return template


def write_marks(processor) -> Written:
    """The chat template rendered with marks for the texts: each turn a list of texts and pictures,
    or, for a template that takes no lists, a string. InputError where neither works."""
    mark = {"type": "text", "text": MARK}
    forms = [([mark], [{"type": "image"}, mark]), (MARK, MARK)]
    for turn, turn_with_picture in forms:
        chats = [as_chat([turn] * 4), as_chat([turn]), as_chat([turn_with_picture])]
        texts = render(chat_template(processor), chats, processor.tokenizer.special_tokens_map)
        errors = [text for text in texts if isinstance(text, InputError)]
        if errors:
            continue
        four, one, picture = texts
        # Trap: a template for strings writes a list as Python would, quotes and all.
        is_python = "'type':" in four or "'role':" in four
        pieces = [] if is_python else four.split(MARK)
        if len(pieces) == 5:
            head, middle, between, _, tail = pieces
            before_one, before_picture = one.split(MARK)[0], picture.split(MARK)[0]
            return Written(head, middle, between, tail, before_one, before_picture)
    if errors:
        raise errors[0]
    reason = f"writes {brief(four)!r} for four turns; each must stand in it once"
    raise InputError(f"the chat template: {reason}")


def as_chat(contents) -> list:
    """Turns in transformers' layout: the user's, the assistant's, the user's."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": x} for role, x in zip(roles, contents, strict=False)]


def write_prompt(processor, chat) -> str:
    """A chat, and how the assistant's answer begins; an InputError where the template fails."""
    variables = processor.tokenizer.special_tokens_map
    template = chat_template(processor)
    (text,) = render(template, [chat], variables, add_generation_prompt=True)
    if isinstance(text, InputError):
        raise text
    return text


def starts_itself(processor, prompt) -> bool:
    """Whether a prompt brings the token that a tokenizer may put in front (Gemma 3's <bos>): two of
    them are one too many."""
    start = processor.tokenizer.bos_token
    return bool(start) and prompt.startswith(start)


class SpecialTokens:
    """Tokens that stand for themselves: a tokenizer cuts a text at them before all else.

    names_of_ids: of all of them, the picture's too; behind: one that leaves what is beside it."""

    def __init__(self, processor):
        self.tokenizer = processor.tokenizer
        tokens = {i: t for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        picture = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        self.names_of_ids = {i: token.content for i, token in tokens.items()}
        self.names_of_ids[picture] = processor.image_token
        names, self.behind = [], ""
        for token in sorted(tokens.values(), key=lambda token: -len(token.content)):
            left = r"\s*" if token.lstrip else ""  # some swallow the whitespace beside them
            right = r"\s*" if token.rstrip else ""
            names.append(left + re.escape(token.content) + right)
            if not left + right:
                self.behind = token.content
        self.pattern = re.compile("|".join(names) or "(?!)")  # without names: nothing

    def cut_before_first(self, text) -> tuple:
        """-> (plain text, the part with special tokens)."""
        match = self.pattern.search(text)
        cut = match.start() if match else len(text)
        return text[:cut], text[cut:]

    def cut_behind_first(self, text) -> tuple:
        """-> (the first one and what stands before it, the rest)."""
        match = self.pattern.search(text)
        cut = match.end() if match else 0
        return text[:cut], text[cut:]

    def cut_behind_last(self, text) -> tuple:
        """-> (the part with special tokens, plain text)."""
        ends = [0, *(match.end() for match in self.pattern.finditer(text))]
        return text[: ends[-1]], text[ends[-1] :]

    def start_of(self, text) -> str:
        """Those that a text begins with, but for the last, which opens what follows it."""
        kept = end = 0
        while match := self.pattern.match(text, end):
            kept, end = end, match.end()
        return text[:kept]

    def ids_of(self, text) -> list:
        """The tokens of a part of the template, special ones and all."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def own_start(self) -> list:
        """What the tokenizer puts in front of any text."""
        ids = self.tokenizer("a").input_ids
        return ids[: ids.index(self.ids_of("a")[0])]


def read_template(processor, style) -> Template:
    """What the model's chat template writes before, between and after two questions and answers."""
    special = SpecialTokens(processor)
    if style == "vlm2vec":  # nothing stands around the user's words
        return Template(
            picture=processor.image_token, special=special.names_of_ids, behind=special.behind
        )
    written = write_marks(processor)
    after_answer, end, opening = end_and_turn(special, written, processor.tokenizer.eos_token)
    head, before_text = special.cut_behind_last(without_system(special, written.head, opening))
    after_text, header = special.cut_before_first(written.middle)
    answer, before_answer = special.cut_behind_last(header)
    turn, before_question = special.cut_behind_last(opening)
    # Some write less where a picture comes first: "User:" in the place of "User: ".
    shared = len(os.path.commonprefix([written.before_one, written.before_picture]))
    unshared = len(written.before_one) - shared  # characters that it leaves out at the end
    before_picture = before_text[: len(before_text) - unshared]
    head_ids, start_ids, end_ids = special.ids_of(head), special.own_start(), special.ids_of(end)
    return Template(
        head_ids=head_ids,
        before_text=before_text,
        after_text=after_text,
        answer_ids=special.ids_of(answer),
        end_ids=end_ids,
        turn_ids=special.ids_of(end + turn),
        before_question=before_question,
        picture=written.before_picture[shared:] or processor.image_token,
        before_answer=before_answer,
        after_answer=after_answer,
        before_picture=before_picture,
        start_ids=[] if head_ids[: len(start_ids)] == start_ids else start_ids,
        special=special.names_of_ids,
        behind=special.behind,
    )


def end_and_turn(special, written, eos_token) -> tuple:
    """What closes an assistant's turn, what opens the user's next one. -> (plain text behind the
    answer, the special token that ends it, the rest up to the next question). The tokenizer's own
    end where the template leaves the last turn open."""
    closing = os.path.commonprefix([written.tail, written.between])
    end, _ = special.cut_behind_first(closing)
    if not end and eos_token and eos_token in written.between:
        end = written.between.partition(eos_token)[0] + eos_token
    turn = written.between.removeprefix(end)
    if not end and not eos_token:
        raise InputError("the chat template: nothing ends an answer, nor has the tokenizer an end")
    after_answer, end = special.cut_before_first(end or eos_token)
    return after_answer, end, turn


def without_system(special, head, turn) -> str:
    """The head without a default system prompt, as in the official code: where what opens a later
    turn opens the first one too, and words stand before it."""
    opening = turn.lstrip()
    if not opening or not head.endswith(opening):
        return head
    before = head.removesuffix(opening)
    is_prompt = special.pattern.sub("", before).strip()
    return special.start_of(before) + opening if is_prompt else head


# ------------------------------------------------------------------------- a row, part after part


class Part(NamedTuple):
    """A stretch of a row with one role: token ids, or text that waits for `spell`. turn: the number
    of the (question, answer) that it belongs to, 0 for the content; by_user: not the template's.
    columns: what else a picture's tokens carry, as mm_token_type_ids."""

    role: int
    content: Sequence  # token ids, or a string
    turn: int = 0
    by_user: bool = False
    columns: dict = {}


def spell(tokenizer, template, parts) -> list:
    """Parts whose texts have become token ids. Texts that meet are tokenized as one, and cut where
    they met; a token that lies across belongs to the user's."""
    spelled = []
    for group in side_by_side(part for part in parts if len(part.content)):
        if isinstance(group[0].content, str):
            text = "".join(part.content for part in group)
            group = cut_apart(group, tokenize(tokenizer, template, text, not spelled))
        spelled += group
    return spelled


def side_by_side(parts) -> list:
    """Lists of parts that are tokenized as one: texts side by side. But a question and an answer
    with nothing between them (style "vlm2vec") share no token."""
    groups = []
    for part in parts:
        last = groups[-1][-1] if groups else None
        are_texts = last and isinstance(last.content, str) and isinstance(part.content, str)
        if are_texts and not (last.by_user and part.by_user):
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


class Tokens(NamedTuple):
    """A text's tokens, and where each begins and ends, in characters."""

    ids: list
    starts: list
    ends: list


def tokenize(tokenizer, template, text, begins_row) -> Tokens:
    """Of plain text, at the beginning of a row or behind a special token."""
    if not text:
        return Tokens([], [], [])
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"no text, but half a surrogate pair in it: {e}") from None
    # Trap: some tokenizers put a blank in front of a row's first word, and of no other.
    tokens = tokens_behind(tokenizer, "" if begins_row else template.behind, text)
    if spells_special(template, text, tokens):
        # Trap: a special token that a user spells out must stay text.
        tokens = tokens_behind(tokenizer, "", text, split_special_tokens=True)
        if spells_special(template, text, tokens):
            raise InputError(f"a picture's token stands as text in {brief(text)!r}")
    return tokens


def tokens_behind(tokenizer, behind, text, **options) -> Tokens:
    """Of the text alone, where it stands behind a special token, or behind nothing."""
    encoded = tokenizer(
        behind + text, add_special_tokens=False, return_offsets_mapping=True, **options
    )
    first, shift = (1, len(behind)) if behind else (0, 0)
    places = encoded.offset_mapping[first:]
    starts = [start - shift for start, _ in places]
    return Tokens(encoded.input_ids[first:], starts, [end - shift for _, end in places])


def spells_special(template, text, tokens) -> bool:
    """Whether one of a text's tokens is a special one by name. (The id alone could be that of an
    unknown word.)"""
    if template.special.keys().isdisjoint(tokens.ids):
        return False
    for token_id, start, end in zip(*tokens, strict=True):
        if token_id in template.special and template.special[token_id] in text[start:end]:
            return True
    return False


def cut_apart(parts, tokens) -> list:
    """Parts with the tokens of their texts, which were tokenized as one."""
    cuts, border = [0], 0  # in tokens; in characters
    for part in parts[:-1]:
        border += len(part.content)
        if part.by_user:  # a token across the border is this part's
            cut = bisect_left(tokens.starts, border)
        else:  # it is the next part's
            cut = bisect_right(tokens.ends, border)
        cuts.append(max(cut, cuts[-1]))
    cuts.append(len(tokens.ids))
    borders = itertools.pairwise(cuts)
    return [
        part._replace(content=tokens.ids[first:last])
        for part, (first, last) in zip(parts, borders, strict=True)
    ]


def picture_parts(tokenizer, template, columns, role) -> list:
    """A picture's tokens, as parts. Plain text at either end of them, as a newline, becomes text
    again: it may share a token with its neighbours."""
    ids = columns["input_ids"]
    special = [i for i, token_id in enumerate(ids) if token_id in template.special]
    first, last = special[0], special[-1] + 1
    before, after = tokenizer.decode(ids[:first]), tokenizer.decode(ids[last:])
    # Only where it is the text that these tokens were made of.
    if tokenize(tokenizer, template, before, begins_row=True).ids != ids[:first]:
        before, first = "", 0
    if tokenize(tokenizer, template, after, begins_row=False).ids != ids[last:]:
        after, last = "", len(ids)
    columns = {key: column[first:last] for key, column in columns.items()}
    picture = Part(role, columns["input_ids"], columns=columns)
    return [Part(role, before), picture, Part(role, after)]


def shorten(parts, max_length, item="") -> tuple:
    """Makes a row fit max_length (0: any): its last turns go, but the first, then text from the
    middle of the content's longest piece; never a picture's tokens or the code. item: what an error
    names. -> (the parts, how many tokens it cost)."""
    parts, before = list(parts), tokens_in(parts)
    while max_length and tokens_in(parts) > max_length:
        over, last = tokens_in(parts) - max_length, parts[-1].turn
        if last > 1:
            parts = [part for part in parts if part.turn < last]
            continue
        texts = [i for i, part in enumerate(parts) if part.by_user and not part.turn]
        longest = max(texts, key=lambda i: len(parts[i].content), default=None)
        if longest is None or not parts[longest].content:
            uncut = "pictures, a first question and its answer are never cut"
            text = f"{over} tokens too many, and no text is left to cut ({uncut})"
            way = f"raise it, or lower --max-pixels; {brief(item)}"
            raise InputError(f"--max-length {max_length}: {text}; {way}")
        ids = parts[longest].content
        over = min(over, len(ids))
        keep = (len(ids) - over + 1) // 2  # of its beginning
        parts[longest] = parts[longest]._replace(content=ids[:keep] + ids[keep + over :])
    return parts, before - tokens_in(parts)


def tokens_in(parts) -> int:
    """How many tokens they have."""
    return sum(len(part.content) for part in parts)
