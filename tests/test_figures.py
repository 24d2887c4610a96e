"""tools.figures: each is drawn, light and not blank; the numbers behind them have oracles."""

import hashlib
import json
import math
import random
import shutil
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checks import close, equal, expect, toy
from matplotlib.figure import Figure
from PIL import Image

import evaluate
import model
from data import Item, read_tasks
from plumbing.errors import InputError
from plumbing.formats import IMAGE
from tools import drawings, figures, overview, records
from tools import figure_numbers as numbers
from toy.world import Scene, Shapes

NAMES = ["mask", "curves", "arms", "k", "pca", "tokens", "looks", "code", "gallery"]


@pytest.fixture
def few(monkeypatch):
    """Figures of a few pictures, pairs, questions and queries."""
    for name, n in dict(PICTURES=4, PAIRS=8, QUESTIONS=3, QUERIES=1).items():
        monkeypatch.setattr(drawings, name, n)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders as the stages leave them, of random models, and records as of bench/reproduce.py."""
    top = tmp_path_factory.mktemp("runs")
    logs = dict(pretrain=dict(loss=1.0, exact=0.5), contrastive=dict(loss=2.0, top1=0.3, chance=4))
    for name, logged in logs.items():
        model.save(toy(), top / name)
        lines = [dict(config={}), *(dict(step=i + 1, **logged) for i in range(12))]
        (top / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    score, first = random.Random(0).random, dict(none=None, coma="", plain="--no-compress")
    studies = {name: {arm: (first[arm], f"{n}") for arm in first}
               for name, n in (("arms", 0), ("pairs-200", 200))}  # fmt: skip
    studies["K"] = {f"K={K}": (f"--K {K}", "0") for K in (1, 4)}
    rows = [dict(first=f, second=n, seed=i, pairs=int(n), K=int((f or "4")[-1:].replace("s", "4")),
                 steps=[5, 10], curve=[score(), score()], ind=score(), ood=score(), overall=score())
            for arms in studies.values() for f, n in arms.values() for i in range(2)]  # fmt: skip
    (top / "records.json").write_text(json.dumps(dict(studies=studies, runs=rows)))
    return top


def test_every_figure_is_drawn_light_and_not_blank(runs, few, tmp_path, monkeypatch):
    """Nine files of at most 900 pixels and 120 KB, with ink on them; a second time the same."""
    files = figures.draw(tmp_path, runs / "contrastive", records_file=runs / "records.json")
    equal([p.stem for p in files], NAMES, "drawings.FIGURES; was one left out?")
    for path in files:
        pixels = np.asarray(Image.open(path).convert("L"))
        expect(pixels.shape[1] <= 900, pixels.shape, "<= 900 wide", path.name)
        expect(path.stat().st_size < 120_000, path.stat().st_size, "< 120 KB", path.name)
        ink = (pixels < 200).mean()
        expect(0.01 < ink < 0.9, f"{ink:.3f} dark", "0.01 to 0.9", path.name)
    twice = ("pca", "looks")
    monkeypatch.setattr(drawings, "FIGURES", {k: drawings.FIGURES[k] for k in twice})
    before = [p.read_bytes() for p in files if p.stem in twice]
    again = figures.draw(tmp_path, runs / "contrastive", records_file=runs / "records.json")
    equal([p.read_bytes() for p in again], before, "no dates, no unseeded draws")


def test_the_drawings_of_the_readme_s_head_are_light_and_have_no_model(tmp_path, monkeypatch):
    """overview.png and example.png: sharp on a dense screen, light, not blank, twice the same."""
    monkeypatch.setattr(model, "load", None)
    files = overview.draw(tmp_path)
    equal([p.name for p in files], ["overview.png", "example.png"], "what the README shows")
    before = [p.read_bytes() for p in files]
    for path in files:
        pixels = np.asarray(Image.open(path).convert("L"))
        equal(pixels.shape[1], 1600, f"{path.name}: pixels, twice a page's width")
        expect(path.stat().st_size < 120_000, path.stat().st_size, "< 120 KB", path.name)
        ink = (pixels < 200).mean()
        expect(0.03 < ink < 0.5, f"{ink:.3f} dark", "0.03 to 0.5", path.name)
    equal([p.read_bytes() for p in overview.draw(tmp_path)], before, "no dates")


def noted(monkeypatch, name) -> list:
    """The calls of one of the overview's functions, which draws all the same."""
    calls, function = [], getattr(overview, name)
    monkeypatch.setattr(
        overview, name, lambda *x, **style: calls.append((*x[1:], style)) or function(*x, **style)
    )
    return calls


