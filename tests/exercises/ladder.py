"""Whose functions the exercises' tests grade: the student's file, or the reference.

The reference is this repository's own functions: no second copy of a solution exists anywhere."""

import ast
import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STUB = HERE / "stub.py"
NAMES = dict(
    ex1="InfoNCE", ex2="compression mask", ex3="answer labels", ex4="pooling", ex5="GradCache",
    ex6="two ranks", ex7="Precision@1", ex8="predict, then run", ex9="bug hunt", ex10="ablation",
)  # fmt: skip
CLOSED = ("model", "pretrain", "contrastive", "evaluate")  # where the solutions stand
sys.path[:0] = [str(p) for p in (ROOT, HERE.parent, HERE) if str(p) not in sys.path]


def chosen():
    """The student's file: $EXERCISES, else exercises.py at the root (hand_out.py puts it there).
    None: the reference is graded."""
    given = os.environ.get("EXERCISES")
    own = ROOT / "exercises.py"
    return Path(given).resolve() if given else own if own.exists() else None


def refuse(path):
    """Raises SyntaxError where a student's file is no Python, ImportError where it imports a
    solution."""
    for node in ast.walk(ast.parse(Path(path).read_bytes(), str(path))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in {n.split(".")[0] for n in names} & set(CLOSED):
            why = f"line {node.lineno} imports {name}.py, where the solution stands"
            raise ImportError(f"{Path(path).name}, {why}; torch, numpy, math and data are open")


def load(path):
    """A student's file as a module."""
    refuse(path)
    spec = importlib.util.spec_from_file_location("student_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Reference:
    """What a student's file holds, filled with this repository's functions; for exercises 8 and 9
    with what running them says."""

    @functools.cached_property
    def PREDICTIONS(self):
        import questions

        return {name: q.compute() for name, q in questions.QUESTIONS.items()}

    @functools.cached_property
    def BUGS(self):
        import bugs

        return {name: bugs.hunt(name) for name in bugs.BUGS}

    @functools.cached_property
    def ABLATION(self):
        """Made-up numbers, to try the checker on; nobody measured them."""
        arms = {"a": {0: 10.0, 1: 12.0, 2: 14.0}, "b": {0: 20.0, 1: 21.0, 2: 22.0}}
        arms = {k: dict(command=f"made up: {k}", scores=v) for k, v in arms.items()}
        arms["a"] |= dict(mean=12.0, se=2 / 3**0.5)
        arms["b"] |= dict(mean=21.0, se=1 / 3**0.5)
        return dict(
            question="Does the checker work?", arms=arms, difference=9.0,
            difference_se=(5 / 3) ** 0.5, conclusion="higher",
        )  # fmt: skip

    def __getattr__(self, name):
        import contrastive
        import evaluate
        import model
        import pretrain

        if name == "gradcache":
            return our_gradcache
        for module in (contrastive, pretrain, evaluate, model):
            if hasattr(module, name) and not name.startswith("_"):
                return getattr(module, name)
        raise AttributeError(name)


def our_gradcache(embed, rows, chunks, loss_of, keep=0):
    """Exercise 5's signature around `contrastive.gradcache_step`, with a loss of one's own."""
    import torch

    import contrastive
    import model

    def between(z, *_):
        z = z.requires_grad_()
        loss = loss_of(z)
        return loss.item(), 0.0, torch.autograd.grad(loss, z)[0]

    class Embedder:
        device = torch.device("cpu")
        collate = SimpleNamespace(pad_rows=lambda rows, device: torch.stack(rows))
        parameters = list

        def __call__(self, inputs):
            return embed(inputs)

    with (
        mock.patch.object(contrastive, "loss_and_gradient", between),
        mock.patch.object(model, "token_chunks", lambda lengths, budget: chunks),
        mock.patch.object(model, "row_lengths", lambda rows: [1] * len(rows)),
    ):
        none = torch.zeros(0)
        out = contrastive.gradcache_step(Embedder(), list(rows), none, none, 1, 1, keep)
        return out["loss"]


@functools.cache
def _loaded(path):
    try:
        return (load(path) if path else Reference()), None
    except BaseException as e:  # an endless loop or an exit while loading, too: tried only once
        return None, e


def subject(path):
    """The student's file, loaded once; the reference for None. Raises what loading raised."""
    found, error = _loaded(path)
    if error is not None:
        raise error
    return found
