"""Ranks, as far as one process shows them: gradients in several buckets, torchrun's environment,
how a script ends. (With processes: test_gradcache.py, test_torchrun.py, test_ending.py.)"""

import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from checks import equal, expect

import contrastive
from plumbing import agreement, ranks
from plumbing.errors import InputError


def parameters(*numbers):
    """Parameters of so many numbers, each with a gradient of ones."""
    made = [torch.nn.Parameter(torch.zeros(n)) for n in numbers]
    for p in made:
        p.grad = torch.ones_like(p)
    return made


@pytest.mark.parametrize("bucket", [1, 4, 5, 7, 100])
def test_each_gradient_is_summed_once_in_whatever_bucket(bucket, monkeypatch):
    """Two ranks, of which the other has the same; what no row touched counts as zero, and what is
    frozen has none."""
    monkeypatch.setattr(ranks, "world", lambda: 2)
    sent = []
    monkeypatch.setattr(ranks, "all_sum", lambda x: sent.append(len(x)) or x.mul_(2))
    made = parameters(3, 2, 4, 1, 6)
    made[1].grad = None
    made[3].grad, made[3].requires_grad = None, False
    ranks.sum_gradients(made, bucket)
    for i, value in ((0, 2), (1, 0), (2, 2), (4, 2)):
        equal(made[i].grad.tolist(), [value] * len(made[i]), f"parameter {i}")
    equal(made[3].grad, None, "frozen")
    equal(sum(sent), 15, "each number once")
    assert max(sent) < bucket + 6


def test_small_gradients_are_sent_together(monkeypatch):
    """After a full bucket, too: thousands of small messages would take longer than the step."""
    monkeypatch.setattr(ranks, "world", lambda: 2)
    sent = []
    monkeypatch.setattr(ranks, "all_sum", lambda x: sent.append(len(x)) or x)
    ranks.sum_gradients(parameters(4, 1, 1, 1, 1, 2), 4)
    equal(sent, [4, 4, 2], "numbers in each message")


def test_what_is_not_said_is_a_large_message(monkeypatch):
    """Of a hundred small gradients one."""
    monkeypatch.setattr(ranks, "world", lambda: 2)
    sent = []
    monkeypatch.setattr(ranks, "all_sum", lambda x: sent.append(len(x)) or x)
    ranks.sum_gradients(parameters(*[1000] * 100))
    equal(sent, [100_000], "numbers in each message")


def test_of_one_rank_all_is_its_own():
    """No process group: nothing is sent, and gradients flow through."""
    x = torch.ones(3, 2, requires_grad=True)
    rows = ranks.gather_rows(x, [3])
    (rows * torch.arange(6).view(3, 2)).sum().backward()
    equal((rows.tolist(), x.grad.tolist()), ([[1, 1]] * 3, [[0, 1], [2, 3], [4, 5]]), "GatherRows")
    equal((ranks.rank(), ranks.world(), ranks.gather_objects("a")), (0, 1, ["a"]), "one")
    equal((ranks.all_sum(3), ranks.all_sum(torch.tensor(4)).item()), (3, 4), "all_sum")


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("change", "devices", "says"),
    [
        ({}, None, None),
        ({}, 2, None),
        ({}, 1, "this machine has 1 GPUs: torchrun --nproc-per-node 1"),
        ({"RANK": "2"}, None, "RANK=2 is not below WORLD_SIZE=2"),
        *(({name: "-1"}, None, f"{name}=-1: not a number") for name in list(WHOLE)[:3]),
        ({"MASTER_PORT": "http"}, None, "MASTER_PORT=http: not a number; torchrun sets it"),
        *(({name: ""}, None, f"RANK is set, but not {name}") for name in list(WHOLE)[1:]),
    ],
)
def test_torchruns_environment_is_whole_or_refused(change, devices, says, monkeypatch):
    """Each name, empty or no number; a rank beyond the others; more ranks than GPUs."""
    for name, value in {**WHOLE, **change}.items():
        monkeypatch.setenv(name, value)
    if says is None:
        return ranks.check_environment(devices)
    with pytest.raises(InputError, match=says):
        ranks.check_environment(devices)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_ranks_that_cannot_be_joined_are_one_line(error, monkeypatch):
    """With the address; in a process of torchrun's alone."""
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)

    def fail(*_, **__):
        raise error("no route to host")

    monkeypatch.setattr(ranks.dist, "init_process_group", fail)
    with pytest.raises(InputError, match="cannot join the other ranks at a:1: no route to host"):
        ranks.setup()
    monkeypatch.delenv("RANK")
    equal(ranks.setup(), torch.device("cpu"), "without torchrun there are none")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(InputError, match="RANK=2 is not below"):
        ranks.setup()


