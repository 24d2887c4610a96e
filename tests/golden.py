"""What the code computed and said before the house was rebuilt, in golden_files/; test_golden.py
compares. Form may change, this may not.

    python tests/golden.py golden.json      what the code gives now, on this machine

Training: log.jsonl and the weights' digest of 6 steps of each stage, on one rank and on two, LoRA,
frozen tower. Scores: a table with --limit 20. Rows: token ids and roles of each tiny family in each
prompt style. Answers: what bad input is told. Beside golden.json: an unfinished run's checkpoint
and a saved folder of the old code.

Stage 2's numbers were recorded anew when attention began to do without a mask for padding: the
first steps' losses differ by 6e-6 of themselves, other kernels round otherwise. All numbers were
recorded anew when Muon began to multiply in float32 on a CPU: with PyTorch's own in its place the
six runs were the old ones, bit for bit. And when the toy MLLM was finished: other weights, other
numbers; the unfinished run's weights and optimizer are new ones in the old code's files. And when
patches became a matrix product: with the convolution in its place all runs were the old ones."""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).parent
FILES = HERE / "golden_files"
CPU = Path("/proc/cpuinfo")
sys.path[:0] = [str(HERE), str(HERE.parent)]

import families  # noqa: E402
from forked import on_ranks, said_on  # noqa: E402

import contrastive  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402
from data import Item, read_dialogues  # noqa: E402
from plumbing import optim  # noqa: E402
from plumbing.errors import InputError  # noqa: E402
from toy.world import Shapes  # noqa: E402

STAGES = {"pretrain": pretrain, "contrastive": contrastive, "evaluate": evaluate}
LORA = dict(lora_rank=4, lora_dropout=0.1, muon_lr=0.02)  # as it was then
PRETRAIN = dict(model="toy", steps=6, batch=8, workers=1)
CONTRASTIVE = dict(model="toy", steps=6, batch=16, block=8, workers=1)
RUNS = {  # name -> (stage, flags); each with OUT = the name
    "pretrain": ("pretrain", PRETRAIN),
    "pretrain-lora": ("pretrain", PRETRAIN | LORA),
    "pretrain-frozen": (
        "pretrain",
        PRETRAIN | dict(freeze_vision=True, question_first=0.5, texts=0.3),
    ),
    "contrastive": ("contrastive", CONTRASTIVE | dict(model="pretrain", graph_memory="200MiB")),
    "contrastive-lora": (
        "contrastive",
        CONTRASTIVE | LORA | dict(model="pretrain-lora", graph_memory="0"),
    ),
    "contrastive-frozen": ("contrastive", CONTRASTIVE | dict(freeze_vision=True, graph_memory="0")),
}
TWO_RANKS = {  # the same, on two ranks
    "pretrain-2": ("pretrain", PRETRAIN),
    "contrastive-2": ("contrastive", CONTRASTIVE | dict(graph_memory="200MiB")),
}


def digest(*parts) -> str:
    """A short digest of anything that has a repr."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def machine() -> str:
    """What the last bits of a sum depend on."""
    kernel = torch.backends.cpu.get_cpu_capability()
    cpu = [
        line for line in CPU.read_text().splitlines() if line.startswith(("model name", "cache"))
    ]
    names = " ".join(line.partition(": ")[2] for line in cpu[:2])
    return f"{names} {kernel} torch {torch.__version__} transformers {transformers.__version__}"


def logged(out) -> list:
    """What log.jsonl says of each step, without versions and clocks."""
    lines = Path(out, "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def trained(out) -> dict:
    """What a run left in OUT: its log, and its weights' digest."""
    files = [*Path(out).glob("model.safetensors"), *Path(out).glob("adapter_model.safetensors")]
    weights = load_file(files[0])
    content = [(name, w.shape, w.float().numpy().tobytes()) for name, w in sorted(weights.items())]
    size = sum(float(w.double().abs().sum()) for w in weights.values())
    return dict(steps=logged(out), weights=digest(content), size=size)


def train(name) -> dict:
    """Runs one of `RUNS` in this process, in the working folder, after the run it starts from."""
    stage, flags = RUNS[name]
    if flags["model"] in RUNS and not Path(flags["model"]).exists():
        train(flags["model"])
    module = STAGES[stage]
    module.main(module.Config(**flags, out=name))
    return trained(name)


def scores(name, subsets="") -> dict:
    """The table's numbers of a run's model, 20 queries a set."""
    cfg = evaluate.Config(model=name, limit=20, subsets=subsets, json=f"{name}.json")
    evaluate.main(cfg)
    found = json.loads(Path(f"{name}.json").read_text())
    return {k: row["p_at_1"] for k, row in found["sets"].items()}


def saved() -> list:
    """The first numbers of embeddings by the old code's saved folder, a LoRA adapter."""
    toy = Shapes()
    query, _ = toy.query("vqa", 3)
    items = [Item("a red circle"), read_dialogues()[0].item, Item(*query)]
    z = model.load(str(FILES / "saved"), device="cpu").encode(items)
    return z[:, :8].tolist()