def test_the_example_s_right_answers_are_its_green_ones(monkeypatch):
    """Question, caption and crop: each the one right answer of its kind."""
    said, framed = noted(monkeypatch, "words"), noted(monkeypatch, "frame")
    shown = noted(monkeypatch, "picture")
    overview.example()
    (_, (scene,)), candidates = Shapes("test").query("ground", 2)
    right = candidates[0][1][0]
    green = [tuple(x[:2]) for *x, color, _, _ in framed if color == drawings.GREEN]
    crops = {(x, y): crop for crop, x, y, *_ in shown[1:]}
    equal([crops[place] for place in green], [right], "one frame, around the right crop")
    equal((shown[0][0], len(crops)), (scene, 7), "the picture, and seven candidates")
    texts = [" ".join(x[2].split()) for x in said if x[-1].get("color") == drawings.GREEN]
    (subject,) = right.objects
    equal(texts, [subject.color, scene.describe()], "answer and caption")
    asked = [x[2] for x in said if f"color of the {subject.shape}" in x[2]]
    equal(len(asked), 1, f"what is answered with its color: {said}")


def test_the_overview_names_what_it_draws(monkeypatch):
    """C_1 to C_K; each answer behind its own question; the query's vector q, the target's t."""
    said, codes = noted(monkeypatch, "words"), noted(monkeypatch, "code")
    overview.overview()
    names = [text for *_, text, style in said if text.startswith("$C")]
    equal(names, [f"$C_{k}$" for k in (1, 2, 3, 4)] * 3, "compressed, query, target")
    equal(len(codes), 3, "as many codes")
    (_, (scene,)), turns, _ = Shapes().dialogue(0)
    at = {text: y for x, y, text, _ in said}
    for question, answer in (turns[2], turns[4]):
        equal(at[question], at[answer], f"{question} {answer}")
    heights = {text: [y for _, y, x, _ in said if x == text][0] for text in ("$q$", "$t$")}
    caption = next(y for _, y, x, _ in said if " ".join(x.split()) == scene.describe())
    equal(heights["$t$"], caption, "the target's, behind the caption")
    expect(heights["$q$"] > heights["$t$"], heights, "the query above", "draw_match")


def test_the_mask_is_drawn_with_each_region_s_name(monkeypatch):
    """Blue where a row attends, yellow what is hidden, white the future; turns count from 1."""
    (ax,) = drawings.mask(None).axes
    above = sorted((x.get_position()[0], x.get_text()) for x in ax.texts if x.get_position()[1] < 0)
    names = ["head", "picture", "C", "Q$_1$", "A$_1$", "Q$_2$", "A$_2$"]
    equal([name for _, name in above], names, "name_regions")
    pixels, places = ax.images[0].get_array(), {name: round(x) for x, name in above}

    def color(row, column):
        red, _, blue = pixels[places[row], places[column]]
        return "white" if red == blue == 1 else "yellow" if red > blue else "blue"

    equal(color("A$_1$", "C"), "blue", "may attend")
    equal(color("A$_1$", "picture"), "yellow", "hidden")
    equal(color("C", "picture"), "blue", "what C is for")
    equal(color("picture", "C"), "white", "the future")


def test_the_flags_reach_the_figures(monkeypatch, tmp_path):
    """The model that is named, and the seed of the scenes."""
    made = []
    monkeypatch.setattr(figures, "Sources", lambda *args: made.append(args))
    monkeypatch.setattr(drawings, "FIGURES", {})
    monkeypatch.setattr(overview, "FIGURES", {})
    figures.main([str(tmp_path), "--model", "there", "--seed", "3"])
    ((folder, seed, device, file),) = made
    equal((folder, seed, file), ("there", 3, records.RECORDS), "figures.draw")
    equal(str(device), "cpu", "setup's")


