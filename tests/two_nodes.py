"""What a user of two nodes without a shared disk does, one thing after the other in one process
group: what test_two_nodes.py runs on each node, in a working folder of its own."""

import dataclasses
import json
import os
from pathlib import Path

import torch

import contrastive
from plumbing import optim, ranks
from plumbing.errors import InputError

PAIRS = contrastive.Config(
    model="toy-random", steps=3, batch=4, block=2, muon_lr=0.0, workers=0, save_every=1
)
LORA = dataclasses.replace(PAIRS, lora_rank=2)
SHARDED = dataclasses.replace(PAIRS, fsdp=True)


class Crash(Exception):
    """Both nodes go down in the third step."""


def crash(embedder, optimizers, cfg, step, *rest):
    if step == 2:
        raise Crash
    return END_STEP(embedder, optimizers, cfg, step, *rest)


END_STEP = optim.end_step


def run(cfg, **changes) -> str:
    """Stage 2 with these flags. -> how it ended."""
    try:
        contrastive.main(dataclasses.replace(cfg, **changes))
    except InputError as e:
        return str(e)
    except Crash:
        return "crashed"
    except SystemExit as e:
        return f"status {e.code}"
    return "done"


def crashing(cfg, out) -> str:
    """The same, up to the third step."""
    optim.end_step = crash
    ended = run(cfg, out=out)
    optim.end_step = END_STEP
    return ended


def write_pairs(file, queries, target):
    """Two pairs: a list whose queries, or whose targets, are all one is refused."""
    lines = []
    for query, text in zip(queries, (target, "u"), strict=True):
        lines.append(json.dumps(dict(query={"text": query}, target={"text": text})))
    Path(file).write_text("\n".join(lines))


def main():
    """On every node."""
    ranks.setup()
    me = ranks.rank()
    write_pairs("pairs.jsonl", ("q", "r"), f"{me}")
    long = "a red circle " * 20, "a red square " * 20  # longer than --max-length lets them be
    write_pairs("shared.jsonl", long, "t")
    said = {}
    for name, cfg in (("full", PAIRS), ("adapter", LORA), ("sharded", SHARDED)):
        said[f"{name} whole"] = run(cfg, out=f"{name}-whole")
        said[f"{name} crashes"] = crashing(cfg, f"{name}-broken")
        said[f"{name} resumed"] = run(cfg, out=f"{name}-broken", resume=True)
    said["finished"] = run(PAIRS, out="full-whole", resume=True)
    # What differs between the nodes.
    said["rate"] = run(PAIRS, out="bad", lr=1e-3 * (1 + me))
    said["rank of LoRA"] = run(PAIRS, out="bad", lora_rank=2 * me)
    if me == 0:
        os.renames("adapter-whole", "out/pretrain")  # what stage 2 starts from where it is
    said["default model"] = run(PAIRS, out="bad", model="")
    said["data"] = run(PAIRS, out="bad", data="pairs.jsonl")
    cfg = dataclasses.replace(PAIRS, data=f"{Path.cwd()}/shared.jsonl", max_length=40)
    said["same data elsewhere"] = run(cfg, out=f"node-{me}")
    said["no model"] = run(PAIRS, out="bad", model="toy-random" if me == 0 else "./nowhere")
    if me == 0:
        Path("file").touch()
    said["out"] = run(PAIRS, out="file")
    Path("said.json").write_text(json.dumps(said, indent=1))
    torch.distributed.barrier()
