"""Folds a LoRA adapter into its model: the same embeddings from a folder that plain transformers
loads.

    python -m tools.merge IN OUT
    python -m tools.merge IN OUT --export sentence-transformers

IN is a folder that a stage wrote; without an adapter in it OUT is a copy. OUT has the number type
of the model under the adapter; where that is bfloat16 the sum of the two is rounded to it (toy
MLLM, 20 items: cosine 0.99996 or more). With --export, OUT is for that library too:
`SentenceTransformer(OUT, trust_remote_code=True)` (the code is one small pooling module that is
written into OUT; with --pooling last there is none).
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import os

import model
from plumbing.adapters import origin_of
from plumbing.errors import InputError
from plumbing.folders import refuse_unwritable
from plumbing.ranks import run_command
from tools.command_line import make_parser
from tools.sentence_transformers_folder import save_sentence_transformers


def main(argv):
    """The command line."""
    parser = make_parser("merge", __doc__)
    parser.add_argument("source", metavar="IN", help="a folder that a stage wrote")
    parser.add_argument("target", metavar="OUT", help="the new folder")
    parser.add_argument("--export", choices=["sentence-transformers"], help="and this library too")
    args = parser.parse_args(argv)
    refuse_unwritable(args.target)
    # On the CPU: a merge is a sum of matrices, and need not fit onto a GPU.
    embedder = model.merge(model.load(args.source, device="cpu"))
    embedder.mllm.to(embedder.mllm.config.dtype)  # as the files had it; a CPU works in float32
    for kept in (args.source, origin_of(embedder.mllm).folder):
        if os.path.realpath(args.target) == os.path.realpath(kept):
            raise InputError(
                f"OUT {args.target} would replace {kept}, which was read; take another"
            )
    if args.export:
        save_sentence_transformers(embedder, args.target)
    else:
        model.save(embedder, args.target)
    print(f"wrote {args.target}")


if __name__ == "__main__":
    run_command(main)
