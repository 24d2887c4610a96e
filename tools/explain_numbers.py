"""The numbers of the page that `python -m tools.explain --html FILE` writes, each by the functions
that train: a dialogue's row through stage 1's model, a batch of pairs through stage 2's."""

import base64
import io
import itertools
import math
import sys
from typing import NamedTuple

import torch
from PIL import Image

import contrastive
import pretrain
from data import ANSWER, COMPRESS, CONTENT, HEAD, QUESTION, Item
from plumbing.errors import InputError
from plumbing.families import position_ids
from plumbing.formats import IMAGE
from plumbing.graphs import graph_bytes
from plumbing.images import open_image
from plumbing.loader import each
from plumbing.memory import to_device, token_chunks
from tools import mask_as_cache
from tools.measured import InBatch, eager, gap, gradients, norm

SIDE = 64  # pixels of a picture in the page, at most
PAIRS = 64  # of the matrix
BLOCK = 8  # of them from one data set; so many pairs go through GradCache, too
LONGEST = 200  # tokens of a row: the page shows each of them
LAYERS = 4  # whose attention is shown, the last among them
GUESSES = 4  # words that are shown for each answer token
NAMES = {HEAD: "head", CONTENT: "picture", COMPRESS: "code", QUESTION: "question", ANSWER: "answer"}


