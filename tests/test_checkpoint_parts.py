"""A checkpoint's parts in one process: what is written, what is read back, who is told what, when
signals are noted. (Whole runs: test_checkpoint.py; what may lie in a folder: test_resume.py.)"""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from checks import equal, expect
from safetensors.torch import load_file
from threads import on_ranks
from torch import nn

import contrastive
import pretrain
from plumbing import checkpoint, ending, folders, locks, outfolder, ranks
from plumbing.errors import InputError, OfAllRanks
from plumbing.formats import checked_digest

STEP = "step-00000003"


class Small(nn.Module):
    """An embedder of two layers, of which one is frozen."""

    K, pooling, style, adapter = 4, "mean", "chat", None

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.frozen, self.trained = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 3)


def stepped(net, steps=2):
    """An optimiser that has taken some steps."""
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net.trained(torch.ones(2)).square().sum().backward()
        optimizer.step()
    return optimizer


@pytest.fixture
def cfg(tmp_path):
    return begun(pretrain.Config(model="toy-random", out=str(tmp_path / "out"), steps=10))


def begun(cfg, **flags):
    """The same run with other flags, as `begin` leaves it."""
    cfg = dataclasses.replace(cfg, **flags)
    cfg.model_digest = checkpoint.digest_of_model(cfg.model)
    return cfg


def saved(cfg, step=3, seed=0):
    net = Small(seed)
    optimizer = stepped(net)
    checkpoint.save_checkpoint(net, [optimizer], cfg, step)
    return net, optimizer


# ------------------------------------------------------------------------------ written and read


def test_a_checkpoint_is_the_trained_weights_the_optimiser_and_the_step(cfg):
    """Not what is frozen: of a model of 3 billion weights an adapter is some millions."""
    cfg.fitting = 77
    saved(cfg)
    folder = Path(cfg.out, "checkpoints", STEP)
    equal(set(load_file(folder / "weights.safetensors")), {"trained.weight", "trained.bias"}, "")
    state = checkpoint.read_state(folder)
    equal((state.step, state.world, state.flags["fitting"]), (3, 1, 77), "state.json")
    equal(state.flags, dataclasses.asdict(cfg), "all flags")
    equal([x.name for x in folder.parent.iterdir()], [STEP], "nothing beside it")


def test_what_is_resumed_is_weights_and_optimiser_as_they_were(cfg):
    """Into a model that begins with other ones; from the step that was done, with what fitted."""
    cfg.fitting = 77
    net, optimizer = saved(cfg)
    again = Small(seed=1)
    other = stepped(again, steps=1)
    resumed = begun(cfg, resume=True)
    equal(checkpoint.start_or_resume(again, [other], resumed), 3, "the step to begin with")
    checkpoint.forget_signals()
    equal(resumed.fitting, 77, "chunk tokens that fitted")
    for name in ("weight", "bias"):
        got, want = (getattr(x.trained, name).detach() for x in (again, net))
        equal(got, want, f"trained.{name}")
    expect(not torch.equal(again.frozen.weight, net.frozen.weight), "", "", "frozen: its own")
    for mine, theirs in zip(other.state.values(), optimizer.state.values(), strict=True):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            equal(mine[key], theirs[key], f"AdamW's {key}")


def test_what_fitted_counts_only_for_the_same_chunks(cfg):
    """--chunk-tokens is said anew: then it is tried anew."""
    cfg.fitting = 77
    saved(cfg)
    resumed = begun(cfg, resume=True, chunk_tokens=500)
    net = Small()
    checkpoint.start_or_resume(net, [stepped(net)], resumed)
    checkpoint.forget_signals()
    equal(resumed.fitting, 0, "not known")


def test_what_is_known_only_when_the_data_are_read_is_compared_then(cfg):
    """The data themselves; and all else once more, as what stage 2 calls its model."""
    saved(cfg)
    net = Small()
    for change, says in (({"data_digest": 5}, "data_digest was 0, is 5"), ({"lr": 0.5}, "lr was")):
        resumed = begun(cfg, resume=True)
        for name, value in change.items():
            setattr(resumed, name, value)
        with pytest.raises(InputError, match=f"not the same run: .*{says}"):
            checkpoint.start_or_resume(net, [stepped(net)], resumed)
        checkpoint.forget_signals()


def test_a_run_from_the_start_begins_with_step_0(cfg, capsys):
    """And says, where it was to go on, that there is nothing."""
    net = Small()
    equal(checkpoint.start_or_resume(net, [stepped(net)], cfg), 0, "step")
    equal("holds no checkpoint" in capsys.readouterr().out, False, "nobody asked")
    checkpoint.start_or_resume(net, [stepped(net)], begun(cfg, resume=True))
    equal("the run begins at step 1" in capsys.readouterr().out, True, "--resume")
    checkpoint.forget_signals()