def test_a_missing_model_or_record_costs_its_figures_and_is_named(runs, few, tmp_path, capsys):
    """Without stage 1 and records: what needs neither is drawn, and a line says how to make it."""
    shutil.copytree(runs / "contrastive", tmp_path / "contrastive")
    nowhere = tmp_path / "none.json"
    files = figures.draw(tmp_path / "f", tmp_path / "contrastive", records_file=nowhere)
    equal([p.stem for p in files], ["mask", "gallery"], "what needs no stage 1")
    said = capsys.readouterr().out
    for name in set(NAMES) - {"mask", "gallery"}:
        expect(f"left out {tmp_path / 'f' / name}.png: " in said, said, name, "one line each")
    for hint in (f"`python pretrain.py --out {tmp_path / 'pretrain'}`", "tests/bench/reproduce.py"):
        expect(hint in said, said, hint, "the command that makes it")


def test_damaged_records_name_record_and_field(tmp_path):
    """A record without its curve is no figure."""
    (tmp_path / "r.json").write_text('{"studies": {}, "runs": [{"first": "", "second": ""}]}')
    with pytest.raises(InputError, match=r"r.json: run 0 lacks K, curve"):
        records.read_records(tmp_path / "r.json")


def test_one_compression_token_has_no_cosines(runs, tmp_path):
    """K = 1 is an embedder, but two tokens are needed to compare."""
    model.save(model.load("toy-random", 1, device="cpu"), tmp_path / "contrastive")
    sources = figures.Sources(tmp_path / "contrastive", 0, "cpu")
    with pytest.raises(InputError, match="K = 1"):
        sources.coded("contrastive")


def test_the_figures_share_one_model_that_drops_nothing_out():
    """Loaded once; as a model trains, two figures of it would not be of the same numbers."""
    sources = figures.Sources("nowhere", 0, "cpu")
    base = sources.model("base")
    expect(sources.model("base") is base, "another", "the same", "Sources.loaded")
    expect(not base.training, "as it trains", "eval", "Sources.model")


def test_a_log_without_steps_costs_its_figure(runs, tmp_path):
    """`--steps 0` saves a model, and a log that holds its flags alone."""
    shutil.copytree(runs / "contrastive", tmp_path / "contrastive")
    (tmp_path / "contrastive" / "log.jsonl").write_text('{"config": {}}\n')
    sources = figures.Sources(tmp_path / "contrastive", 0, "cpu")
    with pytest.raises(InputError, match="log.jsonl has no steps"):
        sources.log("contrastive")


@pytest.mark.parametrize("line", [b'{"step": 2, "lo', b"\xff", b"\0\0\0"])
def test_a_log_that_is_damaged_costs_its_figure(tmp_path, line):
    """It was a traceback, and no figure that comes behind it was drawn."""
    (tmp_path / "nanocoma.json").write_text("{}")
    (tmp_path / "log.jsonl").write_bytes(b'{"config": {}}\n{"step": 1}\n' + line + b"\n")
    with pytest.raises(InputError, match="log.jsonl is damaged: .*take the bad lines out"):
        figures.Sources(tmp_path).log("contrastive")


def test_a_log_that_is_not_there_costs_its_figure_and_no_other(tmp_path):
    """A model that was copied without it: `draw` leaves out what is an InputError."""
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "nanocoma.json").write_text("{}")
    sources = figures.Sources(tmp_path / "contrastive", 0, "cpu")
    with pytest.raises(InputError, match="log.jsonl is missing: training writes it"):
        sources.log("compressed")


def test_tokens_of_tiles_have_no_place_in_the_picture():
    """LLaVA-NeXT's: dots would stand anywhere."""
    with pytest.raises(InputError, match="12 image tokens are no square"):
        drawings.draw_dots(None, np.ones(12))


def test_a_folder_in_the_place_of_a_drawing_is_named(tmp_path):
    """As with all other files that are written."""
    (tmp_path / "overview.png").mkdir()
    with pytest.raises(InputError, match="the figure .*overview.png"):
        overview.draw(tmp_path)


