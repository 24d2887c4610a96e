"""The numbers behind the figures: what a model sees, keeps, and gets wrong. Nothing is drawn."""

import sys
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

import pretrain
from data import COMPRESS, Item, read_tasks
from evaluate import precision_at_1
from plumbing.config import CHUNK_TOKENS, by_device
from plumbing.formats import IMAGE
from plumbing.memory import token_chunks
from tools.measured import eager
from toy.world import ASK, Shapes

# -------------------------------------------------------------------------------------- embeddings


def pca(x):
    """The two directions of largest variance, by a singular value decomposition: x (n, D) ->
    (n, 2), and the shares (2,) of the variance that they hold. Row i stays row i."""
    centred = x - x.mean(0)
    _, s, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    # An axis may point either way: its largest entry is made positive.
    largest = axes[np.arange(2), abs(axes).argmax(1)]
    axes = axes * np.sign(largest)[:, None]
    return centred @ axes.T, (s**2 / (s**2).sum())[:2]


def token_cosines(h):
    """Cosines between the K tokens of a picture, mean over pictures: h (n, K, D) -> (K, K)."""
    z = torch.nn.functional.normalize(h, dim=-1)
    return (z @ z.transpose(1, 2)).mean(0).numpy()


class PairCosines(NamedTuple):
    """Mean cosine of a query with its own target, with the other targets of its task, and for how
    many queries their own is the nearest of these."""

    own: float
    others: float
    nearest: int


def pair_cosines(q, t, tasks) -> PairCosines:
    """q, t (n, D), row i a pair; tasks (n,) names."""
    same = tasks[:, None] == tasks[None]  # (n, n) against all targets, captions would win
    cosines = np.where(same, q @ t.T, np.nan)
    others = cosines[same & ~np.eye(len(q), dtype=bool)].mean()
    nearest = np.nanargmax(cosines, 1) == np.arange(len(q))
    return PairCosines(np.diag(cosines).mean(), others, int(nearest.sum()))


def smooth(x):
    """Running mean of 9 steps, fewer at the ends and in a shorter run."""
    window = np.ones(min(9, len(x)))
    count = np.convolve(np.ones(len(x)), window, "same")
    return np.convolve(x, window, "same") / count


# --------------------------------------------------------------------------------------- attention


class Look(NamedTuple):
    """What the K tokens of n pictures hold, and where they look."""

    h: torch.Tensor  # (n, K, D) final hidden states
    attention: torch.Tensor  # (layers, n, K, L) mean over heads
    image: torch.Tensor  # (L,) which positions are the picture


@torch.no_grad()
def look(embedder, pictures) -> Look:
    """Embeds pictures of one size. Only the eager kernel gives attention out; the embeddings under
    both kernels are the same."""
    inputs = embedder.collate([Item(IMAGE, (picture,)) for picture in pictures])
    with eager(embedder.mllm):
        outputs = embedder.outputs(inputs, output_attentions=True)
    # Pictures of one size have rows of one layout: the first tells where things are.
    code = inputs["roles"][0] == COMPRESS  # (L,)
    image = inputs["input_ids"][0] == embedder.mllm.config.image_token_id  # (L,)
    layers = []
    for heads in outputs.attentions:  # (n, heads, L, L)
        layers.append(heads.float().mean(1)[:, code])  # (n, K, L)
    attention = torch.stack(layers)
    h = outputs.last_hidden_state[:, code].float()
    return Look(h.cpu(), attention.cpu(), image.cpu())


# ----------------------------------------------------------------------------------------- answers


def questions(n, seed=0) -> dict:
    """n questions of each type about test scenes: {type: [(scene, question, answer)]}."""
    shapes = Shapes("test", seed)
    by_kind = {kind: [] for kind in ASK}
    i = 0
    while min(map(len, by_kind.values())) < n:
        rng = shapes._rng("figures", i)
        scene = shapes.scene(rng)
        for kind, question, answer in shapes.ask(rng, scene):
            by_kind[kind].append((scene, question, answer))
        i += 1
    return {kind: asked[:n] for kind, asked in by_kind.items()}


@torch.no_grad()
def answered(embedder, asked) -> float:
    """Share of questions that greedy decoding answers word for word; where the model has a code,
    from the code alone. One question a row: earlier answers would give later ones away."""
    rows = []
    for scene, question, answer in asked:
        item, turns = Item(IMAGE, (scene,)), ((question, answer),)
        rows.append(embedder.collate.row(item, turns))
    right = 0
    budget = by_device(None, CHUNK_TOKENS, embedder.device)
    lengths = [row.length for row in rows]
    for chunk in token_chunks(lengths, budget):
        inputs = embedder.collate.pad_rows([rows[i] for i in chunk])
        logits, labels = pretrain.answer_logits(embedder, inputs)
        right += pretrain.exact_answers(logits, labels, inputs["roles"])[0]
    return right / len(rows)


def most_frequent(asked) -> float:
    """Share that the best constant answer gets right: what is known without a picture."""
    counts = Counter(answer for _, _, answer in asked)
    return max(counts.values()) / len(asked)


# ----------------------------------------------------------------------------------------- ranking


class Ranked(NamedTuple):
    """A query with the scores of its candidates; candidate 0 is the right one."""

    query: Item
    candidates: list
    scores: np.ndarray
    hit: bool


def ranked(embedder, task, n, seed=0) -> list:
    """n test queries of a task of the toy world, Ranked."""
    (test,) = read_tasks(subsets=task, limit=n, seed=seed)
    queries = list(test.queries)
    items = []
    for query, candidates in queries:
        items += [query, *candidates]
    z = embedder.encode(items)  # (all of them, D)
    rows, start = [], 0
    for query, candidates in queries:
        end = start + 1 + len(candidates)
        q, c = z[start], z[start + 1 : end]  # (D,), (m, D)
        hit = precision_at_1(q[None], c, [range(len(c))]) == 1
        rows.append(Ranked(query, candidates, c @ q, hit))
        start = end
    return rows


if __name__ == "__main__":
    sys.exit("tools/figure_numbers.py has no commands: tools/drawings.py imports it")
