"""The figures of the README: what the models of the toy world see, keep, and get wrong.

    python evaluate.py --figures DIR                            out/pretrain, out/contrastive
    python evaluate.py --figures DIR --model RUN/contrastive    that one, and RUN/pretrain beside it

Needs matplotlib; half a minute on one core. Reads three models - base (`toy`), compressed (stage
1), contrastive (stage 2) - their log.jsonl, and assets/reproduce.json where there is one; writes
DIR/*.png, each below 120 KB. A figure whose model or record is missing is left out, and a line says
how to make that. The same models give the same figures, bit for bit.

Top to bottom: the numbers - what they are read from - the drawings.
"""

import io
import itertools
import json
import math
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

import model
import pretrain
from data import ANSWER, COMPRESS, CONTENT, HEAD, IMAGE, QUESTION, InputError, Item, open_image
from evaluate import precision_at_1
from shapes import ASK, META_TASK, Scene, Shapes

RECORDS = Path(__file__).parent / "assets" / "reproduce.json"
PICTURES, PAIRS, QUESTIONS, QUERIES = 200, 60, 300, 50  # how many a figure is made of
# Okabe and Ito's colours: told apart with any colour vision.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, GREY = (
    "#000000 #E69F00 #56B4E9 #009E73 #0072B2 #D55E00 #666666".split()
)
COLORS = (BLUE, RED, GREEN, ORANGE)  # of lines
WIDTH = 8  # inches; 880 pixels
STYLE = {
    "figure.dpi": 110, "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip

# ------------------------------------------------------------------------------------- the numbers


def pca(x):
    """The two directions of largest variance, by a singular value decomposition: x (n, D) ->
    (n, 2), and the shares (2,) of the variance that they hold. Row i stays row i."""
    centred = x - x.mean(0)
    _, s, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * np.sign(axes[np.arange(2), abs(axes[:2]).argmax(1)])[:, None]  # one sign
    return centred @ axes.T, (s**2 / (s**2).sum())[:2]


def token_cosines(h):
    """Cosines between the K tokens of a picture, mean over pictures: h (n, K, D) -> (K, K)."""
    z = torch.nn.functional.normalize(h, dim=-1)
    return (z @ z.transpose(1, 2)).mean(0).numpy()


@torch.no_grad()
def look(embedder, pictures):
    """Embeds n pictures of one size. -> final hidden states of the K tokens (n, K, D), their
    attention, mean over heads (layers, n, K, L), and which positions are the picture (L,).

    Only the eager kernel gives attention out; the embeddings under both kernels are the same."""
    rows = [embedder.collate.row(Item(IMAGE, (p,))) for p in pictures]
    inputs = embedder.collate.pad_rows(rows, embedder.device)
    before = embedder.mllm.config._attn_implementation
    embedder.mllm.set_attn_implementation("eager")
    found = embedder.outputs(inputs, output_attentions=True)
    embedder.mllm.set_attn_implementation(before)
    code = inputs["roles"][0] == COMPRESS  # (L,) alike in all rows
    image = inputs["input_ids"][0] == embedder.mllm.config.image_token_id
    attention = torch.stack([a.float().mean(1)[:, code] for a in found.attentions])
    return found.last_hidden_state[:, code].float().cpu(), attention.cpu(), image.cpu()


def questions(n, seed=0) -> dict:
    """n questions of each type about test scenes: {type: [(scene, question, answer)]}."""
    shapes, found, i = Shapes("test", seed), {kind: [] for kind in ASK}, 0
    while min(map(len, found.values())) < n:
        rng = shapes._rng("figures", i)
        scene, i = shapes.scene(rng), i + 1
        for kind, question, answer in shapes.ask(rng, scene):
            found[kind].append((scene, question, answer))
    return {kind: asked[:n] for kind, asked in found.items()}


@torch.no_grad()
def answered(embedder, asked) -> float:
    """Share of questions that greedy decoding answers word for word; where the model has a code,
    from the code alone. One question a row: earlier answers would give later ones away."""
    rows = [embedder.collate.row(Item(IMAGE, (s,)), ((q, a),)) for s, q, a in asked]
    right, budget = 0, model.by_device(None, model.CHUNK_TOKENS, embedder.device)
    for chunk in model.token_chunks(model.row_lengths(rows), budget):
        inputs = embedder.collate.pad_rows([rows[i] for i in chunk], embedder.device)
        right += pretrain.exact_answers(*pretrain.answer_logits(embedder, inputs), inputs)[0]
    return right / len(rows)


def most_frequent(asked) -> float:
    """Share that the best constant answer gets right: what is known without a picture."""
    return Counter(answer for _, _, answer in asked).most_common(1)[0][1] / len(asked)


def ranked(embedder, task, n, seed=0) -> list:
    """n test queries of a task: (query, candidates, scores, is it a hit), candidate 0 right."""
    queries = [Shapes("test", seed).query(task, i) for i in range(n)]
    z = embedder.encode([x for query, candidates in queries for x in (query, *candidates)])
    found, at = [], 0
    for query, candidates in queries:
        q, c = z[at], z[at + 1 : at + 1 + len(candidates)]  # (D,), (m, D)
        at += 1 + len(candidates)
        hit = precision_at_1(q[None], c, [range(len(c))]) == 1
        found.append((query, candidates, c @ q, hit))
    return found


def pair_cosines(q, t, tasks) -> tuple:
    """-> mean cosine of a query with its own target, with the other targets of its task, and for
    how many queries their own is the nearest of these. q, t (n, D), row i a pair; tasks (n,)."""
    same = tasks[:, None] == tasks[None]  # (n, n) against all targets, captions would win
    cosines = np.where(same, q @ t.T, np.nan)
    others = cosines[same & ~np.eye(len(q), dtype=bool)].mean()
    nearest = np.nanargmax(cosines, 1) == np.arange(len(q))
    return np.diag(cosines).mean(), others, int(nearest.sum())


def mean_error(scores) -> tuple:
    """Mean over seeds, and its standard error (NaN, which is not drawn, for a single seed)."""
    n = len(scores)
    return np.mean(scores), np.std(scores, ddof=1) / math.sqrt(n) if n > 1 else math.nan


def percent(scores) -> str:
    """Mean and standard error of shares, in percent, as tables say it: "70.4 ± 3.1"."""
    mean, error = mean_error(scores)
    return f"{100 * mean:.1f}" + f" ± {100 * error:.1f}" * (len(scores) > 1)


def smooth(x):
    """Running mean of 9 steps, fewer at the ends."""
    return np.convolve(x, np.ones(9), "same") / np.convolve(np.ones(len(x)), np.ones(9), "same")


# ------------------------------------------------------------------------ what they are read from


class Models(dict):
    """base, compressed, contrastive: each is loaded when a figure first asks for it."""

    def __init__(self, contrastive, seed, device):
        super().__init__()
        self.contrastive, self.seed, self.device = Path(contrastive), seed, device

    def __missing__(self, name):
        what = ("toy", 0, "last") if name == "base" else (self.folder(name),)
        self[name] = model.load(*what, device=self.device).eval()
        return self[name]

    def folder(self, name) -> Path:
        """The folder of a trained model; InputError with the command that makes it."""
        stage = "pretrain" if name == "compressed" else name
        folder = self.contrastive if stage == name else self.contrastive.parent / stage
        if not (folder / "nanocoma.json").exists():
            start = f" --model {folder.parent / 'pretrain'}" * (stage == name)
            raise InputError(f"no {name} model: `python {stage}.py{start} --out {folder}` makes it")
        return folder

    def coded(self, name, least=2):
        """A trained model, if it has enough compression tokens for the figure."""
        if (K := self[name].K) < least:
            raise InputError(f"{self.folder(name)} has K = {K} compression tokens, not {least}")
        return self[name]

    def log(self, name) -> list:
        """The steps of log.jsonl; its first record, which holds the flags, is left out."""
        path = self.folder(name) / "log.jsonl"
        if not path.exists():
            raise InputError(f"{path} is missing: training writes it")
        return [json.loads(line) for line in path.read_text().splitlines()[1:]]

    def scenes(self) -> list:
        """Test scenes."""
        return [Shapes("test", self.seed).dialogue(i).item.images[0] for i in range(PICTURES)]


def read_records(path) -> dict:
    """The runs of tests/reproduce.py, {study: {arm: [run, by seed]}}; a run: seed, pairs, K, steps,
    curve, ind, ood, overall, ... Of a study only the seeds that all of its arms have run (but those
    with no run at all): every comparison is between the same seeds."""
    if not Path(path).exists():
        raise InputError(f"{path} is missing: `python tests/reproduce.py` writes it")
    found, records = json.loads(Path(path).read_text()), {}
    needed = {"first", "second", "seed", "pairs", "K", "steps", "curve", "ind", "ood", "overall"}
    for i, run in enumerate(found["runs"]):
        if lacks := ", ".join(sorted(needed - set(run))):
            raise InputError(f"{path}: run {i} lacks {lacks}")
    for study, arms in found["studies"].items():
        runs = {a: {r["seed"]: r for r in found["runs"] if [r["first"], r["second"]] == flags}
                for a, flags in arms.items()}  # fmt: skip
        have = [set(by_seed) for by_seed in runs.values() if by_seed]
        if seeds := have and sorted(set.intersection(*have)):
            records[study] = {a: [by[s] for s in seeds] for a, by in runs.items() if by}
    return records


# ------------------------------------------------------------------------------------ the drawings


def mask(models, records):
    """Who may attend to whom, in a real row: what compression takes away from causal attention."""
    collate = model.load("toy", device="cpu").collate
    turns = (("count the objects.", "two"), ("where is the cross?", "top left"))
    row = collate.pad_rows([collate.row(Shapes().dialogue(0).item, turns)])
    roles, L = row["roles"][0].tolist(), row["roles"].shape[1]
    may = pretrain.compression_mask(row["roles"])[0, 0].numpy()  # (L, L)
    kinds = np.where(may, 2, np.tri(L)).astype(int)  # 0 the future, 1 hidden, 2 may attend
    fig = Figure((WIDTH, 6.7), layout="none")
    ax = fig.add_axes((0.18, 0.01, 0.8, 0.92))
    ax.imshow(np.array([(1, 1, 1), (0.97, 0.8, 0.45), (0.2, 0.55, 0.75)])[kinds])
    names = {HEAD: "head", CONTENT: "picture", COMPRESS: "C", QUESTION: "Q", ANSWER: "A"}
    at = [i for i in range(L) if i == 0 or roles[i] != roles[i - 1]] + [L]  # where regions start
    for n, (a, b) in enumerate(itertools.pairwise(at)):
        name, middle = names[roles[a]], (a + b - 1) / 2
        name += f"$_{(n - 1) // 2}$" * (name in "QA")  # head, picture, C, Q1, A1, Q2, A2
        for line in (ax.axhline, ax.axvline):
            line(a - 0.5, color="white", lw=1)
        ax.text(middle, -1.2, name, ha="center", weight="bold")
        ax.text(-7, middle, name, ha="right", va="center", weight="bold")
    words = collate.tokenizer.convert_ids_to_tokens(row["input_ids"][0])
    ax.set_yticks(range(L), [w.strip("\u0120<|>") for w in words], fontsize=6.5)
    ax.set_title("A row attends to the columns that are blue", pad=24)
    ax.tick_params(length=0, labelbottom=False)
    ax.spines[:].set_visible(False)
    text = "hidden: all that Q and A know\nof the picture went through C"
    ax.text(at[2] / 2, (at[3] + at[4] - 1) / 2, text, ha="center", va="center")
    ax.text(at[2] * 0.36, at[2] * 0.8, "may attend", ha="center", color="white")
    ax.text(L * 0.75, L * 0.3, "the future", ha="center", color=GREY)
    return fig


def curves(models, records):
    """Loss and hits of both stages, step by step, from their log.jsonl."""
    panels = (
        ("compressed", "loss", "Stage 1: loss of the answers, nats"),
        ("compressed", "exact", "Stage 1: answers right word for word, %"),
        ("contrastive", "loss", "Stage 2: InfoNCE, nats"),
        ("contrastive", "top1", "Stage 2: queries nearest to their own target, %"),
    )
    fig = Figure((WIDTH, 4.6))
    for ax, (name, key, title) in zip(fig.subplots(2, 2).flat, panels, strict=True):
        log = models.log(name)
        steps = [r["step"] for r in log]
        y = np.array([r[key] for r in log]) * (1 if key == "loss" else 100)
        ax.plot(steps, y, color=SKY, lw=0.6, label="each batch")
        ax.plot(steps, smooth(y), color=BLUE, label="mean of 9")
        ax.set(title=title, xlim=(0, steps[-1]), ylim=(0, 100), xlabel="step")
        if key == "loss":
            ax.set(yscale="log", ylim=(smooth(y).min() / 3, y.max() * 1.5))
            ax.yaxis.set_major_formatter("{x:g}")
        if (chance := log[-1].get("chance")) and key == "loss":
            label = f"ln {math.exp(chance):.0f} = {chance:.2f}: no information"
            ax.axhline(chance, color=RED, ls="--", lw=1.2, label=label)
    lines = fig.axes[2].get_legend_handles_labels()
    fig.legend(*lines, loc="outside upper center", ncols=3)
    return fig


def error_bars(ax, x, runs, i, label):
    """Mean and standard error, in percent, at each x of its runs' scores (shares)."""
    y, error = np.transpose([mean_error(scores) for scores in runs])  # (n,), (n,)
    how = dict(color=COLORS[i], marker="os^D"[i], capsize=3, label=label)
    ax.errorbar(x, 100 * y, 100 * error, **how)


ARMS = dict(none="contrastive only", plain="the same dialogues, no mask", coma="CoMa")
ARMS["both"] = "CoMa, beyond the paper"


def arms(models, records):
    """In-distribution Precision@1 of each arm, mean and standard error over seeds: a panel for each
    amount of pairs, against contrastive steps; the last one, at the end, against the pairs."""
    runs = {}  # pairs -> arm -> its runs
    for study, found in read_records(records).items():
        if study.startswith(("arms", "pairs")):
            runs[next(iter(found.values()))[0]["pairs"]] = found
    if not runs:
        raise InputError('the records hold no study "arms": `python tests/reproduce.py` runs it')
    amounts = sorted(runs, key=lambda n: n or math.inf)  # 0: unlimited
    fig = Figure((WIDTH, 3.6))
    *axes, last = fig.subplots(1, len(amounts) + 1, sharey=True)
    for ax, pairs in zip(axes, amounts, strict=True):
        for i, arm in enumerate(ARMS):
            if found := runs[pairs].get(arm):
                scores = zip(*(r["curve"] for r in found), strict=True)  # of each step, (seeds,)
                error_bars(ax, found[0]["steps"], scores, i, ARMS[arm])
        seeds, what = len(next(iter(runs[pairs].values()))), f"{pairs:,}" if pairs else "unlimited"
        ax.set(xlabel="contrastive steps", title=f"{what} pairs\nseeds: {seeds}")
    for i, arm in enumerate(ARMS):
        at = [n for n, pairs in enumerate(amounts) if arm in runs[pairs]]
        ends = [[r["ind"] for r in runs[amounts[n]][arm]] for n in at]
        if at:
            error_bars(last, at, ends, i, ARMS[arm])
    short = [f"{n // 1000}k" if n >= 1000 else n or "∞" for n in amounts]
    last.set_xticks(range(len(short)), short)
    last.set(xlabel="distinct pairs", title="at the end")
    axes[0].set_ylabel("Precision@1, %, in distribution")
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda x: len(x[1]))
    fig.legend(handles, labels, loc="outside upper center", ncols=4)
    return fig