def test_without_matplotlib_the_command_says_what_to_install(monkeypatch, tmp_path):
    """One clear line, before anything is loaded or written."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="tools.figures needs matplotlib: pip install matplotlib"):
        figures.main([str(tmp_path / "nowhere")])
    assert not (tmp_path / "nowhere").exists()


def test_pca_is_the_covariance_matrix_s_eigenvectors():
    """Coordinates, shares of the variance, and rows that stay where they were."""
    x = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1, 0.5, 0.1]
    flat, share = numbers.pca(x)
    values, axes = np.linalg.eigh(np.cov(x.T))  # ascending
    want = (x - x.mean(0)) @ axes[:, [5, 4]]
    close(np.abs(flat), np.abs(want), "up to each axis' sign", 1e-9)
    close(share, values[[5, 4]] / values.sum(), "shares of all variance", 1e-9)
    order = np.random.default_rng(1).permutation(40)
    close(numbers.pca(x[order])[0], flat[order], "row i of the result is row i of x", 1e-9)


def test_pair_cosines_compare_within_a_task_only():
    """Against loops; a caption that equals the query is no rival of a picture."""
    z = np.random.default_rng(0).normal(size=(2, 6, 4))
    q, t = z / np.linalg.norm(z, axis=-1, keepdims=True)
    tasks = np.array(["a"] * 3 + ["b"] * 3)
    t[4], t[0] = q[0], 0.9 * q[0]  # t[4] is nearer, but of the other task
    t[1] = q[1]
    pairs = [(i, j) for i in range(6) for j in range(6) if tasks[i] == tasks[j]]
    own, others, nearest = numbers.pair_cosines(q, t, tasks)
    close(own, np.mean([q[i] @ t[i] for i in range(6)]), "own targets", 1e-9)
    close(others, np.mean([q[i] @ t[j] for i, j in pairs if i != j]), "others of the task", 1e-9)
    best = [max((q[i] @ t[j], j) for a, j in pairs if a == i)[1] for i in range(6)]
    equal(nearest, sum(b == i for i, b in enumerate(best)), "argmax over the task's targets")


def test_a_query_looks_for_its_target_and_no_target_for_its_query():
    """Target 0 is the nearest of both queries, and query 0 of target 0 alone."""
    q = np.array([[1.0, 0.0], [0.8, 0.6]])
    t = np.array([[0.9, 0.1], [0.1, 0.2]])  # query 1's own is its second; of target 1 it is first
    same = np.array(["a", "a"])
    equal((q @ t.T).argmax(1).tolist(), [0, 0], "of each query the nearest target")
    equal((q @ t.T).argmax(0).tolist(), [0, 1], "of each target the nearest query")
    equal(numbers.pair_cosines(q, t, same).nearest, 1, "pair_cosines: query 0 alone")


def test_attention_is_that_of_the_embedding(shared):
    """Rows sum to 1, nothing looks ahead, eager and sdpa embed alike, and sdpa is back after."""
    scenes = figures.Sources("nowhere").scenes(3)
    equal(scenes[1], Shapes("test").dialogue(1)[0][1][0], "test scenes")
    h, attention, image = numbers.look(shared, scenes)
    equal(shared.mllm.config._attn_implementation, "sdpa", "the kernel is put back")
    layers, L = shared.mllm.config.text_config.num_hidden_layers, len(image)
    equal(tuple(attention.shape), (layers, 3, 4, L), "(layers, n, K, L)")
    equal(int(image.sum()), 16, "4 x 4 image tokens")
    close(attention.sum(-1), torch.ones(layers, 3, 4), "a row of a softmax", 1e-5)
    ahead = torch.stack([attention[:, :, k, L - 3 + k :].sum() for k in range(3)])
    equal(float(ahead.abs().max()), 0.0, "C_k sees C_1 ... C_k only")
    z = torch.nn.functional.normalize(h.mean(1), dim=-1)
    close(z, shared.encode([Item(IMAGE, (s,)) for s in scenes]), "the embedding under sdpa", 1e-4)


def test_image_token_i_is_patch_i_in_reading_order(shared):
    """A white square in one cell of a 4 x 4 grid changes the pixels of that image token alone."""
    black = Image.new("RGB", (64, 64))
    for row, column in ((0, 0), (0, 3), (2, 1), (3, 3)):
        picture = black.copy()
        picture.paste("white", (16 * column, 16 * row, 16 * column + 16, 16 * row + 16))
        rows = [shared.collate.row(Item(IMAGE, (x,))).images for x in (black, picture)]
        differ = (rows[0]["pixel_values"] != rows[1]["pixel_values"]).any(1)  # 4 patches a token
        equal(differ.reshape(16, 4).any(1).nonzero().flatten().tolist(), [4 * row + column],
              "looks() draws token i at divmod(i, 4)")  # fmt: skip


def test_token_cosines_are_means_over_pictures():
    """Against loops; 1 on the diagonal."""
    h = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    got = numbers.token_cosines(h)
    for i, j in product(range(4), repeat=2):
        want = np.mean([torch.cosine_similarity(x[i], x[j], dim=0) for x in h])
        close(got[i, j], want, f"C{i + 1}, C{j + 1}", 1e-5)


def written(embedder, scene, question):
    """What greedy decoding writes, a token at a time, up to the end of the turn."""
    tokenizer, ids = embedder.processor.tokenizer, []
    row = embedder.collate.row(Item(IMAGE, (scene,)), ((question, ""),))
    columns = {k: v[:-1] for k, v in row.tokens.items()}  # without the end of the turn
    while len(ids) < 60 and ids[-1:] != embedder.collate.template.end_ids:
        inputs = embedder.collate.pad_rows([row._replace(tokens=columns)])
        with torch.no_grad():
            ids.append(int(embedder.logits(embedder.hidden(inputs)[0, -1]).argmax()))
        for k, v in columns.items():
            last = dict(input_ids=ids[-1], roles=int(v[-1])).get(k, 0)
            columns[k] = torch.cat([v, v.new_tensor([last])])
    return tokenizer.decode(ids[:-1])


def test_answered_agrees_with_decoding_token_by_token():
    """Questions of each type, some with an answer that is not the picture's."""
    embedder = model.load("toy", 0, "last", device="cpu").eval()
    asked = [x for rows in numbers.questions(2).values() for x in rows]
    asked += [(s, q, "two") for s, q, _ in asked[:4]]
    hits = [written(embedder, s, q) == a for s, q, a in asked]
    expect(0 < sum(hits) < len(hits), sum(hits), "some right, some wrong", "the toy's weights")
    close(numbers.answered(embedder, asked), np.mean(hits), "exact_answers, batched", 1e-9)


