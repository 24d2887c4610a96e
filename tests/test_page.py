"""The page of `python -m tools.explain --html`: its numbers are those of the functions that train,
and in a real browser (Debian's chromium) every control does what it says."""

import base64
import html
import inspect
import io
import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import browser
import families
import pytest
import torch
from checks import close, equal, expect, shorten, toy
from PIL import Image

import contrastive
import model
import pretrain
from data import ANSWER, CONTENT, Item, Pair, read_dialogues, read_pairs
from plumbing.errors import InputError
from plumbing.families import position_ids
from plumbing.formats import IMAGE
from tools import explain, explain_numbers, explain_page, mask_as_cache
from tools.measured import eager

ROOT = Path(__file__).parent.parent
MODEL = "toy-random"


def content_of(page) -> dict:
    """The numbers of a page."""
    line = re.search(r"^const content = (.*);$", page, re.MULTILINE)[1]
    return json.loads(line)


@pytest.fixture(scope="session")
def file(once):
    """The page of a toy-random model, made once."""

    def fill(folder):
        explain.main(["--html", str(folder / "page.html"), "--model", MODEL])

    return once("page", fill) / "page.html"


@pytest.fixture(scope="session")
def content(file):
    """Its numbers."""
    return content_of(file.read_text())


@pytest.fixture(scope="session")
def embedder():
    """The model that it was made of."""
    return model.load(MODEL, device="cpu").eval()


# -------------------------------------------------------------------------------------- the numbers


def row_of(embedder):
    """The dialogue of the page as model inputs."""
    dialogue = read_dialogues()[0]
    row = embedder.collate.row(dialogue.item, dialogue.turns[:2])
    return embedder.collate.pad_rows([row])


def test_one_file_that_needs_no_other(file):
    """Below a megabyte; nothing is loaded from anywhere."""
    page = file.read_text()
    expect(len(page) < 1_000_000, len(page), "< 1 MB", "pictures too large?")
    addresses = re.findall(r"(?:https?:)?//[a-z][^\s\"'<]*\.[^\s\"'<]*", page)
    equal(set(addresses), {"http://www.w3.org/2000/svg"}, "a name, which nobody fetches")


def test_the_mask_is_the_functions(content, embedder):
    """Masked: compression_mask; unmasked: causal."""
    roles = row_of(embedder)["roles"]
    mask = pretrain.compression_mask(roles)[0, 0]
    L = roles.shape[1]
    for name, want in (("masked", mask), ("unmasked", torch.ones(L, L).tril().bool())):
        rows = ["".join("01"[x] for x in row) for row in want.int().tolist()]
        equal(content["story"]["may"][name], rows, name)


def test_the_attention_adds_up_and_is_nowhere_where_the_mask_is(content):
    """Each token's shares make one, in every layer; what is hidden has none."""
    story = content["story"]
    for name, layers in story["attention"].items():
        for layer in layers:
            for i, row in enumerate(layer):
                total = sum(row)
                expect(abs(total - 1000) <= len(row) / 2 + 1, total, 1000, f"{name}, token {i}")
                hidden = [x for j, x in enumerate(row) if story["may"][name][i][j] == "0"]
                equal(sum(hidden), 0, f"{name}, token {i}: looks at what is hidden")
    expect(story["attention"]["masked"] != story["attention"]["unmasked"], "alike", "not", "")


def test_the_attention_is_the_mean_over_all_heads():
    """As the library gives it out, of a model whose heads look to different places."""
    embedder = toy()
    inputs = row_of(embedder)
    L = inputs["roles"].shape[1]
    causal = torch.ones(1, 1, L, L, dtype=torch.bool).tril()
    with torch.no_grad(), eager(embedder.mllm):
        layers = embedder.outputs(inputs, output_attentions=True).attentions
    shown = explain_numbers.attention(embedder, inputs, causal)
    for number, rows in zip(explain_numbers.shown_layers(embedder), shown, strict=True):
        heads = 1000 * layers[number - 1][0]  # (heads, L, L)
        expect((heads[0] - heads.mean(0)).abs().max() > 10, "alike", "different heads", number)
        pairs = zip(rows, heads.mean(0), strict=True)
        apart = [(torch.tensor(x) - y[: len(x)]).abs().max() for x, y in pairs]
        expect(max(apart) < 1, max(apart), "below one thousandth", f"layer {number}")


