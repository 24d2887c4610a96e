"""A real model's size once through everything, on a CPU: Qwen2-VL-2B from its config with random
bfloat16 weights, in a folder of several safetensors files, LoRA of rank 16, K = 32.

    python tests/bench/real_size.py FOLDER         about an hour of one core, 17 GiB of memory, and
                                                   30 GB of disk below FOLDER
    python tests/bench/real_size.py FOLDER --tiny  a minute: does everything here run?

Stage 1 is stopped by SIGTERM after its first step and goes on with --resume; then stage 2, merge
and evaluation. Prints the wall and CPU seconds and the peak memory of each command. Words are the
toy's, and so is the tokenizer; the embedding table has its full size.
"""

import argparse
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu  # the shapes; which also puts the repository's root on the path
import torch
import transformers
from transformers import AutoModelForImageTextToText

import model

ROOT = Path(__file__).parent.parent.parent
PIXELS = 224 * 224  # of a picture: 64 tokens
LORA = "--lora-rank 16 --muon-lr 0 --lr 5e-5"
SMALL = f"--batch 4 --workers 0 --chunk-tokens 512 --min-pixels {PIXELS}"


def build(folder, tiny):
    """Config, random bfloat16 weights in files of 1 GB, the toy's tokenizer, Qwen's pixels."""
    toy = model.load("toy-random", 32, "mean", "coma", "cpu")
    ids = {key: x for key, x in toy.mllm.config.to_dict().items() if key.endswith("_token_id")}
    torch.manual_seed(0)
    config = gpu.config_of(gpu.SHAPES["qwen2_vl_2b"], tiny, ids)
    mllm = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    mllm.save_pretrained(folder, max_shard_size="1MB" if tiny else "1GB")
    processor = model.load("toy", 0, "last", "chat", "cpu").processor
    processor.image_processor = transformers.Qwen2VLImageProcessorPil(patch_size=14, merge_size=2)
    processor.save_pretrained(folder)
    files = len(list(Path(folder).glob("*.safetensors")))
    print(f"{sum(p.numel() for p in mllm.parameters()):,} weights in {files} files", flush=True)


def run(name, *words, stop_after=None):
    """A command of ours in a process of its own, which must end well; prints what it cost.
    stop_after: a word of its output at which it gets SIGTERM."""
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, text=True,
    )  # fmt: skip
    said = []
    for line in process.stdout:
        said.append(line)
        if stop_after and stop_after in line:
            process.send_signal(signal.SIGTERM)
            stop_after = None
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 143):
        raise SystemExit(f"{name}: {''.join(said)[-3000:]}")
    spent = used.ru_utime + used.ru_stime
    peak = used.ru_maxrss / 2**20  # ru_maxrss is in KiB
    print(f"{name:<34}{time.time() - began:>8.0f}{spent:>8.0f}{peak:>8.1f}", flush=True)
    for line in said:
        if line.startswith("step ") or "Overall" in line or "parameters trained" in line:
            print("    " + line.strip()[:150], flush=True)


def size(folder) -> str:
    """Of all files below it."""
    return f"{sum(p.stat().st_size for p in Path(folder).rglob('*') if p.is_file()) / 1e9:.2f} GB"


def main(folder, tiny):
    """Everything in turn, below `folder`."""
    folder = Path(folder).resolve()
    base, first, second = (str(folder / name) for name in ("base", "pretrain", "contrastive"))
    if not Path(base, "config.json").exists():
        build(base, tiny)
    first_words = f"pretrain.py --model {base} --out {first} --prompt coma --compress-tokens 32"
    first_words = f"{first_words} --steps 2 --turns 2 --save-every 1 {LORA} {SMALL}".split()
    print(f"{'':<34}{'wall s':>8}{'CPU s':>8}{'GiB':>8}")
    run("stage 1, stopped after a step", *first_words, stop_after="step     1/2")
    run("stage 1, resumed", *first_words, "--resume")
    second_words = (
        f"contrastive.py --model {first} --out {second} --block 2 --steps 1 {LORA} {SMALL}"
    )
    run("stage 2 (merges first)", *second_words.split())
    merged = str(folder / "merged")
    run("merge", "-m", "tools.merge", second, merged)
    run("evaluation, 4 queries", *f"evaluate.py --model {merged} --subsets vqa:4".split())
    for name in ("base", "pretrain", "contrastive", "merged"):
        print(f"{name}: {size(folder / name)}")
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"(building the model: {mine:.1f} GiB)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    args = parser.parse_args()
    main(args.folder, args.tiny)