def test_a_run_that_is_ended_says_where_it_goes_on(cfg, capsys, monkeypatch):
    """A full disk may have cost it its last checkpoint, or all of them. And all ranks end together:
    at the end of one of them torchrun ends the others, of which rank 0 may still be saving."""
    met = []
    monkeypatch.setattr(checkpoint, "gather_objects", lambda x: met.append(x) or [x])
    for saves, says in (
        (0, "why. There is no checkpoint: without --resume the run begins anew"),
        (2, "why. --resume goes on from step-00000002"),
    ):
        for step in range(1, saves + 1):
            saved(cfg, step)
        with pytest.raises(SystemExit):
            checkpoint.stop("why", cfg)
        assert says in capsys.readouterr().out, says
    monkeypatch.setattr(checkpoint, "rank", lambda: 1)
    with pytest.raises(SystemExit):
        checkpoint.stop("why", cfg)
    equal(len(met), 3, "checkpoint.stop: gather_objects, of every rank")
    monkeypatch.setattr(checkpoint, "gather_objects", lambda x: ["rank 0's", x])
    equal(checkpoint.way_on(cfg), "rank 0's", "of several nodes only its disk counts")


def test_the_newest_ones_stay_and_the_others_go_once_it_is_there(cfg):
    """--keep of them."""
    for keep, want in ((2, [5, 7]), (1, [9])):
        cfg.keep = keep
        for step in (3, 5, 7) if keep == 2 else (9,):
            saved(cfg, step)
        names = [path.name for path in checkpoint.checkpoints_in(cfg.out)]
        equal(names, [f"step-{step:08d}" for step in want], f"--keep {keep}")
    left = [path.name for path in Path(cfg.out, "checkpoints").iterdir()]
    equal(left, ["step-00000009"], "no half of another one")


def test_what_a_kill_left_half_takes_no_room_from_the_run_that_goes_on(cfg):
    """Half a checkpoint that was being written, or removed, is as large as a whole one: on a disk
    that was measured for --keep of them no other would fit beside it, nor the model."""
    cfg.command = "pretrain"
    saved(cfg)
    folder = Path(cfg.out, "checkpoints")
    for name in ("part", "removed-step-00000002", f"damaged-{STEP}", "removed-by-hand"):
        (folder / name).mkdir()
        (folder / name / "weights.safetensors").touch()
    checkpoint.begin(dataclasses.replace(cfg, resume=True))
    left = sorted(path.name for path in folder.iterdir())
    equal(left, [f"damaged-{STEP}", "lock", "removed-by-hand", STEP], "checkpoint.begin")


def test_a_disk_that_refuses_costs_the_checkpoint_alone(cfg, monkeypatch, capsys):
    """One line; older ones stay, nothing half is left."""
    saved(cfg)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    saved(cfg, 4)
    said = capsys.readouterr().out
    expect("no checkpoint at step 4: " in said and said.count("\n") == 1, said, "", "one line")
    left = [path.name for path in Path(cfg.out, "checkpoints").iterdir()]
    equal(left, [STEP], "the older one")


def test_what_is_there_already_is_not_written_again(cfg, capsys, monkeypatch):
    """The step after it was left: the state is a function of the step."""
    saved(cfg)
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: pytest.fail("written again"))
    saved(cfg)
    equal((names_in(cfg.out), capsys.readouterr().out), ([STEP], ""), "and nothing is said")


def test_rank_0_alone_writes_and_reads(cfg, monkeypatch):
    """The others are sent what it read; that they are several is written down."""
    monkeypatch.setattr(checkpoint, "rank", lambda: 1)
    saved(cfg)
    equal(checkpoint.checkpoints_in(cfg.out), [], "rank 1 writes nothing")
    seen = {}

    def note(name):
        return lambda *args, options: seen.update({name: options.broadcast_from_rank0})

    monkeypatch.setattr(checkpoint, "world", lambda: 3)
    for name in ("set_optimizer_state_dict", "set_model_state_dict"):
        monkeypatch.setattr(checkpoint.dcp, name, note(name))
    checkpoint.load_checkpoint(Small(), [], None)
    equal(set(seen.values()), {True}, f"of several ranks: {seen}")
    equal(checkpoint.written_state(cfg, 3)["world"], 3, "state.json")
    monkeypatch.setattr(checkpoint, "world", lambda: 1)
    checkpoint.load_checkpoint(Small(), [], None)
    equal(set(seen.values()), {False}, "of one rank")


# ------------------------------------------------------------------------ around a step, signals


def around(cfg, step, inside=lambda: None, net=None):
    """A step, in which something happens. -> the exit status, or None."""
    net = net or Small()
    try:
        with checkpoint.saved_after(net, [stepped(net)], cfg, step):
            inside()
    except SystemExit as end:
        return end.code
    return None


