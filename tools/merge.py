"""Folds a LoRA adapter into its model: the same embeddings from a folder that plain transformers
loads.

    python -m tools.merge IN OUT
    python -m tools.merge IN OUT --export sentence-transformers

IN is a folder that a stage wrote; without an adapter in it OUT is a copy. With --export, OUT is for
that library too: `SentenceTransformer(OUT, trust_remote_code=True)` (the code is one small pooling
module that is written into OUT; with --pooling last there is none).
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there

import model
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
    # On the CPU: a merge is a sum of matrices, and need not fit onto a GPU.
    embedder = model.merge(model.load(args.source, device="cpu"))
    if args.export:
        save_sentence_transformers(embedder, args.target)
    else:
        model.save(embedder, args.target)
    print(f"wrote {args.target}")


if __name__ == "__main__":
    run_command(main)