def test_the_loss_is_the_functions(content, embedder):
    """Of each answer token, and their mean, with and without the mask."""
    inputs, story = row_of(embedder), content["story"]
    for name, compress in (("masked", True), ("unmasked", False)):
        with torch.no_grad():
            logits, labels = pretrain.answer_logits(embedder, inputs, compress)
        mean = pretrain.answer_loss(logits, labels) / len(labels)
        close(story["loss"][name], mean, name, 1e-5)
        nats = [answer[name]["nats"] for answer in story["answers"]]
        close(sum(nats) / len(nats), mean, f"{name}, token by token", 1e-5)
    places = [answer["place"] for answer in story["answers"]]
    want = (inputs["roles"][0] == ANSWER).nonzero()[:, 0].tolist()
    equal(places, want, "answers alone")


def test_a_token_that_only_looks_like_the_right_one_is_not_right():
    """ "red" and " red" are two tokens, and shown alike."""
    tokenizer = SimpleNamespace(decode=lambda ids: ["red", " red", "a", "b", "c"][ids[0]])
    logits = torch.tensor([[1.0, 2, 0, 0, 0], [1, 2, 0, 0, 0]])
    guesses = explain_numbers.guesses_of(tokenizer, logits, torch.tensor([0, 1]))
    equal([guess.best[0][0] for guess in guesses], ["red", "red"], "without its space")
    equal([guess.right for guess in guesses], [False, True], "by their ids")
    for guess, p in zip(guesses, logits.softmax(-1), strict=True):
        close([share for _, share in guess.best[:2]], [p[1], p[0]], "probabilities", 1e-3)


def test_the_cache_is_the_mask(content, embedder):
    """Hidden states to 1e-5, the same loss, and the picture's share of the bytes is gone."""
    story, roles = content["story"], row_of(embedder)["roles"][0]
    cache = story["cache"]
    expect(cache["apart"] < 1e-5, cache["apart"], "< 1e-5", "tests/test_cache.py")
    close(cache["loss"], story["loss"]["masked"], "loss through the cache", 1e-5)
    before = len(cache["norms"][0])
    kept = before - int((roles == CONTENT).sum())
    close(cache["kept"] / cache["whole"], kept / before, "bytes", 1e-9)


def test_the_norms_of_the_cache_are_of_its_keys(content, embedder):
    """Of each layer and token, the mean over heads."""
    inputs, norms = row_of(embedder), content["story"]["cache"]["norms"]
    positions = position_ids(embedder.mllm, inputs, False)[..., 0, : len(norms[0])]
    with torch.no_grad():
        run = mask_as_cache.runner(embedder, inputs)
        _, cache = run(inputs["input_ids"][0, : len(norms[0])], positions, None)
    for (keys, _), got in zip(cache, norms, strict=True):
        heads = keys[0].norm(dim=-1)  # (heads, tokens up to C)
        expect((heads[0] - heads.mean(0)).abs().max() > 0.01, heads, "heads that differ", "keys")
        close(got, heads.mean(0), "their mean", 1e-3)


def test_pairs_without_equal_targets_are_drawn_too():
    """One's own list may have none: there is no false negative to see then, and still a page."""
    pairs = {"a": [Pair(Item(f"q {i}"), (Item(f"t {i}"),)) for i in range(99)]}
    chosen = explain_numbers.drawn(pairs, 0)
    equal(len(chosen), explain_numbers.PAIRS, "explain_numbers.drawn")


def test_the_matrix_is_the_functions(content, embedder):
    """Cosines of the pairs that stage 2 would draw, and info_nce's loss for every size."""
    matrix = content["matrix"]
    chosen = explain_numbers.drawn(read_pairs(), 0)
    queries = [pair.query for _, pair in chosen]
    targets = [pair.targets[0] for _, pair in chosen]
    z = torch.from_numpy(embedder.encode(queries + targets))
    q, t = z[: len(queries)], z[len(queries) :]
    gap = (torch.tensor(matrix["cosines"]) - q @ t.T).abs().max().item()
    expect(gap < 1e-4, gap, "< 1e-4", "five decimals")
    keys = torch.tensor([target.key for target in targets])
    for size, loss in matrix["losses"].items():
        n = int(size)
        want, _ = contrastive.info_nce(q[:n], t[:n], matrix["temperature"], keys=keys[:n])
        close(loss, want, f"{n} pairs", 1e-5)
    first = matrix["keys"][: explain_numbers.BLOCK]
    expect(len(set(first)) < len(first), first, "two that are equal", "a false negative to see")


def test_the_sides_of_the_matrix_are_those_of_its_pairs(content):
    """Queries down, targets across: their words, their pictures, their data set."""
    matrix, chosen = content["matrix"], explain_numbers.drawn(read_pairs(), 0)
    equal(matrix["sets"], [name for name, _ in chosen], "sets")
    for name, items in (
        ("queries", [pair.query for _, pair in chosen]),
        ("targets", [pair.targets[0] for _, pair in chosen]),
    ):
        want = [(item.text.replace(IMAGE, "").strip(), bool(item.images)) for item in items]
        equal([(x["text"], bool(x["picture"])) for x in matrix[name]], want, name)


