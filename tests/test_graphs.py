"""Kept graphs: what a graph takes, how many fit into --graph-memory, and that a run is the same,
bit for bit, whatever it keeps. (The gradient with any number kept: test_gradcache.py.)"""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
from checks import equal, expect
from forked import on_ranks, said_on
from safetensors.torch import load_file
from torch import nn

import contrastive
from model import Embedder
from plumbing import graphs
from plumbing.combinations import bytes_of
from plumbing.errors import InputError
from plumbing.graphs import KeptGraphs, as_if_full, graph_bytes
from plumbing.ranks import rank, setup

# ------------------------------------------------------------------------------- what a graph takes


def taken(run) -> int:
    """Bytes of the graph of what run() returns."""
    with graph_bytes() as sizes:
        z = run()  # lives until its sizes are summed
        return sum(sizes.values()) if z.requires_grad else -1


def test_what_a_graph_saves_is_counted_in_bytes():
    """By hand: a product saves x for the weight's gradient (4 x 3 float32), exp its result (4 x 5);
    the weight, and a view of it, are there anyway."""
    linear, x = nn.Linear(3, 5, bias=False), torch.randn(4, 3, requires_grad=True)
    equal(taken(lambda: linear(x).exp()), 4 * (4 * 3 + 4 * 5), "x and exp(..)")
    equal(taken(lambda: x.detach() @ linear.weight.t()), 4 * 4 * 3, "a weight's transpose")
    linear.double()
    equal(taken(lambda: linear(x.double())), 8 * 4 * 3, "float64")
    linear.requires_grad_(False)
    equal(taken(lambda: linear(x.double())), 0, "a frozen weight is a weight, too")


def test_a_storage_counts_once_and_whole():
    """Two views of it keep all of it alive; so does x that is saved twice."""
    x = torch.randn(100, requires_grad=True)
    equal(taken(lambda: x[:10].exp().sum() + (x[10:20] * x[20:30]).sum()), 440, "100 and exp's 10")
    equal(taken(lambda: x * x), 400, "twice the same")


def test_a_weight_that_is_cast_counts():
    """Autocast makes a bfloat16 copy of each weight for each graph."""
    weight = nn.Parameter(torch.randn(3, 5))
    x = torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        want = 2 * (4 * 3 + 3 * 5)  # x and the weight
        equal(taken(lambda: x.requires_grad_() @ weight), want, "bfloat16 copies")


def test_what_makes_no_graph_takes_nothing():
    with torch.no_grad(), graph_bytes() as sizes:
        nn.Linear(3, 5)(torch.randn(4, 3)).exp()
    equal(sizes, {}, "no graph")


def test_a_graph_that_is_dropped_is_freed():
    """Out of memory in the midst of a step: what pass 2 did not come to must go."""
    with graph_bytes():
        y = torch.randn(3, requires_grad=True).exp()  # saves itself
        z = y * 2
    seen = weakref.ref(y)
    del y, z
    equal(seen(), None, "a graph that holds itself is never freed")