# ------------------------------------------------------------------------------------------- rows


def picture(i) -> Image.Image:
    """A picture of 56 to 100 pixels a side."""
    image = Image.new("RGB", (56 + 4 * i, 100 - 4 * i), (20 * i, 255 - 20 * i, 7 * i))
    image.paste((255, 0, 0), (10, 10, 30, 40))
    return image


def examples() -> list:
    """Twenty (Item, turns)."""
    found = []
    for i in range(8):
        d = read_dialogues()[i]
        found.append((Item("<image>", (picture(i),)), d.turns))
    for i in range(3):
        found.append((Item("<image> Find a caption.", (picture(i),)), ()))
    found += [
        (Item("a red circle"), ()),
        (Item("One <|im_end|> and </s>, <image> and then <image>?", (picture(1), picture(2))), ()),
        (Item("  two  spaces\nand a line.\n"), ()),
        (Item("<image>", (picture(4),)), ()),
        (Item("caf\u00e9 \u4e2d\u6587 \U0001f600"), ()),
        (Item("What is it? <image> Tell me.", (picture(5),)), (("and now?", " a  dog "),)),
        (Item("a text to compress"), (("what?", "this"), ("and?", "that."))),
        (Item("<image>\n", (picture(6),)), (("", "x"),)),
        (Item("<|user|> <|compress_0|> <end_of_turn>"), ()),
    ]
    return found


def row_digest(row) -> str:
    """Of a row's token ids, roles and other token columns, and the shapes of its pictures."""
    content = {key: value.tolist() for key, value in row.tokens.items()}
    shapes = {key: tuple(value.shape) for key, value in row.images.items()}
    return digest(sorted(content.items()), sorted(shapes.items()))


def rows(folder, style, K) -> list:
    """Digests of the twenty rows of a model folder. K = 0: the plain layout."""
    embedder = model.load(folder, compress_tokens=K, prompt=style, device="cpu")
    return [row_digest(embedder.collate.row(item, turns)) for item, turns in examples()]


def all_rows(folder_of, names=("toy", *families.FAMILIES)) -> dict:
    """Of these families, by style and K. folder_of: family -> its folder."""
    layouts = (("chat", 3), ("chat", 0), ("coma", 3), ("vlm2vec", 0))
    return {
        f"{name} {style} K={K}": rows("toy" if name == "toy" else folder_of(name), style, K)
        for name in names
        for style, K in layouts
    }


# ---------------------------------------------------------------------------------------- answers


def pair(**query) -> str:
    """A line of pairs."""
    return json.dumps({"query": query, "target": {"text": "b"}}) + "\n"


def talk(*speakers) -> str:
    """A line of dialogues."""
    turns = [{"from": speaker, "value": "<image>\nq"} for speaker in speakers]
    return json.dumps({"id": "1", "image": "p.png", "conversations": turns}) + "\n"