def test_a_photograph_becomes_a_small_picture_of_its_shape(tmp_path):
    """As large as it is on a disk it would make a page of megabytes."""
    Image.new("RGB", (1000, 500), "red").save(tmp_path / "a.jpg")
    head, _, code = explain_numbers.picture_uri(str(tmp_path / "a.jpg")).partition(",")
    equal(head, "data:image/png;base64", "what a browser takes it for")
    picture = Image.open(io.BytesIO(base64.b64decode(code)))
    equal(picture.size, (64, 32), "explain_numbers.SIDE")
    expect(picture.convert("RGB").getpixel((9, 9))[0] > 250, picture.getpixel((9, 9)), "red", "")


def test_a_token_of_blanks_is_seen():
    """As the space that it is."""
    tokenizer = SimpleNamespace(decode=lambda ids: [" ", " red"][ids[0]])
    equal([explain_numbers.word_of(tokenizer, i) for i in (0, 1)], ["\u2423", "red"], "word_of")


def test_gradcache_is_measured(content):
    """Pass 1 keeps nothing, pass 2 a chunk at a time less than the whole batch; every row once in
    each pass; the sum of chunks is the batch's gradient, that of two half batches is not."""
    passes = content["passes"]
    rows = list(range(2 * passes["pairs"]))
    for name in ("pass 1", "pass 2"):
        stages = [stage for stage in passes["stages"] if stage["name"] == name]
        expect(len(stages) > 1, len(stages), "several chunks", "")
        equal(sorted(row for stage in stages for row in stage["rows"]), rows, name)
        for stage in stages:
            kept = stage["kept"]
            right = kept == 0 if name == "pass 1" else 0 < kept < 0.6 * passes["full"]["kept"]
            expect(right, kept, "0 in pass 1, else less than the whole batch", name)
    expect(passes["apart"] < 1e-5, passes["apart"], "< 1e-5", "the gradient is exact")
    expect(passes["halves"] > 0.05, passes["halves"], "> 0.05", "half the negatives are missing")
    last = passes["stages"][-1]["gradient"]
    close(last, passes["full"]["gradient"], "the norm when all is over", 1e-5)


@torch.no_grad()
def test_each_layer_is_shown_under_its_own_number():
    """Counted from 1; here without the mask, as the model itself says it."""
    embedder = shorten(toy())
    inputs = row_of(embedder)
    L = inputs["roles"].shape[1]
    mask = torch.ones(1, 1, L, L, dtype=torch.bool).tril()
    with explain_numbers.eager(embedder.mllm):
        layers = embedder.outputs(inputs, output_attentions=True).attentions
    equal(explain_numbers.shown_layers(embedder), [1, 2], "both")
    for got, want in zip(explain_numbers.attention(embedder, inputs, mask), layers, strict=True):
        rows = (1000 * want[0].mean(0)).round().int().tolist()
        rows = [row[: i + 1] for i, row in enumerate(rows)]
        away = [
            abs(x - y) for a, b in zip(got, rows, strict=True) for x, y in zip(a, b, strict=True)
        ]
        expect(max(away) <= 1, max(away), "the same thousandths", "explain_numbers.attention")


def test_four_layers_at_most_are_shown_and_the_last_among_them():
    """Of 28 each seventh."""

    def shown(n):
        text = SimpleNamespace(num_hidden_layers=n)
        config = SimpleNamespace(get_text_config=lambda: text)
        return explain_numbers.shown_layers(SimpleNamespace(mllm=SimpleNamespace(config=config)))

    want = [[1], [1, 2, 3, 4], [2, 4, 6], [7, 14, 21, 28]]
    equal([shown(n) for n in (1, 4, 6, 28)], want, "shown_layers")


def test_a_row_that_the_page_cannot_hold_is_refused(embedder, monkeypatch):
    """It shows each token, and the attention from each to each."""
    dialogue = read_dialogues()[0]
    L = len(explain_numbers.story(embedder, dialogue).tokens)
    monkeypatch.setattr(explain_numbers, "LONGEST", L - 1)
    with pytest.raises(InputError, match=f"the first row has {L} tokens, of {L - 1}; lower --max-"):
        explain_numbers.story(embedder, dialogue)


def test_a_turn_that_max_length_has_cost_is_not_shown():
    """The row ends in the first answer."""
    roles = [explain_numbers.QUESTION, explain_numbers.ANSWER, explain_numbers.ANSWER]
    got = explain_numbers.turns_of((("a?", "b"), ("c?", "d")), roles)
    equal(got, [("a?", "b", [1, 2])], "turns_of")


