"""What a contrastive step costs: ours against a plain full batch, and against other GradCaches.

    OMP_NUM_THREADS=1 python tests/bench/step.py [--rounds 3]     about 15 minutes

256 pairs: a query is a picture of 4-36 tokens and 8-60 words, a target is 3-120 words; a random
Qwen2-VL of 3.5 M parameters, its vision tower and language model in the proportions of Qwen2-VL-2B.
All rows of the table see the same ids and pixels, and leave the same gradient (checked first). User
CPU seconds of one thread, rounds interleaved; of each row the fastest round. (System time stands
beside it: a full batch has the machine hand out gigabytes of fresh memory in every step.)

Predicted before measuring, everything trained (and measured then, on another machine; the newest
table is in docs/speed.md). F = the language model's forward pass over the real tokens, a backward
pass is 2 F; padding makes a full batch 1.75 F; the tower, V = 0.25 F, is never padded. Small chunks
stay in the processor's cache: less 10 %.

                            arithmetic                              predicted    measured
  plain full batch          3 x 1.75 + 3 V = 6.0 F                       1.00        1.00
  GradCache, chunks of 32   4 x 1.6 + 4 V = 7.4 F, less 10 %             1.10        1.28
  luyug/GradCache's way     4 x 1.75 + 4 V = 8 F, less 10 %              1.20        1.32
  sentence-transformers     it trims each chunk, as GradCache            1.10        1.27
  ours, sorted chunks       4 x 1.05 + 4 V = 5.2 F, less 10 %            0.78        0.84
  ours, a graph kept        of 4 chunks the longest runs once            0.74        0.84
  ours, three graphs kept   of 4 chunks three run once                   0.64        0.80
  ours, 16 of 1,024 tokens  (not predicted)                                          0.75
  ours, 24 of 1,024 tokens  (not predicted)                                          0.70

Frozen tower, in units of that table's plain batch (5.5 F): GradCache 1.12 predicted, 1.34 measured;
sorted chunks with the tower's features remembered 0.70 predicted, 0.81; with 16 small graphs kept
0.66, with 24 of them 0.65. The best of ours is 0.53 to 0.55 of the best peer with everything
trained, 0.50 with the tower frozen. What the predictions missed: a GradCache gains nothing from the
cache, and a kept graph saves less than its share, for the last chunks hold the fewest, longest
rows.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import contrastive  # noqa: E402
import model  # noqa: E402
from data import Item  # noqa: E402
from plumbing import last_layer  # noqa: E402
from plumbing.graphs import KeptGraphs  # noqa: E402
from plumbing.memory import Budget  # noqa: E402
from plumbing.weights import Settings  # noqa: E402

TAU, CHUNK, PAIRS = 0.05, 32, 256
ALL = 10**6  # graphs kept
WORDS = "red blue circle square small large top left right what where is the at and of object count"

# ---------------------------------------------------------------------------- model and workload


def build(frozen) -> model.Embedder:
    """A random Qwen2-VL of 3.5 M parameters behind the toy's tokenizer; pictures up to 96 x 96."""
    toy = model.load("toy-random", 4, "mean", "chat", "cpu")
    config = toy.mllm.config
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 192, 512, 5
    text.num_attention_heads, text.num_key_value_heads = 6, 2
    text.layer_types = ["full_attention"] * 5
    vision.hidden_size, vision.embed_dim, vision.depth = 192, 128, 5
    torch.manual_seed(0)
    mllm = transformers.AutoModelForImageTextToText.from_config(config)
    toy.processor.image_processor.size = {"shortest_edge": 32**2, "longest_edge": 96**2}
    embedder = model.Embedder(mllm, toy.processor, Settings(4, "mean", "chat")).train()
    if frozen:
        mllm.get_encoder(modality="image").requires_grad_(False)
    return embedder


def workload(embedder, pairs) -> tuple:
    """-> (query rows, target rows), not padded."""
    rng = random.Random(0)

    def words(low, high):
        return " ".join(rng.choices(WORDS.split(), k=rng.randint(low, high)))

    def picture():
        w, h = (16 * rng.randint(2, 6) for _ in range(2))
        return Image.frombytes("RGB", (w, h), rng.randbytes(3 * w * h))

    queries = [Item("<image> " + words(8, 60), (picture(),)) for _ in range(pairs)]
    targets = [Item(words(3, 120)) for _ in range(pairs)]
    row = embedder.collate.row
    return [row(x) for x in queries], [row(x) for x in targets]


