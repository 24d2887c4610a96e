"""What other libraries make of our folders: sentence-transformers alone, mteb."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from checks import equal, expect
from huggingface_hub import ModelCard

import contrastive
import evaluate
import model
import plumbing.card
import pretrain
from data import IMAGE, Item
from plumbing.config import TrainingFlags
from plumbing.errors import InputError
from plumbing.folders import digest_of_weights
from tools import merge
from tools.sentence_transformers_folder import PROMPTS
from toy.world import Scene, Shapes

# Qwen's, SmolVLM2's and InternVL's load in that library only where torchvision is installed.
FOLDERS = {"mean": "gemma3", "last": "llava_next"}
QUESTION = "what is it?"
TORCHVISION = find_spec("torchvision") is not None

# Run where no file of ours can be imported.
ALONE = """
import sys
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

def vectors(model, picture):
    both = {"image": picture, "text": "what is it?"}
    parts = [
        model.encode(["a red circle.", "What is\\nit? ", picture, both]),
        model.encode([{"text": "what is it?", "image": picture}]),
        model.encode_query(["a red circle."]),
        model.encode_document([picture]),
        model.encode([picture], prompt_name="classify image"),
        model.encode(["a red circle."], prompt_name="caption to image"),
    ]
    return np.concatenate(parts)

picture = Image.open(sys.argv[1])
for folder in sys.argv[2:]:
    model = SentenceTransformer(folder, device="cpu")
    np.save(folder + ".npy", vectors(model, picture))
    model.save_pretrained(folder + "-again")
    again = SentenceTransformer(folder + "-again", device="cpu")
    np.save(folder + "-again.npy", vectors(again, picture))
"""


def scene(i) -> Scene:
    """A picture of the toy world."""
    (_, (scene,)), *_ = Shapes().dialogue(i)
    return scene


def without_pad_token(folder, longest) -> Path:
    """A model's folder whose tokenizer cannot pad, and cuts what is longer: real ones are so."""
    file = Path(folder, "tokenizer_config.json")
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings | {"model_max_length": longest}))
    return folder


def export(pooling, folder):
    """An embedder, saved, merged and exported into folder/out."""
    base = without_pad_token(families.build(FOLDERS[pooling], folder / "f"), longest=8)
    made = model.load(base, 4, pooling, "coma", device="cpu")
    families.redraw(made)
    model.save(made, folder / "in")
    merge.main([str(folder / "in"), str(folder / "out"), "--export", "sentence-transformers"])


@pytest.fixture(scope="module")
def exported(once):
    """{pooling: the folder, with in/ and out/ in it}. Each out/ was read by a process that has
    sentence-transformers and nothing of ours, and saved anew: out.npy, out-again/, out-again.npy.
    """

    def fill(folder):
        scene(0).render().save(folder / "picture.png")
        for pooling in FOLDERS:
            (folder / pooling).mkdir()
            export(pooling, folder / pooling)
        outs = [str(folder / pooling / "out") for pooling in FOLDERS]
        command = [sys.executable, "-I", "-c", ALONE, str(folder / "picture.png"), *outs]
        subprocess.run(command, cwd=folder, check=True, timeout=600)

    folder = once("exported", fill)
    return {pooling: folder / pooling for pooling in FOLDERS}


def ours(embedder, picture) -> np.ndarray:
    """What ALONE's `vectors` should be, by this project."""
    instruction = "\nRepresent the given image for classification\n"
    caption = "Find me an everyday image that matches the given caption: a red circle."
    both = {"image": picture, "text": QUESTION}
    items = ["a red circle.", "What is\nit? ", picture, both, both, "a red circle.", picture]
    return embedder.encode([*items, Item(IMAGE + instruction, (picture,)), caption])


