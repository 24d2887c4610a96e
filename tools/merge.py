"""Folds a LoRA adapter into its model: the same embeddings from a folder that plain transformers
loads.

    python -m tools.merge IN OUT
    python -m tools.merge IN OUT --export sentence-transformers

IN is a folder that a stage wrote; without an adapter in it OUT is a copy. OUT has the number type
of the model under the adapter; where that is bfloat16 the sum of the two is rounded to it (toy
MLLM, 20 items: cosine 0.99996 or more). With --export, OUT is for that library too:
`SentenceTransformer(OUT)` makes the same vectors, without any code of ours.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import os
from dataclasses import dataclass

import model
from plumbing import card
from plumbing.adapters import origin_of
from plumbing.config import CommandLine, flag, word
from plumbing.errors import InputError
from plumbing.folders import refuse_unwritable_folder
from plumbing.ranks import run_command
from tools.sentence_transformers_folder import save_sentence_transformers


@dataclass
class Config(CommandLine):
    """Flags of the merge."""

    source: str = word("a folder that a stage wrote", "IN")
    target: str = word("the new folder", "OUT")
    export: str | None = flag(None, "OUT is for this library, too", ["sentence-transformers"])


def main(argv):
    """The command line."""
    cfg = Config.parse(argv)
    refuse_unwritable_folder(cfg.target)
    # On the CPU: a merge is a sum of matrices, and need not fit onto a GPU.
    embedder = model.merge(model.load(cfg.source, device="cpu"))
    embedder.mllm.to(embedder.mllm.config.dtype)  # as the files had it; a CPU works in float32
    for kept in (cfg.source, origin_of(embedder.mllm).folder):
        if os.path.realpath(cfg.target) == os.path.realpath(kept):
            raise InputError(f"OUT {cfg.target} would replace {kept}, which was read; take another")
    if cfg.export:
        save_sentence_transformers(embedder, cfg.target)
    else:
        model.save(embedder, cfg.target)
    card.write(cfg.target, source=cfg.source)
    print(f"wrote {cfg.target}")


if __name__ == "__main__":
    run_command(main)