@pytest.fixture
def terminal():
    """SIGHUP as in a terminal, also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def names_in(out) -> list:
    return [path.name for path in checkpoint.checkpoints_in(out)]


def leave_step():
    raise ending.StepLeft


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_ends_the_run_with_its_own_status_once_the_state_is_saved(cfg, number, capsys):
    """After the step, or before it where the step is left; then signals are what they were."""
    handlers = [signal.getsignal(x) for x in ending.SIGNALS]
    for inside, name in ((lambda: None, "step-00000006"), (leave_step, "step-00000005")):
        ending.note_signals()
        ending.on_signal(number, None)
        equal(around(cfg, 5, inside), 128 + number, "as a shell has it")
        equal(names_in(cfg.out)[-1 if name[-1] == "6" else 0], name, "the state that is saved")
        equal([signal.getsignal(x) for x in ending.SIGNALS], handlers, "forget_signals")
        equal((ending.stop_asked, ending.handlers_before), ([], {}), "forget_signals")
    said = capsys.readouterr().out
    expect("after step 6. --resume goes on" in said and "step 6 is left" in said, said, "", "said")


def test_of_a_first_step_that_is_left_nothing_is_saved(cfg):
    """Trap: optimisers that have taken no step would be saved without a state, or with one that
    PyTorch invents for the occasion; the run begins again at step 1 all the same."""
    ending.note_signals()
    ending.on_signal(signal.SIGTERM, None)
    equal(around(cfg, 0, leave_step), 128 + signal.SIGTERM, "as a shell has it")
    equal(names_in(cfg.out), [], "checkpoints")


def test_a_checkpoint_is_due_every_so_many_steps_but_after_the_last(cfg):
    """Which the model itself is; 0: none."""
    for every, want in ((3, [3, 6, 9]), (5, [5]), (0, [])):
        cfg.save_every, cfg.keep, cfg.out = every, 9, f"{cfg.out}{every}"
        for step in range(cfg.steps):
            equal(around(cfg, step), None, "it goes on")
        equal(names_in(cfg.out), [f"step-{n:08d}" for n in want], f"--save-every {every}")


def fail_with(error):
    """Something that happens inside of a step."""

    def fail():
        raise error

    return fail


@pytest.mark.parametrize("error", [ZeroDivisionError(), InputError("of one rank alone")])
def test_an_error_in_a_step_is_an_error_and_saves_nothing(cfg, error):
    """Signals are then what they were before the run. Of one rank's error the others know nothing:
    to save a sharded model would be to wait for them."""
    ending.note_signals()
    with pytest.raises(type(error)):
        around(cfg, 5, fail_with(error))
    equal((names_in(cfg.out), ending.handlers_before), ([], {}), "kept")


def test_an_error_of_all_ranks_costs_no_step_that_was_taken_before(cfg, monkeypatch):
    """A picture that breaks, or a loss that is not finite: the steps before are saved, and the line
    says where --resume goes on. Of the first step there is nothing to be saved. A signal ends no
    rank that waits for rank 0, for torchrun would then end that in its saving."""
    handlers = []
    monkeypatch.setattr(
        checkpoint,
        "gather_objects",
        lambda x: handlers.append(ending.handlers_before.copy()) or [x],
    )
    for step, names, way in (
        (0, [], ""),
        (5, ["step-00000005"], ". --resume goes on from step-00000005"),
    ):
        ending.note_signals()
        with pytest.raises(InputError, match=f"^a broken picture{re.escape(way)}$"):
            around(cfg, step, fail_with(OfAllRanks("a broken picture")))
        equal((names_in(cfg.out), ending.handlers_before), (names, {}), f"step {step + 1}")
        equal(len(handlers), len(names), "the ranks meet where there is something to be saved")
    assert handlers.pop(), "signals are noted until rank 0 is done"


def test_signals_are_noted_from_where_the_run_begins_to_its_end(cfg, terminal):
    """start_or_resume and finish; in between they end nothing."""
    handlers = [signal.getsignal(x) for x in ending.SIGNALS]
    net = Small()
    checkpoint.start_or_resume(net, [stepped(net)], cfg)
    equal([signal.getsignal(x) for x in ending.SIGNALS], [ending.on_signal] * 3, "noted")
    signal.raise_signal(signal.SIGINT)
    equal([wish.number for wish in ending.stop_asked], [signal.SIGINT], "and nothing else")
    Path(cfg.out).mkdir()
    checkpoint.finish(lambda *_: None, net, cfg)
    equal([signal.getsignal(x) for x in ending.SIGNALS], handlers, "finish")
    equal((ending.stop_asked, ending.handlers_before), ([], {}), "forget_signals")
    ending.note_signals()
    equal(set(ending.handlers_before), set(ending.SIGNALS), "they can be noted again")
    ending.forget_signals()


@pytest.mark.parametrize("deaf", [False, True])
def test_a_child_leaves_the_terminals_signal_to_its_parent(deaf, monkeypatch):
    """And SIGTERM, too, where the parent needs its work; else it ends by that as any process."""
    set_to, masks = {}, []
    monkeypatch.setattr(ending.signal, "signal", lambda number, how: set_to.update({number: how}))
    monkeypatch.setattr(ending.signal, "set_wakeup_fd", lambda fd: set_to.update(fd=fd))
    monkeypatch.setattr(ending.signal, "pthread_sigmask", lambda *args: masks.append(args))
    monkeypatch.setattr(ending, "outlive_nobody", lambda parent: None)
    ending.be_a_child(deaf)
    want = {signal.SIGINT: signal.SIG_IGN, signal.SIGHUP: signal.SIG_IGN, "fd": -1}
    want[signal.SIGTERM] = signal.SIG_IGN if deaf else signal.SIG_DFL
    equal(set_to, want, "be_a_child")
    equal(masks, [(signal.SIG_UNBLOCK, ending.SIGNALS)], "blocked around the fork, and no longer")


def test_under_nohup_a_closed_terminal_ends_nothing(terminal):
    """Whoever started the run has switched that off; all else is as ever."""
    equal(ending.ending_signals(), list(ending.SIGNALS), "in a terminal")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ending.note_signals()
    equal(signal.getsignal(signal.SIGHUP), signal.SIG_IGN, "ending.ending_signals")
    equal(set(ending.handlers_before), {signal.SIGINT, signal.SIGTERM}, "ending.note_signals")
    ending.forget_signals()


def test_a_process_of_ours_is_watched_from_its_first_moment(monkeypatch, terminal):
    """All signals; a thread reads what C's handler writes; children are told what they are."""
    set_to, threads, forks, pipes = {}, [], {}, []
    monkeypatch.setattr(ending, "pipes", pipes)
    monkeypatch.setattr(ending.signal, "signal", lambda number, how: set_to.update({number: how}))
    monkeypatch.setattr(ending.signal, "set_wakeup_fd", lambda fd, **_: set_to.update(fd=fd))
    monkeypatch.setattr(ending.os, "register_at_fork", lambda **calls: forks.update(calls))

    class Thread:
        def __init__(self, target, args, daemon):
            self.what = target, args, daemon

        def start(self):
            threads.append(self.what)

    monkeypatch.setattr(ending.threading, "Thread", Thread)
    ending.watch_signals()
    inside, outside = pipes
    equal(threads, [(ending.obey, (inside,), True)], "the thread that obeys")
    equal(set_to.pop("fd"), outside.fileno(), "where C's handler writes")
    equal(set_to, dict.fromkeys(ending.SIGNALS, ending.on_signal), "all signals")
    equal(forks["after_in_child"], ending.be_a_child, "children")
    masks = []
    monkeypatch.setattr(ending.signal, "pthread_sigmask", lambda *args: masks.append(args))
    forks["before"](), forks["after_in_parent"]()
    want = [(how, ending.SIGNALS) for how in (signal.SIG_BLOCK, signal.SIG_UNBLOCK)]
    equal(masks, want, "around the fork")
    for pipe in pipes:
        pipe.close()