@pytest.mark.parametrize("pooling", FOLDERS)
def test_sentence_transformers_alone_makes_the_same_vectors(exported, pooling):
    """Text, picture, both in either order of keys, encode_query, encode_document, prompts; saved
    again by that library and loaded: the same."""
    folder = exported[pooling]
    want = ours(model.load(folder / "in", device="cpu"), scene(0).render())
    for name in ("out", "out-again"):
        cosines = (np.load(folder / f"{name}.npy") * want).sum(1)
        assert cosines.min() > 0.9999, (name, cosines)
    assert (want @ want.T)[np.triu_indices(4, 1)].max() < 0.999, "the check tells vectors apart"


@pytest.mark.parametrize("pooling", FOLDERS)
def test_the_exported_folder_is_ours_too(exported, pooling, tmp_path):
    """`load` makes the same vectors of it; saved by us it is a plain folder again. What
    sentence-transformers saved anew has lost the model's own template, or a weight: refused."""
    folder, picture = exported[pooling], scene(0).render()
    items = ["a red circle.", picture, {"image": picture, "text": QUESTION}]
    want = model.load(folder / "in", device="cpu").encode(items)
    back = model.load(folder / "out", device="cpu")
    assert (back.encode(items) * want).sum(1).min() > 0.99999
    model.save(back, tmp_path / "plain")
    template = (tmp_path / "plain" / "chat_template.jinja").read_text()
    assert template == (folder / "in" / "chat_template.jinja").read_text()
    assert "chat_template" not in json.loads((tmp_path / "plain" / "nanocoma.json").read_text())
    lost = "sentence-transformers, which saved this folder anew|lack 1 weights, lm_head"
    with pytest.raises(InputError, match=lost):
        model.load(folder / "out-again", 4, pooling, "coma", device="cpu")


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", ["toy", *families.FAMILIES] if TORCHVISION else ["toy"])
def test_with_torchvision_every_family_loads_there(tmp_path, family, pooling):
    """The toy too."""
    if not TORCHVISION:
        pytest.skip("torchvision is not installed, and sentence-transformers' processors need it")
    # Here: it imports for seconds, in each of `pytest -n`'s processes, and one of them needs it.
    from sentence_transformers import SentenceTransformer

    name = "toy" if family == "toy" else families.build(family, tmp_path / "f")
    embedder = model.load(name, 4, pooling, "coma", device="cpu")
    model.save(embedder, tmp_path / "in")
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--export", "sentence-transformers"]
    merge.main(words)
    picture = scene(0).render()
    items = ["a red circle.", "What is\nit? ", picture, {"image": picture, "text": QUESTION}]
    cosines = SentenceTransformer(words[1], device="cpu").encode(items) * embedder.encode(items)
    assert cosines.sum(1).min() > 0.9999


def test_a_prompt_stands_apart_from_a_picture_and_from_a_text():
    """As MMEB writes them: on a line of its own behind the picture, a blank before a text."""
    before_a_text = "question about image, caption to image, changed image, object in image"
    for name, prompt in PROMPTS.items():
        if name not in ("query", "document"):  # these add nothing
            equal(prompt.startswith("\n"), name != "caption to image", f"{name}: its beginning")
            end = " " if name in before_a_text.split(", ") else "\n"
            equal((prompt[-1], prompt.strip()[-1:] != ""), (end, True), f"{name}: its end")


def test_nothing_of_ours_is_run(exported):
    """Only stock modules, and no code in the folder."""
    modules = json.loads((exported["mean"] / "out" / "modules.json").read_text())
    kinds = [module["type"].split(".")[-1] for module in modules]
    assert kinds == ["Transformer", "WordWeights", "Pooling", "Normalize"]
    assert all(module["type"].startswith("sentence_transformers.models.") for module in modules)
    assert not list((exported["mean"] / "out").rglob("*.py"))


# --------------------------------------------------------------------------------------------- mteb


def retrieval_task(pictures, captions):
    """A task of mteb's, offline: each caption's picture is to be found."""
    datasets = pytest.importorskip("datasets", reason="mteb is not installed")
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Captions(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="ToyCaptions",
            description="captions of toy pictures",
            dataset={"path": "toy/captions", "revision": "1"},
            type="Any2AnyRetrieval",
            category="t2i",
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **_):
            queries = [{"id": f"q{i}", "text": text} for i, text in enumerate(captions)]
            corpus = [{"id": f"d{i}", "image": x} for i, x in enumerate(pictures)]
            corpus = datasets.Dataset.from_list(corpus).cast_column("image", datasets.Image())
            relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(captions))}
            split = {"queries": datasets.Dataset.from_list(queries), "corpus": corpus}
            split.update(relevant_docs=relevant, top_ranked=None)
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Captions()