def by_walking(z) -> dict:
    """{address: bytes} of what z's graph saves, asked of its nodes one by one."""
    sizes, nodes, seen = {}, [z.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        names = [n for n in dir(node) if n.startswith("_saved_")]
        names += ["saved_tensors"] if hasattr(node, "saved_tensors") else []
        for name in names:
            value = getattr(node, name)
            for x in value if isinstance(value, tuple | list) else [value]:
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


def live_bytes(embedder, outputs) -> int:
    """Bytes of all graphs that live, but the model's own tensors. outputs: weak references."""
    sizes = {}
    for output in outputs:
        try:
            z = output()
            sizes.update(by_walking(z) if z is not None and z.requires_grad else {})
        except RuntimeError as e:  # its backward pass is over
            assert "already been freed" in str(e), e
    own = {p.untyped_storage().data_ptr() for p in embedder.parameters()}
    return sum(size for address, size in sizes.items() if address not in own)


@pytest.mark.parametrize("trained", ["all", "frozen", "lora"])
def test_a_models_graph_is_what_its_nodes_hold(trained):
    """graph_bytes against a walk through the finished graph."""
    embedder = ranks.build(trained, torch.float32)
    inputs = embedder.collate.pad_rows(ranks.batch_of(embedder).rows[:8])
    with graph_bytes() as sizes:
        z = embedder(inputs)
    want = live_bytes(embedder, [weakref.ref(z)])
    got = sum(sizes.values())
    # Buffers of the model (some numbers) count here or there.
    expect(0.99 * want < got < 1.01 * want, got, want, trained)


def test_checkpointing_saves_graphs():
    """What is computed again in the backward pass is no part of the graph, and is not counted."""
    plain, again = (ranks.build("all", torch.float32, checkpointing=c) for c in (False, True))
    inputs = plain.collate.pad_rows(ranks.batch_of(plain).rows[:8])
    a, b = (taken(lambda e=e: e.train()(inputs)) for e in (plain, again))
    expect(0 < b < a / 3, b, f"< {a} / 3", "--checkpointing")


def test_a_chunk_counts_as_a_full_one():
    """Bytes in proportion to the tokens; twice its own at most, for a first chunk of few tokens has
    what each graph has; and a row that is longer than a chunk counts as it is."""
    for tokens, want in ((100, 1000), (80, 1250), (50, 2000), (3, 2000), (250, 1000)):
        equal(as_if_full(1000, tokens, 100), want, f"{tokens} tokens of 100")


# ------------------------------------------------------------------------------- how many are kept


class Small(nn.Module):
    """Its graph is of 8 bytes a token: a product saves its ids, exp its result."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return (inputs["input_ids"].float() * self.scale).exp()


@pytest.fixture
def run_of(monkeypatch):
    """run_of(graph_memory) -> the KeptGraphs of a run with 100 tokens a chunk, 800 bytes. What it
    says is in .said."""

    def start(graph_memory, fitting=0):
        cfg = SimpleNamespace(graph_memory=graph_memory, chunk_tokens=100, fitting=fitting)
        cfg.vision_cache = "off"
        run = KeptGraphs(cfg, Small())
        run.said = []
        monkeypatch.setattr(graphs, "say", run.said.append)
        return run

    return start


def step(run, *tokens) -> int:
    """A step with chunks of so many tokens. -> how many of them kept their graph."""
    with run.budget() as budget:
        for n in tokens:
            run.embedder({"input_ids": torch.zeros(1, n)})
    return budget.keep_graphs


@pytest.mark.parametrize(
    ("graph_memory", "want"),
    [("0", 0), ("1", 0), ("799", 0), ("800", 1), ("4000", 5), ("3999", 4), ("999999 GiB", 2**99)],
)
def test_as_many_are_kept_as_fit(run_of, graph_memory, want):
    """From the second step on; in the first one nothing is known, and none is kept."""
    run = run_of(graph_memory)
    want = min(want, 999999 * 2**30 // 800)
    equal([step(run, 100, 90), step(run, 100), step(run, 100)], [0, want, want], graph_memory)
    equal(len(run.said), 1, "told once")
    expect(f"up to {want} chunks keep" in run.said[0], run.said, want, "told")
    expect(f": {want * 800 / 2**20:,.0f} MiB" in run.said[0], run.said, want, "2^20 bytes each")


def test_the_heaviest_chunk_counts(run_of):
    """Wherever it comes in the step; and in the first step that is heavier than those before, which
    is the last one to keep too many."""
    run = run_of("4000")
    numbers = [step(run, 100, 200, 100), step(run, 100), step(run, 400), step(run, 100)]
    equal(numbers, [0, 2, 2, 1], "4000 / 1600, 4000 / 3200")
    equal([step(run, 100), len(run.said)], [1, 2], "told anew, and once")


def test_a_pass_without_a_graph_says_nothing_of_graphs(run_of):
    """A step's pass 1 runs without one; a step in which no chunk had a graph is as none."""
    run = run_of("4000")
    with torch.no_grad():
        equal([step(run, 100), step(run, 100)], [0, 0], "not measured")
    equal([step(run, 100), step(run, 100)], [0, 5], "measured")


def test_chunks_that_were_halved_keep_half_the_memory(run_of):
    """The number stays. A run that goes on with halved chunks measures these."""
    run = run_of("4000")
    step(run, 100)
    run.cfg.fitting = 50
    equal([step(run, 50, 50), step(run, 50)], [5, 5], "the number stays")
    run = run_of("4000", fitting=50)
    equal([step(run, 50), step(run, 50)], [0, 10], "400 bytes a chunk")
    run = run_of("4000", fitting=50)
    equal([step(run, 100, 50), step(run, 50)], [0, 5], "halved in its first step")


def test_the_forward_pass_is_put_back(run_of):
    """After each step, and where one ends in an error: of one step, too."""
    run = run_of("4000")
    step(run, 100)
    equal("forward" in vars(run.embedder), False, "after a step")
    with pytest.raises(KeyError):
        with run.budget():
            run.embedder({})
    equal("forward" in vars(run.embedder), False, "after an error")
    equal(step(run, 100), 5, "what was seen stays")


def test_all_ranks_keep_what_the_fullest_can(run_of, monkeypatch):
    """The largest graph of any rank, and the least room."""
    run = run_of("")
    monkeypatch.setattr(graphs, "free_bytes", lambda device: 16000)
    step(run, 100)
    others = [1600.0, 8000]
    monkeypatch.setattr(graphs, "gather_objects", lambda x: [x, others.pop(0)])
    equal(step(run, 100), 1, "a quarter of 8000, by 1600")
    run.largest, others[:] = 800.0, [0.0]
    equal(run.that_fit(), 2, "the other one measured nothing; the room is known")


@pytest.mark.parametrize(("device", "want"), [("cpu", 5), ("cuda", 10), ("xpu", 5)])
def test_the_default_is_a_share_of_what_is_free(run_of, monkeypatch, device, want):
    """A quarter of a CPU's memory, half of a GPU's, as it is when the first step is over."""
    run = run_of("")
    free = [16000, 0]
    monkeypatch.setattr(graphs, "free_bytes", lambda device: free.pop(0))
    step(run, 100)
    equal(len(free), 2, "asked after the first step")
    run.embedder.device = torch.device(device)
    equal([step(run, 100), step(run, 100)], [want, want], "asked once")


# ----------------------------------------------------------------------------------- what is free


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine({file: text}): a machine whose /proc and /sys/fs/cgroup hold these."""

    def pretend(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(graphs, "PROC", tmp_path / "proc")
        monkeypatch.setattr(graphs, "CGROUP", tmp_path / "group")

    return pretend


MEMINFO = {"proc/meminfo": "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:     8000 kB\n"}
CPU = torch.device("cpu")


def test_a_machine_says_what_no_program_uses(machine, monkeypatch):
    """MemAvailable, divided by the ranks of this node."""
    machine(MEMINFO)
    equal(graphs.free_bytes(CPU), 8000 * 1024, "MemAvailable")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    equal(graphs.free_bytes(CPU), 2000 * 1024, "of four ranks")


def test_a_machine_that_does_not_say_has_four_gigabytes(machine):
    """macOS and Windows have no /proc, an old Linux no MemAvailable."""
    machine({})
    equal(graphs.free_bytes(CPU), 4 * 2**30, "no /proc")
    machine({"proc/meminfo": "MemTotal:  9000 kB\n"})
    equal(graphs.free_bytes(CPU), 4 * 2**30, "no MemAvailable")


def group(limit, used, files=0) -> dict:
    """What one group of processes says."""
    stat = f"anon 5\ninactive_file {files}\nactive_file 7\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}


def under(folder, files) -> dict:
    return {f"{folder}/{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("groups", "want"),
    [
        ({"group": group(5000, 1000)}, 4000),  # a container sees its own group as the root
        ({"group": group(5000, 1000, files=300)}, 4300),
        ({"group": group(1000, 5000)}, 0),
        ({"group": group("max", 5000)}, 8000 * 1024),
        ({"group/job/step": group("max", 5), "group/job": group(900, 100)}, 800),
        ({"group/job/step": group(70, 50), "group/job": group(900, 100)}, 20),
        ({"group/other": group(70, 50)}, 8000 * 1024),
    ],
)
def test_the_limit_of_a_container_or_a_job_counts(machine, monkeypatch, groups, want):
    """Its own, or that of what it is a part of; files that were read may go."""
    machine(MEMINFO | {"proc/self/cgroup": "4:memory:/old\n0::/job/step\n"})
    for folder, files in groups.items():
        machine(under(folder, files))
    equal(graphs.free_bytes(CPU), want, groups)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    equal(graphs.free_bytes(CPU), want // 4, "of four ranks, which are in it together")


def test_a_gpu_has_free_what_the_first_step_did_not_take(monkeypatch):
    """PyTorch keeps what the step took at its peak: it counts as used."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    equal(graphs.free_bytes(torch.device("cuda")), 700, "torch.cuda.mem_get_info")


# ---------------------------------------------------------------------------------------- the flag


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("0", 0), ("0.4", 0), ("1000", 1000), ("4GiB", 2**32), ("4 GiB", 2**32),
        ("1.5KiB", 1536), ("2MiB", 2**21), ("3KB", 3000), ("3MB", 3 * 10**6), ("3GB", 3 * 10**9),
        ("9" * 15 + "GiB", 999999999999999 * 2**30),
    ],
)  # fmt: skip
def test_a_size_is_a_number_of_bytes(text, want):
    """float64 holds 15 digits."""
    equal(bytes_of(text), want, text)
    equal(contrastive.Config.parse(["--graph-memory", text]).graph_memory, text, "the flag")