# --------------------------------------------------------------------------------- the contestants


def plain(embedder, queries, targets):
    """Queries and targets through the model at once, in one graph each."""
    q, t = (embedder(embedder.collate.pad_rows(rows)) for rows in (queries, targets))
    contrastive.info_nce(q, t, TAU)[0].backward()


def grad_cache(embed, n, size):
    """`contrastive.two_passes` without tricks: chunks of `size` rows in input order, the n queries,
    then their n targets; no graph is kept."""
    chunks = []
    for start in (*range(0, n, size), *range(n, 2 * n, size)):
        end = n if start < n else 2 * n
        chunks.append(list(range(start, min(start + size, end))))
    contrastive.two_passes(embed, chunks, lambda z: contrastive.info_nce(z[:n], z[n:], TAU)[0])


def naive(embedder, queries, targets, size=CHUNK):
    """GradCache as in the paper: `size` rows at a time, padded to their own longest."""
    rows = queries + targets

    def embed(chunk):
        return embedder(embedder.collate.pad_rows([rows[i] for i in chunk]))

    grad_cache(embed, len(queries), size)


def luyug(embedder, queries, targets, size=CHUNK):
    """As luyug/GradCache does it: the batch is padded once, then cut into chunks of `size` rows."""
    n = len(queries)
    cut_queries, cut_targets = (
        cut(embedder.collate.pad_rows(rows), size) for rows in (queries, targets)
    )

    def embed(chunk):
        first = chunk[0]
        return embedder(cut_queries[first] if first < n else cut_targets[first - n])

    grad_cache(embed, n, size)


def cut(inputs, size) -> dict:
    """A padded batch of at most one picture a row in chunks of `size` rows; nothing is trimmed. ->
    {a chunk's first row: its model inputs}."""
    chunks = {}
    for i in range(0, len(inputs["input_ids"]), size):
        rows = slice(i, i + size)
        part = {key: x[rows] for key, x in inputs.items() if key != "pixel_values"}
        if "pixel_values" in inputs:  # flattened patches, see image_grid_thw
            ends = F.pad(inputs["image_grid_thw"].prod(1).cumsum(0), (1, 0))
            last = min(i + size, len(ends) - 1)
            part["pixel_values"] = inputs["pixel_values"][ends[i] : ends[last]]
        chunks[i] = part
    return chunks


class SentenceTransformerLike(torch.nn.Sequential):
    """The little that sentence-transformers' losses ask of a model, around our embedder."""

    def forward(self, features):
        return {"sentence_embedding": self[0](features)}


def sentence_transformers(embedder, queries, targets, size=CHUNK):
    """Its CachedMultipleNegativesRankingLoss, on the same padded ids."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss as CachedLoss,
    )

    loss = CachedLoss(SentenceTransformerLike(embedder), scale=1 / TAU, mini_batch_size=size)
    inputs = [embedder.collate.pad_rows(rows) for rows in (queries, targets)]
    loss(inputs, None).backward()


BUDGET = Budget(CHUNK * 128)  # chunks have the padded tokens of 32 longest rows


def ours(embedder, queries, targets, budget=BUDGET):
    """`contrastive.gradcache_step`."""
    n = torch.arange(len(queries))
    batch = contrastive.Batch(queries + targets, n[:, None], n)
    contrastive.gradcache_step(embedder, batch, TAU, budget)


# --------------------------------------------------------------------------------------- measuring


def by_others(step):
    """A peer's step: in no other library the last MLP leaves out what nobody reads."""

    def run(embedder, queries, targets):
        with mock.patch.object(last_layer, "OnlyAt", lambda tokens: nullcontext()):
            step(embedder, queries, targets)

    return run


def contestants(frozen) -> dict:
    """{name: function(embedder, queries, targets)}, peers first."""
    steps = {"plain full batch": plain, "GradCache, chunks of 32": naive}
    steps["luyug/GradCache's way"] = luyug
    try:
        import sentence_transformers as package

        steps[f"sentence-transformers {package.__version__}"] = sentence_transformers
    except ImportError:
        print("(sentence-transformers is not installed: its row is left out)")
    steps = {name: by_others(step) for name, step in steps.items()}
    for cache in ("off", "device") if frozen else ("off",):
        for tokens, keep in ((4096, 0), (1024, 0), (1024, 8), (1024, 24), (1024, ALL)):
            name = f"ours, {tokens} tokens, keep {'all' if keep == ALL else keep}"
            if cache != "off":
                name += ", cache"
            steps[name] = partial(ours, budget=Budget(tokens, keep, cache))
    return steps