def hits(embedder, pictures, captions) -> float:
    """Recall@1 by hand."""
    cosines = embedder.encode(captions) @ embedder.encode(pictures).T
    return float((cosines.argmax(1) == np.arange(len(captions))).mean())


def test_mteb_scores_the_embedder_as_we_do(exported, tmp_path):
    """tools/mteb_model.py, and the exported folder, on a task of one's own."""
    mteb = pytest.importorskip("mteb", reason="mteb is not installed")
    from tools.mteb_model import Model
    from tools.mteb_model import exported as for_mteb

    scenes = [scene(i) for i in range(12)]
    pictures, captions = [x.render() for x in scenes], [x.describe() for x in scenes]
    embedder = model.load("toy", device="cpu")
    task = retrieval_task(pictures, captions)

    def score(what):
        result = mteb.evaluate(what, task, cache=None, show_progress_bar=False)
        (scores,) = result.task_results[0].scores["test"]
        return scores["recall_at_1"]

    assert score(Model(embedder)) == pytest.approx(hits(embedder, pictures, captions), abs=1e-5)
    made = model.load(exported["mean"] / "in", device="cpu")
    assert score(for_mteb(exported["mean"] / "out")) == pytest.approx(
        hits(made, pictures, captions), abs=1e-5
    )


def test_mteb_gets_texts_and_pictures_as_they_are_called():
    """Of batches with both, or with one of them."""
    pytest.importorskip("mteb", reason="mteb is not installed")
    from tools.mteb_model import Model

    seen = []
    batches = [{"text": ["a", "b"], "image": [1, 2]}, {"image": [3]}, {"text": ["c"]}]
    Model(SimpleNamespace(encode=seen.append)).encode(batches)
    want = [{"text": "a", "image": 1}, {"text": "b", "image": 2}, {"image": 3}, {"text": "c"}]
    equal(seen, [want], "Model.encode")


# ---------------------------------------------------------------------------- transformers and peft


def snippet(number, section="Using the result") -> str:
    """A block of Python from a section of the README, from 0, as it stands there."""
    text = Path(__file__).parent.parent.joinpath("README.md").read_text()
    section = text.split(f"## {section}")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[number]


def test_the_snippets_of_the_readme_work_as_written(tmp_path, monkeypatch):
    """sentence-transformers, transformers, peft: all of a LoRA run, all the same vectors."""
    monkeypatch.chdir(tmp_path)
    picture = scene(1).render()
    picture.save("photo.jpg")
    base = model.load(families.build("gemma3", tmp_path / "f"), 4, "mean", "coma", device="cpu")
    families.redraw(base)
    model.save(base, "BASE", is_embedder=False)
    embedder = model.load("BASE", 4, "mean", "coma", device="cpu")
    model.choose_trained(embedder, TrainingFlags(model="BASE", lora_rank=2))
    for name, p in embedder.named_parameters():
        if "lora_B" in name or "tokens_delta" in name:  # so that the adapter changes something
            torch.nn.init.normal_(p, std=0.1)
    model.save(embedder.eval(), "out/contrastive")
    merge.main(["out/contrastive", "out/merged", "--export", "sentence-transformers"])
    both = {"image": Path("photo.jpg"), "text": QUESTION}
    want = embedder.encode(["a red circle", both])

    names = {}
    exec(snippet(1).replace('"out/merged")', '"out/merged", device="cpu")', 1), names)
    prompted = embedder.encode([Item(f"{IMAGE}\nRepresent the given image for classification\n",
                                     (Path("photo.jpg"),))])  # fmt: skip
    assert (names["z"] * prompted).sum(1).min() > 0.9999
    assert (names["library"].encode(["a red circle"]) * want[:1]).sum() > 0.9999
    names = {}
    exec(snippet(2), names)
    assert (names["z"].detach().numpy() * want[1]).sum() > 0.9999, "transformers"
    exec(snippet(3), names)
    z = torch.nn.functional.normalize(names["h"][:, -4:].mean(1), dim=-1)
    assert (z.detach().numpy() * want[1]).sum() > 0.9999, "peft"
    plain = base.encode([both])
    assert (plain * want[1]).sum() < 0.999, "the check tells vectors apart: the adapter counts"


