"""The drawings of tools/figures.py: each is a function of its sources (models, logs, records) that
returns a matplotlib Figure. In the order of FIGURES, at the end."""

import io
import itertools
import math
import sys
import textwrap

if __name__ == "__main__":  # in front of a library that may not be there
    sys.exit("tools/drawings.py has no commands: tools/figures.py and tools/overview.py import it")

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import model
import pretrain
from data import ANSWER, COMPRESS, CONTENT, HEAD, QUESTION, Item
from plumbing.errors import InputError
from plumbing.formats import IMAGE
from plumbing.images import open_image
from plumbing.writing import written
from tools.figure_numbers import (
    answered,
    look,
    most_frequent,
    pair_cosines,
    pca,
    questions,
    ranked,
    smooth,
    token_cosines,
)
from tools.records import NAMES, mean_error
from toy.world import ASK, META_TASK, Scene, Shapes

# How many a figure is made of.
PICTURES = 200
PAIRS = 60
QUESTIONS = 300  # of each kind
QUERIES = 50  # of each task
# Okabe and Ito's colours: told apart with any colour vision.
BLACK = "#000000"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
RED = "#D55E00"
PINK = "#CC79A7"
GREY = "#666666"
COLORS = (BLUE, GREY, RED, GREEN, ORANGE, SKY, BLACK, PINK)  # of lines
MARKERS = ("o", "x", "s", "^", "D", "v", "P", "*")  # of lines
WIDTH = 8  # inches; 880 pixels
STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
}
MODELS = ("compressed", "contrastive")  # after stage 1, after stage 2


def picture_of(figure, colors, dpi="figure"):
    """A Figure as a picture of so many colours, which are enough for a drawing."""
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=dpi)
    return Image.open(raw).convert("RGB").quantize(colors, dither=Image.Dither.NONE)


def save_png(picture, path):
    """Whole, or not at all: InputError where it cannot be written."""
    with written(path, "the figure") as part:
        picture.save(part, optimize=True)