@pytest.mark.parametrize(
    "text",
    ["1e9", "nan", "inf", "4gib", "4G", "4  GiB", "GiB", "4GiB ", " ", "٤GiB", "9" * 400, "x",
     "1_0", "4.GiB", ".5GiB", "4TiB", "-4GiB"],
)  # fmt: skip
def test_what_is_no_size_is_refused(text):
    """One line, which says how it would be right."""
    with pytest.raises(InputError, match="must be a number of bytes, KiB, MiB or GiB, as 4GiB"):
        contrastive.Config.parse([f"--graph-memory={text}"])
    equal(bytes_of(text), None, text)


# ------------------------------------------------------------------------------------- whole runs

LORA = ["--lora-rank", "2"]  # with dropout
RUN = "--model toy-random --steps 4 --batch 8 --block 4 --workers 0 --chunk-tokens 100 --muon-lr 0"
SOME, ALL, ROOM = "15MiB", "9GiB", 15 * 2**20


def train(out, graph_memory, *words):
    """A short run of stage 2."""
    words = [*RUN.split(), "--graph-memory", graph_memory, "--out", str(out), *words]
    contrastive.main(contrastive.Config.parse(words))
    return out


def bits(out) -> tuple:
    """What a run logged of its steps, and its weights, as bytes."""
    steps = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()[1:]]
    numbers = [[row[name] for name in ("step", "loss", "top1", "norm", "lr")] for row in steps]
    weights = {}
    for path in sorted(Path(out).glob("*model.safetensors")):
        weights.update(load_file(path))
    assert len(numbers) > 2 and weights, "no run"
    return numbers, {name: w.numpy().tobytes() for name, w in weights.items()}