def test_tensorboard_reads_the_log(tmp_path, monkeypatch):
    """As the README says: each number of each step."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    Path("out/contrastive").mkdir(parents=True)
    records = [{"config": {}}, {"step": 1, "loss": 2.0, "lr": 0.1}, {"step": 2, "loss": 1.5}]
    lines = [json.dumps(record) + "\n" for record in records]
    Path("out/contrastive/log.jsonl").write_text("".join(lines))
    exec(snippet(0, "Logged quantities"), {})
    board = EventAccumulator("out/board").Reload()
    assert [(x.step, x.value) for x in board.Scalars("loss")] == [(1, 2.0), (2, 1.5)]
    assert [x.step for x in board.Scalars("lr")] == [1]


# --------------------------------------------------------------------------------------- model card


def test_each_run_leaves_a_model_card(tmp_path, monkeypatch):
    """Base, data, flags of both stages, K, pooling; scores where they were written; what a person
    changed stays; `merge` brings it along."""
    monkeypatch.chdir(tmp_path)
    flags = {"steps": 1, "workers": 0, "muon_lr": 0.0, "out": "out/pretrain"}
    pretrain.main(pretrain.Config(model="toy-random", batch=2, turns=1, **flags))
    flags.update(out="out/contrastive", steps=2)
    contrastive.main(contrastive.Config(model="out/pretrain", batch=4, block=4, **flags))
    card = ModelCard.load("out/contrastive/README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag
    rows = ("| base model | toy-random |", "| compression tokens K | 4 |", "| `--batch` | 4 |")
    for words in (
        *rows,
        "## Training: compression",
        "## Training: contrastive",
        "| `--steps` | 2 |",
    ):
        assert words in card.text, words
    assert "## Scores" not in card.text and "--out" not in card.text
    said = ("| `--muon-lr` | 0.0 |", "| `--no-caption` |  |", "| `--merge` |  |")
    assert all(words in card.text for words in said) and "`--command`" not in card.text
    order = [card.text.index(words) for words in ("## Training: comp", "## Training: contr")]
    assert order == sorted(order), "stage 1 comes first"
    scores = "out/contrastive/scores.json"
    few = dict(limit=2, subsets="classify,vqa", workers=0, json=scores)
    evaluate.main(evaluate.Config(model="out/contrastive", **few))
    overall = json.loads(Path(scores).read_text())["overall"]
    card = Path("out/contrastive/README.md")
    assert f"| overall | {100 * overall:.1f} |" in card.read_text()
    assert "means over 2 sets of shapes, of a part" in card.read_text()
    merge.main(["out/contrastive", "out/merged", "--export", "sentence-transformers"])
    merged = Path("out/merged/README.md").read_text()
    assert "SentenceTransformer(" in merged and "| `--batch` | 4 |" in merged
    card.write_text(card.read_text().replace("Trained with", "Patiently trained with"))
    merge.main(["out/contrastive", "out/merged"])
    assert "SentenceTransformer(" not in Path("out/merged/README.md").read_text()
    kept = card.read_text()
    weights = Path("out/contrastive/model.safetensors")
    assert plumbing.card.scores("out/contrastive")
    other = bytearray(weights.read_bytes())
    other[-1] ^= 1
    weights.write_bytes(other)
    assert not plumbing.card.scores("out/contrastive"), "of the weights before"
    evaluate.main(evaluate.Config(model="out/contrastive", **few))
    assert card.read_text() == kept
    mark = Path("out/pretrain/finished.json")
    flags_of_the_run = mark.read_text()
    merge.main(["out/merged", "out/pretrain"])
    assert not mark.exists(), "of the model before"
    mark.write_text(flags_of_the_run)
    merge.main(["out/contrastive", "out/merged"])
    assert "| base model | out/pretrain |" in Path("out/merged/README.md").read_text(), "another"


def test_the_card_of_two_adapters_in_turn_tells_of_both(tmp_path, monkeypatch):
    """The papers' recipe: LoRA in both stages. The base is the model at the beginning, and a card
    that a person has written stays when a run is run again."""
    monkeypatch.chdir(tmp_path)
    flags = {"steps": 1, "workers": 0, "muon_lr": 0.0, "lora_rank": 2}
    first = pretrain.Config(model="toy-random", batch=2, turns=1, out="out/pretrain", **flags)
    pretrain.main(copy.copy(first))
    second = contrastive.Config(model="out/pretrain", batch=4, block=4, out="out/second", **flags)
    contrastive.main(second)
    card = Path("out/second/README.md").read_text()
    for words in (
        "| base model | toy-random |",
        "## Training: comp",
        "| `--model` | out/pretrain |",
    ):
        assert words in card, words
    mine = "# My own\n[More Information Needed]\n"
    Path("out/pretrain/README.md").write_text(mine)
    pretrain.main(first)
    assert Path("out/pretrain/README.md").read_text() == mine


def test_the_card_of_a_model_that_is_no_embedder_says_so(tmp_path, good):
    """Stage 1 with K = 0, the control, leaves an MLLM."""
    folder = shutil.copytree(good, tmp_path / "m")
    settings = json.loads((folder / "nanocoma.json").read_text())
    del settings["compress_tokens"]
    (folder / "nanocoma.json").write_text(json.dumps(settings))
    plumbing.card.write(folder)
    text = (folder / "README.md").read_text()
    assert "No embedding model yet" in text and "## How to embed" not in text


def test_the_card_names_the_base_models_licence(tmp_path):
    """As its own card has it, where that lies beside it."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    (tmp_path / "run").mkdir()
    run = {"config": {"model": str(tmp_path / "base"), "temperature": 0.02}}
    (tmp_path / "run" / "finished.json").write_text(json.dumps(run))
    plumbing.card.write(tmp_path / "run")
    written = ModelCard.load(tmp_path / "run" / "README.md")
    assert written.data.license == "apache-2.0" and "| licence | apache-2.0 |" in written.text


