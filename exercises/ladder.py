"""The exercises, and whose functions their tests grade: a student's file, or the reference.

The reference is this repository's own functions: no second copy of a solution exists anywhere."""

import ast
import functools
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from exercises.planting import ROOT, TESTS

HERE = Path(__file__).resolve().parent
STUB = HERE / "stub.py"
# Of one test: an endless loop costs the rest of its exercise and no other one.
SECONDS = int(os.environ.get("EXERCISES_SECONDS", "60"))
MORE_TIME = f"A busy machine needs more, EXERCISES_SECONDS={3 * SECONDS} (now {SECONDS})"
OWN = ROOT / "my_exercises.py"  # the student's file; hand_out.py puts it there
CLOSED = {  # where the solutions stand: what a student's file may not import
    "model": "model.py",
    "pretrain": "pretrain.py",
    "contrastive": "contrastive.py",
    "evaluate": "evaluate.py",
    "plumbing": "plumbing/",
    "tools": "tools/",
    "exercises": "exercises/",
    "tests": "tests/",
    **{path.stem: "tests/" for path in TESTS.glob("*.py")},  # they import it, and have loops of it
}


class Exercise(NamedTuple):
    title: str
    points: int


EXERCISES = {  # 100 points in all
    "ex0": Exercise("one bit", 4),
    "ex1": Exercise("InfoNCE", 7),
    "ex2": Exercise("compression mask", 7),
    "ex3": Exercise("answer labels", 7),
    "ex4": Exercise("pooling", 7),
    "ex5": Exercise("GradCache", 8),
    "ex6": Exercise("two ranks", 8),
    "ex7": Exercise("Precision@1", 7),
    "ex8": Exercise("predict, then run", 8),
    "ex9": Exercise("bug hunt", 8),
    "ex10": Exercise("ablation", 9),
    "ex11": Exercise("the layout", 4),
    "ex12": Exercise("the mask as a cache", 4),
    "ex13": Exercise("InfoNCE's gradient", 4),
    "ex14": Exercise("hardness", 4),
    "ex15": Exercise("Matryoshka", 4),
}


def tests_of(exercise):
    """The file with an exercise's tests."""
    return next(HERE.glob(f"test_{exercise}_*.py"))


def chosen():
    """The student's file: $EXERCISES, else my_exercises.py at the root.
    None: the reference is graded."""
    path = os.environ.get("EXERCISES")
    if path:
        return Path(path).resolve()
    return OWN if OWN.exists() else None


def refuse(path):
    """Raises SyntaxError where a student's file is no Python, ImportError where it imports a
    solution."""
    for node in ast.walk(ast.parse(Path(path).read_bytes(), str(path))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            place = CLOSED.get(name.split(".")[0])
            if place:
                why = f"line {node.lineno} imports {place}, where the solution stands"
                raise ImportError(f"{Path(path).name}, {why}; torch, numpy, math and data are open")


def load(path):
    """A student's file as a module, whatever it is called and wherever it lies."""
    refuse(path)
    module = ModuleType("student_file")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up there
    exec(compile(Path(path).read_bytes(), str(path), "exec"), vars(module))
    return module


def gradient_of_ours(cosines, temperature, labels=None, keys=None, reweigh=None):
    """What autograd says of `contrastive.info_nce`, in whatever mode it is called: (B, M)."""
    import torch

    import contrastive

    with torch.inference_mode(False), torch.enable_grad():
        q = cosines.clone().requires_grad_()
        t = torch.eye(q.shape[1], dtype=q.dtype)  # the cosine with unit vector j is entry j
        loss, _ = contrastive.info_nce(q, t, temperature, labels, keys, reweigh)
        return torch.autograd.grad(loss, q)[0]


class Reference:
    """What a student's file holds, filled with this repository's functions; for exercises 8 and 9
    with what running them says."""

    FLIP = (37, 2)  # read off `python -m tools.explain pretrain`, as students do

    def flip_one_bit(self, mask, row, column):
        flipped = mask.clone()
        flipped[0, 0, row, column] = ~mask[0, 0, row, column]
        return flipped

    @functools.cached_property
    def PREDICTIONS(self):
        from exercises import questions

        return {name: q.compute() for name, q in questions.QUESTIONS.items()}

    @functools.cached_property
    def BUGS(self):
        from exercises import bugs

        return {name: bugs.hunt(name) for name in bugs.BUGS}

    @functools.cached_property
    def ABLATION(self):
        """Made-up numbers, to try the checker on; nobody measured them."""
        a = {"command": "made up: a", "scores": {0: 10.0, 1: 12.0, 2: 14.0}}
        b = {"command": "made up: b", "scores": {0: 20.0, 1: 21.0, 2: 22.0}}
        return {
            "question": "Does the checker work?",
            "arms": {
                "a": {**a, "mean": 12.0, "se": 2 / 3**0.5},
                "b": {**b, "mean": 21.0, "se": 1 / 3**0.5},
            },
            "difference": 9.0,
            "difference_se": (5 / 3) ** 0.5,
            "conclusion": "higher",
        }

    def layout(self, template, content, code, turns):
        from exercises import layouts

        return layouts.layout(template, content, code, turns)

    def hidden_through_cache(self, run, tokens, positions, roles):
        from tools import mask_as_cache

        return mask_as_cache.hidden_through_cache(run, tokens, positions, roles)

    def info_nce_gradient(self, cosines, temperature, labels=None, keys=None):
        return gradient_of_ours(cosines, temperature, labels, keys)

    def hardness_gradient(self, cosines, temperature, alpha, labels=None):
        from plumbing import losses

        reweigh = functools.partial(losses.weighed, hardness=alpha)
        return gradient_of_ours(cosines, temperature, labels, reweigh=reweigh)

    def matryoshka_loss(self, loss, q, t, lengths):
        """`over_prefixes` wants one z, and a loss that also brings what the log shows of it."""
        import torch

        from plumbing import losses

        def loss_of(z, batch, temperature):
            return loss(z[: len(q)], z[len(q) :]), (0.0, 0.0, len(t))

        return losses.over_prefixes(loss_of, lengths, torch.cat([q, t]), None, None)[0]

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        from plumbing import ranks

        if hasattr(ranks, name):  # all that a rank of exercise 6 wants; the others import long
            return getattr(ranks, name)
        import contrastive
        import evaluate
        import model
        import pretrain

        for module in (contrastive, pretrain, evaluate, model):
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(name)


@functools.cache
def load_once(path):
    """-> (the student's file, or the reference; the error that loading it raised)."""
    try:
        return (load(path) if path else Reference()), None
    except BaseException as e:  # an endless loop or an exit while loading, too: tried only once
        return None, e


def subject(path):
    """The student's file, loaded once; the reference for None. Raises what loading raised."""
    loaded, error = load_once(path)
    if error is not None:
        raise error
    return loaded
