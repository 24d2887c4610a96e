"""The toy world as files, in every format that real data come in.

    python -m tools.export DIR

Writes 100 examples of each kind into a new folder, or over an earlier export; they read back to
the same examples:

    python pretrain.py --data DIR/dialogues.jsonl       LLaVA's layout
    python pretrain.py --data DIR/captions              pictures with metadata.jsonl
    python contrastive.py --data DIR/pairs.jsonl        of all five tasks
    python contrastive.py --data DIR/captions-csv       pictures with metadata.csv
    python contrastive.py --data DIR/MMEB-train         parquet and PNG
    python evaluate.py --data DIR/MMEB-eval             and sets.json, which says what the sets are
    python evaluate.py --data DIR/pairs.jsonl
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

from data import read_dialogues, read_pairs, read_tasks
from plumbing.config import CommandLine, flag, word
from plumbing.errors import InputError, brief
from plumbing.formats import IMAGE
from plumbing.parquet import pyarrow
from plumbing.ranks import run_command
from plumbing.retrieval import SETS
from plumbing.writing import refuse_no_folder, refuse_unwritable, written
from tools.conversations import as_conversations
from toy.world import Shapes

README, TITLE = "README.md", "# The toy world of nanoCoMa\n\n"


@dataclass
class Config(CommandLine):
    """Flags of the export."""

    folder: str = word("where the files go", "DIR")
    examples: int = flag(100, "examples of each kind", least=1, most=100_000)


def is_export(folder) -> bool:
    """Whether a folder was written by this command, be it in part."""
    file = Path(folder, README)
    return file.is_file() and file.read_bytes().startswith(TITLE.encode())


def write_picture(picture, path):
    """A picture, whole or not at all."""
    with written(path, "the picture") as part:
        picture.render().save(part)


def write_text(text, path):
    """A list, whole or not at all."""
    with written(path, "the list") as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_item(item, root) -> tuple:
    """Saves the item's picture, if it has one. -> (text as MMEB writes it, path or "")."""
    text = item.text.replace(IMAGE, "<|image_1|>")
    if not item.images:
        return text, ""
    # Equal pictures with equal texts share a file: the name is the key of their content.
    name = f"shapes/{item.key:016x}.png"
    write_picture(item.images[0], Path(root, "images", name))
    return text, name


def write_table(rows, columns, path):
    """Rows as a parquet file."""
    values = map(list, zip(*rows, strict=True))  # rows become columns
    table = pyarrow().table(dict(zip(columns, values, strict=True)))
    with written(path, "the table") as part:
        pyarrow().parquet.write_table(table, part)


def export_dialogues(out, n):
    """Stage 1's data: pictures, and a line of JSON for each dialogue."""
    lines, dialogues = [], read_dialogues()
    for i in range(n):
        d = dialogues[i]
        _, picture = write_item(d.item, out)
        lines.append(json.dumps(as_conversations(d.id, picture, d.turns)))
    write_text("\n".join(lines) + "\n", Path(out, "dialogues.jsonl"))


def export_captions(out, n):
    """Pictures with captions, for both stages: a folder with metadata.jsonl, one with .csv."""
    rows, shapes = [], Shapes()
    for i in range(n):
        (_, (scene,)), _, _ = shapes.dialogue(i, caption=True)
        rows.append((f"{i:05}.png", scene.describe()))
        for folder in ("captions", "captions-csv"):
            write_picture(scene, Path(out, folder, rows[-1][0]))
    lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows]
    write_text("".join(lines), Path(out, "captions", "metadata.jsonl"))
    table = io.StringIO()
    csv.writer(table).writerows([("file_name", "text"), *rows])
    write_text(table.getvalue(), Path(out, "captions-csv", "metadata.csv"))


def as_content(item, root) -> dict:
    """An Item as a line of pairs has it: {"text", "image"}."""
    _, picture = write_item(item, root)
    return {"text": item.text, "image": picture} if picture else {"text": item.text}


def export_pairs(out, n):
    """Stage 2's data: one list of the pairs of all tasks, their pictures beside it."""
    lines, sets = [], read_pairs()
    for i in range(n):
        for pairs in sets.values():
            query, target = pairs[i].query, pairs[i].targets[0]
            pair = {"query": as_content(query, out), "target": as_content(target, out)}
            lines.append(json.dumps(pair) + "\n")
    write_text("".join(lines), Path(out, "pairs.jsonl"))


def export_mmeb_train(out, n):
    """Stage 2's data in MMEB's layout: a table for each task."""
    columns = ("qry", "qry_image_path", "pos_text", "pos_image_path")
    for task, pairs in read_pairs().items():
        rows = []
        for i in range(n):
            pair = pairs[i]
            rows.append((*write_item(pair.query, out), *write_item(pair.targets[0], out)))
        write_table(rows, columns, Path(out, task, "original-00000-of-00001.parquet"))


def export_tasks(out, n):
    """Evaluation sets: a table for each, the candidates of a query as two lists."""
    columns, kinds = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path"), {}
    for task in read_tasks(limit=n):
        rows = []
        for query, candidates in task.queries:
            # The right one comes first, as in MMEB.
            targets = [write_item(x, out) for x in candidates]
            texts, pictures = [text for text, _ in targets], [name for _, name in targets]
            rows.append((*write_item(query, out), texts, pictures))
        write_table(rows, columns, Path(out, task.name, "test-00000-of-00001.parquet"))
        kinds[task.name] = {"meta_task": task.meta_task, "ood": task.ood}
    write_text(json.dumps(kinds, indent=1) + "\n", Path(out, SETS))


def export(out, n):
    """All of it, n examples of each kind."""
    refuse_no_folder(out, "DIR")
    refuse_unwritable(Path(out, README), "the lists")
    if os.listdir(out) and not is_export(out):
        raise InputError(f"{brief(out)}: holds files that are no export's; take a new folder")
    write_text(TITLE + __doc__, Path(out, README))  # first of all: what is there is an export's
    export_dialogues(out, n)
    export_captions(out, n)
    export_pairs(out, n)
    export_mmeb_train(Path(out, "MMEB-train"), n)
    export_tasks(Path(out, "MMEB-eval"), n)
    lists = "dialogues.jsonl, pairs.jsonl, captions, captions-csv, MMEB-train, MMEB-eval"
    print(f"wrote {out}/ with {lists}: {n} examples of each kind")


def main(argv):
    """The command line."""
    cfg = Config.parse(argv)
    export(cfg.folder, cfg.examples)


if __name__ == "__main__":
    run_command(main)
