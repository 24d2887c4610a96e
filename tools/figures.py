"""Draws the figures of docs/results.md and README: what the toy's models see, keep, and get wrong.

    python -m tools.figures docs/figures                     of out/pretrain, out/contrastive
    python -m tools.figures DIR --model RUN/contrastive      of it, and of RUN/pretrain beside it

Needs matplotlib; half a minute on one core. Reads three models - base (`toy`), compressed (stage
1), contrastive (stage 2) - their log.jsonl, and docs/reproduce.json where there is one; writes
DIR/*.png, each below 120 KB. A figure whose model or record is missing is left out, and a line says
how to make that. The same models give the same figures, bit for bit.

The numbers come from figure_numbers.py and records.py, the drawings from drawings.py; overview.py
draws the README's diagram and example, which need no model.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import json
from dataclasses import dataclass
from pathlib import Path

import model
from plumbing.config import CommandLine, flag, word
from plumbing.errors import InputError, brief, needs
from plumbing.ranks import run_command, setup
from plumbing.writing import refuse_no_folder, refuse_unwritable
from tools.records import RECORDS, read_records
from toy.world import Shapes


class Sources:
    """What the figures are drawn from: the models base, compressed and contrastive, each loaded
    when a figure first asks for it, their logs, test scenes, and the records of many runs."""

    def __init__(self, contrastive, seed=0, device=None, records_file=RECORDS):
        self.contrastive, self.seed, self.device = Path(contrastive), seed, device
        self.records_file = records_file
        self.loaded = {}

    def model(self, name):
        """An Embedder."""
        if name not in self.loaded:
            if name == "base":  # the plain MLLM: no code, the last token's embedding
                embedder = model.load("toy", 0, "last", device=self.device)
            else:
                embedder = model.load(self.folder(name), device=self.device)
            self.loaded[name] = embedder.eval()
        return self.loaded[name]

    def folder(self, name) -> Path:
        """The folder of a trained model; InputError with the command that makes it."""
        pretrain = self.contrastive.parent / "pretrain"
        if name == "compressed":
            folder, command = pretrain, "python pretrain.py"
        else:
            folder, command = self.contrastive, f"python contrastive.py --model {pretrain}"
        if not (folder / "nanocoma.json").exists():
            raise InputError(f"no {name} model: `{command} --out {folder}` makes it")
        return folder

    def coded(self, name, least=2):
        """A trained model, if it has enough compression tokens for the figure."""
        embedder = self.model(name)
        if embedder.K < least:
            folder = self.folder(name)
            raise InputError(f"{folder} has K = {embedder.K} compression tokens, not {least}")
        return embedder

    def log(self, name) -> list:
        """The steps of log.jsonl; its first record, which holds the flags, is left out."""
        path = self.folder(name) / "log.jsonl"
        if not path.exists():
            raise InputError(f"{path} is missing: training writes it")
        try:
            steps = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        except ValueError as e:  # what a power cut leaves
            raise InputError(f"{path} is damaged: {brief(e)}; take the bad lines out") from None
        if not steps:
            raise InputError(f"{path} has no steps: the model was not trained")
        return steps

    def scenes(self, n) -> list:
        """n test scenes."""
        shapes = Shapes("test", self.seed)
        contents = [shapes.dialogue(i)[0] for i in range(n)]
        return [images[0] for _, images in contents]

    def records(self) -> dict:
        """See tools/records.py."""
        return read_records(self.records_file)


def draw(folder, contrastive="", seed=0, device=None, records_file=RECORDS) -> list:
    """Draws all figures that can be drawn into a folder, and says why a figure is left out.
    contrastive: the stage-2 folder; stage 1's is `pretrain` beside it. -> the files."""
    with needs("matplotlib", "tools.figures"):
        from matplotlib import rc_context

        from tools.drawings import FIGURES, STYLE, picture_of, save_png
    sources = Sources(contrastive or "out/contrastive", seed, device, records_file)
    refuse_no_folder(folder, "DIR")
    refuse_unwritable(Path(folder, "x.png"), "the figures")
    files = []
    for name, figure in FIGURES.items():
        path = Path(folder, f"{name}.png")
        try:
            with rc_context(STYLE):
                picture = picture_of(figure(sources), colors=256)
        except InputError as e:
            print(f"left out {path}: {e}")
            continue
        save_png(picture, path)
        files.append(path)
        print(f"wrote {path}")
    return files


@dataclass
class Config(CommandLine):
    """Flags of the figures."""

    folder: str = word("where the figures go", "DIR")
    model: str = flag("out/contrastive", "stage 2's folder; stage 1's is `pretrain` beside it")
    seed: int = flag(0, "of the test scenes and queries", least=0, most=2_147_483_647)


def main(argv):
    """The command line."""
    cfg = Config.parse(argv)
    draw(cfg.folder, cfg.model, cfg.seed, setup())
    from tools import overview  # matplotlib is there: draw has asked for it

    overview.draw(cfg.folder)


if __name__ == "__main__":
    run_command(main)
