"""Exercise 9: bugs of the papers' official code, planted in ours, in memory, one at a time.

    python tests/exercises/bugs.py                            the bugs
    python tests/exercises/bugs.py b3 tests/test_answers.py   pytest, with b3 planted

Which test catches which bug is written down nowhere; `hunt` finds one by running them. A bug is
planted in this process: tests that start other processes (torchrun) do not meet it."""

import contextlib
import dataclasses
import functools
import importlib
import io
import sys
from typing import NamedTuple

import ladder
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from planting import planted

import contrastive
import data
import evaluate
import model
import pretrain
from data import COMPRESS, PAD

FILES = ("test_mask", "test_answers", "test_pooling", "test_infonce", "test_gradcache")
FILES += ("test_evaluate", "test_data", "test_embedder")


class Bug(NamedTuple):
    story: str
    owner: object  # a module, or a class
    name: str
    make: object  # our function -> the wrong one
    files: tuple  # where `hunt` looks
    hint: str  # for a test that does not notice it


def causal(roles):
    """Plain causal attention, padding hidden: no compression. (B, 1, L, L)."""
    i = torch.arange(roles.shape[1])
    return ((i[:, None] >= i) & (roles != PAD)[:, None, :] | (i[:, None] == i))[:, None]


def mask_off(ours):
    return causal


def mask_in_half_the_layers(ours):
    def hidden(self, inputs, mask=None):
        if mask is None:
            return ours(self, inputs)

        def see_all(layer, args, kwargs):
            return args, dict(kwargs, attention_mask=causal(inputs["roles"]))

        layers = self.mllm.model.language_model.layers
        hooks = [
            x.register_forward_pre_hook(see_all, with_kwargs=True)
            for x in layers[len(layers) // 2 :]
        ]
        try:
            return ours(self, inputs, mask)
        finally:
            for hook in hooks:
                hook.remove()

    return hidden


def labels_of_everything(ours):
    def answer_labels(input_ids, roles):
        labels = input_ids[:, 1:].masked_fill(roles[:, 1:] <= COMPRESS, -100)
        return F.pad(labels, (0, 1), value=-100)

    return answer_labels


def last_token_in_evaluation(ours):
    def encode(self, *args, **how):
        trained, self.pooling = self.pooling, "last"
        try:
            return ours(self, *args, **how)
        finally:
            self.pooling = trained

    return encode


def first_index_wins(ours):
    def precision_at_1(q, c, candidates, tie=1e-6):
        hits = [np.argmax(c[rows] @ x) == 0 for x, rows in zip(q, candidates, strict=True)]
        return float(np.mean(hits))

    return precision_at_1


def negatives_thrown_away(ours):
    def local_batch(pairs, *rest):
        def strip(found, i):
            return found[i]._replace(negatives=())

        pairs = {k: data.Lazy(len(v), functools.partial(strip, v)) for k, v in pairs.items()}
        return ours(pairs, *rest)

    return local_batch


def block_times_world(ours):
    def local_batch(pairs, collate, cfg, step, rank, world):
        cfg = dataclasses.replace(cfg, block=min(cfg.block * world, cfg.batch))
        return ours(pairs, collate, cfg, step, rank, world)

    return local_batch


def grey_for_a_bad_picture(ours):
    def open_image(*args, **how):
        try:
            return ours(*args, **how)
        except data.InputError:
            return Image.new("RGB", (56, 56), "grey")

    return open_image


def plain_batch_on_one_gpu(ours):
    inside = []

    def gradcache_step(embedder, rows, labels, keys, temperature, *rest, **how):
        if model.world() > 1:
            return ours(embedder, rows, labels, keys, temperature, *rest, **how)
        if inside:  # a plain batch does not know how to begin again with less
            raise torch.OutOfMemoryError("the whole batch does not fit")
        inside.append(True)
        try:  # one chunk, whose graph is kept: one forward of everything, one backward
            return ours(embedder, rows, labels, keys, temperature, chunk_tokens=10**9, keep=1)
        finally:
            inside.clear()

    return gradcache_step


BUGS = dict(
    b1=Bug("CoMa: the compression mask is off by default (split_layer = -1); we plant a causal "
           "mask that hides nothing of the picture",
           pretrain, "compression_mask", mask_off, ("test_mask",),
           "which test asks compression_mask itself, and not a wrong mask of its own?"),
    b2=Bug("CoMa: where the mask is on, it holds in some layers only",
           model.Embedder, "hidden", mask_in_half_the_layers, ("test_mask",),
           "the mask is right; which test looks at what a model does with it?"),
    b3=Bug("CoMa: questions and template tokens are trained like answers",
           pretrain, "answer_labels", labels_of_everything, ("test_answers",),
           "which test reads the labels, token by token?"),
    b4=Bug("CoMa: trained with the mean of the code, evaluated with the last token",
           model.Embedder, "encode", last_token_in_evaluation, ("test_embedder",),
           "which test compares what encode gives with what a forward pass gives?"),
    b5=Bug("The official evaluation: Precision@1 by argmax, and the right candidate stands at "
           "index 0", evaluate, "precision_at_1", first_index_wins, ("test_evaluate",),
           "argmax is right where no two scores are equal; which test has equal ones?"),
    b6=Bug("Hard negatives are read, and then thrown away",
           contrastive, "local_batch", negatives_thrown_away, ("test_gradcache",),
           "which test looks at the columns that a step is given?"),
    b7=Bug("VLM2Vec: the size of a one-dataset block is multiplied by the number of ranks",
           contrastive, "local_batch", block_times_world, ("test_gradcache",),
           "with one rank nothing is wrong; which test asks for the batch of several, in one "
           "process?"),
    b8=Bug("A sample that cannot be read is replaced by a dummy, and nobody hears of it",
           data, "open_image", grey_for_a_bad_picture, ("test_data",),
           "which test has a picture that cannot be read, and wants to hear of it?"),
    b9=Bug("VLM2Vec: GradCache runs on several GPUs only; on one it is silently a plain batch",
           contrastive, "gradcache_step", plain_batch_on_one_gpu, ("test_gradcache",),
           "the gradient is right; what does a plain batch cost, and what can it not do?"),
)  # fmt: skip


@contextlib.contextmanager
def plant(bug):
    """Inside, the bug is in our code; None: nothing is changed."""
    for file in FILES:  # before planting: what is imported under a bug would keep it
        importlib.import_module(file)
    if bug is None:
        yield
        return
    b = BUGS[bug]
    with planted(b.owner, b.name, b.make(getattr(b.owner, b.name))):
        yield


class Outcomes:
    """A pytest plugin: what each test said; none that starts ranks is run."""

    def __init__(self, hunting):
        self.hunting, self.failed, self.ran = hunting, {}, 0

    def pytest_collection_modifyitems(self, items):
        kept = {}
        for item in items:
            if "ranks_of" not in item.fixturenames:
                kept.setdefault(item.originalname if self.hunting else item.nodeid, item)
        # The hunt begins at a file's end: test_gradcache.py's first tests are its slowest.
        late = self.hunting and items[0].path.name == "test_gradcache.py"
        items[:] = list(kept.values())[:: -1 if late else 1]

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call"
        if report.failed:
            self.failed[report.nodeid.split("[")[0].split("/")[-1]] = report


def run(names, bug=None, hunting=False):
    """Runs tests in this process. -> Outcomes."""
    found = Outcomes(hunting)
    quiet = ["-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:faulthandler", "-s"]
    where = [f"--rootdir={ladder.ROOT}", "-c", str(ladder.ROOT / "pyproject.toml")]
    paths = [str(ladder.HERE.parent / name) for name in names]
    with plant(bug), contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*quiet, *where, *["-x"] * hunting, *paths], plugins=[found])
    return found