def test_from_an_untrained_code_less_is_answered():
    """Negative control: were the mask off, the base model's untrained C would cost it little."""
    base = model.load("toy", 0, "last", device="cpu").eval()
    coded = model.load("toy", 4, device="cpu").eval()
    asked = numbers.questions(30)["color"]
    right = [numbers.answered(e, asked) for e in (base, coded)]
    expect(right[0] > 0.9 and right[1] < 0.5, right, "> 0.9, < 0.5", "C knows nothing yet")


def test_questions_are_of_their_type_and_the_constant_answer_is_the_mode():
    """n of each type, the same ones each time; a constant answer is right for its share."""
    asked = numbers.questions(20)
    equal([len(x) for x in asked.values()], [20] * 8, "n of each")
    equal(asked, numbers.questions(20), "seeded")
    expect({a for *_, a in asked["size"]} == {"small", "large"}, asked["size"], "sizes", "kinds")
    counts = [sum(a == b for *_, b in asked["size"]) for a in ("small", "large")]
    equal(numbers.most_frequent(asked["size"]), max(counts) / 20, "the mode's share")


def test_figures_are_of_scenes_that_training_never_shows_and_of_the_seed():
    """Questions and gallery: a picture that was learned by heart would be answered."""
    for seed in (0, 3):
        for scene, *_ in numbers.questions(5, seed)["count"]:
            digest = hashlib.blake2b(scene.describe().encode(), digest_size=1).digest()[0]
            equal(digest % 8, 0, f"held out of training, {scene.describe()}")
    expect(numbers.questions(5) != numbers.questions(5, 3), "the same", "others", "--seed")
    (task,) = read_tasks(subsets="classify", limit=2, seed=3)
    shown = [row.query for row in numbers.ranked(toy(), "classify", 2, seed=3)]
    equal(shown, [query for query, _ in task.queries], "--seed")