def test_the_licence_of_a_base_of_the_hub_is_that_of_its_cached_card(tmp_path, monkeypatch):
    """Nothing is asked for: what is not in the cache is not known."""
    (tmp_path / "card").write_text("---\nlicense: mit\n---\n")
    cached = {("Qwen/Qwen2-VL", "README.md"): str(tmp_path / "card")}
    monkeypatch.setattr(plumbing.card, "try_to_load_from_cache", lambda *name: cached.get(name))
    equal(plumbing.card.licence_of("Qwen/Qwen2-VL"), "mit", "card.licence_of")
    equal(plumbing.card.licence_of("Qwen/another"), None, "not in the cache")


def test_a_card_that_is_no_file_costs_the_card_alone(tmp_path, good, capsys):
    """A pipe is not waited for, a folder is no error; one's own in any letters stays;
    and no model is refused for its card."""
    folder = shutil.copytree(good, tmp_path / "m")
    (folder / "README.md").write_bytes("Mon modèle".encode("latin-1"))
    plumbing.card.write(folder)
    assert "changed by hand" in capsys.readouterr().out
    (folder / "README.md").unlink()
    for make in (os.mkfifo, os.mkdir):
        make(folder / "README.md")
        plumbing.card.write(folder)
        assert "README.md: is a " in capsys.readouterr().out
        model.load(folder, device="cpu")
        os.unlink(folder / "README.md") if make is os.mkfifo else os.rmdir(folder / "README.md")