def gradient(embedder, step, rows) -> torch.Tensor:
    """The whole gradient of a step, flat."""
    embedder.zero_grad()
    step(embedder, *rows)
    return torch.cat([p.grad.flatten() for p in embedder.parameters() if p.grad is not None])


def check(embedder, steps, rows):
    """All contestants leave the same gradient, to float32."""
    want = gradient(embedder, plain, rows)
    for name, step in steps.items():
        gap = float((gradient(embedder, step, rows) - want).norm() / want.norm())
        if not gap < 1e-4:
            raise SystemExit(f"{name}: its gradient is {gap:.1e} off the plain batch's")


def race(embedder, steps, rows, rounds) -> dict:
    """{name: (user, system) CPU seconds of each round}."""
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            embedder.zero_grad()
            start = os.times()
            step(embedder, *rows)
            end = os.times()
            seconds[name].append((end.user - start.user, end.system - start.system))
    return seconds


def timing(frozen, rounds, pairs):
    """One table: seconds, ratio to the plain batch, ratio to the best peer."""
    embedder = build(frozen)
    steps, rows = contestants(frozen), workload(embedder, pairs)
    check(embedder, steps, [r[:24] for r in rows])
    seconds = race(embedder, steps, rows, rounds)
    best = {name: min(s)[0] for name, s in seconds.items()}
    peers = [n for n in best if not n.startswith(("ours", "plain"))]
    peer = min(peers, key=best.get)
    trained = "vision tower frozen" if frozen else "everything trained"
    total = sum(p.numel() for p in embedder.parameters()) / 1e6
    print(f"\n{pairs} pairs, {total:.2f} M parameters, {trained}; best peer: {peer}")
    print(f"{'':<34}{'s':>7}{'slowest':>9}{'system':>8}{'/ plain':>9}{'/ best peer':>13}")
    for name, s in best.items():
        slow, system = max(seconds[name])[0], min(s for _, s in seconds[name])
        ratios = f"{s / best['plain full batch']:>9.2f}{s / best[peer]:>13.2f}"
        print(f"{name:<34}{s:>7.2f}{slow:>9.2f}{system:>8.2f}{ratios}", flush=True)


# ------------------------------------------------------------------------------------------ memory


class Setting(NamedTuple):
    """What one fresh process measures: a step on `pairs` pairs, ours with --graph-memory; or where
    `rows` > 0 InfoNCE of so many, alone."""

    step: str = "ours"  # plain, naive or ours
    pairs: int = PAIRS
    frozen: bool = False
    graph_memory: str = "0"
    rows: int = 0


