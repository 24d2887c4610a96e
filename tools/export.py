"""The toy world as files, in the formats that real data come in.

    python -m tools.export DIR

Writes DIR/dialogues.jsonl (LLaVA's layout), DIR/MMEB-train and DIR/MMEB-eval (parquet and PNG), 100
examples of each kind. They read back to the same examples:

    python pretrain.py --data DIR/dialogues.jsonl
    python contrastive.py --data DIR/MMEB-train
    python evaluate.py --data DIR/MMEB-eval
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import json
from pathlib import Path

from data import read_dialogues, read_pairs, read_tasks
from plumbing.errors import needs
from plumbing.formats import IMAGE
from plumbing.ranks import run_command
from tools.command_line import make_parser
from tools.conversations import as_conversations


def write_item(item, root) -> tuple:
    """Saves the item's picture, if it has one. -> (text as MMEB writes it, path or "")."""
    text = item.text.replace(IMAGE, "<|image_1|>")
    if not item.images:
        return text, ""
    # Equal pictures with equal texts share a file: the name is the key of their content.
    name = f"shapes/{item.key:016x}.png"
    path = Path(root, "images", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    item.images[0].render().save(path)
    return text, name


def write_table(rows, columns, path):
    """Rows as a parquet file."""
    with needs("pyarrow", "MMEB's parquet files"):
        import pyarrow
        import pyarrow.parquet as pq
    path.parent.mkdir(parents=True, exist_ok=True)
    values = map(list, zip(*rows, strict=True))  # rows become columns
    table = pyarrow.table(dict(zip(columns, values, strict=True)))
    pq.write_table(table, path)


def export_dialogues(out, n):
    """Stage 1's data: pictures, and a line of JSON for each dialogue."""
    lines, dialogues = [], read_dialogues()
    for i in range(n):
        d = dialogues[i]
        _, picture = write_item(d.item, out)
        lines.append(json.dumps(as_conversations(d.id, picture, d.turns)))
    Path(out, "dialogues.jsonl").write_text("\n".join(lines) + "\n")


def export_pairs(out, n):
    """Stage 2's data: a table for each task."""
    columns = ("qry", "qry_image_path", "pos_text", "pos_image_path")
    for task, pairs in read_pairs().items():
        rows = []
        for i in range(n):
            pair = pairs[i]
            rows.append((*write_item(pair.query, out), *write_item(pair.targets[0], out)))
        write_table(rows, columns, Path(out, task, "original-00000-of-00001.parquet"))


def export_tasks(out, n):
    """Evaluation sets: a table for each, the candidates of a query as two lists."""
    columns = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    for task in read_tasks(limit=n):
        rows = []
        for query, candidates in task.queries:
            # The right one comes first, as in MMEB.
            targets = [write_item(x, out) for x in candidates]
            texts, pictures = [text for text, _ in targets], [name for _, name in targets]
            rows.append((*write_item(query, out), texts, pictures))
        write_table(rows, columns, Path(out, task.name, "test-00000-of-00001.parquet"))


def export(out, n=100):
    """All of it, n examples of each kind."""
    export_dialogues(out, n)
    export_pairs(Path(out, "MMEB-train"), n)
    export_tasks(Path(out, "MMEB-eval"), n)
    print(f"wrote {out}/dialogues.jsonl, MMEB-train, MMEB-eval: {n} examples of each kind")


def main(argv):
    """The command line."""
    parser = make_parser("export", __doc__)
    parser.add_argument("out", metavar="DIR", help="the folder")
    export(parser.parse_args(argv).out)


if __name__ == "__main__":
    run_command(main)
