"""The model card, README.md of a folder: what the folder says of itself in config.json,
nanocoma.json, finished.json (the run's flags) and scores.json (evaluate.py --json), for people."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from plumbing.combinations import option
from plumbing.errors import InputError, brief
from plumbing.files import open_file
from plumbing.folders import CARD, FINISHED, digest_of_weights, read_json
from plumbing.ranks import say
from plumbing.writing import written

SCORES = "scores.json"
# Flags of one machine, and what is no flag.
UNSAID = ("out", "workers", "save_every", "keep", "fitting", "graph_memory", "resume", "command")
# Flags of an evaluation without which the folder's embeddings are others.
EMBEDDING = ("dim", "min_pixels", "max_pixels", "max_length")
TAGS = ["multimodal-embedding", "image-text-retrieval", "sentence-similarity", "coma", "vlm2vec"]


def write(folder, source=None):
    """README.md into a folder, unless a person has changed the one that is there. source: where the
    folder's run is told of, if not in it. A disk that is full costs the card and nothing else."""
    file = Path(folder, CARD)
    try:
        if file.exists() and not is_ours(text_in(file)):
            say(f"{file} was changed by hand, and stays as it is")
            return
        text = text_of(Path(folder), source or folder)
        with written(file, "the model card") as part:
            part.write_text(text + signature(text), encoding="utf-8")
    except (InputError, OSError) as e:  # what the card is of may be gone by now
        say(f"no model card: {e}")


def text_in(file) -> str:
    """Of a card that is there; InputError where it is no ordinary file."""
    with open_file(file) as opened:
        return opened.read().decode(errors="replace")


def signature(text) -> str:
    """The last line of a card: one who changes the text keeps it."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"<!-- written by nanoCoMa, {digest} -->\n"


def is_ours(text) -> bool:
    """Whether a card is as `write` left it."""
    body, mark, end = text.rpartition("<!-- written by nanoCoMa, ")
    return mark + end == signature(body)


def runs_of(folder) -> list:
    """The flags of the runs that made a folder's model, the last one first: as far back as each
    started from the weights that are there today."""
    runs = []
    while len(runs) < 10:  # a chain that bites its own tail ends, too
        flags = read_json(folder, FINISHED).get("config")
        if not isinstance(flags, dict):
            break
        runs.append(flags)
        folder = str(flags.get("model"))
        if not os.path.isdir(folder) or not is_of(folder, flags):
            break
    return runs


def is_of(folder, noted) -> bool:
    """Whether the model_digest that was noted is that of the weights that are in a folder today."""
    digest = str(noted.get("model_digest")).partition(" ")[0]  # see digest_of_model
    return digest == digest_of_weights(folder)


def licence_of(base) -> str | None:
    """What the base model's own card says, where it is on this disk."""
    with suppress(Exception):  # whatever is wrong with a card of others
        file = Path(base, CARD)
        if not file.exists():
            file = try_to_load_from_cache(base, CARD)
        return ModelCard(text_in(file), ignore_metadata_errors=True).data.license
    return None


def text_of(folder, source) -> str:
    """The text of the card, but for its signature."""
    runs = runs_of(source)
    base = str(runs[-1].get("model")) if runs else str(source)
    is_adapter = Path(folder, "adapter_config.json").exists()
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not os.path.exists(base)
    licence = licence_of(base)
    head = ModelCardData(
        license=licence,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="feature-extraction",
        tags=TAGS,
        base_model=base if is_hub_id else None,
    )
    kind, what_for, how_to = "a multimodal embedding model", EMBEDS, usage(folder)
    if "compress_tokens" not in read_json(folder, "nanocoma.json"):
        kind, what_for, how_to = "a multimodal language model", STARTS, ""
    parts = [
        f"---\n{head.to_yaml()}\n---\n# {folder.absolute().name}: {kind}",
        f"{what_for} Trained with nanoCoMa.",
        facts(folder, base, licence),
        how_to,
        *(training(flags) for flags in reversed(runs)),
        scores(source),
    ]
    return "\n\n".join(part for part in parts if part) + "\n\n"