def show(ax, item, alpha=None):
    """An Item's picture, or its text, in a cell."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if item.images:
        ax.imshow(open_image(item.images[0]), alpha=alpha)
    words = textwrap.fill(item.text.replace(IMAGE, ""), 31)
    ax.text(0.5, 0.5, words, ha="center", va="center", fontsize=6.5, transform=ax.transAxes)


# ---------------------------------------------------------------------------------------- the mask


def mask(sources):
    """Who may attend to whom, in a real row: what compression takes away from causal attention."""
    collate = model.load("toy", device="cpu").collate
    turns = (("count the objects.", "two"), ("where is the cross?", "top left"))
    item = Item(*Shapes().dialogue(0)[0])
    inputs = collate([item], [turns])
    roles, L = inputs["roles"][0].tolist(), inputs["roles"].shape[1]
    may = pretrain.compression_mask(inputs["roles"])[0, 0].numpy()  # (L, L)
    kinds = np.where(may, 2, np.tri(L)).astype(int)  # 0 the future, 1 hidden, 2 may attend
    colors = np.array([(1, 1, 1), (0.97, 0.8, 0.45), (0.2, 0.55, 0.75)])
    fig = Figure((WIDTH, 6.7), layout="none")
    ax = fig.add_axes((0.18, 0.01, 0.8, 0.92))
    ax.imshow(colors[kinds])
    starts = [i for i in range(L) if i == 0 or roles[i] != roles[i - 1]]
    starts.append(L)
    name_regions(ax, roles, starts)
    tokens = collate.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    ax.set_yticks(range(L), [token.strip("\u0120<|>") for token in tokens], fontsize=6.5)
    ax.set_title("A row attends to the columns that are blue", pad=24)
    ax.tick_params(length=0, labelbottom=False)
    ax.spines[:].set_visible(False)
    # head, content, C, Q1, A1, ...: content ends where C starts, the first answer where Q2 does.
    code, question, answer = starts[2], starts[3], starts[4]
    text = "hidden: all that Q and A know\nof the picture went through C"
    ax.text(code / 2, (question + answer - 1) / 2, text, ha="center", va="center")
    ax.text(code * 0.36, code * 0.8, "may attend", ha="center", color="white")
    ax.text(L * 0.75, L * 0.3, "the future", ha="center", color=GREY)
    return fig


def name_regions(ax, roles, starts):
    """White lines between regions, their names above and beside: head, picture, C, Q1, A1, Q2..."""
    names = {HEAD: "head", CONTENT: "picture", COMPRESS: "C", QUESTION: "Q", ANSWER: "A"}
    for n, (start, end) in enumerate(itertools.pairwise(starts)):
        name, middle = names[roles[start]], (start + end - 1) / 2
        if roles[start] in (QUESTION, ANSWER):
            name += f"$_{(n - 1) // 2}$"
        ax.axhline(start - 0.5, color="white", lw=1)
        ax.axvline(start - 0.5, color="white", lw=1)
        ax.text(middle, -1.2, name, ha="center", weight="bold")
        ax.text(-7, middle, name, ha="right", va="center", weight="bold")


# ------------------------------------------------------------------------------------ training runs


def curves(sources):
    """Loss and hits of both stages, step by step, from their log.jsonl."""
    panels = (
        ("compressed", "loss", "Stage 1: loss of the answers, nats"),
        ("compressed", "exact", "Stage 1: answers right word for word, %"),
        ("contrastive", "loss", "Stage 2: InfoNCE, nats"),
        ("contrastive", "top1", "Stage 2: queries nearest to their own target, %"),
    )
    fig = Figure((WIDTH, 4.6))
    for ax, (name, key, title) in zip(fig.subplots(2, 2).flat, panels, strict=True):
        log = sources.log(name)
        steps = [r["step"] for r in log]
        y = np.array([r[key] for r in log])
        if key != "loss":
            y = 100 * y  # shares, in percent
        ax.plot(steps, y, color=SKY, lw=0.6, label="each batch")
        ax.plot(steps, smooth(y), color=BLUE, label="mean of 9")
        ax.set(title=title, xlim=(0, steps[-1]), ylim=(0, 100), xlabel="step")
        if key == "loss":
            ax.set(yscale="log", ylim=(smooth(y).min() / 3, y.max() * 1.5))
            ax.yaxis.set_major_formatter("{x:g}")
            chance = log[-1].get("chance")  # stage 2 alone has it
            if chance:
                label = f"ln {math.exp(chance):.0f} = {chance:.2f}: no information"
                ax.axhline(chance, color=RED, ls="--", lw=1.2, label=label)
    handles, labels = fig.axes[2].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=3)
    return fig


def error_bars(ax, x, scores, i, label):
    """Line i: mean and standard error, in percent; scores[j]: the runs' scores (shares) at x[j]."""
    y, error = np.transpose([mean_error(runs) for runs in scores])  # (n,), (n,)
    turn, color = divmod(i, len(COLORS))
    marker = MARKERS[(i + turn) % len(MARKERS)]  # a colour's second line has another one
    line = {"color": COLORS[color], "marker": marker, "capsize": 3, "label": label}
    ax.errorbar(x, 100 * y, 100 * error, **line)