def plain(name) -> str:
    """A test's name without folder and [parameters], as pytest's own lines have them."""
    return str(name).removeprefix("tests/").partition("[")[0]


def problem(name) -> str:
    """Why this cannot be the name of a test; "" where it can."""
    file, _, function = name.partition("::")
    if not file.endswith(".py") or file.removesuffix(".py") not in FILES:
        return f"test_file.py::test_name, the file one of {', '.join(FILES)}"
    test = getattr(importlib.import_module(file.removesuffix(".py")), function, None)
    if not function.startswith("test_") or test is None:
        return f"{file} has no such test"
    if "ranks_of" in test.__code__.co_varnames:
        return "that one starts processes of its own, which the bug does not reach"
    return ""


known = {}  # (test, bug or None) -> whether it fails


def fails(name, bug=None, others=()):
    """Whether a test fails, on our code or with a bug planted; None where it cannot be run.
    others: tests that will be asked for next, to run them along."""
    if (name, bug) not in known:
        names = [n for n in {name, *others} if not problem(n)]
        found = run(names, bug)
        for n in names:
            known[n, bug] = n in found.failed if found.ran else None
    return known.get((name, bug))


def hunt(bug) -> str:
    """A test that catches the bug, found by running them."""
    found = run([f"{file}.py" for file in BUGS[bug].files], bug, hunting=True)
    name = next(iter(found.failed), "")
    known[name, bug] = bool(name)
    return name


if __name__ == "__main__":
    bug, *arguments = sys.argv[1:] or [""]
    if bug not in BUGS or not arguments:
        for name, b in BUGS.items():
            print(f"{name}  {b.story}")
        sys.exit(f"{bug}: no such bug" if bug and bug not in BUGS else 0)
    print(f"planted: {bug}, {BUGS[bug].story}")
    with plant(bug):
        sys.exit(pytest.main(["-W", "ignore::pytest.PytestAssertRewriteWarning", *arguments]))