def test_the_gallery_s_hits_are_the_table_s():
    """ranked() and evaluate.score: the same queries, the same Precision@1."""
    embedder = model.load("toy", 4, device="cpu")
    hits = [row.hit for row in numbers.ranked(embedder, "classify", 6)]
    (task,) = read_tasks(limit=6, subsets="classify")
    want = evaluate.score(embedder, task, evaluate.Config(workers=0))["p_at_1"]
    close(np.mean(hits), want, "candidate 0 is right, ties are no hits", 1e-9)


def test_means_errors_and_smoothing_have_known_values():
    """1, 2, 3: mean 2, standard error 1 / sqrt 3; one seed has no error; a constant stays."""
    close(records.mean_error((1, 2, 3)), (2, 1 / math.sqrt(3)), "ddof = 1", 1e-12)
    mean, error = records.mean_error([0.5])
    expect(mean == 0.5 and math.isnan(error), (mean, error), "0.5, NaN", "no error of one seed")
    close(numbers.smooth(np.full(20, 3.0)), np.full(20, 3.0), "fewer steps at the ends", 1e-12)
    close(numbers.smooth(np.full(4, 3.0)), np.full(4, 3.0), "a run of four steps has four", 1e-12)
    close(numbers.smooth(np.arange(30.0))[4:-4], np.arange(4, 26), "centred", 1e-12)


# ------------------------------------------------------------------------- what stands in a drawing


def axes():
    """Empty ones."""
    return drawings.Figure().subplots()


def test_a_dot_stands_on_its_patch():
    """Of 4 x 4 the second of the first row."""
    ax, weights = axes(), np.zeros(16)
    weights[1] = 0.5
    drawings.draw_dots(ax, weights)
    (dots,) = ax.collections
    equal(dots.get_offsets()[dots.get_sizes() > 0].tolist(), [[23.5, 7.5]], "x, y")


def test_an_error_bar_is_a_standard_error_in_percent():
    """Of 10 and 30 percent: 20 +- 10."""
    ax = axes()
    drawings.error_bars(ax, [7], [(0.1, 0.3)], 0, "an arm")
    line, _, (bars,) = ax.containers[0]
    equal(line.get_xydata().round(6).tolist(), [[7, 20]], "the mean")
    equal(bars.get_segments()[0].round(6).tolist(), [[7, 10], [7, 30]], "its error")


def test_as_many_arms_as_have_names_are_as_many_kinds_of_line():
    """There are more of them than colours."""
    ax = axes()
    for i, label in enumerate(records.NAMES.values()):
        drawings.error_bars(ax, [7], [(0.1, 0.3)], i, label)
    kinds = {(bars[0].get_color(), bars[0].get_marker()) for bars in ax.containers}
    equal(len(kinds), len(records.NAMES), "drawings.error_bars")


def test_the_arms_are_compared_in_distribution_to_the_end(monkeypatch):
    """As the axis says; where an arm was not run there is no point."""
    drawn = []
    monkeypatch.setattr(drawings, "error_bars", lambda ax, x, scores, *_: drawn.append((x, scores)))
    runs = [{"ind": 0.1, "ood": 0.5, "overall": 0.9}]
    drawings.arms_over_pairs(axes(), [{"coma": runs}, {}, {"coma": runs}])
    equal(drawn, [([0, 2], [[0.1], [0.1]])], "arms_over_pairs")


def test_losses_are_drawn_in_nats_and_shares_in_percent():
    """Of both stages."""
    log = [{"step": i, "loss": 2.0, "exact": 0.5, "top1": 0.25, "chance": 4.0} for i in (1, 2, 3)]
    fig = drawings.curves(SimpleNamespace(log=lambda name: log))
    levels = [ax.lines[0].get_ydata().tolist() for ax in fig.axes[:4]]
    equal(levels, [[2.0] * 3, [50.0] * 3, [2.0] * 3, [25.0] * 3], "curves")
    chance = [x.get_label() for x in fig.axes[2].lines if "no information" in x.get_label()]
    equal(chance, ["ln 55 = 4.00: no information"], "of so many targets")


