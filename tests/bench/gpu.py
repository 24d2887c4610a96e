"""Both stages at the size of real models: pairs/s, tokens/s, MFU and peak memory on one GPU.

    python tests/bench/gpu.py                        Qwen2-VL-2B and Qwen2.5-VL-3B, random weights
    python tests/bench/gpu.py --model qwen2_5_vl_3b --batches 64,256 --chunk-tokens 16384
    python tests/bench/gpu.py --profile              where the time of a step goes, too
    python tests/bench/gpu.py --tiny                 a minute on a CPU: does everything here run?

LoRA of rank 16, K = 32, bfloat16; a query is a picture of 256-1024 tokens and 8-60 words, a target
3-120 words; a dialogue has such a picture and three turns. The shapes are those of the public
configs; the tokenizer is the toy's, so the words are fewer ids, in an embedding table of full size.

MFU = FLOPs that a step cannot do without / seconds / the GPU's dense bfloat16 peak. Counted, with 2
FLOPs for a multiplication and an addition: over real tokens (no padding) the language model's
layers forward, and once more as much for the gradient of the activations (frozen weights need none
of their own, LoRA's are below 1 %); the vision tower forward, once; attention, the causal half of
it in the language model, twice for its backward pass. Not counted: GradCache's second forward pass,
padding, recomputation. So GradCache cannot exceed 2/3 of what a plain batch could reach. (Against
torch's FlopCounterMode at --tiny: 2 to 4 % apart.) Counted as if all tokens met the last layer's
MLP, 3 % of the language model, of which stage 2 leaves out what nobody reads.
"""

import argparse
import random
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import step  # which also puts the repository's root on the path
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

import contrastive
import model
import pretrain
from data import COMPRESS, IMAGE, Item
from plumbing.config import CHUNK_TOKENS
from plumbing.families import position_ids
from plumbing.loader import halved
from plumbing.memory import Budget
from plumbing.weights import Settings
from tools import mask_as_cache

PEAK = {  # FLOP/s, dense bfloat16, vendor's numbers
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "A10": 125e12,
    "A6000": 155e12,
}


class Shape(NamedTuple):
    """The sizes of a public config."""

    kind: str
    text: dict
    vision: dict