def arms(sources):
    """In-distribution Precision@1 of each arm, mean and standard error over seeds: a panel for each
    amount of pairs, against contrastive steps; the last one, at the end, against the pairs."""
    runs_of = {}  # pairs -> {arm: its runs}
    for study, runs in sources.records().items():
        if study.startswith(("arms", "pairs")):
            first = next(iter(runs.values()))  # of its arms, which have the same pairs
            runs_of[first[0]["pairs"]] = runs
    if not runs_of:
        command = "python tests/bench/reproduce.py"
        raise InputError(f'the records hold no study "arms": `{command}` runs it')
    amounts = sorted(runs_of, key=lambda n: n or math.inf)  # 0: unlimited
    fig = Figure((WIDTH, 3.6))
    *axes, last = fig.subplots(1, len(amounts) + 1, sharey=True)
    for ax, pairs in zip(axes, amounts, strict=True):
        arms_over_steps(ax, runs_of[pairs], f"{pairs:,}" if pairs else "unlimited")
    arms_over_pairs(last, [runs_of[pairs] for pairs in amounts])
    short = [f"{n // 1000}k" if n >= 1000 else n or "∞" for n in amounts]
    last.set_xticks(range(len(short)), short)
    axes[0].set_ylabel("Precision@1, %, in distribution")
    # The panel with the most arms names them all.
    legends = [ax.get_legend_handles_labels() for ax in axes]
    handles, labels = max(legends, key=lambda legend: len(legend[1]))
    fig.legend(handles, labels, loc="outside upper center", ncols=3)
    return fig


def arms_over_steps(ax, runs_of, pairs):
    """One amount of pairs: how each arm learns."""
    for i, (arm, label) in enumerate(NAMES.items()):
        runs = runs_of.get(arm)
        if runs:
            scores = zip(*(r["curve"] for r in runs), strict=True)  # of each step, (seeds,)
            error_bars(ax, runs[0]["steps"], scores, i, label)
    seeds = len(next(iter(runs_of.values())))
    ax.set(xlabel="contrastive steps", title=f"{pairs} pairs\nseeds: {seeds}")


def arms_over_pairs(ax, amounts):
    """Each arm at the end of its runs. amounts[n]: {arm: its runs}."""
    for i, (arm, label) in enumerate(NAMES.items()):
        x = [n for n, runs_of in enumerate(amounts) if arm in runs_of]
        if x:
            error_bars(ax, x, [values_of(amounts[n][arm], "ind") for n in x], i, label)
    ax.set(xlabel="distinct pairs", title="at the end")


def values_of(runs, key) -> list:
    """One score of each run, by seed."""
    return [run[key] for run in runs]


