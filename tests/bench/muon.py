"""What Muon costs in a step of stage 1: PyTorch's, in bfloat16, and ours, in float32 on a CPU.

    OMP_NUM_THREADS=1 python tests/bench/muon.py

CPU seconds of one thread, the least of three rounds in turn: the gradient of 64 dialogues through
the toy MLLM (pretrain.accumulate), then the step of each optimiser on it. On a CPU with bfloat16
instructions (AVX-512 BF16, AMX) the two may be alike.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import model  # noqa: E402
import pretrain  # noqa: E402
from data import read_dialogues  # noqa: E402
from plumbing import optim  # noqa: E402

ROUNDS = 3


def spent(work) -> float:
    """CPU seconds of work()."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main():
    """Prints the table."""
    torch.set_num_threads(1)
    cfg = pretrain.Config(batch=64, workers=0)
    embedder = model.load("toy", 4, device="cpu").train()
    model.choose_trained(embedder, cfg)
    dialogues, examples = read_dialogues(), []
    for i in range(cfg.batch):
        examples.append(
            pretrain.Example(embedder.collate.row(dialogues[i].item, dialogues[i].turns))
        )
    adam, ours = optim.make_optimizers(embedder, cfg)
    theirs = torch.optim.Muon(ours.param_groups[0]["params"], cfg.muon_lr)
    works = {
        "forward and backward": lambda: pretrain.accumulate(embedder, examples),
        "AdamW's step": adam.step,
        "Muon's step, torch.optim.Muon": theirs.step,
        "Muon's step, plumbing.optim.Muon": ours.step,
    }
    least = {}
    for _ in range(ROUNDS):
        embedder.zero_grad()
        for name, work in works.items():
            least[name] = min(spent(work), least.get(name, float("inf")))
    for name, seconds in least.items():
        print(f"{name:<34}{seconds:>8.3f} s")


if __name__ == "__main__":
    main()