def table(rows) -> str:
    """Markdown of [(name, value)]; what is None stands in no row."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows:
        if value is not None:
            cell = str(value).replace("|", "\\|")
            lines.append(f"| {name} | {cell} |")
    return "\n".join(lines)


def facts(folder, base, licence) -> str:
    """What a reader looks for first."""
    config, settings = read_json(folder, "config.json"), read_json(folder, "nanocoma.json")
    pooling = {"mean": "mean of the K tokens", "last": "last token"}
    return table(
        [
            ("base model", base),
            ("family", config.get("model_type")),
            ("dimensions", config.get("text_config", config).get("hidden_size")),
            ("prefixes trained, too", ", ".join(map(str, settings.get("matryoshka", ()))) or None),
            ("compression tokens K", settings.get("compress_tokens")),
            ("pooling", pooling.get(settings.get("pooling"))),
            ("prompt", settings.get("prompt")),
            ("licence", licence or "the base model's (its card was not on the training disk)"),
        ]
    )


EMBEDS = """A text, a picture or both become one vector of unit length; two are compared by their
cosine."""
STARTS = "No embedding model yet: one is made of it by `contrastive.py --model FOLDER`."
OURS = """## How to embed

In a clone of nanoCoMa, with FOLDER this one:

```python
from pathlib import Path
from model import load

embedder = load("FOLDER")
both = {"image": Path("photo.jpg"), "text": "what is it?"}
z = embedder.encode(["a red circle", Path("photo.jpg"), both])  # unit length
```"""
THEIRS = """sentence-transformers, without code from elsewhere:

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
both = {"image": Image.open("photo.jpg"), "text": "what is it?"}
z = model.encode(["a red circle", Image.open("photo.jpg"), both])  # unit length
```

vLLM (by its documentation; not run): of pooling `last`, `--runner pooling --convert embed`; of the
mean of the K tokens ask for `token_embed`, and average the last K vectors on the client."""
EXPORT = """For sentence-transformers and vLLM,
`python -m tools.merge FOLDER OUT --export sentence-transformers` writes what they read."""


def usage(folder) -> str:
    """How to embed with it, in each library that can."""
    exported = Path(folder, "modules.json").exists()
    return f"{OURS}\n\n{THEIRS if exported else EXPORT}"


def training(flags) -> str:
    """The flags of one run, but for those that are empty."""
    stage = "compression pre-training (CoMa, arXiv:2511.08480)"
    if "temperature" in flags:
        stage = "contrastive matching (VLM2Vec, arXiv:2410.05160)"
    rows = []
    for name, value in flags.items():
        if value not in (None, "") and name not in UNSAID and not name.endswith("digest"):
            if isinstance(value, bool):  # as it is typed: --merge, --no-merge
                name, value = name if value else f"no_{name}", ""
            rows.append((f"`{option(name)}`", value))
    return f"## Training: {stage}\n\n{table(rows)}"


def scores(folder) -> str:
    """Precision@1, where `evaluate.py --json FOLDER/scores.json` has written it; "" where the
    scores are of other weights than the folder's."""
    known = read_json(folder, SCORES)
    if not known or not is_of(folder, known):
        return ""
    sets, meta_tasks, flags = (known.get(name) or {} for name in ("sets", "meta_tasks", "config"))
    if not all(isinstance(part, dict) for part in (sets, meta_tasks, flags)):
        say(f"{Path(folder, SCORES)}: not as evaluate.py --json writes it; the card has no scores")
        return ""
    means = {"overall": known.get("overall"), "IND": known.get("ind"), "OOD": known.get("ood")}
    means.update(meta_tasks)
    rows = [(name, f"{100 * x:.1f}") for name, x in means.items() if isinstance(x, float)]
    title = f"## Scores: Precision@1 x 100, means over {len(sets)} sets"
    if data := flags.get("data"):
        title += f" of {brief(data)}"
    if known.get("partial"):
        title += ", of a part of the queries"
    others = [f"{option(name)} {brief(flags[name])}" for name in EMBEDDING if flags.get(name)]
    if others:
        title += f", with {' '.join(others)}"
    return f"{title}\n\n{table(rows)}" if rows else ""