def test_captions_are_called_captions():
    """Here they are all alike: one point, and the pictures are not."""
    noise = np.random.default_rng(0)

    def encode(items):
        return np.stack([noise.standard_normal(8) if x.images else np.ones(8) for x in items])

    sources = SimpleNamespace(model=lambda name: SimpleNamespace(encode=encode), seed=0)
    dots = drawings.pairs_in_plane(sources).axes[0].collections
    spread = {x.get_label(): np.ptp(x.get_offsets(), 0).max() for x in dots}
    expect(spread["caption"] < 1e-6 < spread["picture"], spread, "captions in one point", "is_text")


def test_two_different_tokens_are_not_compared_with_themselves(monkeypatch):
    """The diagonal is 1, whatever the model does."""
    monkeypatch.setattr(drawings, "look", lambda *_: SimpleNamespace(h=None))
    monkeypatch.setattr(drawings, "token_cosines", lambda h: np.array([[1, 0.2], [0.2, 1]]))
    sources = SimpleNamespace(coded=lambda name: SimpleNamespace(K=2), scenes=lambda n: [])
    titles = [ax.get_title() for ax in drawings.tokens(sources).axes[:2]]
    equal(titles, [f"{x}: two different tokens 0.20" for x in drawings.MODELS], "tokens")


def test_the_layer_that_is_shown_is_the_one_that_looks_at_the_picture_most(monkeypatch):
    """Here the second of three: 4 x 15 percent."""
    attention = torch.full((3, 4, 1, 6), 0.05)  # (layers, n, K, L)
    attention[1, :, :, :4] = 0.15
    seen = numbers.Look(None, attention, torch.tensor([True] * 4 + [False] * 2))
    monkeypatch.setattr(drawings, "look", lambda *_: seen)
    sources = SimpleNamespace(scenes=lambda n: [Scene(())] * 4)
    sources.coded = sources.model = lambda name: SimpleNamespace(K=1)
    titles = [part.get_suptitle() for part in drawings.looks(sources).subfigs[1:]]
    equal(titles, [f"{x}: layer 2 of 3, 60% on the picture" for x in drawings.MODELS], "looks")


def test_what_is_answered_from_the_code_is_called_so(monkeypatch):
    """Beside the uncompressed model."""
    asked = {"count": [(0, "q", "a"), (0, "q", "b")]}
    monkeypatch.setattr(drawings, "questions", lambda n, seed: asked)
    monkeypatch.setattr(drawings, "answered", lambda embedder, rows: embedder)
    sources = SimpleNamespace(coded=lambda *_: 0.25, model=lambda name: 0.75, seed=0)
    (ax,) = drawings.code(sources).axes
    bars = {bar.get_label(): bar[0].get_height() for bar in ax.containers}
    equal(bars, {"from C alone": 25.0, "uncompressed": 75.0}, "drawings.code")


def test_the_gallery_shows_the_nearest_and_which_of_them_is_right(monkeypatch):
    """Candidate 0, which is the third here."""
    item = Item("x")
    rows = [numbers.Ranked(item, [item] * 4, np.array([0.2, 0.9, 0.1, 0.5]), False)]
    monkeypatch.setattr(drawings, "ranked", lambda *_: rows)
    fig = drawings.gallery(SimpleNamespace(model=lambda name: None, seed=0))
    _, text, *best = fig.axes[:5]
    equal([ax.get_title() for ax in best], ["wrong 0.90", "wrong 0.50", "right 0.20"], "the best")
    expect("here rank 3" in text.get_title(), text.get_title(), "rank 3", "gallery")


def test_figures_are_of_scenes_that_no_model_was_trained_on():
    """And of --seed."""
    got = figures.Sources("x", seed=3).scenes(4)
    equal(got, [Shapes("test", 3).dialogue(i)[0][1][0] for i in range(4)], "Sources.scenes")


def test_a_figure_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    """And none that is left out, as one is whose model or records are not there."""
    monkeypatch.setattr(drawings, "FIGURES", {"a": lambda sources: Figure((1, 1))})
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match="a.png"):
        figures.draw(str(tmp_path))