class Watch:
    """What a run keeps: .numbers of chunks that may keep their graph, a step each; .peaks, the most
    bytes of graphs that lived at once in it; .kept, the most graphs."""

    def __init__(self, monkeypatch):
        self.numbers, self.peaks, self.kept, self.outputs = [], [], [], []
        load, fit, watch = contrastive.load_for, KeptGraphs.that_fit, self

        def load_for(cfg, device):
            embedder = load(cfg, device)
            embedder.register_forward_hook(self.look)
            return embedder

        def that_fit(graphs):
            watch.numbers.append(fit(graphs))
            watch.peaks.append(0)
            watch.kept.append(0)
            watch.outputs.clear()
            return watch.numbers[-1]

        monkeypatch.setattr(contrastive, "load_for", load_for)
        monkeypatch.setattr(KeptGraphs, "that_fit", that_fit)

    def look(self, embedder, args, z):
        """After each forward pass."""
        self.outputs.append(weakref.ref(z))
        alive = [ref for ref in self.outputs if ref() is not None and ref().requires_grad]
        self.peaks[-1] = max(self.peaks[-1], live_bytes(embedder, alive))
        self.kept[-1] = max(self.kept[-1], len(alive))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: (folder, Watch)} of runs that keep no graph, some, and all; with LoRA's dropout."""
    found = {}
    for name, graph_memory in (("none", "0"), ("some", SOME), ("all", ALL)):
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch)
            out = train(tmp_path_factory.mktemp(name), graph_memory, *LORA)
        found[name] = out, watch
    return found


def test_a_run_is_the_same_whatever_it_keeps(runs):
    """Bit for bit: losses, gradients' norms, weights."""
    want = bits(runs["none"][0])
    for name in ("some", "all"):
        equal(bits(runs[name][0]) == want, True, name)
    kept = {name: watch.kept[1:] for name, (_, watch) in runs.items()}
    equal(kept["none"], [1, 1, 1], "one at a time, in pass 2")
    expect(1 < max(kept["some"]) < min(kept["all"]), kept, "none, some, all", "graphs that lived")
    equal({watch.kept[0] for _, watch in runs.values()}, {1}, "none in the first step")