def test_what_a_card_is_of_may_be_gone(tmp_path, capsys):
    """A start that a link led to, on a disk that is cleared: the model is saved all the same."""
    start, out = tmp_path / "start", tmp_path / "out"
    start.mkdir()
    out.mkdir()
    (start / "model.safetensors").symlink_to(tmp_path / "cleared")
    flags = {"model": str(start), "model_digest": "x"}
    (out / "finished.json").write_text(json.dumps({"config": flags}))
    plumbing.card.write(out)
    said = capsys.readouterr().out
    assert "no model card: " in said and not (out / "README.md").exists(), said


def test_the_card_says_of_scores_what_was_left_out_and_of_flags_what_makes_the_model(tmp_path):
    """A mean over a part of the queries is no mean over all; who read the data changes nothing."""
    scores = {"overall": 0.5, "sets": {"a": {}, "b": {}}, "partial": True}
    scores["config"] = {"dim": 32, "min_pixels": 0, "max_pixels": 784, "max_length": 512}
    scores["model_digest"] = plumbing.folders.digest_of_weights(tmp_path)
    (tmp_path / plumbing.card.SCORES).write_text(json.dumps(scores))
    said = plumbing.card.scores(tmp_path)
    flags = "--dim 32 --max-pixels 784 --max-length 512"
    title = f"means over 2 sets, of a part of the queries, with {flags}\n"
    assert title in said and "| overall | 50.0 |" in said, said
    flags = dict(lr=0.1, seed=7, workers=3, out="x", save_every=5, model_digest="d")
    said = plumbing.card.training(flags)
    assert "| `--lr` | 0.1 |" in said and "| `--seed` | 7 |" in said, said
    assert not any(word in said for word in ("workers", "out", "save", "digest")), said
    for flags, paper in (({}, "2511.08480"), ({"temperature": 0.03}, "2410.05160")):
        assert f"arXiv:{paper}" in plumbing.card.training(flags).splitlines()[0]


@pytest.mark.parametrize(("merged", "library"), [(False, "peft"), (True, "transformers")])
def test_the_card_names_the_library_that_loads_the_folder(tmp_path, merged, library):
    """Of an adapter peft; of what `merge` made of it transformers, though its run is told of in the
    adapter's folder."""
    run, folder = tmp_path / "run", tmp_path / ("merged" if merged else "run")
    run.mkdir()
    folder.mkdir(exist_ok=True)
    (run / "adapter_config.json").write_text("{}")
    said = plumbing.card.text_of(folder, run)
    expect(f"library_name: {library}\n" in said, said, library, "card.text_of")


def test_a_cell_of_the_card_may_hold_a_bar():
    """As a regular expression has it: Markdown would begin another column."""
    said = plumbing.card.table([("--x", "a|b")])
    equal(said.splitlines()[-1], r"| --x | a\|b |", "card.table")


def test_a_chain_of_runs_that_bites_its_own_tail_ends(tmp_path, no_waiting):
    """--steps 0 leaves the weights as they are: a model of B, and B of it."""
    flags = {"model": str(tmp_path), "model_digest": digest_of_weights(tmp_path)}
    (tmp_path / "finished.json").write_text(json.dumps({"config": flags}))
    equal(len(plumbing.card.runs_of(tmp_path)), 10, "card.runs_of")


@pytest.mark.parametrize("base", ["out/base", "Qwen/Qwen2-VL"])
def test_the_card_links_to_a_base_on_the_hub_and_to_no_folder(tmp_path, monkeypatch, base):
    """out/base looks like a name on the hub, and may be anyone's there."""
    monkeypatch.chdir(tmp_path)
    Path("out/base").mkdir(parents=True)
    Path("finished.json").write_text(json.dumps({"config": {"model": base}}))
    card = ModelCard(plumbing.card.text_of(tmp_path, tmp_path))
    equal(card.data.base_model, None if base == "out/base" else base, "card.text_of")