# ---------------------------------------------------------------------------- beginning and ending


def test_a_finished_run_has_its_model_its_mark_and_no_checkpoints(cfg, capsys):
    """The mark is of the last step, with the flags."""
    net, _ = saved(cfg)
    wrote = []
    checkpoint.finish(lambda *args, **more: wrote.append((args, more)), net, cfg, is_embedder=False)
    equal(wrote, [((net, cfg.out), {"is_embedder": False})], "save")
    equal(checkpoint.checkpoints_in(cfg.out), [], "they are needed no more")
    equal(Path(cfg.out, "checkpoints").exists(), False, "nor is their folder")
    mark = json.loads(Path(cfg.out, checkpoint.FINISHED).read_text())
    equal((mark["step"], mark["config"]["steps"]), (10, 10), "finished.json")
    expect(f"saved {cfg.out}" in capsys.readouterr().out, "", "", "said")


def test_rank_0_alone_says_that_a_run_is_over(cfg, monkeypatch):
    """On another node there is no OUT: a mark would make one, without a model."""
    monkeypatch.setattr(checkpoint, "rank", lambda: 1)
    checkpoint.finish(lambda *_: None, Small(), cfg)
    equal(Path(cfg.out).exists(), False, "checkpoint.finish")


def test_the_checkpoints_stay_until_the_mark_is_there(cfg, monkeypatch):
    """A kill between the two must leave one of them: else --resume finds a model that no mark calls
    whole, and nothing to finish it from."""
    net, _ = saved(cfg)
    mark, there = checkpoint.mark_finished, []
    monkeypatch.setattr(
        checkpoint, "mark_finished", lambda cfg: (there.extend(names_in(cfg.out)), mark(cfg))
    )
    checkpoint.finish(lambda *_: None, net, cfg)
    equal(there, [STEP], "checkpoint.finish")