TEXT = {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
EYES = {
    "depth": 32,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
SHAPES = {
    "qwen2_vl_2b": Shape(
        "qwen2_vl",
        text={
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
        },
        vision={"embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4},
    ),
    "qwen2_5_vl_3b": Shape(
        "qwen2_5_vl",
        text={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
        },
        vision={
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
    ),
}
TINY_TEXT = {  # the same shapes, a twelfth as wide
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "rope_parameters": {**ROPE, "mrope_section": [4, 6, 6]},
}
TINY_EYES = {"intermediate_size": 128, "embed_dim": 64, "out_hidden_size": 128}


def config_of(shape, tiny, token_ids):
    """The transformers config of a shape."""
    text = {**TEXT, "rope_parameters": ROPE, **shape.text}
    vision = {**EYES, **shape.vision}
    if tiny:
        text.update(TINY_TEXT)
        vision.update(depth=2, num_heads=2, fullatt_block_indexes=[1])
        vision.update({key: x for key, x in TINY_EYES.items() if key in shape.vision})
        # In Qwen2-VL the tower's "hidden size" is the language model's.
        vision["hidden_size"] = 128 if shape.kind == "qwen2_vl" else 64
    config = AutoConfig.for_model(shape.kind, text_config=text, vision_config=vision, **token_ids)
    config.tie_word_embeddings = True
    return config


def tokens_of_a_picture(tiny) -> tuple:
    """The fewest and the most."""
    return (16, 64) if tiny else (256, 1024)


def build(shape, cfg, tiny) -> model.Embedder:
    """The embedder with random weights, LoRA as `cfg` says, on the GPU if there is one."""
    toy = model.load("toy-random", 32, "mean", "coma", "cpu")
    ids = {key: x for key, x in toy.mllm.config.to_dict().items() if key.endswith("_token_id")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        mllm = AutoModelForImageTextToText.from_config(config_of(shape, tiny, ids), dtype=dtype)
    least, most = (28 * 28 * tokens for tokens in tokens_of_a_picture(tiny))
    toy.processor.image_processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, min_pixels=least, max_pixels=most
    )
    embedder = model.Embedder(mllm, toy.processor, Settings(32, "mean", "coma"))
    model.choose_trained(embedder, cfg)
    return embedder.train()


# ---------------------------------------------------------------------------------------- workload


class Workload(NamedTuple):
    """Rows, a few distinct ones of each kind."""

    queries: list
    targets: list
    talks: list


def workload(embedder, tiny, distinct=16) -> Workload:
    """Batches repeat these rows: a thousand large pictures would not fit into a laptop's memory."""
    rng = random.Random(0)
    low, high = (round(tokens**0.5) for tokens in tokens_of_a_picture(tiny))

    def words(least, most):
        return " ".join(rng.choices(step.WORDS.split(), k=rng.randint(least, most)))

    def picture():
        w, h = (28 * rng.randint(low, high) for _ in range(2))
        return Image.frombytes("RGB", (w, h), rng.randbytes(3 * w * h))

    def row(*args):  # as the loader hands it over
        made = embedder.collate.row(*args)
        if embedder.device.type == "cpu":
            return made
        return made._replace(images={key: halved(x) for key, x in made.images.items()})

    queries = [row(Item(f"{IMAGE} {words(8, 60)}", (picture(),))) for _ in range(distinct)]
    targets = [row(Item(words(3, 120))) for _ in range(distinct)]
    talks = []
    for _ in range(distinct):
        turns = [(words(8, 16), words(1, 30)) for _ in range(3)]
        talks.append(row(Item(IMAGE, (picture(),)), turns))
    return Workload(queries, targets, talks)


def repeat(rows, n) -> list:
    """n rows out of fewer."""
    return [rows[i % len(rows)] for i in range(n)]


def tokens_in(rows) -> int:
    return sum(row.length for row in rows)


# ------------------------------------------------------------------------------------------- FLOPs


def weights(module) -> int:
    """Parameters of its matrices, LoRA's left out: each meets each token once."""
    return sum(p.numel() for n, p in module.named_parameters() if p.ndim >= 2 and "lora" not in n)


def flops(embedder, rows) -> float:
    """What these rows cost at least, forward and backward, as the docstring counts it."""
    c, tower = embedder.mllm.config, embedder.mllm.get_encoder(modality="image")
    text, vision = c.get_text_config(), c.vision_config
    layers = weights(embedder.mllm.get_decoder().layers)
    merger, blocks = weights(tower.merger), weights(tower) - weights(tower.merger)
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    full = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2  # patches
    heads = text.num_attention_heads * embedder.mllm.get_decoder().layers[0].self_attn.head_dim
    total = 0.0
    for row in rows:
        L = row.length
        forward = 2 * layers * L + text.num_hidden_layers * 4 * heads * L * L / 2
        total += forward + 2 * layers * L + 2 * (forward - 2 * layers * L)
        for grid in row.images.get("image_grid_thw", ()):
            n = int(grid.prod())  # patches
            total += 2 * blocks * n + 2 * merger * n / 4
            total += 4 * width * n * (full * n + (vision.depth - full) * min(window, n))
    return total


# --------------------------------------------------------------------------------------- measuring


def matmul_rate(device, n) -> float:
    """FLOP/s of an n x n bfloat16 product: what this device does at best here."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / timed(lambda: a @ b, device, repeats=10)[0]


def timed(step, device, repeats=2, warm=True) -> tuple:
    """-> (seconds of the fastest run after one for warming up, peak GiB or None)."""
    cuda, seconds = device.type == "cuda", []
    if warm:
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds), torch.cuda.max_memory_allocated() / 2**30 if cuda else None


def contestants(embedder, cfg, rows) -> dict:
    """{name: function(queries, targets)}."""
    size = max(1, cfg.chunk_tokens // max(row.length for row in rows))
    none_kept = Budget(cfg.chunk_tokens, 0, "device")
    return {
        f"GradCache, chunks of {size}": partial(step.naive, embedder, size=size),
        "ours, no graph kept": partial(step.ours, embedder, budget=none_kept),
        "ours, as trained": partial(step.as_trained(embedder, cfg), embedder),
    }


# ----------------------------------------------------------------------- where the time of it goes


def waits(run) -> Counter:
    """The places, folder/file:line, at which the host waits for the GPU in run(), and how often."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "synchronizing" in str(w.message)
    )


def print_waits(run):
    """Those of a step."""
    places = waits(run)
    print(f"    the host waits {places.total()} times:")
    for place, times in places.most_common(12):
        print(f"      {times:>6}  {place}")


def print_kernels(run, seconds):
    """How much of `seconds` (of run() without a profiler) the GPU is busy, and with what."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    spent, calls = Counter(), Counter()
    for kernel in profile.key_averages():
        spent[kernel.key] += kernel.self_device_time_total / 1e6
        calls[kernel.key] += kernel.count
    busy = 100 * spent.total() / seconds
    print(f"    {calls.total():,} kernels and copies, {busy:.0f} % of {seconds:.2f} s:")
    for name, total in spent.most_common(16):
        print(f"      {100 * total / seconds:>5.1f} %  {calls[name]:>6}  {name[:110]}")


def profiled(run, device, args, seconds):
    """Prints both, where asked for and where there is a GPU."""
    if args.profile and device.type == "cuda":
        print_waits(run)
        print_kernels(run, seconds)


def peak_of(device, measured, asked) -> float:
    """The device's peak FLOP/s: --peak, or by its name, or what a product reached."""
    if asked:
        return asked * 1e12
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return next((peak for key, peak in PEAK.items() if key in name), measured)


class Line(NamedTuple):
    """One line of the table."""

    name: str
    n: int
    unit: str
    tokens: int
    work: float  # FLOPs
    peak: float  # FLOP/s

    def show(self, seconds, memory):
        held = "-" if memory is None else f"{memory:.1f}"
        rate = f"{self.n / seconds:>9.2f} {self.unit}/s{self.tokens / seconds:>12,.0f} tokens/s"
        mfu = 100 * self.work / seconds / self.peak
        print(f"{self.name:<32}{self.n:>6}{rate}{mfu:>7.1f} %{held:>7} GiB", flush=True)


def measure(name, args):
    """The table of one model."""
    cfg = contrastive.Config(
        model=name,
        lora_rank=16,
        lora_dropout=0.0,
        checkpointing=args.checkpointing,
        chunk_tokens=args.chunk_tokens,
    )
    embedder = build(SHAPES[name], cfg, args.tiny)
    device = embedder.device
    rate = matmul_rate(device, 512 if args.tiny else 8192)
    peak = peak_of(device, rate, args.peak)
    kind = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    of = f"MFU of {peak / 1e12:.1f} TFLOP/s; measured matmul {rate / 1e12:.1f}"
    print(f"\n{name} on {kind}: {of}")
    rows = workload(embedder, args.tiny)
    batches = [int(n) for n in args.batches.split(",")]
    for n in batches:
        q, t = repeat(rows.queries, n), repeat(rows.targets, n)
        tokens, work = tokens_in(q + t), flops(embedder, q + t)
        for who, contestant in contestants(embedder, cfg, q + t).items():
            if args.only not in who:
                continue

            def run(contestant=contestant, q=q, t=t):
                embedder.zero_grad()
                contestant(q, t)

            try:
                # A larger batch is not run twice, which takes minutes: with --repeats 1 the step
                # that is measured also takes and pins its memory.
                seconds = timed(run, device, args.repeats, warm=n == batches[0])
            except torch.OutOfMemoryError:
                print(f"{who:<32}{n:>6}   out of memory")
                continue
            Line(who, n, "pairs", tokens, work, peak).show(*seconds)
            if n == batches[0]:
                profiled(run, device, args, seconds[0])
    measure_stage1(embedder, repeat(rows.talks, batches[0]), args, peak)


def measure_stage1(embedder, talks, args, peak):
    """Its lines: a step with the mask and without one; then one call, three ways."""
    device = embedder.device
    examples = [pretrain.Example(row) for row in talks]
    work = flops(embedder, talks)  # without the answers' logits: below 1 %
    for compress, who in ((True, "stage 1"), (False, "stage 1, no mask at all")):

        def run(compress=compress):
            embedder.zero_grad()
            pretrain.accumulate(embedder, examples, args.chunk_tokens, compress)

        seconds = timed(run, device, args.repeats)
        Line(who, len(talks), "talks", tokens_in(talks), work, peak).show(*seconds)
        if compress:
            profiled(run, device, args, seconds[0])
    row = sorted(talks, key=lambda row: row.length)[len(talks) // 2]
    alike = [row] * max(1, args.chunk_tokens // (1 + row.length))
    for who, way in ways_behind_code(embedder, alike).items():

        def run(way=way):
            embedder.zero_grad()
            way().float().pow(2).mean().backward()

        seconds = timed(run, device, args.repeats)
        work = flops(embedder, alike)
        Line(f"  a call, {who}", len(alike), "talks", tokens_in(alike), work, peak).show(*seconds)


def ways_behind_code(embedder, rows) -> dict:
    """{name: function() -> hidden states (B, n, D) of questions and answers}, of equal rows: by the
    mask; by a cache, of which the picture is thrown away, so that every call is plain causal
    attention, with the fastest kernel; and without either, which sees the picture."""
    inputs = embedder.collate.pad_rows(rows)
    positions = position_ids(embedder.mllm, inputs, False).to(embedder.device)
    inputs = {key: x.to(embedder.device) for key, x in inputs.items()}
    ids, roles = inputs["input_ids"], inputs["roles"]
    after = roles[0] > COMPRESS
    n = int((~after).sum())  # tokens up to C; no row is padded
    seen = mask_as_cache.seen_first(inputs, n)

    def by_cache():
        _, cache = mask_as_cache.call(embedder, ids[:, :n], positions[..., :n], [], seen)
        left = mask_as_cache.without_content(cache, roles[0, :n])
        return mask_as_cache.call(embedder, ids[:, n:], positions[..., n:], left, {})[0]

    return {
        "the mask": lambda: embedder.hidden(inputs, pretrain.compression_mask(roles))[:, after],
        "as a cache": by_cache,
        "no mask": lambda: embedder.hidden(inputs)[:, after],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", default="", help=f"{', '.join(SHAPES)}; empty: all")
    parser.add_argument("--batches", default="", help="pairs a step (default: 64,256,1024)")
    parser.add_argument("--chunk-tokens", type=int, default=0, help="(default: contrastive.py's)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s, for a GPU not known here")
    parser.add_argument("--only", default="", help="stage 2: lines with this in their name")
    parser.add_argument("--profile", action="store_true", help="kernels; where the host waits")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    args = parser.parse_args()
    args.batches = args.batches or ("16,32" if args.tiny else "64,256,1024")
    args.chunk_tokens = args.chunk_tokens or (1024 if args.tiny else CHUNK_TOKENS["cuda"])
    for name in [args.model] if args.model else SHAPES:
        measure(name, args)
