"""What ranks must hold alike is compared, field by field, before the first step. Here with planned
answers of two ranks; with processes: test_two_nodes.py."""

import copy
import dataclasses
import json
import sys

import pytest
from threads import on_ranks

import contrastive
import evaluate
import pretrain
from plumbing import agreement, checkpoint
from plumbing.ending import StepLeft
from plumbing.errors import InputError, OfAllRanks
from tools import condense

STAGES = (pretrain, contrastive, evaluate)
# What may differ between nodes: where things lie, and how many processes read them.
FREE = {"model", "data", "image_root", "skip_bad", "out", "json", "workers"}


def another(value):
    """Another value than this one, of its kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    return (value or 0) + 1


class Planned:
    """The other rank: what rank 0 gathers from itself and from this Config."""

    def __init__(self, cfg, compare=agreement.join):
        self.cfg, self.compare = cfg, compare

    def together_with(self, cfg, monkeypatch):
        gathered = []
        with monkeypatch.context() as patch:
            patch.setattr(agreement, "gather_objects", lambda x: gathered.append(x) or [x])
            self.compare(self.cfg)
            patch.setattr(agreement, "gather_objects", lambda x: [x, gathered[0]])
            self.compare(cfg)


FIELDS = [
    (stage, field.name)
    for stage in STAGES
    for field in dataclasses.fields(stage.Config)
    if field.init
]


@pytest.mark.parametrize("stage, name", FIELDS)
def test_every_flag_that_matters_is_compared(stage, name, monkeypatch):
    """Rank 1 has another value of one flag: the message says rank, flag and both values; a place on
    a node's disk may differ."""
    cfg = stage.Config()
    changed = copy.copy(cfg)  # past the checks of one's own flags
    setattr(changed, name, another(getattr(cfg, name)))
    if name in FREE:
        Planned(changed).together_with(cfg, monkeypatch)
        return
    flag = "--" + name.replace("_", "-")
    theirs, ours = getattr(changed, name), getattr(cfg, name)
    with pytest.raises(InputError) as refused:
        Planned(changed).together_with(cfg, monkeypatch)
    said = str(refused.value)
    assert said.startswith("rank 1 (") and f"has {flag} {theirs} where rank 0 has {ours}" in said


def test_what_is_skipped_is_compared_by_its_content(tmp_path, monkeypatch):
    """Each node has a --skip-bad list of its own: the examples in it count, in any order, and
    neither its path nor what is wrong with them. Without a list is not an empty list."""
    bad = [{"list": "a.jsonl", "digest": 7, "example": i, "error": "x"} for i in (1, 2)]
    lists = {"same": bad, "again": [{**bad[1], "error": "y"}, bad[0], bad[1]], "other": bad[:1]}
    for name, examples in lists.items():
        (tmp_path / name).write_text("".join(json.dumps(x) + "\n" for x in examples))
    here = pretrain.Config(data="a.jsonl", skip_bad=str(tmp_path / "same"))
    for name, same in (("again", True), ("other", False), ("", False)):
        there = pretrain.Config(data="a.jsonl", skip_bad=name and str(tmp_path / name))
        compare = Planned(there, checkpoint.same_data).together_with
        if same:
            compare(here, monkeypatch)
            continue
        with pytest.raises(InputError, match=r"rank 1 \(.* has --skip-bad .*rank 0 has 2 examples"):
            compare(here, monkeypatch)


def test_another_script_is_another_start(monkeypatch):
    """Stage 1 on one node, stage 2 on the other."""
    with pytest.raises(InputError, match="--objective ce where rank 0 has None"):
        Planned(pretrain.Config()).together_with(contrastive.Config(), monkeypatch)
    monkeypatch.setattr(agreement, "gather_objects", lambda x: [x, ("node-b", {})])
    with pytest.raises(InputError, match="has --lr None where rank 0 has 1"):
        agreement.agree({"--lr": 1})


def test_flags_are_compared_by_a_group_that_is_there(monkeypatch):
    """Before it is, each rank would gather its own flags alone, and all would agree."""
    done = []
    monkeypatch.setattr(agreement, "setup", lambda: done.append("setup"))
    monkeypatch.setattr(agreement, "gather_objects", lambda x: done.append("gather") or [x])
    agreement.join(pretrain.Config())
    assert done == ["setup", "gather"]