BAD_FILES = {
    "empty.jsonl": "",
    "notjson.jsonl": pair(text="a") + '{"query": oops}\n',
    "array.jsonl": "[1, 2]\n",
    "noquery.jsonl": '{"target": {"text": "b"}}\n',
    "emptyitem.jsonl": pair(text=""),
    "textnumber.jsonl": pair(text=5),
    "twomarks.jsonl": pair(text="<image> <image>", image="p.png"),
    "lostpicture.jsonl": pair(text="<image> a", image="lost.png"),
    "outside.jsonl": pair(text="<image> a", image="../p.png"),
    "badpicture.jsonl": pair(text="<image> a", image="bad.png") * 15
    + pair(text="<image> c", image="bad.png").replace('"b"', '"c"'),  # neither side is all one
    "surrogate.jsonl": pair(text="\ud800"),
    "oneturn.jsonl": talk("human"),
    "wrongfrom.jsonl": talk("gpt", "human"),
    "notalk.jsonl": '{"id": "1", "image": "p.png"}\n',
    "bad.png": "no picture",
    "captions/metadata.jsonl": '{"file_name": "a.png"}\n',
    "csv/metadata.csv": 'file_name,text\na.png,"open quote\n',
    "mmeb/A/original-00000.parquet": "no parquet",
    "mmeb/A/test-00000.parquet": "no parquet",
    "badjson/nanocoma.json": "{",
    "badconfig/config.json": "{}",
    "noweights/config.json": '{"model_type": "qwen2_vl"}',
}
ANSWERS = [  # (stage, words): each is refused with one clear line
    ("contrastive", "--data empty.jsonl"),
    ("contrastive", "--data notjson.jsonl"),
    ("contrastive", "--data array.jsonl"),
    ("contrastive", "--data noquery.jsonl"),
    ("contrastive", "--data emptyitem.jsonl"),
    ("contrastive", "--data textnumber.jsonl"),
    ("contrastive", "--data twomarks.jsonl"),
    ("contrastive", "--data lostpicture.jsonl"),
    ("contrastive", "--data outside.jsonl"),
    ("contrastive", "--data badpicture.jsonl --steps 1 --batch 8 --block 4 --workers 0"),
    ("contrastive", "--data surrogate.jsonl"),
    ("contrastive", "--data lost.jsonl"),
    ("contrastive", "--data captions"),
    ("contrastive", "--data csv"),
    ("contrastive", "--data mmeb"),
    ("contrastive", "--data ."),
    ("contrastive", "--data ./nowhere"),
    ("contrastive", "--subsets nothing"),
    ("contrastive", "--subsets classify:x"),
    ("contrastive", "--data captions --subsets a"),
    ("contrastive", "--batch 30 --block 8"),
    ("contrastive", "--temperature 0"),
    ("contrastive", "--fsdp"),
    ("contrastive", "--model ./nowhere"),
    ("contrastive", "--model badjson"),
    ("contrastive", "--model badconfig"),
    ("contrastive", "--model noweights"),
    ("contrastive", "--model k4 --compress-tokens 5"),
    ("contrastive", "--model k4 --pooling last"),
    ("contrastive", "--model k4 --prompt coma"),
    ("contrastive", "--compress-tokens 0 --pooling mean"),
    ("contrastive", "--max-length 4 --steps 1 --batch 8 --block 4 --workers 0"),
    ("contrastive", "--max-pixels 1000 --min-pixels 2000"),
    ("contrastive", "--steps"),
    ("contrastive", "--step 3"),
    ("contrastive", "--pooling median"),
    ("contrastive", "--batch x"),
    ("pretrain", "--data oneturn.jsonl"),
    ("pretrain", "--data wrongfrom.jsonl"),
    ("pretrain", "--data notalk.jsonl"),
    ("pretrain", "--data notalk.jsonl --caption"),
    ("pretrain", "--batch 0"),
    ("pretrain", "--objective kl --max-length 40"),
    ("pretrain", "--attn eager --steps 1 --batch 2 --workers 0"),
    ("evaluate", "--data mmeb"),
    ("evaluate", "--data ./nowhere"),
    ("evaluate", "--subsets nothing"),
    ("evaluate", "--model ./nowhere"),
]  # fmt: skip


def prepare_answers():
    """Writes the bad files, a picture, and a model whose K is 4, into the working folder."""
    for name, text in BAD_FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    Image.new("RGB", (40, 40), "red").save("p.png")
    model.save(model.load("toy-random", compress_tokens=4, device="cpu"), "k4")


def answer(stage, words) -> str:
    """What a command says before it ends: its error, in this process, without a traceback."""
    module, said = STAGES[stage], io.StringIO()
    words = words.split() if "--model" in words else ["--model", "toy-random", *words.split()]
    if stage != "evaluate":
        words += ["--out", "refused"]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            module.main(module.Config.parse(words))
    except InputError as e:
        return str(e).replace(f"{Path.cwd()}/", "").replace(str(HERE.parent), "ROOT")
    except SystemExit:
        return said.getvalue().splitlines()[-1].partition("error: ")[2]
    return "accepted"


class Enough(Exception):
    """The steps that are wanted are done."""


def some_steps(name, steps, **changes) -> list:
    """The first `steps` steps of a run of `RUNS` or `TWO_RANKS`, in the working folder, in which it
    leaves no weights. -> what its log says of them."""
    stage, flags = (RUNS | TWO_RANKS)[name]
    begin_step = optim.begin_step

    def begin(optimizers, step, cfg):
        if step == steps:
            raise Enough
        return begin_step(optimizers, step, cfg)

    out = "-".join([name, *map(str, changes)])
    with mock.patch.object(optim, "begin_step", begin), contextlib.suppress(Enough):
        STAGES[stage].main(STAGES[stage].Config(**flags | changes, out=out))
    return logged(out)


def two_ranks(name, steps=6) -> dict:
    """Runs one of `TWO_RANKS` on two ranks, in the working folder; whole, or the first steps."""
    folder = Path(f"{name}-ranks")
    folder.mkdir()
    statuses = on_ranks(2, lambda: some_steps(name, steps), folder)
    assert statuses == [0, 0], said_on(folder)
    return trained(name) if steps == 6 else dict(steps=logged(name))


def record(file):
    """All of it, in a new folder."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    file = Path(file).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        runs = {name: train(name) for name in RUNS}
        runs.update({name: two_ranks(name) for name in TWO_RANKS})
        numbers = dict(runs=runs, scores=scores("contrastive"))
        # Of several machines the numbers stand side by side.
        golden = dict(numbers={machine(): numbers}, answers={}, saved=saved())
        golden["rows"] = all_rows(lambda name: families.build(name, Path(folder, "fam", name)))
        prepare_answers()
        for stage, words in ANSWERS:
            golden["answers"][f"{stage} {words}"] = answer(stage, words)
        file.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    record(sys.argv[1])