def test_a_picture_s_tokens_have_their_rows_and_columns():
    """Of a wide one more columns, where the family says so; else a square, or none."""
    wide = {"image_grid_thw": torch.tensor([[1, 8, 12]])}  # patches, four of them a token
    equal(explain_numbers.grid_of(wide, 24), (4, 6), "rows, columns")
    equal([explain_numbers.grid_of({}, n) for n in (16, 15)], [(4, 4), (0, 0)], "other families")


def test_two_half_batches_are_as_far_away_as_their_mean_loss(monkeypatch):
    """Each half's queries see its own targets alone; here of four pairs, by hand."""
    embedder, gap = shorten(toy()), explain_numbers.gap
    monkeypatch.setattr(explain_numbers, "BLOCK", 4)
    pairs = read_pairs()["i2t"]
    chosen = [("i2t", pairs[i]) for i in range(4)]
    z = embedder(embedder.collate([p.query for _, p in chosen] + [p.targets[0] for _, p in chosen]))
    parameters = [p for p in embedder.parameters() if p.requires_grad]

    def gradient(loss):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [x for x in found if x is not None]

    def loss(rows):
        return contrastive.paper_info_nce(z[:4][rows], z[4:][rows], 0.1)

    halves = (loss(slice(0, 2)) + loss(slice(2, 4))) / 2
    want = gap(gradient(halves), gradient(loss(slice(0, 4))))
    (dz,) = torch.autograd.grad(loss(slice(0, 4)), z, retain_graph=True)  # (8, D)
    got = explain_numbers.passes(embedder, chosen, 0.1, 200)
    close(got.embeddings, dz.norm(dim=1), "what the loss asks of each embedding", 1e-3)
    close(got.halves, want, "the gap of two half batches", 1e-3)
    expect(got.apart < 1e-3, got.apart, "none", "GradCache")


def test_the_page_runs_the_functions_that_train(embedder, monkeypatch):
    """Negative control: mistakes planted in them are seen in its numbers."""
    two_passes, answer_loss = contrastive.two_passes, pretrain.answer_loss

    def half_of_it(embed, chunks, loss_of):
        return two_passes(embed, chunks, lambda z: loss_of(z) / 2)

    monkeypatch.setattr(contrastive, "two_passes", half_of_it)
    monkeypatch.setattr(pretrain, "answer_loss", lambda x, y: 2 * answer_loss(x, y))
    chosen = explain_numbers.drawn(read_pairs(), 0)
    passes = explain_numbers.passes(embedder, chosen, 0.03, 150)
    expect(abs(passes.apart - 0.5) < 1e-3, passes.apart, 0.5, "the check has its own route")
    losses, answers = explain_numbers.losses_of(embedder, row_of(embedder))
    mean = sum(answer.masked.nats for answer in answers) / len(answers)
    close(losses["masked"], 2 * mean, "the mean is answer_loss's", 1e-4)


def test_each_stage_of_the_page_has_its_own_model(tmp_path, monkeypatch, capsys):
    """What both stages have left; without --model."""
    monkeypatch.chdir(tmp_path)
    both, made = ("out/pretrain", "out/contrastive"), []
    for name in both:
        Path(name).mkdir(parents=True)
        Path(name, "config.json").write_text("{}")
    monkeypatch.setattr(model, "load_for", lambda cfg, device: cfg.model)
    page = "x" * 2048
    monkeypatch.setattr(explain_page, "make_page", lambda models, *_: made.append(models) or page)
    explain.main(["--html", "x.html"])
    equal(made, [(*both, both)], "explain.write_html")
    expect("wrote x.html: 2 KiB" in (said := capsys.readouterr().out), said, "2 KiB", "its size")


def test_the_page_is_of_the_flags_and_stage_2s_adapter_is_folded_in(monkeypatch):
    """The cosines are the model's as it is; what is trained is what stage 2 trains."""
    seen = []

    def note(name, result=None):
        monkeypatch.setattr(explain_page, name, lambda *args: seen.append((name, *args)) or result)

    for name, result in (("story", 1), ("drawn", "pairs"), ("matrix", 2), ("passes", 3)):
        note(name, result)
    note("write_page", "page")
    evaluated = []
    first, second = (
        SimpleNamespace(K=4, eval=partial(evaluated.append, name)) for name in ("first", "second")
    )
    monkeypatch.setattr(model, "merge", lambda embedder: ("merged", embedder))
    monkeypatch.setattr(model, "choose_trained", lambda embedder, _: seen.append(("to", embedder)))
    cfg = explain.Config(seed=3, temperature=0.5, chunk_tokens=77)
    models = explain_page.Models(first, second, ("a", "b"))
    equal(explain_page.make_page(models, "talk", "sets", cfg), "page", "make_page")
    merged = ("merged", second)
    want = [("story", first, "talk"), ("drawn", "sets", 3), ("matrix", second, "pairs", 0.5)]
    want += [("to", merged), ("passes", merged, "pairs", 0.5, 77)]
    equal(seen[:-1], want, "make_page")
    equal(seen[-1][1][::4], (("a", "b"), 3), "Shown: the names, the passes")
    equal(evaluated, ["first", "second"], "without dropout, both of them")
    second.K = 0
    with pytest.raises(InputError, match="--html shows the code C"):
        explain_page.make_page(models, "talk", "sets", cfg)


