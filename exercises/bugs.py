"""Exercise 9: bugs of the papers' official code, planted in ours, in memory, one at a time.

    python -m exercises.bugs                            the bugs
    python -m exercises.bugs b3 tests/test_answers.py   pytest, with b3 planted

Which test catches which bug is written down nowhere; `hunt` finds one by running them. A bug is
planted in this process: tests of several ranks, which are started once for all, do not meet it."""

import contextlib
import dataclasses
import io
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import contrastive
import evaluate
import model
import pretrain
from data import COMPRESS, PAD
from exercises.planting import ROOT, TESTS, planted
from plumbing import images, ranks
from plumbing.errors import InputError
from plumbing.formats import Lazy


def suite() -> dict:
    """The test files that exercise 9 is about: {name: module}."""
    import test_answers
    import test_data
    import test_embedder
    import test_evaluate
    import test_gradcache
    import test_infonce
    import test_mask
    import test_pooling

    modules = (test_mask, test_answers, test_pooling, test_infonce, test_gradcache)
    modules += (test_evaluate, test_data, test_embedder)
    return {module.__name__: module for module in modules}


# ---------------------------------------------------------------- the bugs: our function -> wrong


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
            return args, {**kwargs, "attention_mask": causal(inputs["roles"])}

        layers = self.mllm.model.language_model.layers
        with contextlib.ExitStack() as hooks:
            for layer in layers[len(layers) // 2 :]:
                hook = layer.register_forward_pre_hook(see_all, with_kwargs=True)
                hooks.callback(hook.remove)
            return ours(self, inputs, mask)

    return hidden


def labels_of_everything(ours):
    def answer_labels(input_ids, roles):
        labels = input_ids[:, 1:].masked_fill(roles[:, 1:] <= COMPRESS, -100)
        return F.pad(labels, (0, 1), value=-100)

    return answer_labels


def last_token_in_evaluation(ours):
    def encode(self, *args, **kwargs):
        trained, self.pooling = self.pooling, "last"
        try:
            return ours(self, *args, **kwargs)
        finally:
            self.pooling = trained

    return encode


def first_index_wins(ours):
    def precision_at_1(q, c, candidates, tie=1e-6):
        hits = [np.argmax(c[rows] @ x) == 0 for x, rows in zip(q, candidates, strict=True)]
        return float(np.mean(hits))

    return precision_at_1


def without_negatives(pairs):
    """The same pairs, their hard negatives dropped."""

    def strip(i):
        return pairs[i]._replace(negatives=())

    return Lazy(len(pairs), strip)


def negatives_thrown_away(ours):
    def local_batch(pairs, *rest):
        return ours({name: without_negatives(p) for name, p in pairs.items()}, *rest)

    return local_batch


def block_times_world(ours):
    def local_batch(pairs, collate, cfg, step, rank, world):
        cfg = dataclasses.replace(cfg, block=min(cfg.block * world, cfg.batch))
        return ours(pairs, collate, cfg, step, rank, world)

    return local_batch


def grey_for_a_bad_picture(ours):
    def open_image(ref, name=None):
        try:
            return ours(ref, name)
        except InputError:
            return Image.new("RGB", (56, 56), "grey")

    return open_image


def plain_batch_on_one_gpu(ours):
    def two_passes(embed, chunks, loss_of, keep=0):
        if ranks.world() > 1:
            return ours(embed, chunks, loss_of, keep)
        rows = [i for chunk in chunks for i in chunk]
        return ours(embed, [rows], loss_of, keep=1)  # one forward of all, whose graph is kept

    return two_passes


class Bug(NamedTuple):
    story: str
    owner: object  # a module, or a class
    name: str
    make: object  # our function -> the wrong one
    files: tuple  # where `hunt` looks
    hint: str  # for a test that does not notice it


BUGS = {
    "b1": Bug(
        "CoMa: the compression mask is off by default (split_layer = -1); we plant a causal "
        "mask that hides nothing of the picture",
        pretrain, "compression_mask", mask_off, ("test_mask.py",),
        "which test asks compression_mask itself, and not a wrong mask of its own?",
    ),
    "b2": Bug(
        "CoMa: where the mask is on, it holds in some layers only",
        model.Embedder, "hidden", mask_in_half_the_layers, ("test_mask.py",),
        "the mask is right; which test looks at what a model does with it?",
    ),
    "b3": Bug(
        "CoMa: questions and template tokens are trained like answers",
        pretrain, "answer_labels", labels_of_everything, ("test_answers.py",),
        "which test reads the labels, token by token?",
    ),
    "b4": Bug(
        "CoMa: trained with the mean of the code, evaluated with the last token",
        model.Embedder, "encode", last_token_in_evaluation, ("test_embedder.py",),
        "which test compares what encode gives with what a forward pass gives?",
    ),
    "b5": Bug(
        "The official evaluation: Precision@1 by argmax, and the right candidate stands at index 0",
        evaluate, "precision_at_1", first_index_wins, ("test_evaluate.py",),
        "argmax is right where no two scores are equal; which test has equal ones?",
    ),
    "b6": Bug(
        "Hard negatives are read, and then thrown away",
        contrastive, "local_batch", negatives_thrown_away, ("test_gradcache.py",),
        "which test looks at the columns that a step is given?",
    ),
    "b7": Bug(
        "VLM2Vec: the size of a one-dataset block is multiplied by the number of ranks",
        contrastive, "local_batch", block_times_world, ("test_gradcache.py",),
        "with one rank nothing is wrong; which test asks for the batch of several, in one process?",
    ),
    "b8": Bug(
        "A sample that cannot be read is replaced by a dummy, and nobody hears of it",
        images, "open_image", grey_for_a_bad_picture, ("test_data.py",),
        "which test has a picture that cannot be read, and wants to hear of it?",
    ),
    "b9": Bug(
        "VLM2Vec: GradCache runs on several GPUs only; on one it is silently a plain batch",
        contrastive, "two_passes", plain_batch_on_one_gpu, ("test_gradcache.py",),
        "the gradient is right; what does a plain batch cost, and what can it not do?",
    ),
}  # fmt: skip


# ------------------------------------------------------------------- running tests with a bug in


@contextlib.contextmanager
def plant(bug):
    """Inside, the bug is in our code; None: nothing is changed."""
    suite()  # before planting: what is imported under a bug would keep it
    if bug is None:
        yield
        return
    b = BUGS[bug]
    with planted(b.owner, b.name, b.make(getattr(b.owner, b.name))):
        yield


def starts_ranks(names) -> bool:
    """Whether a test with these fixtures or arguments asks ranks, which run once for all tests."""
    return "ranks_of" in names


class Outcomes:
    """A pytest plugin: what each test said; none that starts ranks is run. hunting: one case of
    each test is enough."""

    def __init__(self, hunting):
        self.hunting, self.failed, self.ran = hunting, {}, 0

    def pytest_collection_modifyitems(self, items):
        kept = {}
        for item in items:
            if not starts_ranks(item.fixturenames):
                kept.setdefault(item.originalname if self.hunting else item.nodeid, item)
        items[:] = kept.values()

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call"
        if report.failed:
            self.failed[plain(report.nodeid.split("/")[-1])] = report


def run(names, bug=None, hunting=False):
    """Runs tests in this process. -> Outcomes."""
    outcomes = Outcomes(hunting)
    options = ["-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:faulthandler", "-s"]
    options += [f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    if hunting:
        options.append("-x")
    paths = [str(TESTS / name) for name in names]
    with plant(bug), contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*options, *paths], plugins=[outcomes])
    return outcomes


