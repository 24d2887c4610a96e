"""Data: what is read from files or from the toy world, and how it becomes model inputs.

`Item(text, images)` is the only currency: a piece of text with `<image>` where each picture goes.
A *dialogue* is an Item plus (question, answer) turns (stage 1), a *pair* is a query Item, its right
targets and its hard negatives (stage 2), a *task* is queries, each with candidates (evaluation).

Top to bottom: Item and its kin - what is read - an Item becomes a row, rows become a batch.
`python -m tools.look` shows the toy world, `python -m tools.check DATA` reads a data set once.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from plumbing import formats, mmeb, retrieval
from plumbing.errors import InputError, brief
from plumbing.formats import IMAGE, Lazy
from plumbing.images import PictureEncoder, join_images, open_image, pixels_of
from plumbing.inputs import checked, content_of, refuse_empty, whole_number
from plumbing.template import STYLES, Part, picture_parts, read_template, shorten, spell
from toy.world import META_TASK, Shapes, evaluation_sets

# --------------------------------------------------------------------------------- Item and its kin


@dataclass(frozen=True)
class Item:
    """A text with `<image>` where each picture goes. `images`: paths, PIL images, or objects with a
    `.render()`; they are opened late, in the loader's workers."""

    text: str = ""
    images: tuple = ()  # as many as the text has marks

    @staticmethod
    def of(x) -> "Item":
        """An Item from what a user has: an Item, a string (always text), a picture (PIL, numpy, a
        `pathlib.Path`), or both, see plumbing/inputs.py."""
        return checked(x) if isinstance(x, Item) else Item(*content_of(x))

    @cached_property
    def key(self) -> int:
        """63 bits, equal for equal texts and equal paths of pictures, on every rank."""
        # A PIL image has no name: what a model sees of it counts.
        pictures = [pixels_of(x) if isinstance(x, Image.Image) else repr(x) for x in self.images]
        digest = hashlib.blake2b(repr((self.text, pictures)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1  # torch's integers have a sign


class Dialogue(NamedTuple):
    """One stage-1 example: what is compressed, and the (question, answer) turns asked of it."""

    item: Item
    turns: tuple  # of (question, answer)
    id: str = ""  # for error messages

    @staticmethod
    def of(plain) -> "Dialogue":
        """From (content, turns, id), as files and the toy world give it."""
        content, turns, name = plain
        return Dialogue(Item(*content), turns, name)


class Pair(NamedTuple):
    """One stage-2 example: a query, its right targets (one or more), its hard negatives."""

    query: Item
    targets: tuple  # of Items; none of them is a negative of another
    negatives: tuple = ()  # of Items, columns for every query of the batch

    @staticmethod
    def of(plain) -> "Pair":
        """From (query, targets, negatives), as files and the toy world give them."""
        query, targets, negatives = plain
        targets = tuple(Item(*content) for content in targets)
        negatives = tuple(Item(*content) for content in negatives)
        return Pair(Item(*query), targets, negatives)


class Task(NamedTuple):
    """One evaluation set. A query's first candidate is the right one. In your own data the first
    rights[i] candidates of query i are right; if it has no others, the rest of `pool` is wrong."""

    name: str
    meta_task: str  # Classification, VQA, Retrieval, Grounding, or Other
    ood: bool  # out of distribution: nothing like it was trained on
    queries: Sequence  # of (query Item, its candidates, a list of Items)
    rights: Sequence = ()  # of numbers; empty where one candidate is right
    pool: Sequence = ()  # all targets, each (text, images)


# ------------------------------------------------------------------------------------ what is read


def read_dialogues(
    source="shapes", image_root=None, seed=0, turns=0, caption=False, texts=0.0
) -> Sequence:
    """Stage 1's data: a sequence of Dialogues.

    source: "shapes" (10^9 toy dialogues), a list in LLaVA's layout, or a folder of pictures with
    captions (metadata.jsonl or .csv). image_root: a folder, or a plumbing.first_pass.Place. turns:
    the most questions; 0: all. In the toy world only: caption, one description in place of the
    dialogue; texts, the share of dialogues about a text. Raises InputError."""
    turns = whole_number("turns", turns, 0)
    if source == "shapes":
        toy = partial(Shapes("train", seed).dialogue, caption=caption, texts=texts)
        talks = Lazy(10**9, toy)  # made when drawn: as many as one likes
    elif caption or texts:
        raise InputError("--caption and --texts go with --data shapes; a file brings its own")
    else:
        talks = formats.read_dialogues(source, image_root)  # the first bad line is named now

    def dialogue(i):
        d = Dialogue.of(talks[i])
        return d._replace(turns=d.turns[: turns or None], id=d.id or f"{source}[{i}]")

    return Lazy(len(talks), dialogue, talks.source)


def read_pairs(source="shapes", image_root=None, subsets="", seed=0, split="original") -> dict:
    """Stage 2's data: {name: sequence of Pairs}, one entry a data set.

    source: "shapes", a list of pairs, a folder with captions (two sets: i2t, t2i), a folder or hub
    id in MMEB-train's layout. image_root: see read_dialogues. subsets: names with caps, "A:1000,B",
    or "mmeb20". split: "original" or "diverse_instruction". Raises InputError."""
    if source == "shapes":
        sets = {}
        for task, cap in formats.choose(subsets, META_TASK).items():
            sets[task] = Lazy(cap or 10**9, partial(Shapes(seed=seed).pair, task))
    elif formats.is_list(source):
        formats.refuse_subsets(source, subsets)
        sets = formats.read_pair_sets(source, image_root)
    else:
        sets = mmeb.train_sets(source, image_root, subsets, split)
    return {name: pairs.map(Pair.of) for name, pairs in sets.items()}


def read_tasks(source="shapes", image_root=None, subsets="", limit=0, seed=0) -> list:
    """Evaluation sets: a list of Tasks. source: "shapes" (5 tasks, each three times: in
    distribution, with combinations and with wordings never trained on), a folder or hub id in
    MMEB-eval's layout, a list of pairs, a folder with captions. subsets: names with caps. limit:
    most queries of a set; 0: all, or 100 of a toy set without a cap. Raises InputError."""
    tasks, limit = [], whole_number("limit", limit, 0)
    if source == "shapes":
        toy_sets = evaluation_sets(seed)
        for name, cap in formats.choose(subsets, toy_sets).items():
            task, ood, shapes = toy_sets[name]
            queries = Lazy(cap or 10**9, partial(shapes.query, task)).first(limit or cap or 100)
            tasks.append(Task(name, META_TASK[task], ood, queries))
    else:
        tasks = [Task(*x) for x in retrieval.read_tasks(source, image_root, subsets, limit)]

    @lru_cache(1)  # one set's Items at a time are in memory: they are many
    def item_maker(name):  # candidates repeat: each is made once, and its key computed once
        return lru_cache(None)(Item)

    def items(name, plain):
        query, candidates = plain
        item_of = item_maker(name)
        return item_of(*query), [item_of(*content) for content in candidates]

    return [task._replace(queries=task.queries.map(partial(items, task.name))) for task in tasks]


# ------------------------------------------------------- an Item becomes a row, rows become a batch

PAD, HEAD, CONTENT, COMPRESS, QUESTION, ANSWER = range(6)  # roles of tokens; their order counts


class Row(NamedTuple):
    """One example, not padded."""

    tokens: dict  # {input_ids, roles, ...: (L,)}
    images: dict  # {pixel_values, ...: (n, ...)}, as the processor makes them
    cut: int  # tokens that --max-length cost it

    @property
    def length(self) -> int:
        """L, in tokens."""
        return len(self.tokens["input_ids"])


class Collator:
    """Items -> padded model inputs, in one layout for all stages; the roles of its tokens:

        HEAD      the first user turn opens: the only part that all may see
        CONTENT   text and pictures, the style's instruction; the assistant's turn opens
        COMPRESS  C_1 ... C_K: the assistant's answer is the code         <- an embedding ends here
        QUESTION  a user turn: Q_1; the assistant's turn opens            <- stage 1 goes on
        ANSWER    A_1 and the end-of-turn token; and so on

    With K = 0 there is no code: content and Q_1 share one user turn (plain instruction tuning).
    Style "vlm2vec": the text as it stands, no template; no code unless K is asked for.

    processor: of transformers (tokenizer, image processor); compress_ids: the K tokens' ids;
    max_length: longer rows lose their last turns, then text from the content's middle; 0: none."""

    def __init__(self, processor, compress_ids=(), style="chat", max_length=0, check=refuse_empty):
        self.tokenizer = processor.tokenizer
        self.compress_ids, self.style, self.max_length = list(compress_ids), style, max_length
        self.check = check  # called with self, a row and its item: InputError where it is unfit
        self.template = read_template(processor, style)  # what stands around the user's words
        self.pad_id = self.tokenizer.pad_token_id or 0  # any id will do: it is masked
        self.encode_picture = PictureEncoder(processor, self.template.picture)
        self.token_keys = list(dict.fromkeys(["input_ids", "roles", *self.encode_picture.columns]))

    def picture(self, image):
        """A picture as the processor writes it: token columns and image tensors."""
        if self.style == "vlm2vec" and min(image.size) < 28:
            image = image.resize((56, 56))  # as VLM2Vec's code does
        return self.encode_picture(image)

    def row(self, item: Item, turns=()) -> Row:
        """One example: head, content, C, then Q_1 A_1 Q_2 A_2 ... (CoMa, section 3.1)."""
        template = self.template  # plumbing/template.py has a picture of its pieces
        # With K = 0 a dialogue's content has no turn of its own: Q_1 follows it.
        own_turn = bool(self.compress_ids) or not turns
        parts, images = self.content(item, own_turn)
        opening = ["\n"]  # what stands before a question; K = 0: a newline
        if own_turn:
            parts += [Part(CONTENT, x) for x in (template.answer_ids, template.before_answer)]
            parts.append(Part(COMPRESS, self.compress_ids))  # what the assistant answers is C
            opening = [template.after_answer, template.turn_ids, template.before_question]
        for turn, (question, answer) in enumerate(turns, 1):
            parts += [Part(QUESTION, x, turn) for x in opening]
            parts.append(Part(QUESTION, question, turn, by_user=True))
            closing = template.after_text, template.answer_ids, template.before_answer
            parts += [Part(QUESTION, x, turn) for x in closing]
            parts.append(Part(ANSWER, answer, turn, by_user=True))
            parts += [Part(ANSWER, x, turn) for x in (template.after_answer, template.end_ids)]
            # turn_ids begin with end_ids, which close C's turn; an answer has brought its own.
            opening = [template.turn_ids[len(template.end_ids) :], template.before_question]
        parts = [Part(HEAD, template.start_ids), *spell(self.tokenizer, template, parts)]
        parts, cut = shorten(parts, self.max_length, item)
        row = Row(self.join_parts(parts), images, cut)
        self.check(self, row, item)
        return row

    def content(self, item, own_turn) -> tuple:
        """-> (parts: head, text, picture, ...; image tensors). own_turn: with the turn's end."""
        texts, template = item.text.split(IMAGE), self.template
        if len(texts) - 1 != len(item.images):
            count = f"{len(texts) - 1} {IMAGE} for {len(item.images)} pictures"
            raise InputError(f"{count} in {brief(item)}: put one where each goes")
        pictures = [self.picture(open_image(x)) for x in item.images]  # opened here, and no earlier
        before = template.before_picture if pictures and not texts[0] else template.before_text
        parts = [Part(HEAD, template.head_ids), Part(HEAD, before)]
        for i, text in enumerate(texts):
            parts.append(Part(CONTENT, text, by_user=True))
            if i < len(pictures):
                parts += picture_parts(self.tokenizer, template, pictures[i].columns, CONTENT)
        if own_turn:
            parts.append(Part(CONTENT, STYLES[self.style] + template.after_text))
        return parts, join_images([picture.images for picture in pictures])

    def join_parts(self, parts) -> dict:
        """Parts -> token columns {input_ids, roles, ...: (L,)}; zero where a part has none."""
        columns = {key: [] for key in self.token_keys}
        for part in parts:
            n = len(part.content)
            values = {**part.columns, "input_ids": part.content, "roles": [part.role] * n}
            for key, numbers in columns.items():
                numbers += values.get(key, [0] * n)  # 0: as text has it
        return {key: torch.tensor(numbers, dtype=torch.long) for key, numbers in columns.items()}

    def pad_rows(self, rows) -> dict:
        """Rows -> inputs, right-padded to the longest: input_ids, attention_mask, roles, ... (B,
        L), and the image tensors of all rows end to end."""
        inputs = {}
        for key in self.token_keys:
            padding = self.pad_id if key == "input_ids" else 0
            column = [row.tokens[key] for row in rows]
            inputs[key] = pad_sequence(column, batch_first=True, padding_value=padding)  # (B, L)
        inputs["attention_mask"] = (inputs["roles"] != PAD).long()  # (B, L)
        inputs.update(join_images([row.images for row in rows]))  # (n, ...), see Row
        return inputs

    def __call__(self, items, turns=None) -> dict:
        """Items (and the turns of each) -> padded model inputs."""
        examples = zip(items, turns or [()] * len(items), strict=True)
        return self.pad_rows([self.row(item, its_turns) for item, its_turns in examples])


if __name__ == "__main__":
    sys.exit("data.py has no commands: python -m tools.look | check | generate | export --help")