def picture_uri(picture) -> str:
    """A picture, made small, as a data URI."""
    image = open_image(picture).convert("RGB")
    image.thumbnail((SIDE, SIDE))
    raw = io.BytesIO()
    image.quantize(32, dither=Image.Dither.NONE).save(raw, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()


# ------------------------------------------------------------------------------- one dialogue's row


class Token(NamedTuple):
    """A token of the row."""

    text: str
    role: str


class Guess(NamedTuple):
    """What the model says at the place of an answer token, given the right words before."""

    nats: float  # of the right token
    best: list  # [(text, probability)], from the likeliest
    right: bool  # whether that is the right token: two may look alike


class Answer(NamedTuple):
    """A token of an answer: its place in the row, and the guesses with and without the mask."""

    place: int
    masked: Guess
    unmasked: Guess


class Cache(NamedTuple):
    """The row through a cache from which the picture has been taken."""

    norms: list  # [layer][token before the first question]: the norm of its keys, mean over heads
    whole: int  # bytes of keys and values of head, picture and C
    kept: int  # bytes without the picture's
    apart: float  # largest difference of a hidden state from that under the mask
    loss: float  # mean nats of the answer tokens, through the cache


class Story(NamedTuple):
    """Stage 1's half of the page."""

    tokens: list  # of Token
    picture: str  # a data URI
    grid: tuple  # rows and columns of the picture's tokens
    places: list  # of these tokens in the row, as one reads
    may: dict  # "masked", "unmasked": a string of 0 and 1 for each row
    layers: list  # whose attention is shown, counted from 1
    attention: dict  # as `may`: [of these layers][row][column], thousandths, mean over heads
    turns: list  # (question, answer, the places of the answer's tokens)
    answers: list  # of Answer
    loss: dict  # "masked", "unmasked": mean nats
    cache: Cache


def story(embedder, dialogue) -> Story:
    """A dialogue's row through the model, its first two turns."""
    turns = dialogue.turns[:2]
    inputs = embedder.collate([dialogue.item], [turns])
    # The cache and the eager kernel take them as they are.
    inputs = to_device(inputs, embedder.device)
    roles = inputs["roles"]
    L = roles.shape[1]
    if L > LONGEST:
        raise InputError(f"--html: the first row has {L} tokens, of {LONGEST}; lower --max-pixels")
    masks = {
        "masked": pretrain.compression_mask(roles),
        "unmasked": torch.ones(1, 1, L, L, dtype=torch.bool, device=roles.device).tril(),
    }
    places = (inputs["input_ids"][0] == embedder.mllm.config.image_token_id).nonzero()[:, 0]
    losses, answers = losses_of(embedder, inputs)
    return Story(
        tokens=tokens_of(embedder, inputs),
        picture=picture_uri(dialogue.item.images[0]),
        grid=grid_of(inputs, len(places)),
        places=places.tolist(),
        may={name: zeros_and_ones(mask[0, 0]) for name, mask in masks.items()},
        layers=shown_layers(embedder),
        attention={name: attention(embedder, inputs, mask) for name, mask in masks.items()},
        turns=turns_of(turns, roles[0].tolist()),
        answers=answers,
        loss=losses,
        cache=through_cache(embedder, inputs),
    )


def zeros_and_ones(mask) -> list:
    """A string for each row of a mask (L, L)."""
    return ["".join(map(str, row)) for row in mask.int().tolist()]


def word_of(tokenizer, token_id) -> str:
    """A token as the page writes it."""
    return tokenizer.decode([token_id]).strip() or "␣"  # of blanks alone nothing would be seen


def tokens_of(embedder, inputs) -> list:
    """Each token as text, with its role."""
    ids, roles = inputs["input_ids"][0].tolist(), inputs["roles"][0].tolist()
    tokens = []
    for token_id, role in zip(ids, roles, strict=True):
        tokens.append(Token(word_of(embedder.processor.tokenizer, token_id), NAMES[role]))
    return tokens


def turns_of(turns, roles) -> list:
    """[(question, answer, places of the answer's tokens, the closing one among them)]."""
    runs = itertools.groupby(range(len(roles)), lambda i: roles[i])
    answers = [list(places) for role, places in runs if role == ANSWER]
    # --max-length may have cost the last turns.
    return [(*turn, places) for turn, places in zip(turns, answers, strict=False)]


def grid_of(inputs, count) -> tuple:
    """Rows and columns of a picture's tokens: what the family says, or a square; (0, 0) where they
    are of tiles, and have no one place in the picture."""
    side = math.isqrt(count)
    if "image_grid_thw" in inputs:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()  # of patches
        merge = math.isqrt(rows * columns // count)
        return rows // merge, columns // merge
    return (side, side) if side * side == count else (0, 0)


def shown_layers(embedder) -> list:
    """The last layer, and some before it, counted from 1."""
    total = embedder.mllm.config.get_text_config().num_hidden_layers
    every = -(-total // LAYERS)
    return list(range(total, 0, -every))[::-1]


@torch.no_grad()
def attention(embedder, inputs, mask) -> list:
    """Where each token looks, [layer][row][column up to the row] in thousandths, mean over heads.
    Only the eager kernel gives it out, which *adds* its mask."""
    added = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e9)
    with eager(embedder.mllm):
        out = embedder.outputs(inputs, attention_mask=added, output_attentions=True)
    # Families with masks of their own (Gemma 3) would show what they do not do.
    h = embedder.hidden(inputs, mask).float()
    apart = (out.last_hidden_state - h).norm() / h.norm()
    if apart > 0.1:  # other kernels in bfloat16: some 0.03; without the mask: above 1
        raise InputError("--html: the attention of this family of models cannot be shown")
    layers = []
    for number in shown_layers(embedder):
        heads = out.attentions[number - 1][0]  # (heads, L, L)
        mean = (1000 * heads.float().mean(0)).round().int().tolist()
        layers.append([row[: i + 1] for i, row in enumerate(mean)])
    return layers


@torch.no_grad()
def losses_of(embedder, inputs) -> tuple:
    """-> ({"masked", "unmasked": mean nats}, [Answer])."""
    losses, guesses = {}, {}
    for name, compress in (("masked", True), ("unmasked", False)):
        logits, labels = pretrain.answer_logits(embedder, inputs, compress)  # (n, V), (n,)
        losses[name] = pretrain.answer_loss(logits, labels).item() / len(labels)
        guesses[name] = guesses_of(embedder.processor.tokenizer, logits, labels)
    places = (inputs["roles"][0] == ANSWER).nonzero()[:, 0].tolist()
    rows = zip(places, guesses["masked"], guesses["unmasked"], strict=True)
    return losses, [Answer(*row) for row in rows]


def guesses_of(tokenizer, logits, labels) -> list:
    """A Guess for each answer token."""
    log_p = logits.float().log_softmax(-1)  # (n, V)
    nats = -log_p.gather(1, labels[:, None])[:, 0]  # (n,)
    best = log_p.topk(GUESSES)
    guesses = []
    right = (best.indices[:, 0] == labels).tolist()
    rows = zip(nats.tolist(), best.values, best.indices, right, strict=True)
    for x, values, ids, is_right in rows:
        words = [word_of(tokenizer, token_id) for token_id in ids.tolist()]
        shares = [round(p, 4) for p in values.exp().tolist()]
        guesses.append(Guess(round(x, 5), list(zip(words, shares, strict=True)), is_right))
    return guesses


@torch.no_grad()
def through_cache(embedder, inputs) -> Cache:
    """The same row by another way, see tools/mask_as_cache.py."""
    run, seen = mask_as_cache.runner(embedder, inputs), []

    def watched(tokens, positions, past):
        h, cache = run(tokens, positions, past)
        seen.append((past, cache))
        return h, cache

    sequential = embedder.style == "vlm2vec"
    positions = position_ids(embedder.mllm, inputs, sequential)[..., 0, :]
    tokens, roles = inputs["input_ids"][0], inputs["roles"][0]
    h = mask_as_cache.hidden_through_cache(watched, tokens, positions, roles)  # (L, D)
    want = embedder.hidden(inputs, pretrain.compression_mask(roles[None]))[0]
    labels = pretrain.answer_labels(tokens[None], roles[None])[0]
    is_label = labels != -100
    loss = pretrain.answer_loss(embedder.logits(h[is_label]), labels[is_label])
    (_, whole), (kept, _) = seen
    norms = [keys[0].float().norm(dim=-1).mean(0).double() for keys, _ in whole]
    return Cache(
        norms=[x.round(decimals=3).tolist() for x in norms],  # the page must stay small
        whole=sum(keys.nbytes + values.nbytes for keys, values in whole),
        kept=sum(keys.nbytes + values.nbytes for keys, values in kept),
        apart=(h - want).abs().max().item(),
        loss=loss.item() / int(is_label.sum()),
    )


# ------------------------------------------------------------------------------------ a small batch


class Side(NamedTuple):
    """A query or a target, to look at."""

    text: str
    picture: str  # a data URI, or nothing


class Matrix(NamedTuple):
    """InfoNCE on a batch, query i's target in column i."""

    queries: list  # of Side
    targets: list
    sets: list  # the name of each pair's data set
    cosines: list  # [query][target], five decimals
    keys: list  # columns of equal number are the same target
    temperature: float
    losses: dict  # number of pairs -> nats by info_nce at this temperature


class Moment(NamedTuple):
    """One moment of GradCache."""

    name: str  # "pass 1", "between", "pass 2"
    rows: list  # what goes through the model
    kept: int  # bytes that autograd keeps for the backward pass, measured
    gradient: float  # norm of the gradient of all weights when it is over


class Passes(NamedTuple):
    """GradCache on the first pairs of the batch."""

    pairs: int
    lengths: list  # tokens of each row: queries, then targets
    stages: list  # of Moment
    embeddings: list  # norm of the loss' gradient on each embedding
    loss: float
    full: Moment  # the whole batch at once
    apart: float  # gap between the two gradients, as a share
    halves: float  # the gap, where two half batches have their own losses: what is not allowed


def batch_of(embedder, queries, targets) -> contrastive.Batch:
    """Pairs as the functions of stage 2 take them: query i's target is column i."""
    rows = each(embedder.collate.row, [*queries, *targets])
    keys = torch.tensor([target.key for target in targets])
    return contrastive.Batch(rows, torch.arange(len(queries))[:, None], keys)


def drawn(pairs, seed) -> list:
    """[(data set, Pair)] as stage 2 draws them, in blocks of one data set; of the first steps that
    whose first block holds two equal targets, so that there is a false negative to see."""
    cfg = contrastive.Config(seed=seed, batch=PAIRS, block=BLOCK)
    for step in range(50):
        chosen = [(name, pairs[name][i]) for name, i in contrastive.draw(pairs, cfg, step)]
        if len({pair.targets[0].key for _, pair in chosen[:BLOCK]}) < BLOCK:
            return chosen
    return chosen


def matrix(embedder, chosen, temperature) -> Matrix:
    """Cosines of all queries with all targets, and the loss of the first 8, 16, ... of them."""
    queries = [pair.query for _, pair in chosen]
    targets = [pair.targets[0] for _, pair in chosen]
    n = len(queries)
    z = torch.from_numpy(embedder.encode([*queries, *targets]))
    keys = torch.tensor([target.key for target in targets])
    losses = {}
    for size in (8, 16, 32, 64):
        q, t = z[:size], z[n : n + size]
        losses[size] = contrastive.info_nce(q, t, temperature, keys=keys[:size])[0].item()
    _, same = keys.unique(return_inverse=True)  # small numbers: 63 bits are too many for a script
    cosines = (z[:n] @ z[n:].T).double()
    return Matrix(
        queries=[side(item) for item in queries],
        targets=[side(item) for item in targets],
        sets=[name for name, _ in chosen],
        cosines=cosines.round(decimals=5).tolist(),
        keys=same.tolist(),
        temperature=temperature,
        losses=losses,
    )


def side(item: Item) -> Side:
    """An Item as text and a small picture."""
    picture = picture_uri(item.images[0]) if item.images else ""
    return Side(" ".join(item.text.replace(IMAGE, " ").split()), picture)


class Recorder(InBatch):
    """What `contrastive.two_passes` calls, `embed` and `loss_of`, noting what happens."""

    def __init__(self, embedder, batch, temperature):
        super().__init__(embedder, batch, temperature)
        self.stages, self.embeddings = [], []

    def note_gradient(self):
        """A chunk's gradient is there when the next one begins, or all is over."""
        if self.stages:
            gradient = norm(gradients(self.embedder))
            self.stages[-1] = self.stages[-1]._replace(gradient=gradient)

    def embed(self, chunk):
        """Pass 1 comes without a graph, pass 2 with one."""
        self.note_gradient()
        with graph_bytes() as sizes:
            z = self.forward(chunk)
        name = "pass 2" if torch.is_grad_enabled() else "pass 1"
        self.stages.append(Moment(name, list(chunk), sum(sizes.values()), 0.0))
        return z

    def loss_of(self, z):
        """Between the passes."""
        self.note_gradient()
        with graph_bytes() as sizes:
            loss, _ = self.info_nce(z)
        self.stages.append(Moment("between", list(range(len(z))), sum(sizes.values()), 0.0))
        z.register_hook(lambda dz: self.embeddings.extend(dz.norm(dim=1).tolist()))
        return loss


def passes(embedder, chosen, temperature, chunk_tokens) -> Passes:
    """The first pairs through GradCache, through the model at once, and as two half batches."""
    queries = [pair.query for _, pair in chosen[:BLOCK]]
    targets = [pair.targets[0] for _, pair in chosen[:BLOCK]]
    batch = batch_of(embedder, queries, targets)
    lengths = [row.length for row in batch.rows]
    recorder = Recorder(embedder, batch, temperature)
    embedder.zero_grad(set_to_none=True)
    chunks = token_chunks(lengths, chunk_tokens)
    loss = contrastive.two_passes(recorder.embed, chunks, recorder.loss_of)
    recorder.note_gradient()
    ours = [grad.clone() for grad in gradients(embedder)]

    embedder.zero_grad(set_to_none=True)
    everything = list(range(len(lengths)))
    with graph_bytes() as sizes:
        whole, _ = recorder.info_nce(recorder.forward(everything))
    whole.backward()
    want = [grad.clone() for grad in gradients(embedder)]
    full = Moment("at once", everything, sum(sizes.values()), norm(want))

    embedder.zero_grad(set_to_none=True)
    half = len(queries) // 2
    for rows in (slice(0, half), slice(half, None)):
        part = InBatch(embedder, batch_of(embedder, queries[rows], targets[rows]), temperature)
        mean, _ = part.info_nce(part.forward(range(len(part.batch.rows))))
        (mean / 2).backward()
    halves = gap(gradients(embedder), want)
    embedder.zero_grad(set_to_none=True)
    return Passes(
        pairs=len(queries),
        lengths=lengths,
        stages=recorder.stages,
        embeddings=recorder.embeddings,
        loss=loss.item(),
        full=full,
        apart=gap(ours, want),
        halves=halves,
    )


if __name__ == "__main__":
    sys.exit("tools/explain_numbers.py has no commands: tools/explain_page.py imports it")