def k_score(models, records):
    """Precision@1 against K, the number of compression tokens: mean and standard error."""
    runs = {rows[0]["K"]: rows for rows in read_records(records).get("K", {}).values()}
    if len(runs) < 2:
        raise InputError("the records hold no two K: `python tests/reproduce.py --study K`")
    fig = Figure((WIDTH * 0.7, 3.3))
    ax, tokens = fig.subplots(), sorted(runs)
    labels = dict(ind="in distribution", overall="all sets", ood="out of distribution")
    for i, key in enumerate(labels):
        error_bars(ax, tokens, [[r[key] for r in runs[K]] for K in tokens], i, labels[key])
    ax.set_xscale("log", base=2)
    ax.set_xticks(tokens, tokens)
    seeds = len({r["seed"] for r in runs[tokens[0]]})
    ax.set(xlabel="K, compression tokens", ylabel="Precision@1, %", title=f"seeds: {seeds}")
    ax.legend()
    return fig


def pairs_in_plane(models, records):
    """The paper's figure: embeddings of pairs in their first two principal components."""
    shapes, fig = Shapes("test", models.seed), Figure((WIDTH, 3.6))
    tasks = np.repeat(["t2i", "i2t"], PAIRS // 2)
    pairs = [shapes.pair(task, i) for i, task in enumerate(tasks)]
    items = [p.query for p in pairs] + [p.targets[0] for p in pairs]
    pooled = dict(base="last token", compressed="C after stage 1", contrastive="C after stage 2")
    for ax, (name, how) in zip(fig.subplots(1, 3), pooled.items(), strict=True):
        q, t = np.split(z := models[name].encode(items), 2)  # (n, D), (n, D)
        flat, share = pca(z)
        own, others, nearest = pair_cosines(q, t, tasks)
        for ends in zip(*np.split(flat, 2), strict=True):
            ax.plot(*np.transpose(ends), color=GREY, lw=0.5, zorder=1)
        is_text = np.array([not x.images for x in items])
        ax.scatter(*flat[is_text].T, s=14, color=ORANGE, label="caption", zorder=2)
        ax.scatter(*flat[~is_text].T, s=14, color=BLUE, marker="s", label="picture", zorder=2)
        ax.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        ax.set_title(f"{name} ({how})")
        ax.set_xlabel(f"{share.sum():.0%} of the variance\ncosine: pairs {own:.2f}, others "
                      f"{others:.2f}\nown target nearest: {nearest} of {PAIRS}")  # fmt: skip
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def tokens(models, records):
    """The paper's figure: how alike the K tokens are, in cosines of their final hidden states."""
    fig = Figure((WIDTH, 3.4))
    axes = fig.subplots(1, 2)
    for ax, name in zip(axes, ("compressed", "contrastive"), strict=True):
        embedder = models.coded(name)
        cosines = token_cosines(look(embedder, models.scenes())[0])  # (K, K)
        shown = ax.imshow(cosines, cmap="cividis", vmin=min(0, cosines.min()), vmax=1)
        for (i, j), x in np.ndenumerate(cosines) if embedder.K <= 8 else ():
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


def looks(models, records):
    """Where each token looks: its attention over the image tokens, as dots on the picture."""
    scenes = models.scenes()
    K = min(4, *(models.coded(name).K for name in ("compressed", "contrastive")))
    fig = Figure((WIDTH, 4.3))
    parts = fig.subfigures(1, 3, width_ratios=(1, K, K))
    parts[0].suptitle("picture", fontsize=9)
    for ax, scene in zip(parts[0].subplots(4, 1), [*scenes[:3], Scene(())], strict=True):
        show(ax, Item(IMAGE, (scene,)))
        ax.set_title(" " if ax is parts[0].axes[0] else "")
    ax.text(32, 32, f"mean of\n{PICTURES}", ha="center", va="center")
    for part, name in zip(parts[1:], ("compressed", "contrastive"), strict=True):
        _, attention, image = look(models[name], scenes)
        share = attention[..., image].sum(-1).mean((1, 2))  # (layers,) of all attention
        layer = int(share.argmax())
        patches = attention[layer][:, :, image].numpy()  # (n, K, P)
        side = math.isqrt(patches.shape[-1])
        y, x = (np.indices((side, side)).reshape(2, -1) + 0.5) * 64 / side - 0.5  # (P,), (P,)
        for (row, k), ax in np.ndenumerate(part.subplots(4, K, squeeze=False)):
            show(ax, Item(IMAGE, (scenes[row] if row < 3 else Scene(()),)), alpha=0.6)
            seen = patches[row, k] if row < 3 else patches[:, k].mean(0)  # (P,)
            ax.scatter(x, y, 250 * seen, color=BLACK, edgecolor="white", linewidth=0.5)
            ax.set_title(f"C{k + 1}" if row == 0 else "")
        text = f"{name}: layer {layer + 1} of {len(share)}, {share[layer]:.0%} on the picture"
        part.suptitle(text, fontsize=9)
    return fig


def code(models, records):
    """What is in the code: questions answered from C alone, beside the uncompressed model."""
    asked, fig = questions(QUESTIONS, models.seed), Figure((WIDTH, 3.6))
    ax, at = fig.subplots(), np.arange(len(asked))
    compressed = models.coded("compressed", 1)
    for embedder, i, label in (compressed, 0, "from C alone"), (models["base"], 1, "uncompressed"):
        right = [100 * answered(embedder, x) for x in asked.values()]
        bars = ax.bar(at + 0.4 * i - 0.2, right, 0.38, color=(BLUE, ORANGE)[i], label=label)
        ax.bar_label(bars, fmt="%.0f", fontsize=8)
    constant = [100 * most_frequent(x) for x in asked.values()]
    label = "always the most frequent answer"
    ax.hlines(constant, at - 0.4, at + 0.4, BLACK, lw=1.5, label=label)
    words = [textwrap.fill(ASK[kind][0].replace("{}", "…"), 14) for kind in asked]
    ax.set_xticks(at, [f"{k}\n{w}" for k, w in zip(asked, words, strict=True)], fontsize=7.5)
    ax.set(ylabel="right word for word, %", ylim=(0, 108), xlim=(-0.6, len(asked) - 0.4))
    fig.legend(loc="outside upper center", ncols=3)
    return fig


def gallery(models, records):
    """Queries with their three best candidates: of each task the first right and first wrong."""
    rows = []
    for task in META_TASK:
        found = ranked(models["contrastive"], task, QUERIES, models.seed)
        hits = [hit for *_, hit in found]
        for i in sorted(hits.index(x) for x in (True, False) if x in hits):
            rows.append((f"{task}: {sum(hits)} of {QUERIES} right", *found[i]))
    fig = Figure((WIDTH, 1.1 * len(rows)))
    grid = fig.subplots(len(rows), 5, gridspec_kw=dict(width_ratios=(1, 1.8, 2, 2, 2)))
    for cells, (title, query, candidates, scores, _) in zip(grid, rows, strict=True):
        picture, text, *cells = cells
        show(picture, Item(IMAGE * len(query.images), query.images))
        show(text, Item(query.text.replace(IMAGE, "").strip()))
        order = np.argsort(-scores, kind="stable")
        rank = 1 + int(np.flatnonzero(order == 0)[0])
        text.set_title(f"{title}; here rank {rank}", fontsize=8)
        for ax, i in zip(cells, order[:3], strict=True):
            show(ax, candidates[i])
            ax.set_title(f"{'wrong' if i else 'right'} {scores[i]:.2f}", fontsize=8)
            ax.spines[:].set(visible=True, color=ORANGE if i else BLUE, linewidth=2.5)
    return fig


def show(ax, item, alpha=None):
    """An Item's picture, or its text, in a cell."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if item.images:
        ax.imshow(open_image(item.images[0]), alpha=alpha)
    how = dict(ha="center", va="center", fontsize=6.5, transform=ax.transAxes)
    ax.text(0.5, 0.5, textwrap.fill(item.text.replace(IMAGE, ""), 31), **how)


# ---------------------------------------------------------------------------------------- all of it

FIGURES = dict(mask=mask, curves=curves, arms=arms, k=k_score, pca=pairs_in_plane, tokens=tokens)
FIGURES |= dict(looks=looks, code=code, gallery=gallery)


def draw(folder, contrastive="", seed=0, device=None, records=RECORDS):
    """Draws all figures that can be drawn into a folder, and says why a figure is left out.
    contrastive: the stage-2 folder; stage 1's is `pretrain` beside it. -> the files."""
    models, files = Models(contrastive or "out/contrastive", seed, device), []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items() if model.rank() == 0 else ():
        path, raw = Path(folder, f"{name}.png"), io.BytesIO()
        try:
            with rc_context(STYLE):
                figure(models, records).savefig(raw, format="png")
        except InputError as e:
            model.say(f"left out {path}: {e}")
            continue
        picture = Image.open(raw).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        picture.save(path, optimize=True)  # 256 colours are enough, and light
        files.append(path)
        model.say(f"wrote {path}")
    return files