def test_graphs_take_no_more_than_the_flag_says(runs):
    """Counted by walking through every graph that lives, after each chunk. What was measured in the
    first step holds for the others, and the room is used."""
    watch = runs["some"][1]
    expect(max(watch.peaks) <= ROOM, watch.peaks, f"<= {ROOM}", "--graph-memory 15MiB")
    expect(max(watch.peaks) > ROOM / 2, watch.peaks, f"> {ROOM} / 2", "the room is used")
    expect(max(runs["all"][1].peaks) > ROOM, runs["all"][1].peaks, f"> {ROOM}", "all of them")


def test_more_pairs_take_no_more_memory(tmp_path, monkeypatch):
    """Peak memory is flat in N."""
    watch = Watch(monkeypatch)
    train(tmp_path, SOME, *LORA, "--batch", "32", "--steps", "2")
    expect(watch.peaks[1] <= ROOM, watch.peaks, f"<= {ROOM}", "32 pairs")


def test_a_run_may_go_on_with_another_memory(runs, tmp_path):
    """--graph-memory changes nothing that a run computes; the first step after it keeps none."""
    out = tmp_path / "m"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="pulled out"):
        end_step, steps = contrastive.optim.end_step, iter(range(9))

        def pull(*args):
            if next(steps) == 2:
                raise RuntimeError("pulled out")
            return end_step(*args)

        patch.setattr(contrastive.optim, "end_step", pull)
        train(out, ALL, *LORA, "--save-every", "1")
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        train(out, SOME, *LORA, "--resume")
    equal(bits(out) == bits(runs["none"][0]), True, "the run that was never stopped")
    equal(watch.numbers[0], 0, "measured anew")
    expect(watch.numbers[1] > 0, watch.numbers, "> 0", "kept")


def test_out_of_memory_in_the_first_step_is_measured_all_the_same(tmp_path, monkeypatch):
    """Chunks are halved, and as many as fit keep their graph from the second step on: in no more
    memory."""
    watch, forward, graphs = Watch(monkeypatch), Embedder.forward, iter(range(10**6))

    def short_of_memory(self, inputs):
        if torch.is_grad_enabled() and next(graphs) == 1:
            raise torch.OutOfMemoryError("no memory")
        return forward(self, inputs)

    monkeypatch.setattr(Embedder, "forward", short_of_memory)
    train(tmp_path, "30MiB", *LORA, "--chunk-tokens", "200", "--steps", "2")
    expect(watch.kept[1] == watch.numbers[1] > 1, watch.kept, watch.numbers, "kept")
    expect(watch.peaks[1] <= 2 * ROOM, watch.peaks, "<= 30 MiB", "halved chunks")


# ---------------------------------------------------------------------------------- several ranks


def train_on_ranks(folder, words):
    """On every rank: runs that keep none and some. Notes what each rank measured, and kept."""
    setup()
    fit, noted = KeptGraphs.that_fit, {"none": [], "some": []}

    def that_fit(run):
        steps = noted[Path(run.cfg.out).name]
        steps.append((run.largest, fit(run)))  # what this rank found, what all keep
        return steps[-1][1]

    KeptGraphs.that_fit = that_fit
    for name, graph_memory in (("none", "0"), ("some", "30MiB")):
        train(folder / name, graph_memory, "--batch", "12", "--steps", "3", *words)
    (folder / f"{rank()}.json").write_text(json.dumps(noted))
    torch.distributed.barrier()


@pytest.mark.parametrize(("world", "words"), [(3, LORA), (2, ["--fsdp"])])
def test_ranks_keep_the_same_number_though_their_rows_differ(tmp_path, world, words):
    """Also sharded, where ranks that keep other numbers would wait for each other for ever."""
    statuses = on_ranks(world, lambda: train_on_ranks(tmp_path, words), tmp_path)
    equal(statuses, [0] * world, said_on(tmp_path))
    noted = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(world)]
    for name in ("none", "some"):
        numbers = [[number for _, number in ours[name]] for ours in noted]
        equal(numbers, [numbers[0]] * world, f"{name}: alike on all ranks")
        equal(numbers[0][0], 0, "none in the first step")
        equal(numbers[0][1] > 1, name == "some", name)
        sizes = {ours[name][1][0] for ours in noted}
        expect(len(sizes) == world, sizes, "different", f"{name}: what the ranks measured")
    equal(bits(tmp_path / "some") == bits(tmp_path / "none"), True, "the same bits")