def test_a_model_that_cannot_be_saved_leaves_the_newest_checkpoint(cfg, monkeypatch):
    """Older ones make room, once; the way out is named."""
    cfg.keep = 3
    for step in (3, 5):
        net, _ = saved(cfg, step)
    tries = []

    def full(*_):
        tries.append(names_in(cfg.out))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "weight_of", lambda embedder: 3 * 2**20)
    says = r"the model is not saved: .*3\.0 MiB are needed in .*finishes from step-00000005"
    with pytest.raises(InputError, match=says):
        checkpoint.finish(full, net, cfg)
    equal(tries, [[STEP, "step-00000005"], ["step-00000005"]], "before each try")
    equal(Path(cfg.out, checkpoint.FINISHED).exists(), False, "the run is not over")


def test_a_run_begins_with_a_model_that_has_a_name_and_a_digest(cfg, monkeypatch):
    """Which all ranks agree on; so they do on the data and on what is trained of it."""
    agreed = []
    monkeypatch.setattr(checkpoint, "agree", lambda values, what: agreed.append((values, what)))
    monkeypatch.setattr(checkpoint, "stage_1_model", lambda: "toy-random")
    cfg = dataclasses.replace(cfg, model="")
    equal(checkpoint.begin(cfg), torch.device("cpu"), "this rank's device")
    equal((cfg.model, cfg.model_digest), ("toy-random", "toy-random"), "begin")
    equal(agreed[-1], ({"the model's files": "toy-random"}, "--model toy-random"), "the weights")
    cfg.data_digest = 12345
    net = Small()
    checkpoint.start_or_resume(net, [stepped(net)], cfg)
    checkpoint.forget_signals()
    data = {"data (their digest)": 12345, "--skip-bad": ""}
    equal(agreed[-3], (data, "--data shapes"), "the data")
    equal(agreed[-2], ({"the model's files": "toy-random"}, "--model toy-random"), "still the same")
    layout = (4, "mean", "chat", 2)
    want = {"K, pooling, prompt, trained weights": layout}, "--model toy-random"
    equal(agreed[-1], want, "the layout")


def test_a_model_that_one_rank_cannot_read_is_an_error_of_all(monkeypatch):
    """Else the others would wait for that rank, which has ended."""

    def digest(name):
        if ranks.rank() == 1:
            raise InputError("no such folder")
        return "digest"

    monkeypatch.setattr(checkpoint, "digest_of_model", digest)

    def work(rank):
        with pytest.raises(InputError, match="^rank 1 .*no such folder"):
            checkpoint.same_model("m")

    on_ranks(monkeypatch, 2, work)


def test_a_lock_that_its_run_has_just_removed_is_none(tmp_path, monkeypatch):
    """Between our opening it and our holding it that run may end: another one would lock a new
    file, and both would write."""
    path = tmp_path / "out" / "checkpoints" / "lock"
    path.parent.mkdir(parents=True)
    hold = locks.fcntl.lockf

    def removed_meanwhile(file, how):
        path.unlink()
        hold(file, how)

    monkeypatch.setattr(locks.fcntl, "lockf", removed_meanwhile)
    with pytest.raises(InputError, match="is in use by another command"):
        locks.lock(path, tmp_path)


def test_a_run_may_begin_where_another_one_ends_this_moment(cfg, monkeypatch):
    """At its end it removes the folder of its checkpoints, in which the lock would stand."""
    hold, tries = locks.lock, []

    def after_the_other(path, folder):
        if not tries:
            path.parent.rmdir()
        tries.append(path)
        hold(path, folder)

    monkeypatch.setattr(outfolder, "lock", after_the_other)
    outfolder.take(cfg)
    lock_file = Path(cfg.out, "checkpoints", "lock")
    equal((len(tries), lock_file.read_text()[:7]), (2, "process"), "take")
    locks.held.pop(lock_file.resolve()).close()


@pytest.mark.parametrize("start", ["toy", "toy-random", "elsewhere"])
def test_the_toys_own_folder_is_never_an_out(cfg, start):
    """Whatever a run starts from: every other one starts from the toy."""
    cfg = dataclasses.replace(cfg, model=start, out=str(folders.TOY))
    with pytest.raises(InputError, match="would overwrite .*toy/mllm"):
        outfolder.refuse_own_start(cfg)