def test_the_script_is_compared_too(monkeypatch):
    """Of two that have the same flags."""
    gathered, cfg = [], pretrain.Config()
    monkeypatch.setattr(sys, "argv", ["/a/other.py"])
    monkeypatch.setattr(agreement, "gather_objects", lambda x: gathered.append(x) or [x])
    agreement.join(cfg)
    monkeypatch.setattr(sys, "argv", ["/b/pretrain.py"])
    monkeypatch.setattr(agreement, "gather_objects", lambda x: [x, gathered[0]])
    with pytest.raises(InputError, match="has the script other.py where rank 0 has pretrain.py"):
        agreement.join(cfg)


def test_a_run_knows_whose_flags_it_has(monkeypatch):
    """So that none goes on by another command's: it would train another loss. To Python the file
    that was called is __main__, whatever it is."""
    names = [agreement.command_of(x.Config()) for x in (pretrain, contrastive, condense)]
    assert names == ["pretrain", "contrastive", "condense"]
    monkeypatch.setattr(sys, "argv", ["/a/tools/condense.py", "--steps", "3"])
    called = type("Config", (contrastive.Config,), {"__module__": "__main__"})
    assert agreement.command_of(called()) == "condense"


def test_a_long_value_is_shown_in_brief(monkeypatch):
    """A prompt of a thousand words is no flood."""
    cfg = contrastive.Config(subsets="x," * 9000)
    with pytest.raises(InputError) as refused:
        Planned(cfg).together_with(contrastive.Config(), monkeypatch)
    assert len(str(refused.value)) < 500


def fails():
    raise InputError("pairs.jsonl, line 3: no query")


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_of_one_rank_is_an_error_of_all(monkeypatch, culprit):
    """The rank that failed, the same words on all; rank 0's own, which all would have said, as it
    is."""
    gathered = []
    with monkeypatch.context() as patch:
        patch.setattr(agreement, "gather_objects", lambda x: gathered.append(x) or [x])
        agreement.together(lambda: "fine")
        with pytest.raises(InputError):
            agreement.together(fails)
    fine, failed = gathered
    everyone = [failed, fine] if culprit == 0 else [fine, failed]
    monkeypatch.setattr(agreement, "gather_objects", lambda x: everyone)
    for work in (fails, lambda: "fine"):
        with pytest.raises(OfAllRanks, match="pairs.jsonl, line 3") as told:
            agreement.together(work)
        assert str(told.value).startswith("rank 1 (" if culprit else "pairs.jsonl")


@pytest.mark.parametrize("last", [fails, lambda: "fine"])
def test_a_step_that_one_rank_leaves_is_left_by_all(monkeypatch, last):
    """Whatever the others have done meanwhile: none waits for it, and all of them save."""

    def leaves():
        raise StepLeft

    def work(rank):
        with pytest.raises(StepLeft):
            agreement.together((leaves, last)[rank])

    on_ranks(monkeypatch, 2, work)


def test_a_message_names_the_machine_of_the_rank_that_it_is_about(monkeypatch):
    """Whichever rank says it: of several nodes that one is to be mended."""
    everyone = [("node-a", {"--lr": 1}), ("node-b", {"--lr": 2})]
    monkeypatch.setattr(agreement, "gather_objects", lambda x: everyone)
    with pytest.raises(InputError, match=r"^rank 1 \(node-b\) has --lr 2 .* \(rank 0: node-a\)"):
        agreement.agree({"--lr": 1})
    everyone = [("node-a", None, False), ("node-b", "x", False)]
    with pytest.raises(InputError, match=r"^rank 1 \(node-b\): x"):
        agreement.together(lambda: "fine")


def test_what_rank_0_alone_does_the_others_are_told(monkeypatch):
    """And do not do: only its disk counts."""
    done = []
    for me in (0, 1):
        everyone = iter([[("node", None, False)] * 2, ["what rank 0 found", None]])
        monkeypatch.setattr(agreement, "gather_objects", lambda x, e=everyone: next(e))
        monkeypatch.setattr(agreement, "rank", lambda me=me: me)
        assert agreement.by_rank_0(lambda me=me: done.append(me)) == "what rank 0 found"
    assert done == [0]
