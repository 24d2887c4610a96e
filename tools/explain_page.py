"""The page of `python -m tools.explain --html FILE`: tools/explain.html with numbers and sources in
it. The page's own script draws, and recomputes InfoNCE for another temperature."""

import html
import inspect
import io
import itertools
import json
import keyword
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

import contrastive
import model
import pretrain
from plumbing.config import TrainingFlags
from plumbing.errors import InputError
from plumbing.log import versions
from tools import mask_as_cache
from tools.explain_numbers import Matrix, Passes, Story, drawn, matrix, passes, story

TEMPLATE = Path(__file__).parent / "explain.html"
# The functions whose source stands beside a panel, in the order in which they are shown.
SOURCES = (
    pretrain.compression_mask,
    pretrain.answer_labels,
    pretrain.answer_loss,
    mask_as_cache.hidden_through_cache,
    mask_as_cache.without_content,
    model.compression_pool,
    contrastive.paper_info_nce,
    contrastive.info_nce_rows,
    contrastive.two_passes,
)


def source(function) -> str:
    """A function's source as HTML: where it stands, and its words, comments and strings marked."""
    place = Path(inspect.getsourcefile(function)).relative_to(TEMPLATE.parent.parent)
    code = inspect.getsource(function)
    return (
        f"<details class=source><summary><code>{place}: {function.__name__}</code></summary>"
        f'<pre tabindex=0 aria-label="source of {function.__name__}">{marked(code)}</pre></details>'
    )


def marked(code) -> str:
    """Python as HTML, with <b> for keywords, <i> for comments and <em> for strings."""
    starts = [0, *itertools.accumulate(map(len, code.splitlines(True)))]  # of each line
    pieces, at = [], 0
    tags = {tokenize.COMMENT: "i", tokenize.STRING: "em"}
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        is_word = token.type == tokenize.NAME and keyword.iskeyword(token.string)
        tag = "b" if is_word else tags.get(token.type)
        if tag:
            start, end = (starts[row - 1] + column for row, column in (token.start, token.end))
            pieces.append(html.escape(code[at:start]))
            pieces.append(f"<{tag}>{html.escape(token.string)}</{tag}>")
            at = end
    return "".join([*pieces, html.escape(code[at:])])


def for_json(x):
    """NamedTuples as dicts, at any depth: what JSON can say."""
    if isinstance(x, dict):
        return {str(key): for_json(value) for key, value in x.items()}
    if hasattr(x, "_asdict"):
        return for_json(x._asdict())
    if isinstance(x, list | tuple):
        return [for_json(value) for value in x]
    return x


class Shown(NamedTuple):
    """All that the page shows."""

    models: tuple  # the names of stage 1's and of stage 2's
    versions: dict
    story: Story
    matrix: Matrix
    passes: Passes


def write_page(shown) -> str:
    """The template with sources and numbers put in: one file that needs no other."""
    page = TEMPLATE.read_text(encoding="utf-8")
    for function in SOURCES:
        mark = f"<!-- source {function.__name__} -->"
        if mark not in page:
            raise LookupError(f"{TEMPLATE}: {mark} is missing")
        page = page.replace(mark, source(function))
    # "</" would end the script that holds it.
    numbers = json.dumps(for_json(shown), separators=(",", ":")).replace("</", "<\\/")
    return page.replace("/* numbers */ null", numbers)


class Models(NamedTuple):
    """Two Embedders (they may be one), and what they were loaded from."""

    stage_1: model.Embedder
    stage_2: model.Embedder
    names: tuple


def make_page(models, dialogue, pairs, cfg) -> str:
    """The page of two models, a dialogue and data sets of pairs. cfg: flags of tools.explain."""
    for embedder in models[:2]:
        if not embedder.K:
            raise InputError(
                "--html shows the code C; --compress-tokens 4 would give the model one"
            )
        embedder.eval()  # without dropout
    told = story(models.stage_1, dialogue)
    chosen = drawn(pairs, cfg.seed)
    square = matrix(models.stage_2, chosen, cfg.temperature)
    trained = model.merge(models.stage_2)  # as stage 2 does with stage 1's adapter
    model.choose_trained(trained, TrainingFlags())
    steps = passes(trained, chosen, cfg.temperature, cfg.chunk_tokens)
    return write_page(Shown(models.names, versions(), told, square, steps))


if __name__ == "__main__":
    sys.exit("tools/explain_page.py has no commands: tools/explain.py imports it")