@pytest.mark.parametrize("name", ["take", "refuse_taken"])
def test_what_rank_0_finds_wrong_with_out_all_are_told(cfg, monkeypatch, name):
    """The others have no OUT that they could look at, and would wait for it."""

    def wrong(cfg):
        if ranks.rank() == 0:
            raise InputError("OUT is taken")

    monkeypatch.setattr(checkpoint, "join", lambda cfg: torch.device("cpu"))
    for other in ("take", "refuse_taken"):
        monkeypatch.setattr(checkpoint, other, wrong if other == name else lambda cfg: None)

    def work(rank):
        with pytest.raises(InputError, match="OUT is taken"):
            checkpoint.begin(dataclasses.replace(cfg))

    on_ranks(monkeypatch, 2, work)


def test_a_checkpoint_that_rank_0_cannot_go_on_with_ends_all(cfg, monkeypatch):
    """It alone reads it; the others would wait for its weights."""

    def refused(shapes, cfg):
        equal(ranks.rank(), 0, "who reads")
        raise InputError("not the same run")

    monkeypatch.setattr(checkpoint, "newest_whole", refused)
    monkeypatch.setattr(checkpoint, "note_signals", lambda: None)  # of threads there are none
    nets = [Small(), Small()]

    def work(rank):
        with pytest.raises(InputError, match="not the same run"):
            checkpoint.start_or_resume(nets[rank], [], begun(cfg, resume=True))

    on_ranks(monkeypatch, 2, work)


def test_whether_a_run_is_finished_is_what_rank_0_finds_on_its_disk(cfg, monkeypatch):
    """A rank on another node has no mark; it ends with the others, and does not wait for them."""
    monkeypatch.setattr(checkpoint, "by_rank_0", lambda work: True)
    net = Small()
    with pytest.raises(SystemExit) as end:
        checkpoint.start_or_resume(net, [stepped(net)], begun(cfg, resume=True))
    checkpoint.forget_signals()
    equal(end.value.code, 0, "it is finished")


def test_what_is_in_the_folder_decides_whether_a_run_may_begin_there(cfg):
    """An unfinished run is gone on with, or left alone; a finished one may be replaced; a model
    that no run of ours has left is never taken for one's own."""
    resumed = begun(cfg, resume=True)
    checkpoint.refuse_taken(cfg)
    checkpoint.refuse_taken(resumed)  # nothing is there: it begins
    net, _ = saved(cfg)
    with pytest.raises(InputError, match=f"holds {STEP} of an unfinished run: --resume goes on"):
        checkpoint.refuse_taken(cfg)
    checkpoint.refuse_taken(resumed)
    other = begun(resumed, lr=0.5)
    with pytest.raises(InputError, match="not the same run: lr was 0.003, is 0.5"):
        checkpoint.refuse_taken(other)
    with pytest.raises(InputError, match="not the same run: model was 'toy-random', is 'toy'"):
        checkpoint.refuse_taken(dataclasses.replace(resumed, model="toy"))
    other = begun(resumed, data="a.jsonl")
    other.data_digest = 9
    checkpoint.refuse_taken(other)  # they are not read yet
    checkpoint.finish(lambda *_: None, net, cfg)
    checkpoint.refuse_taken(cfg)
    checkpoint.refuse_taken(resumed)
    with pytest.raises(InputError, match="not the same run: lr"):
        checkpoint.refuse_taken(begun(resumed, lr=0.5))
    Path(cfg.out, checkpoint.FINISHED).unlink()
    Path(cfg.out, "config.json").touch()
    with pytest.raises(InputError, match="holds a model, and no checkpoint to go on from"):
        checkpoint.refuse_taken(resumed)
    assert "without --resume" in checkpoint.way_on(resumed), "of the run that began in its place"
    checkpoint.refuse_taken(cfg)


def test_a_lock_names_the_process_that_holds_it_and_no_earlier_one(tmp_path):
    """What an earlier run has left in the file is not said of this one."""
    (tmp_path / "lock").write_text("process 99999999 on another-machine.example.org")
    locks.lock(tmp_path / "lock", tmp_path)
    words = (tmp_path / "lock").read_text()
    equal(words, f"process {os.getpid()} on {locks.socket.gethostname()}", "locks.lock")
    locks.held.pop((tmp_path / "lock").resolve()).close()