def plain(name) -> str:
    """A test's name without folder and [parameters], as pytest's own lines have them."""
    return str(name).removeprefix("tests/").partition("[")[0]


def problem(name) -> str:
    """Why this cannot be the name of a test; "" where it can."""
    file, _, function = name.partition("::")
    modules = suite()
    if not file.endswith(".py") or file.removesuffix(".py") not in modules:
        return f"test_file.py::test_name, the file one of {', '.join(modules)}"
    test = getattr(modules[file.removesuffix(".py")], function, None)
    if not function.startswith("test_") or test is None:
        return f"{file} has no such test"
    if starts_ranks(test.__code__.co_varnames):
        return "that one asks ranks that were started without the bug"
    return ""


known = {}  # (test, bug or None) -> whether it fails


def fails(name, bug=None, others=()):
    """Whether a test fails, on our code or with a bug planted; None where it cannot be run.
    others: tests that will be asked for next, to run them along."""
    if (name, bug) not in known:
        names = [n for n in {name, *others} if not problem(n)]
        outcomes = run(names, bug)
        for n in names:
            known[n, bug] = n in outcomes.failed if outcomes.ran else None
    return known.get((name, bug))


def hunt(bug) -> str:
    """A test that catches the bug, found by running them."""
    outcomes = run(BUGS[bug].files, bug, hunting=True)
    name = next(iter(outcomes.failed), "")
    known[name, bug] = bool(name)
    return name


def main():
    bug, *arguments = sys.argv[1:] or [""]
    if bug not in BUGS or not arguments:
        for name, b in BUGS.items():
            print(f"{name}  {b.story}")
        sys.exit(f"{bug}: no such bug" if bug and bug not in BUGS else 0)
    if any(word.startswith(("-n", "--numprocesses", "--dist")) for word in arguments):
        sys.exit("without -n, --numprocesses and --dist: the bug is planted in this process alone")
    print(f"planted: {bug}, {BUGS[bug].story}")
    with plant(bug):
        # The test files were imported before pytest could rewrite their assertions.
        sys.exit(pytest.main(["-W", "ignore::pytest.PytestAssertRewriteWarning", *arguments]))


if __name__ == "__main__":
    main()