def peak_memory(setting) -> float:
    """MiB that a step adds to what was there before it, at its peak; where what is freed goes back
    to the system at once (which takes time), so that resident memory is live memory."""
    return measured(setting, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0")[0]


def measured(setting, **malloc) -> list:
    """[MiB at the peak, and where rows > 0 CPU seconds], of a fresh process."""
    command = [sys.executable, __file__, "--memory", json.dumps(setting)]
    env = {**os.environ, **malloc}
    said = subprocess.run(command, check=True, capture_output=True, env=env).stdout
    return [float(word) for word in said.splitlines()[-1].split()]


def resident(key) -> int:
    """Bytes of this process that are resident: "VmRSS" now, "VmHWM" at their peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) * 1024


@contextmanager
def added_memory(peaks):
    """Appends the MiB by which the block's peak exceeds what was resident when it began."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    yield
    peaks.append((resident("VmHWM") - before) / 2**20)


def measure_memory(setting):
    """What `peak_memory` runs."""
    peaks = []
    if setting.rows:
        q, t = (F.normalize(torch.randn(setting.rows, 256), dim=1) for _ in range(2))
        for x in (q, t):
            x.requires_grad_()
        loss_of = LOSSES[setting.step]
        loss_of(q[:8], t[:8]).backward()  # starts what starts once
        q.grad, t.grad = torch.zeros_like(q), torch.zeros_like(t)
        began = time.process_time()
        with added_memory(peaks):
            loss_of(q, t).backward()
        peaks.append(time.process_time() - began)
    else:
        embedder = build(setting.frozen)
        rows = workload(embedder, setting.pairs)
        naive(embedder, *(r[:4] for r in rows))  # makes the gradients, which stay
        steps = {"plain": plain, "naive": naive, "ours": ours_as_trained(embedder, setting)}
        if setting.step == "ours":
            steps["ours"](embedder, *(r[:PAIRS] for r in rows))  # the first step, which measures
        with added_memory(peaks):
            steps[setting.step](embedder, *rows)
    print(*peaks)


def ours_as_trained(embedder, setting):
    """Our step with the memory that is set for it."""
    cfg = contrastive.Config(graph_memory=setting.graph_memory, chunk_tokens=1024)
    cfg.vision_cache = "device" if setting.frozen else "off"
    return as_trained(embedder, cfg)


def as_trained(embedder, cfg):
    """Our step as `contrastive.py` takes it, with as many graphs as fit."""
    graphs = KeptGraphs(cfg, embedder)

    def step(embedder, queries, targets):
        with graphs.budget() as budget:
            ours(embedder, queries, targets, budget)

    return step


LOSSES = {
    "plain": lambda q, t: contrastive.paper_info_nce(q, t, TAU),
    "ours": lambda q, t: contrastive.info_nce(q, t, TAU)[0],
}


def info_nce_table(sizes=(8192, 16384), rounds=3):
    """InfoNCE alone, forward and backward: CPU seconds (the least of some rounds, in turn) and MiB
    beyond q, t and their gradients, beside the plain (N, N) form's."""
    print(f"\n{'InfoNCE, D = 256':<20}{'plain':>9}{'ours':>9}{'ratio':>7}{'MiB':>9}{'MiB':>9}")
    for rows in sizes:
        mib = {step: peak_memory(Setting(step, rows=rows)) for step in LOSSES}
        seconds = {}
        for _ in range(rounds):
            for step in LOSSES:
                _, spent = measured(Setting(step, rows=rows))
                seconds[step] = min(spent, seconds.get(step, spent))
        plain, ours = seconds["plain"], seconds["ours"]
        times = f"{plain:>9.2f}{ours:>9.2f}{ours / plain:>7.2f}"
        print(f"N = {rows:<16,}{times}{mib['plain']:>9.0f}{mib['ours']:>9.0f}", flush=True)


MEMORY = {
    "plain full batch": Setting("plain"),
    "GradCache, chunks of 32": Setting("naive"),
    "ours, --graph-memory 0": Setting(),
    "ours, --graph-memory 500MiB": Setting(graph_memory="500MiB"),
    "ours, --graph-memory 4GiB": Setting(graph_memory="4GiB"),
    "ours, 500MiB, frozen tower remembered": Setting(frozen=True, graph_memory="500MiB"),
}


def memory(pairs):
    """The second table."""
    many, title = 8 * pairs, "Peak of a step, MiB beyond weights and inputs"
    print(f"\n{title}{f'N = {pairs}':>12}{many:>8}{'ratio':>7}")
    for name, setting in MEMORY.items():
        peak, others = peak_memory(setting._replace(pairs=pairs)), ""
        if setting.step != "plain":  # whose eightfold would not fit
            largest = peak_memory(setting._replace(pairs=many))
            others = f"{largest:>8.0f}{largest / peak:>7.2f}"
        print(f"{name:<45}{peak:>12.0f}{others}", flush=True)
    rows = 64 * pairs
    print(f"{f'InfoNCE, N = {rows}, D = 256':<45}{peak_memory(Setting(rows=rows)):>12.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of a step")
    parser.add_argument("--only", choices=["trained", "frozen", "memory", "infonce"], default="")
    parser.add_argument("--memory", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        measure_memory(Setting(*json.loads(args.memory)))
        sys.exit()
    for frozen in (False, True):
        if args.only in ("", "frozen" if frozen else "trained"):
            timing(frozen, args.rounds, args.pairs)
    if args.only in ("", "memory"):
        memory(args.pairs)
    if args.only in ("", "infonce"):
        info_nce_table(rounds=args.rounds)