@pytest.mark.parametrize("out", ["", " ", "  \t"])
def test_a_folder_without_a_name_is_refused(cfg, out, tmp_path, monkeypatch):
    """Blanks are no name, and would be a folder that nobody finds."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--out"):
        outfolder.take(dataclasses.replace(cfg, out=out))
    equal(list(tmp_path.iterdir()), [], "nothing is made")


def test_other_words_of_the_same_number_are_other_data(tmp_path):
    """In one list, or in the second of two."""

    def read(folder, text):
        file = tmp_path / folder / "pairs.jsonl"
        file.parent.mkdir()
        rows = [{"query": {"text": x}, "target": {"text": x}} for x in (text, "z")]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return contrastive.read_pairs(str(file))["pairs"]

    one, same, other = read("a", "x"), read("b", "x"), read("c", "y")
    equal(checked_digest([one]), checked_digest([same]), "the same")
    expect(
        checked_digest([one]) != checked_digest([other]),
        checked_digest([one]),
        "another",
        "checked_digest",
    )
    expect(
        checked_digest([one, one]) != checked_digest([one, other]), "", "another", "the second list"
    )


def test_a_model_that_was_replaced_while_the_data_were_read_is_refused(cfg, monkeypatch):
    """Ranks would train different weights, and the run's digest would be of others."""
    monkeypatch.setattr(checkpoint, "digest_of_model", lambda name: "another")
    net = Small()
    with pytest.raises(InputError, match="--model toy-random: its files were replaced since"):
        checkpoint.start_or_resume(net, [stepped(net)], cfg)
    checkpoint.forget_signals()


@pytest.mark.parametrize("name", ["step-best", "step-00000003.bak", "step-3"])
def test_a_copy_of_a_checkpoint_is_none_of_the_run_s(cfg, name):
    """By its name it would be the newest for ever, or be removed as an old one."""
    saved(cfg)
    folder = Path(cfg.out, "checkpoints")
    (folder / STEP).rename(folder / name)
    net, _ = saved(cfg, step=5)
    equal([path.name for path in checkpoint.checkpoints_in(cfg.out)], ["step-00000005"], "ours")
    checkpoint.finish(lambda *_: None, net, cfg)
    equal([path.name for path in folder.iterdir()], [name], "remove_checkpoints")


def test_a_disk_that_refuses_costs_no_finished_run(cfg, monkeypatch, capsys):
    """The checkpoints' own one may be read-only by now: they stay, and the model is there."""
    net, _ = saved(cfg)
    Path(cfg.out, "checkpoints", "lock").write_text("x")

    def refused(self, missing_ok=False):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        checkpoint.remove_checkpoints(cfg.out)
    assert Path(cfg.out, "checkpoints", "lock").exists()


def test_a_finished_run_that_lacks_its_card_gets_it(cfg, monkeypatch):
    """It was killed between its mark and its card."""
    written = []
    monkeypatch.setattr(checkpoint.card, "write", written.append)
    monkeypatch.setattr(checkpoint, "is_finished", lambda cfg: True)
    again = dataclasses.replace(cfg, resume=True)
    monkeypatch.setattr(checkpoint, "same_model", lambda name: again.model_digest)
    net = Small()
    with pytest.raises(SystemExit) as ended:
        checkpoint.start_or_resume(net, [stepped(net)], again)
    equal((ended.value.code, written), (0, [cfg.out]), "start_or_resume")
    checkpoint.forget_signals()


def test_an_out_that_cannot_be_written_is_refused_wherever_its_checkpoints_lie(cfg, monkeypatch):
    """Their disk has room: a link to another one."""
    Path(cfg.out).mkdir(exist_ok=True)

    def refused(path, name):
        raise InputError(f"{name} {path}: not written: Read-only file system")

    monkeypatch.setattr(outfolder, "refuse_unwritable", refused)
    with pytest.raises(InputError, match="--out .*log.jsonl: not written: Read-only"):
        outfolder.take(cfg)
    locks.held.clear()


def test_a_lock_is_for_others_while_it_is_held(tmp_path, monkeypatch):
    """What is refused is a folder that another process writes; its own lock is no hindrance."""
    path = tmp_path / "lock"
    locks.refuse_locked(path, tmp_path)
    with locks.locked(path, tmp_path):
        locks.refuse_locked(path, tmp_path)
        assert path.resolve() in locks.held, "looking did not give it up"
    expect(not path.exists() and path.resolve() not in locks.held, locks.held, "no lock", "locked")
    path.touch()  # of a command that was killed
    locks.refuse_locked(path, tmp_path)
    expect(path.resolve() not in locks.held, locks.held, "no lock", "refuse_locked")

    def of_another(file, how):
        raise BlockingIOError

    monkeypatch.setattr(locks.fcntl, "lockf", of_another)
    with pytest.raises(InputError, match="is in use by another command"):
        locks.refuse_locked(path, tmp_path)
    with pytest.raises(InputError, match="is in use by another command"):
        with locks.locked(path, tmp_path):
            pass
    assert path.exists(), "the lock of another is not removed"


def test_a_lock_s_file_goes_before_the_lock_is_given_up(tmp_path, monkeypatch):
    """The other way round another command takes the lock in between, and a third one, which finds
    no file, makes a lock of its own: two would write."""
    unlink, held = Path.unlink, []

    def noted(path, **more):
        held.append(path.resolve() in locks.held)
        unlink(path, **more)

    monkeypatch.setattr(Path, "unlink", noted)
    with locks.locked(tmp_path / "lock", tmp_path):
        pass
    equal(held, [True], "locks.locked")