def test_a_text_that_would_end_the_script_does_not():
    """A picture may be described as anything."""
    shown = explain_page.Shown(("</script>", "<b>"), {}, None, None, None)
    page = explain_page.write_page(shown)
    equal(content_of(page)["models"], ["</script>", "<b>"], "what it says")
    ends = explain_page.TEMPLATE.read_text().count("</script>")
    equal(page.count("</script>"), ends, "the template's own alone")


def test_the_sources_are_the_functions(file):
    """Word for word, as inspect.getsource has them."""
    shown, block = {}, r"<summary><code>(.*?)</code>.*?<pre.*?>(.*?)</pre>"
    for name, code in re.findall(block, file.read_text(), re.DOTALL):
        shown[name.split(": ")[1]] = html.unescape(re.sub(r"</?(b|i|em)>", "", code))
    for function in explain_page.SOURCES:
        equal(shown[function.__name__], inspect.getsource(function), function.__name__)


def test_code_stays_what_it_is_between_its_marks():
    """With what HTML has a meaning for, in strings and comments too; the marks are the page's."""
    code = 'if a<b or b>"</pre>":  # <i> & &lt;\n    pass\n'
    shown = explain_page.marked(code)
    equal(html.unescape(re.sub("</?(b|i|em)>", "", shown)), code, "explain_page.marked")
    equal(
        re.findall("<([^/].*?)>", shown), ["b", "b", "em", "i", "b"], "if, or, a string, a comment"
    )


def test_other_families_are_shown_or_refused(tmp_path):
    """LLaVA-NeXT: its tokens are of tiles, so that none is drawn over the picture. Gemma 3: its own
    masks would be shown wrongly."""
    dialogue = read_dialogues()[0]
    for family in ("llava_next", "gemma3"):
        folder = families.build(family, tmp_path / family)
        other = model.load(folder, 3, "mean", "chat", "cpu").eval()
        if family == "gemma3":
            with pytest.raises(InputError, match="cannot be shown"):
                explain_numbers.story(other, dialogue)
        else:
            story = explain_numbers.story(other, dialogue)
            equal(story.grid, (0, 0), "no place in the picture")
            expect(story.cache.apart < 1e-4, story.cache.apart, "< 1e-4", "the cache")


def test_in_bfloat16_too(tmp_path):
    """As on a GPU, where the eager kernel and the other differ in the third digit."""
    other = model.load(families.build("llava_next", tmp_path), 3, "mean", "chat", "cpu").eval()
    inputs = row_of(other)
    mask = pretrain.compression_mask(inputs["roles"])
    want = torch.tensor(explain_numbers.attention(other, inputs, mask)[0][-1])
    other.mllm.bfloat16()
    other.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    got = torch.tensor(explain_numbers.attention(other, inputs, mask)[0][-1])
    close(got / 1000, want / 1000, "attention of the last token", 0.05)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("pretrain --html x.html", "leave pretrain out"),
        ("--html x.html --no-compress", "the mask on and off"),
        ("--html x.html --model toy-random --compress-tokens 0 --pooling last", "shows the code"),
    ],
)
def test_what_the_page_cannot_show_is_refused(words, says, tmp_path, monkeypatch):
    """And no file is left."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        explain.main(words.split())
    equal(list(tmp_path.iterdir()), [], "a file that says nothing")


# ------------------------------------------------------------------------------------- in a browser

needs_browser = pytest.mark.skipif(
    browser.program() is None, reason="no chromium here: apt-get install -y chromium"
)
WIDTHS = (1280, 400)


@pytest.fixture(scope="module")
def chromium():
    """One browser for all of these tests."""
    with browser.Browser() as page:
        yield page


@pytest.fixture
def page(chromium, file):
    """The page, newly opened; no error may have come when a test is over."""
    chromium.complaints.clear()
    chromium.resize(1280)
    chromium.open(file)
    yield chromium
    equal(chromium.complaints, [], "the browser's console")


def text(page, selector):
    """What an element says."""
    return page.run(f"document.querySelector({selector!r}).textContent")


def data(page, selector):
    """An element's data-... attributes."""
    return page.run(f"({{...document.querySelector({selector!r}).dataset}})")