def test_a_node_says_what_it_waits_for(monkeypatch, capsys):
    """Of two nodes one was given a command with a slip in it: the other would wait half an hour
    without a word. One line a node, and none where nobody is waited for."""
    cfg = contrastive.Config()
    for local, minute, seconds, said in (
        ("0", 0.01, 0.5, 1),
        ("1", 0.01, 0.5, 0),
        ("0", 0.4, 0, 0),
    ):
        monkeypatch.setenv("LOCAL_RANK", local)
        monkeypatch.setattr(ranks, "MINUTE", minute)
        monkeypatch.setattr(agreement, "agree", lambda _, s=seconds: time.sleep(s))
        agreement.join(cfg)
        time.sleep(0.6)
        lines = capsys.readouterr().out.splitlines()
        equal([x.split(":")[0] for x in lines], ["node 0 waits for the others"] * said, local)


def test_tokenizers_have_no_threads_that_a_fork_would_lose(monkeypatch):
    """Loader processes are forked, and would wait for them; who says otherwise is obeyed."""
    for said, want in ((None, "false"), ("true", "true")):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if said:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", said)
        ranks.setup()
        equal(os.environ["TOKENIZERS_PARALLELISM"], want, "ranks.setup")


@pytest.mark.parametrize(("cuda", "backend"), [(True, "nccl"), (False, "gloo")])
def test_a_rank_has_a_gpu_of_its_own_and_patience(cuda, backend, monkeypatch):
    """Rank 5 of 8 is the second one of its node, and takes the second GPU; it waits for the others
    for minutes: one of them may fetch a model."""
    for name, value in {**WHOLE, "RANK": "5", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    calls = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda x: calls.update(device=x))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda x: calls.update(precision=x))

    def init_process_group(backend, timeout):
        calls.update(backend=backend, minutes=timeout.total_seconds() / 60)

    monkeypatch.setattr(ranks.dist, "init_process_group", init_process_group)
    device = ranks.setup()
    expect(10 <= calls.pop("minutes") <= 600, calls, "minutes", "ranks.PATIENCE")
    gpu = torch.device("cuda:1")
    equal(device, gpu if cuda else torch.device("cpu"), "LOCAL_RANK")
    want = dict(device=gpu, precision="high") if cuda else {}
    equal(calls, {**want, "backend": backend}, "ranks.setup")


def test_what_a_user_can_put_right_ends_a_command_with_one_line(monkeypatch):
    """Memory, for one; anything else goes on to leave_by."""
    ends = []

    class Left(BaseException):
        pass

    def leave(*words, status=1):
        ends.append(words)
        raise Left

    monkeypatch.setattr(ranks, "leave", leave)
    monkeypatch.setattr(ranks, "leave_by", lambda error: ends.append(error))

    def run(error):
        def main(words):
            raise error

        ranks.run_command(main)

    with pytest.raises(Left):
        run(torch.OutOfMemoryError("no memory"))
    assert "no memory: out of memory; halve --chunk-tokens" in ends[0][0], ends
    unknown = ZeroDivisionError("x")
    run(unknown)
    equal(ends[1:], [unknown], "leave_by")


def test_two_errors_of_torch_have_a_clear_line(monkeypatch):
    """Memory, with the way out; a peer that is gone, where there are peers; no other one."""
    text = ranks.known_reason(torch.OutOfMemoryError("CUDA out of memory. " * 50))
    assert "out of memory; halve --chunk-tokens" in text and len(text) < 250
    gone = RuntimeError("[../gloo/pair.cc:1] Connection closed by peer\nmore")
    equal(ranks.known_reason(gone), "", "one rank has no peers")
    monkeypatch.setattr(ranks, "world", lambda: 2)
    says = "rank 0 lost the others (Connection closed by peer): one of them ended first"
    says += ". A training run goes on with --resume, from its last checkpoint"
    equal(ranks.known_reason(gone), says, "lost")
    equal(ranks.known_reason(RuntimeError("shapes differ")), "", "a mistake of ours")


@pytest.mark.parametrize("text", ["NCCL error: remote process exited", "Gloo timed out"])
def test_a_lost_rank_is_one_line_however_its_backend_is_spelled(monkeypatch, text):
    """On GPUs too, where it is in capitals."""
    monkeypatch.setattr(ranks, "world", lambda: 2)
    said = ranks.known_reason(RuntimeError(text))
    expect("lost the others" in said, said, "a clear line", "ranks.known_reason")


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1)])
def test_what_a_command_returns_is_its_status(result, status, monkeypatch):
    """It gets the words behind its name."""

    class Left(Exception):
        pass

    def leave(reason=None, status=1):
        raise Left(status)

    def leave_by(error):
        raise error

    monkeypatch.setattr(ranks, "leave", leave)
    monkeypatch.setattr(ranks, "leave_by", leave_by)
    monkeypatch.setattr(sys, "argv", ["command", "a", "b"])
    seen = []
    with pytest.raises(Left) as left:
        ranks.run_command(lambda words: seen.append(words) or result)
    equal((left.value.args, seen), ((status,), [["a", "b"]]), "run_command")
    config = SimpleNamespace(parse=lambda words: {"flags": words})
    with pytest.raises(Left) as left:
        ranks.run(seen.append, config)
    equal((left.value.args, seen[1:]), ((0,), [{"flags": ["a", "b"]}]), "run")