def test_the_card_is_found_and_named_where_the_folder_is_the_working_folder(tmp_path, monkeypatch):
    """`python -m tools.merge IN .`: the hub's search goes by tags, a reader by the heading."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    card = ModelCard(plumbing.card.text_of(Path("."), Path(".")))
    equal(card.data.tags, plumbing.card.TAGS, "ModelCardData")
    equal(card.data.pipeline_tag, "feature-extraction", "by which the hub lists it")
    expect("# mine: a multimodal" in card.text, card.text, "# mine", "card.text_of")


def test_the_card_has_each_mean_under_its_name(tmp_path):
    """In and out of distribution, and the meta-tasks."""
    scores = {"overall": 0.5, "ind": 0.6, "ood": 0.4, "meta_tasks": {"VQA": 0.3}}
    scores["model_digest"] = digest_of_weights(tmp_path)
    (tmp_path / plumbing.card.SCORES).write_text(json.dumps(scores))
    said = plumbing.card.scores(tmp_path)
    for row in ("| IND | 60.0 |", "| OOD | 40.0 |", "| VQA | 30.0 |"):
        expect(row in said, said, row, "card.scores")


@pytest.mark.parametrize("field", ["sets", "meta_tasks", "config"])
def test_scores_that_another_hand_has_written_cost_the_card_its_scores_alone(
    tmp_path, capsys, field
):
    """A run ends with its card: no trace there, of a file that stood in the folder before."""
    known = {"overall": 0.5, "model_digest": digest_of_weights(tmp_path), field: [["a", 1]]}
    (tmp_path / "scores.json").write_text(json.dumps(known))
    plumbing.card.write(tmp_path)
    said = capsys.readouterr().out
    assert f"{tmp_path}/scores.json: not as evaluate.py --json writes it" in said, said
    assert "Scores" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("config", [{"text_config": {"hidden_size": 128}}, {"hidden_size": 128}])
def test_the_card_has_the_facts_of_the_folder(tmp_path, config):
    """The width stands in the language model's part of config.json, or on top. What is not there,
    as K and pooling of a model that is no embedder, has no row."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"} | config))
    said = plumbing.card.facts(tmp_path, "toy", None)
    for row in ("| family | qwen2_vl |", "| dimensions | 128 |"):
        expect(row in said, said, row, "card.facts")
    names = [line.split(" | ")[0].strip("| ") for line in said.splitlines()[2:]]
    equal(names, ["base model", "family", "dimensions", "licence"], "card.facts: rows")


def test_the_card_of_a_merged_model_has_the_scores_of_what_was_merged(tmp_path):
    """Its own folder has no scores.json."""
    for name in ("run", "merged"):
        (tmp_path / name).mkdir()
    known = {"overall": 0.5, "model_digest": digest_of_weights(tmp_path / "run")}
    (tmp_path / "run" / plumbing.card.SCORES).write_text(json.dumps(known))
    plumbing.card.write(tmp_path / "merged", source=tmp_path / "run")
    said = (tmp_path / "merged" / "README.md").read_text()
    expect("| overall | 50.0 |" in said, said, "| overall | 50.0 |", "card.scores")


def test_the_card_leaves_out_what_is_of_one_machine_and_what_is_no_flag():
    """What was kept, what fitted into memory, which file it was; all else is said."""
    unsaid = "out workers save_every keep fitting graph_memory resume command".split()
    said = plumbing.card.training(dict.fromkeys(unsaid, "x") | {"lr": 0.1})
    rows = [line for line in said.splitlines() if "`--" in line]
    equal(rows, ["| `--lr` | 0.1 |"], "card.UNSAID")


@pytest.mark.parametrize(
    ("pooling", "words"), [("mean", "mean of the K tokens"), ("last", "last token")]
)
def test_the_card_says_how_a_vector_is_made(tmp_path, pooling, words):
    """Pooling and prompt in words; a licence that is not known is said to be so."""
    stored = {"compress_tokens": 4, "pooling": pooling, "prompt": "coma"}
    (tmp_path / "nanocoma.json").write_text(json.dumps(stored))
    said = plumbing.card.facts(tmp_path, "toy", None)
    rows = (f"| pooling | {words} |", "| prompt | coma |", "| licence | the base model's (its card")
    for row in rows:
        expect(row in said, said, row, "card.facts")