def choose(page, selector, value):
    """A value for a select or a slider, as a hand would give it."""
    page.run(
        f"(() => {{ const e = document.querySelector({selector!r}); e.value = {value!r};"
        " e.dispatchEvent(new Event('input', {bubbles: true}));"
        " e.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def test_the_page_in_docs_shows_todays_functions():
    """Else it is to be made again: `python -m tools.explain --html docs/explain.html`."""
    page = (ROOT / "docs" / "explain.html").read_text()
    for function in explain_page.SOURCES:
        expect(
            explain_page.source(function) in page, function.__name__, "its source", "make it again"
        )


@needs_browser
@pytest.mark.parametrize("made", ["now", "docs/explain.html"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_legible_and_nothing_stands_out_of_the_window(page, file, width, made):
    """At 1280 and at 400 pixels: no sideways scrolling of the page, no letter below 11 pixels; the
    page in docs/ too."""
    page.resize(width)
    page.open(file if made == "now" else ROOT / made)
    inside = page.run("document.documentElement.scrollWidth")
    expect(inside <= width, inside, width, "something is wider than the window")
    out = page.run(
        "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > "
        "innerWidth + 1 && !e.closest('pre, .wide, .equation, .hide')).map(e => e.className)"
    )
    equal(out, [], "elements that stand out of the window")
    sizes = page.run(
        "[...document.querySelectorAll('body *')].filter(e => e.offsetParent && "
        "[...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => "
        "parseFloat(getComputedStyle(e).fontSize))"
    )
    expect(min(sizes) >= 11 and len(sizes) > 200, min(sizes), ">= 11", "letters")


@needs_browser
def test_the_temperature_recomputes_loss_and_gradient(page, content):
    """For several temperatures, sizes, and with equal targets as negatives: what the page computes
    is contrastive.info_nce's loss, hits and gradient with respect to the cosines, to 1e-9."""
    matrix = content["matrix"]
    cosines = torch.tensor(matrix["cosines"], dtype=torch.float64)
    losses = set()
    for place in (34, 60, 80):
        choose(page, "#temperature", place)
        tau = page.run("nce.tau")
        for size in (8, 64):
            page.click(f"[name=size][value='{size}']")
            for left_out in (True, False):
                if page.run("document.querySelector('#left-out').checked") != left_out:
                    page.click("#left-out")
                q = cosines[:size, :size].clone().requires_grad_()
                keys = torch.tensor(matrix["keys"])[:size] if left_out else None
                # With unit vectors for targets the cosines are the queries.
                t = torch.eye(size, dtype=torch.float64)
                loss, hits = contrastive.info_nce(q, t, tau, keys=keys)
                loss.backward()
                got, hint = data(page, "#nce-loss"), f"tau {tau}, {size} pairs, {left_out}"
                close(float(got["loss"]), loss, hint, 1e-9)
                close(float(got["norm"]), q.grad.norm(), f"gradient, {hint}", 1e-9)
                equal(int(got["hits"]), round(hits.item() * size), hint)
                equal(text(page, "#nce-loss"), f"{loss.item():.4f}", "what it says is what it has")
                losses.add(got["loss"])
    equal(len(losses), 12, "each of them another loss")


@needs_browser
def test_the_page_agrees_with_python_at_the_temperature_of_training(page, content):
    """The number beside it is info_nce's; the button comes back to it."""
    choose(page, "#temperature", 90)
    expect("at τ" in text(page, "#nce-python"), text(page, "#nce-python"), "at τ = ...", "")
    page.click("#tau-back")
    close(page.run("nce.tau"), content["matrix"]["temperature"], "as in training", 1e-12)
    for size in (8, 16, 32, 64):
        page.click(f"[name=size][value='{size}']")
        python = float(text(page, "#nce-python"))
        close(float(text(page, "#nce-loss")), python, f"{size} pairs", 1e-3)
        close(float(text(page, "#nce-chance")), math.log(size), "ln N", 1e-4)


@needs_browser
def test_a_cell_is_chosen_by_mouse_and_by_keys(page, content):
    """What is said is of that cell; a false negative is called so."""
    keys = content["matrix"]["keys"][:8]
    i, j = next((i, j) for i in range(8) for j in range(8) if i != j and keys[i] == keys[j])
    page.run("document.querySelector('#matrix').focus()")
    for _ in range(i):
        page.press("ArrowDown")
    for _ in range(j):
        page.press("ArrowRight")
    equal(page.run("nce.cell"), [i, j], "arrow keys")
    expect("left out" in text(page, "#cell-says"), text(page, "#cell-says"), "left out", "")
    page.click("#left-out")
    expect("a false negative" in text(page, "#cell-says"), text(page, "#cell-says"), "", "")
    cosine = f"cosine {content['matrix']['cosines'][i][j]:.3f}"
    expect(cosine in text(page, "#cell-says"), text(page, "#cell-says"), cosine, "")
    page.click("#matrix")  # its middle
    equal(page.run("nce.cell"), [4, 4], "the mouse")
    equal(page.run("document.querySelectorAll('#row-bars rect').length"), 8, "a bar a target")


@needs_browser
def test_another_view_is_another_drawing(page):
    """Cosine, softmax, gradient: three pictures, by mouse and by the keys of a radio button."""
    drawn = []
    for value in ("cosine", "softmax", "gradient"):
        page.click(f"[name=view][value={value}]")
        equal(page.run("nce.view"), value, "the chosen one")
        drawn.append(page.run("document.querySelector('#matrix').toDataURL()"))
    equal(len(set(drawn)), 3, "three drawings")
    page.press("ArrowLeft")
    equal(page.run("nce.view"), "softmax", "arrow keys within the three")


@needs_browser
def test_the_mask_is_switched(page, content):
    """On: an answer looks at nothing of the picture, and it is called hidden; off: it does."""
    story = content["story"]
    i = story["turns"][0][2][0]
    equal(page.run("seen.token"), i, "the first answer's first token is chosen")
    for mask, checked, key in (
        ("masked", "true", None),
        ("unmasked", "false", "click"),
        ("masked", "true", " "),
    ):
        if key == "click":
            page.click("#mask-switch")
        elif key:
            page.run("document.querySelector('#mask-switch').focus()")
            page.press(key)
        switch = page.run("document.querySelector('#mask-switch').getAttribute('aria-checked')")
        equal(switch, checked, "the switch")
        allowed = story["may"][mask][i].count("1")
        said = data(page, "#mask-says")
        equal([int(said["allowed"]), int(said["hidden"])], [allowed, i + 1 - allowed], mask)
        crossed = page.run("document.querySelectorAll('.token.hidden').length")
        equal(crossed, i + 1 - allowed, "tokens that are crossed out")
        share = float(data(page, "#looks [data-role=picture]")["share"])
        expect((share > 0.001) == (mask == "unmasked"), share, mask, "its look at the picture")
        covered = page.run("document.querySelector('#over').classList.contains('hidden')")
        equal(covered, mask == "masked", "the picture is greyed")


@needs_browser
def test_tokens_are_chosen_by_mouse_and_by_keys_and_layers_too(page, content):
    """The shares are those of that token in that layer."""
    story = content["story"]
    page.click("[data-token='22']")
    equal(page.run("seen.token"), 22, "the mouse")
    page.press("ArrowRight")
    page.press("ArrowRight")
    page.press("ArrowUp")
    equal(page.run("seen.token"), 23, "arrow keys")
    equal(page.run("document.activeElement.dataset.token"), "23", "the focus goes with them")
    equal(page.run("document.querySelectorAll('[aria-selected=true]').length"), 1, "one chosen")
    for layer in range(len(story["layers"])):
        choose(page, "#layer", layer)
        row = story["attention"]["masked"][layer][23]
        want = sum(x for j, x in enumerate(row) if story["tokens"][j]["role"] == "picture") / 1000
        got = float(data(page, "#looks [data-role=picture]")["share"])
        close(got, want, f"layer {layer}", 1e-9)


@needs_browser
def test_the_cache_loses_the_picture_and_keeps_the_loss(page, content):
    """Three steps, each in its button's words."""
    cache = content["story"]["cache"]
    layers, before = len(cache["norms"]), len(cache["norms"][0])
    roles = [token["role"] for token in content["story"]["tokens"]]
    picture = layers * roles[:before].count("picture")
    later = layers * (len(roles) - before)
    for step, gone, late in ((0, 0, later), (1, picture, later), (2, picture, 0), (0, 0, later)):
        page.click(f"[data-cache='{step}']")
        equal(page.run("document.querySelectorAll('.cell.gone').length"), gone, f"step {step}")
        equal(page.run("document.querySelectorAll('.cell.late').length"), late, f"step {step}")
        stored = cache["kept"] if step else cache["whole"]
        facts = text(page, "#cache-facts")
        expect(f"{stored / 1024:.1f} KiB" in facts, facts, f"{stored / 1024:.1f} KiB", "bytes")
        expect((f"{cache['loss']:.5f}" in facts) == (step == 2), facts, cache["loss"], "the loss")


@needs_browser
def test_gradcache_goes_step_by_step(page, content):
    """On, back, and by the slider; memory and gradient of each step; the comparison at the end."""
    passes = content["passes"]
    stages = passes["stages"]
    expect(page.run("document.querySelector('#step-back').disabled"), "not", "disabled", "step 0")
    for n, stage in enumerate(stages):
        equal(page.run("step"), n, "the step")
        kind = text(page, "#step-name")
        want = "loss" if stage["name"] == "between" else stage["name"]
        expect(kind.startswith(want), kind, want, "what is going on")
        done = sum(len(s["rows"]) for s in stages[: n + 1] if s["name"] == "pass 2")
        equal(page.run("document.querySelectorAll('#rows .done').length"), done, "rows done")
        expect(f"{stage['gradient']:.4f}" in text(page, "#step-facts"), n, stage["gradient"], "")
        page.click("#step-on")
    expect(page.run("document.querySelector('#step-on').disabled"), "not", "disabled", "the end")
    exponent = page.run(f"({passes['apart']}).toExponential(1)")
    expect(exponent in text(page, "#step-says"), text(page, "#step-says"), exponent, "the end")
    page.click("#step-back")
    equal(page.run("step"), len(stages) - 1, "back")
    choose(page, "#step", 1)
    equal(page.run("step"), 1, "the slider")
    bars = text(page, "#memory")
    for stage in [*stages, passes["full"]]:
        expect(f"{stage['kept'] / 2**20:.2f}" in bars, bars, stage["kept"], "measured memory")


@needs_browser
def test_each_answer_token_is_in_the_table(page, content):
    """With both losses; the verdict is the argmax's."""
    nats = page.run("[...document.querySelectorAll('#answers td')].map(e => +e.dataset.nats)")
    want = []
    for answer in content["story"]["answers"]:
        want += [answer["masked"]["nats"], answer["unmasked"]["nats"]]
    equal(nats, want, "token by token")
    marks = page.run("[...document.querySelectorAll('#answers td em')].map(e => e.className)")
    want = []
    for answer in content["story"]["answers"]:
        want += [["wrong", "right"][answer[name]["right"]] for name in ("masked", "unmasked")]
    equal(marks, want, "by ids, not by words")
    said = data(page, "#loss-says")
    close(float(said["masked"]), content["story"]["loss"]["masked"], "the mean", 1e-9)


@needs_browser
def test_keyboard_and_screen_reader_have_all_of_it(page):
    """Every control has a name and is reached by Tab; pictures have words; one main, five parts."""
    nodes = page.ask("Accessibility.getFullAXTree")["nodes"]
    kinds = ("button", "slider", "radio", "checkbox", "combobox", "option", "switch", "img",
             "image", "listbox", "region", "application", "link")  # fmt: skip
    found = {}
    for node in nodes:
        role, name = (node.get(key, {}).get("value", "") for key in ("role", "name"))
        if role in kinds and not node["ignored"]:
            found.setdefault(role, []).append(name)
    for role, names in found.items():
        expect(all(names), names, "a name for each", role)
    for role, least in {"slider": 2, "radio": 7, "switch": 1, "region": 5, "option": 66}.items():
        expect(len(found.get(role, [])) >= least, found.get(role), f"{least} or more", role)
    page.run("document.body.focus()")
    reached = set()
    for _ in range(60):
        page.press("Tab")
        reached.add(page.run("document.activeElement.id || document.activeElement.name || "
                             "document.activeElement.dataset.cache"))  # fmt: skip
    wanted = {"mask-switch", "layer", "temperature", "tau-back", "size", "view", "left-out"}
    wanted |= {"matrix", "step", "step-on", "0", "1", "2"}
    equal(wanted - reached, set(), "not reached by Tab")


@needs_browser
def test_who_wants_no_motion_gets_none(page):
    """prefers-reduced-motion: nothing slides or fades."""
    moving = "getComputedStyle(document.querySelector('.keys .cell')).transitionDuration"
    expect("0.7s" in page.run(moving), page.run(moving), "0.7s", "else this test is blind")
    feature = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.ask("Emulation.setEmulatedMedia", features=feature)
    equal(page.run(moving), "0s", "no motion")
    page.ask("Emulation.setEmulatedMedia", features=[])


@needs_browser
def test_the_browser_would_say_what_is_wrong(chromium, tmp_path):
    """Negative control: an error in a script, on the console, and a request over the network."""
    faults = ("throw new Error('a')", "console.error('b')", "fetch('https://example.org/c')")
    for word, fault in zip("abc", faults, strict=True):
        chromium.complaints.clear()
        (tmp_path / "x.html").write_text(f"<script>{fault}</script>")
        chromium.open(tmp_path / "x.html")
        chromium.run("1")
        found = any(word in complaint for complaint in chromium.complaints)
        expect(found, chromium.complaints, word, "what is noted of the browser")