def k_score(sources):
    """Precision@1 against K, the number of compression tokens: mean and standard error."""
    runs_of = {runs[0]["K"]: runs for runs in sources.records().get("K", {}).values()}
    if len(runs_of) < 2:
        command = "python tests/bench/reproduce.py --study K"
        raise InputError(f"the records hold no two K: `{command}`")
    fig = Figure((WIDTH * 0.7, 3.3))
    ax, tokens = fig.subplots(), sorted(runs_of)
    labels = {"ind": "in distribution", "overall": "all sets", "ood": "out of distribution"}
    for i, (key, label) in enumerate(labels.items()):
        error_bars(ax, tokens, [values_of(runs_of[K], key) for K in tokens], i, label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(tokens, tokens)
    seeds = len({run["seed"] for run in runs_of[tokens[0]]})
    ax.set(xlabel="K, compression tokens", ylabel="Precision@1, %", title=f"seeds: {seeds}")
    ax.legend()
    return fig


# ------------------------------------------------------------------------------- what the models do


def pairs_in_plane(sources):
    """The paper's figure: embeddings of pairs in their first two principal components."""
    shapes, fig = Shapes("test", sources.seed), Figure((WIDTH, 3.6))
    tasks = np.repeat(["t2i", "i2t"], PAIRS // 2)
    pairs = [shapes.pair(task, i) for i, task in enumerate(tasks)]
    items = [Item(*query) for query, _, _ in pairs]
    items += [Item(*target) for _, (target,), _ in pairs]
    is_text = np.array([not x.images for x in items])
    panels = {
        "base": "last token",
        "compressed": "C after stage 1",
        "contrastive": "C after stage 2",
    }
    for ax, (name, pooled) in zip(fig.subplots(1, 3), panels.items(), strict=True):
        z = sources.model(name).encode(items)  # (2 n, D)
        flat, share = pca(z)
        for ends in zip(flat[:PAIRS], flat[PAIRS:], strict=True):  # query and target of a pair
            ax.plot(*np.transpose(ends), color=GREY, lw=0.5, zorder=1)
        ax.scatter(*flat[is_text].T, s=14, color=ORANGE, label="caption", zorder=2)
        ax.scatter(*flat[~is_text].T, s=14, color=BLUE, marker="s", label="picture", zorder=2)
        ax.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        ax.set_title(f"{name} ({pooled})")
        cosines = pair_cosines(z[:PAIRS], z[PAIRS:], tasks)
        ax.set_xlabel(
            f"{share.sum():.0%} of the variance\n"
            f"cosine: pairs {cosines.own:.2f}, others {cosines.others:.2f}\n"
            f"own target nearest: {cosines.nearest} of {PAIRS}"
        )
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def tokens(sources):
    """The paper's figure: how alike the K tokens are, in cosines of their final hidden states."""
    fig = Figure((WIDTH, 3.4))
    axes = fig.subplots(1, 2)
    for ax, name in zip(axes, MODELS, strict=True):
        embedder = sources.coded(name)
        cosines = token_cosines(look(embedder, sources.scenes(PICTURES)).h)  # (K, K)
        shown = ax.imshow(cosines, cmap="cividis", vmin=min(0, cosines.min()), vmax=1)
        if embedder.K <= 8:  # else there is no room for numbers
            for (i, j), x in np.ndenumerate(cosines):
                color = "black" if x > 0.55 else "white"
                ax.text(j, i, f"{x:.2f}", ha="center", va="center", color=color)
        every = range(0, embedder.K, max(1, embedder.K // 8))
        ax.set_xticks(every, [f"C{i + 1}" for i in every])
        ax.set_yticks(every, [f"C{i + 1}" for i in every])
        apart = cosines[~np.eye(embedder.K, dtype=bool)].mean()
        ax.set_title(f"{name}: two different tokens {apart:.2f}")
        ax.spines[:].set_visible(False)
    fig.colorbar(shown, ax=axes, label=f"cosine, mean over {PICTURES} pictures")
    return fig


def looks(sources):
    """Where each token looks: its attention over the image tokens, as dots on the picture."""
    scenes = sources.scenes(PICTURES)
    shown = [*scenes[:3], Scene(())]  # the empty one stands for the mean of all
    K = min(4, *(sources.coded(name).K for name in MODELS))
    fig = Figure((WIDTH, 4.3))
    first, *parts = fig.subfigures(1, 3, width_ratios=(1, K, K))
    first.suptitle("picture", fontsize=9)
    for i, (ax, scene) in enumerate(zip(first.subplots(4, 1), shown, strict=True)):
        show(ax, Item(IMAGE, (scene,)))
        ax.set_title(" " if i == 0 else "")
    ax.text(32, 32, f"mean of\n{PICTURES}", ha="center", va="center")
    for part, name in zip(parts, MODELS, strict=True):
        seen = look(sources.model(name), scenes)
        to_picture = seen.attention[..., seen.image].sum(-1)  # (layers, n, K) of all attention
        share = to_picture.mean((1, 2))  # (layers,)
        layer = int(share.argmax())  # the one that attends to the picture most
        patches = seen.attention[layer][:, :, seen.image].numpy()  # (n, K, P)
        patches = [*patches[:3], patches.mean(0)]  # a row of the figure each, (K, P)
        for (row, k), ax in np.ndenumerate(part.subplots(4, K, squeeze=False)):
            show(ax, Item(IMAGE, (shown[row],)), alpha=0.6)
            draw_dots(ax, patches[row][k])
            ax.set_title(f"C{k + 1}" if row == 0 else "")
        text = f"{name}: layer {layer + 1} of {len(share)}, {share[layer]:.0%} on the picture"
        part.suptitle(text, fontsize=9)
    return fig


def draw_dots(ax, weights):
    """A dot in the middle of each patch, as large as its share: weights (P,), in reading order."""
    side = math.isqrt(len(weights))
    if side * side != len(weights):  # of tiles, as LLaVA-NeXT's
        raise InputError(f"{len(weights)} image tokens are no square: each one's place is unknown")
    row, column = np.indices((side, side)).reshape(2, -1)  # (P,), (P,)
    x = (column + 0.5) * 64 / side - 0.5  # a pixel's middle has whole coordinates
    y = (row + 0.5) * 64 / side - 0.5
    ax.scatter(x, y, 250 * weights, color=BLACK, edgecolor="white", linewidth=0.5)


def code(sources):
    """What is in the code: questions answered from C alone, beside the uncompressed model."""
    asked = questions(QUESTIONS, sources.seed)
    fig = Figure((WIDTH, 3.6))
    ax = fig.subplots()
    x = np.arange(len(asked))
    compressed, base = sources.coded("compressed", 1), sources.model("base")
    draw_shares(ax, x - 0.2, compressed, asked, BLUE, "from C alone")
    draw_shares(ax, x + 0.2, base, asked, ORANGE, "uncompressed")
    constant = [100 * most_frequent(rows) for rows in asked.values()]
    label = "always the most frequent answer"
    ax.hlines(constant, x - 0.4, x + 0.4, BLACK, lw=1.5, label=label)
    names = []
    for kind in asked:
        example = textwrap.fill(ASK[kind][0].replace("{}", "…"), 14)
        names.append(f"{kind}\n{example}")
    ax.set_xticks(x, names, fontsize=7.5)
    ax.set(ylabel="right word for word, %", ylim=(0, 108), xlim=(-0.6, len(asked) - 0.4))
    fig.legend(loc="outside upper center", ncols=3)
    return fig


def draw_shares(ax, x, embedder, asked, color, label):
    """A model's bar for each kind of question."""
    right = [100 * answered(embedder, rows) for rows in asked.values()]
    bars = ax.bar(x, right, 0.38, color=color, label=label)
    ax.bar_label(bars, fmt="%.0f", fontsize=8)


def gallery(sources):
    """Queries with their three best candidates: of each task the first right and first wrong."""
    rows = []
    for task in META_TASK:
        queries = ranked(sources.model("contrastive"), task, QUERIES, sources.seed)
        hits = [query.hit for query in queries]
        title = f"{task}: {sum(hits)} of {QUERIES} right"
        chosen = [hits.index(outcome) for outcome in (True, False) if outcome in hits]
        for i in sorted(chosen):
            rows.append((title, queries[i]))
    fig = Figure((WIDTH, 1.1 * len(rows)))
    grid = fig.subplots(len(rows), 5, gridspec_kw={"width_ratios": (1, 1.8, 2, 2, 2)})
    for cells, (title, row) in zip(grid, rows, strict=True):
        picture, text, *best = cells
        show(picture, Item(IMAGE * len(row.query.images), row.query.images))
        show(text, Item(row.query.text.replace(IMAGE, "").strip()))
        order = np.argsort(-row.scores, kind="stable")
        rank = 1 + int(np.flatnonzero(order == 0)[0])
        text.set_title(f"{title}; here rank {rank}", fontsize=8)
        for ax, i in zip(best, order[:3], strict=True):
            word, color = ("right", BLUE) if i == 0 else ("wrong", ORANGE)
            show(ax, row.candidates[i])
            ax.set_title(f"{word} {row.scores[i]:.2f}", fontsize=8)
            ax.spines[:].set(visible=True, color=color, linewidth=2.5)
    return fig


FIGURES = {
    "mask": mask,
    "curves": curves,
    "arms": arms,
    "k": k_score,
    "pca": pairs_in_plane,
    "tokens": tokens,
    "looks": looks,
    "code": code,
    "gallery": gallery,
}
