"""Two nodes, one rank each, that share nothing: two working folders. Rank 0's node holds OUT and
its checkpoints; the other has none, and is sent what it needs. What differs between the nodes is
refused before the first step, on both, with the rank and the field."""

import json
import re

import pytest
import two_nodes
from forked import on_ranks, said_on

import model
from data import Item

DIFFER = {  # case of two_nodes.py -> what both nodes are told
    "rate": r"rank 1 \(.*\) has --lr 0.002 where rank 0 has 0.001 .*the same command",
    "rank of LoRA": "rank 1 .* has --lora-rank 2 where rank 0 has 0",
    "default model": r"rank 1 \(.*, --model toy\) has the model's files .* --model out/pretrain",
    "data": "rank 1 .*--data pairs.jsonl.* has data .* where rank 0 has",
    "no model": r"rank 1 \(.*\): --model ./nowhere: no such folder",
    "out": "^--out file cannot be written",
}


@pytest.fixture(scope="module")
def nodes(once):
    """The two working folders, after two_nodes.py ran in both at once."""

    def fill(folder):
        for node in ("0", "1"):
            (folder / node).mkdir()
        assert on_ranks(2, two_nodes.main, folder, apart=True) == [0, 0], said_on(folder)

    return once("two_nodes", fill)


def ended(node):
    """{case: how it ended there}"""
    return json.loads((node / "said.json").read_text())


@pytest.mark.parametrize("name", ["full", "adapter", "sharded"])
def test_a_resumed_run_is_the_whole_one_though_one_node_has_no_checkpoint(nodes, name):
    """The node without a checkpoint is sent the weights and the optimisers' states; it writes no
    OUT. The weights are those of the run that did not stop, byte for byte."""
    for node in ("0", "1"):
        how = ended(nodes / node)
        got = [how[f"{name} {what}"] for what in ("whole", "crashes", "resumed")]
        assert got == ["done", "crashed", "done"], (node, got)
    files = sorted(nodes.glob(f"?/{name}-*/*model.safetensors"))
    files += sorted(nodes.glob("?/out/pretrain/*model.safetensors")) if name == "adapter" else []
    assert [f.relative_to(nodes).parts[0] for f in files] == ["0", "0"], "rank 0 alone writes"
    assert files[0].read_bytes() == files[1].read_bytes()
    said = (nodes / "said-0.txt").read_text()
    assert f"resumed {name}-broken/checkpoints/step-00000002" in said


def test_all_nodes_of_a_finished_run_end_with_status_0(nodes):
    """Though only one of them can see that it is finished."""
    assert [ended(nodes / node)["finished"] for node in ("0", "1")] == ["status 0"] * 2


@pytest.mark.parametrize("case", DIFFER)
def test_what_differs_between_the_nodes_is_refused_on_both(nodes, case):
    """With the rank and the field, and before the first step: no step is logged."""
    for node in ("0", "1"):
        how = ended(nodes / node)[case]
        assert re.search(DIFFER[case], how), (node, how)
    assert not (nodes / "0" / "bad" / "log.jsonl").exists()


def test_the_same_data_and_an_out_of_another_name_are_no_difference(nodes):
    """Each node has its own path to a copy of the data: the content is compared."""
    assert [ended(nodes / node)["same data elsewhere"] for node in ("0", "1")] == ["done"] * 2


def test_the_log_counts_what_was_cut_on_all_nodes(nodes):
    """`cut` is the sum over ranks: of four equal pairs a step, two on each node."""
    collate = model.load("toy-random", device="cpu", max_length=40).collate
    line = (nodes / "0" / "shared.jsonl").read_text().splitlines()[0]
    long = json.loads(line)["query"]["text"]
    cut = collate.row(Item(long)).cut
    lines = (nodes / "0" / "node-0" / "log.jsonl").read_text().splitlines()[1:]
    assert cut > 0 and [json.loads(line)["cut"] for line in lines] == [4 * cut] * 3