# --------------------------------------------------------------------------------- what is damaged


def test_a_checkpoint_that_is_damaged_again_is_laid_aside_again(cfg):
    """The run was resumed before it, came to the same step, and was damaged there once more."""
    net, _ = saved(cfg, step=3)
    saved(cfg, step=4)
    folder = Path(cfg.out, "checkpoints")
    (folder / "step-00000004" / "state.json").write_text("{}")
    (folder / "damaged-step-00000004").mkdir()
    (folder / "damaged-step-00000004" / "state.json").write_text("the first time")
    shapes = {name: p.shape for name, p in net.named_parameters() if p.requires_grad}
    equal(checkpoint.newest_whole(shapes, cfg).folder.name, STEP, "the one before")
    names = sorted(x.name for x in folder.iterdir())
    equal(names, ["damaged-step-00000004", STEP], "laid aside")


@pytest.mark.parametrize("fitting", ["x", -1, None])
def test_what_fitted_is_a_number_or_the_state_is_damaged(tmp_path, fitting):
    """It becomes --chunk-tokens of what is left of the run."""
    state = {"step": 1, "world": 1, "config": {"steps": 2, "fitting": fitting}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(checkpoint.Damaged, match="makes no sense"):
        checkpoint.read_state(tmp_path)


def test_a_pipe_in_the_optimisers_place_is_not_waited_for(cfg, no_waiting):
    """As one in the place of the weights."""
    saved(cfg)
    folder = Path(cfg.out, "checkpoints", STEP)
    (folder / "optimizer.pt").unlink()
    os.mkfifo(folder / "optimizer.pt")
    with pytest.raises(checkpoint.Damaged, match="is a pipe"):
        checkpoint.read_tensors(folder, {})


def test_a_damaged_state_is_told_when_it_is_read_and_refuses_no_run_before(cfg):
    """The checkpoint before it may be whole, see `newest_whole`."""
    Path(cfg.out, "checkpoints", STEP).mkdir(parents=True)
    checkpoint.refuse_taken(dataclasses.replace(cfg, resume=True))


def test_a_run_in_the_place_of_a_finished_one_begins_at_step_1(cfg):
    """Also where a kill left checkpoints behind the mark: without --resume none is gone on from."""
    net, optimizer = saved(cfg)
    mark = json.dumps(checkpoint.written_state(cfg, cfg.steps))
    Path(cfg.out, checkpoint.FINISHED).write_text(mark)
    checkpoint.refuse_taken(cfg)
    equal(checkpoint.start_or_resume(net, [optimizer], cfg), 0, "the step to begin with")
    checkpoint.forget_signals()
    equal(names_in(cfg.out), [], "checkpoint.forget_finished")


def test_the_mark_of_a_finished_run_goes_behind_its_checkpoints(cfg, monkeypatch):
    """A kill between the two would leave checkpoints without a mark: --resume would go on with the
    run that is over, and not with the one that was begun in its place."""
    saved(cfg)
    mark = Path(cfg.out, checkpoint.FINISHED)
    mark.write_text("{}")
    remove, marked = checkpoint.remove, []
    monkeypatch.setattr(
        checkpoint, "remove", lambda folder: (marked.append(mark.exists()), remove(folder))
    )
    checkpoint.forget_finished(cfg)
    equal((marked, mark.exists()), ([True], False), "checkpoint.forget_finished")


def test_a_lock_is_the_same_by_whatever_link_it_is_reached(tmp_path):
    """An OUT may be a link to another disk; by either name the folder is this process' own."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    before = set(locks.held)  # other runs' of this process
    with locks.locked(tmp_path / "out" / "lock", tmp_path / "out"):
        locks.refuse_locked(tmp_path / "disk" / "lock", tmp_path / "disk")
        mine = {(tmp_path / "disk" / "lock").resolve()}
        equal(set(locks.held) - before, mine, "locks.lock")
    equal(set(locks.held), before, "locks.locked")


def test_the_damaged_checkpoints_are_all_laid_aside(cfg):
    """One that stayed would be the newest for ever: --keep would remove the good ones before it."""
    cfg.keep = 3
    for step in (3, 5, 7):
        net, _ = saved(cfg, step)
    for name in ("step-00000005", "step-00000007"):
        Path(cfg.out, "checkpoints", name, "optimizer.pt").write_bytes(b"")
    shapes = {name: p.shape for name, p in net.named_parameters() if p.requires_grad}
    equal(checkpoint.newest_whole(shapes, cfg).state.step, 3, "the newest that can be read")
    equal(names_in(cfg.out), [STEP], "checkpoint.newest_whole")
