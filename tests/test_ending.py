"""How a process ends: whatever ends it ends it soon, with one line or the traceback, and nobody is
left behind. The limits are far above what is needed: they are there for what would hang."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ends
import pytest
import torch
from checks import equal, expect
from forked import Fork, as_script, on_ranks, said_on
from safetensors.torch import load_file

import contrastive
import evaluate
import pretrain
from plumbing import checkpoint, ending, ranks, start
from plumbing.errors import InputError
from tools import (
    check,
    compare_logs,
    condense,
    explain,
    export,
    figures,
    generate,
    lessons,
    look,
    merge,
    mine,
    search,
)

ROOT = Path(__file__).parent.parent
LIMIT = 240  # seconds


def begin(*words, **options):
    """A process in a group of its own, in the background; both its outputs in one pipe each."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(words, cwd=ROOT, text=True, start_new_session=True, **pipes)


def forked(main, folder):
    """A fork of this process from its beginning to its end. -> (status, stdout, stderr)."""
    return ended(Fork(main, folder / "stdout", folder / "stderr"), folder)


def ended(fork, folder):
    """-> (status, stdout, stderr). Fails where the process hangs, or leaves processes behind."""
    try:
        status = fork.wait()
        for _ in range(100):  # a loader process looks every half second whether its rank is there
            if not fork.alive():
                return status, (folder / "stdout").read_text(), (folder / "stderr").read_text()
            time.sleep(0.1)
        pytest.fail("processes are left behind")
    finally:
        fork.kill()


def finish(process):
    """-> (status, stdout, stderr). Fails where the process hangs, or leaves processes behind."""
    try:
        out, err = process.communicate(timeout=LIMIT)
        for _ in range(100):  # a loader process looks every half second whether its rank is there
            if not alive(process.pid):
                return process.returncode, out, err
            time.sleep(0.1)
        pytest.fail("processes are left behind")
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def alive(group):
    """Whether a process of the group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# ------------------------------------------------------------------------------------------ errors


def test_an_error_that_nobody_expects_ends_all_ranks_with_its_traceback(tmp_path):
    """On rank 0 of two, with loader processes: it printed the traceback, and hung for ever."""
    equal(on_ranks(2, lambda: ends.fail_in_a_step(tmp_path), tmp_path), [1, 1], said_on(tmp_path))
    said = [(tmp_path / f"said-{rank}.txt").read_text() for rank in (0, 1)]
    assert "RuntimeError: CUDA error: an illegal memory access" in said[0], said[0]
    assert "contrastive.py: rank 1 lost the others" in said[1], said[1]


def test_a_loader_process_that_is_killed_is_one_clear_line(tmp_path):
    """By the system, where memory is short. And no progress bar in a log file."""
    status, out, err = forked(lambda: ends.lose_a_worker(tmp_path), tmp_path)
    equal((status, err.count("\n")), (1, 1), err)
    says = "a loader process has ended (signal 9, as the system sends where memory is short)"
    assert f"{says}: try fewer --workers" in err, err
    assert "step     1/4" in out and "%|" not in out + err and "\r" not in out + err, out + err


def test_errors_name_the_command(monkeypatch):
    """`python -m tools.merge` is merge, a stage is its file."""
    for path, name in (("/x/tools/merge.py", "merge"), ("pretrain.py", "pretrain.py")):
        monkeypatch.setattr(sys, "argv", [path])
        equal(ending.script_name(), name, path)


def test_a_rank_without_torchrun_is_one_clear_line(monkeypatch):
    """RANK alone waited for an address, or was a KeyError of torch."""
    for name in ranks.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="RANK is set, but not WORLD_SIZE, LOCAL_RANK, MASTER_A"):
        ranks.setup()
    values = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in {**values, "MASTER_PORT": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="MASTER_PORT=x: not a number"):
        ranks.setup()
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(InputError, match="RANK=2 is not below WORLD_SIZE=2"):
        ranks.setup()


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    """`python -m tools.check talks.jsonl | head -1`, and its help (argparse itself takes no
    notice): not a word, and the status that any program has there."""
    (tmp_path / "pairs.jsonl").write_text('{"query": {"text": "q"}, "target": {"text": "t"}}\n')
    help_status = 0 if sys.version_info >= (3, 11) else 141  # argparse takes notice of it there
    cases = {("tools.look", "--help"): help_status, ("tools.check", tmp_path / "pairs.jsonl"): 141}
    for words, expected in cases.items():
        reader, writer = os.pipe()
        os.close(reader)
        process = begin("-u", "-m", *words, stdout=writer)
        os.close(writer)
        status, _, err = finish(process)
        equal((status, err), (expected, ""), words)


class Ended(BaseException):
    """In the place of os._exit: (status)."""


@pytest.fixture
def ours(monkeypatch):
    """This process looks like one that plumbing/start.py took over."""
    monkeypatch.setattr(ending, "pipes", [None])
    monkeypatch.setattr(ending, "leaving", threading.Lock())

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)


WAYS_OUT = [  # what ends a process, its status, what stderr says
    (SystemExit(0), 0, ""),
    (SystemExit(None), 0, ""),
    (SystemExit(3), 3, ""),
    (SystemExit("no such word"), 1, "no such word\n"),
    (ending.Stopped(signal.SIGTERM), 143, "x.py: ended by SIGTERM\n"),
    (ending.Stopped(signal.SIGINT), 130, "x.py: ended by SIGINT\n"),
    (KeyboardInterrupt(), 130, "x.py: ended by SIGINT\n"),
    (InputError("line 3: no query"), 1, "x.py: line 3: no query\n"),
    (ZeroDivisionError("x"), 1, "Traceback"),
    (BrokenPipeError(32, "of a server"), 1, "Traceback"),  # both outputs are read
]


@pytest.mark.parametrize("error, status, says", WAYS_OUT, ids=lambda x: repr(x)[:30])
def test_each_way_out_has_its_status_and_its_words(error, status, says, ours, monkeypatch, capfd):
    """On stderr; a traceback only of what a user cannot put right."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py"])
    with pytest.raises(Ended) as end:
        try:
            raise error  # as an error that has a traceback
        except BaseException as e:
            ending.leave_by(e)
    out, err = capfd.readouterr()
    equal((end.value.args, out), ((status,), ""), err)
    if says == "Traceback":
        expect("Traceback" in err and type(error).__name__ in err, err, "the traceback", "leave_by")
    else:
        equal(err, says, "leave_by")


def test_a_process_of_ours_ends_with_its_parent(ours, monkeypatch):
    """However that ended."""

    def sleep(seconds):
        raise TimeoutError

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(TimeoutError):
        ending.outlive_nobody(os.getppid())
    with pytest.raises(Ended):
        ending.outlive_nobody(os.getppid() + 1)


def test_start_takes_over_scripts_of_ours_and_nothing_else(monkeypatch):
    """Signals and errors from the first moment; help before anything heavy."""
    taken = []
    monkeypatch.setattr(start, "watch_signals", lambda: taken.append("signals"))
    monkeypatch.setattr(start, "leave", lambda status: taken.append(f"help, {status}"))
    hook = sys.excepthook
    main = sys.modules["__main__"]
    for file, word, want in (
        (ROOT / "pretrain.py", "--steps", ["signals"]),
        (ROOT / "pretrain.py", "-h", ["signals", "help, 0"]),
        (ROOT / "tools" / "look.py", "--help", ["signals", "help, 0"]),
        (ROOT / "tests" / "ends.py", "-h", []),
        ("/elsewhere/pretrain.py", "-h", []),
        ("", "-h", []),
    ):
        monkeypatch.setattr(main, "__file__", str(file), raising=False)
        monkeypatch.setattr(sys, "argv", [str(file), word])
        monkeypatch.setattr(sys, "excepthook", hook)
        taken.clear()
        start.begin()
        equal((taken, sys.excepthook is not hook), (want, bool(want)), (file, word))


# ----------------------------------------------------------------------------------------- signals


class Clock:
    """In the place of the module `time`."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Pipe:
    """[(second, number), ...]: signals as they arrive."""

    def __init__(self, clock, *signals):
        self.clock, self.signals = clock, list(signals)

    def recv(self, size):
        self.clock.now, number = self.signals.pop(0)
        return bytes([number])


INT, TERM, CHILD = signal.SIGINT, signal.SIGTERM, signal.SIGCHLD
ARRIVE = [  # (does a run note signals, what arrives when, when it ends, how)
    (False, [(1, TERM)], 4.0, ("ended by SIGTERM", 143)),
    (False, [(1, CHILD), (2, INT)], 5.0, ("ended by SIGINT", 130)),
    (True, [(1, INT), (1.1, INT), (9, TERM)], 9, ("ended by a second SIGTERM", 143)),
    (True, [(1, TERM), (2.9, TERM), (3.1, INT)], 3.1, ("ended by a second SIGINT", 130)),
]


@pytest.mark.parametrize("noted, arrive, at, how", ARRIVE)
def test_a_thread_ends_what_the_main_thread_cannot(noted, arrive, at, how, monkeypatch):
    """A command has three seconds for its files; a training run goes on after a first signal, which
    may come twice at once (the terminal's, and torchrun's), and ends by a later one."""
    clock = Clock()

    def leave(*words):
        raise Ended(*words)

    monkeypatch.setattr(ending, "time", clock)
    monkeypatch.setattr(ending, "leave", leave)
    monkeypatch.setattr(ending, "handlers_before", {INT: None} if noted else {})
    with pytest.raises(Ended) as end:
        ending.obey(Pipe(clock, *arrive))
    equal((end.value.args, clock.now), (how, at), "ending.obey")


def test_the_first_signal_counts(monkeypatch):
    """Of a training run's, for the time that a step may take; of a command's a second one does not
    break into what the first one began."""
    clock = Clock()
    monkeypatch.setattr(ending, "time", clock)
    monkeypatch.setattr(ending, "stop_asked", [])
    with monkeypatch.context() as patch:
        patch.setattr(ending, "handlers_before", {INT: None})
        assert not ending.overdue()
        ending.on_signal(TERM, None)
        clock.sleep(4.0)
        ending.on_signal(INT, None)
        assert [wish.number for wish in ending.stop_asked] == [TERM, INT] and not ending.overdue()
        clock.sleep(1.5)
        assert ending.overdue()
    monkeypatch.setattr(ending, "unwinding", threading.Event())
    with pytest.raises(ending.Stopped) as stopped:
        ending.on_signal(TERM, None)
    assert stopped.value.number == TERM
    ending.on_signal(INT, None)


def test_a_run_in_another_thread_leaves_signals_alone():
    """As a notebook's may be: Python lets the main thread alone set handlers."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ending.note_signals).result()
    equal(ending.handlers_before, {}, "none was set")


@pytest.mark.parametrize("others, step, saved", [(1, 3, [4]), (0, 3, []), (0, 4, [5]), (0, 9, [])])
def test_a_signal_to_another_rank_ends_this_one_too(
    others, step, saved, shared, tmp_path, monkeypatch
):
    """After the step, saved. Without one a checkpoint is made every --save-every steps, but for the
    last one, after which the model is."""
    monkeypatch.setattr(checkpoint, "all_sum", lambda mine: mine + others)
    cfg = pretrain.Config(out=str(tmp_path), steps=10, save_every=5)
    status = None
    try:
        with checkpoint.saved_after(shared, [torch.optim.SGD(shared.parameters(), 0.1)], cfg, step):
            pass
    except SystemExit as end:
        status = end.code
    equal(status, 143 if others else None, "checkpoint.stop")
    names = [folder.name for folder in checkpoint.checkpoints_in(tmp_path)]
    equal(names, [f"step-{n:08d}" for n in saved], "checkpoint.saved_after")


def begin_fork(main, folder, word):
    """A fork of this process, in the background, as soon as it has printed `word`."""
    fork, said = Fork(main, folder / "stdout", folder / "stderr"), folder / "stdout"
    deadline = time.time() + LIMIT
    while not said.exists() or word not in said.read_text():
        assert time.time() < deadline and fork.poll() is None, f"no {word}"
        time.sleep(0.01)
    return fork


def check_ended(status, err, number):
    """One line, and the status that a shell gives."""
    line = f"ended by {signal.Signals(number).name}\n"
    assert status == 128 + number and err.count("\n") == 1 and err.endswith(line), (status, err)


def test_a_signal_while_torch_is_imported(tmp_path):
    """It was a KeyboardInterrupt somewhere in torch, with 40 lines."""
    process = begin("pretrain.py", "--out", tmp_path, "--model", "no-such-folder/x")
    deadline = time.time() + LIMIT
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert time.time() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = finish(process)
    check_ended(status, err, signal.SIGINT)


def test_a_signal_within_one_call_of_c(tmp_path):
    """Which may last for minutes, and Python's own handler waits for its end."""
    fork = begin_fork(ends.be_deaf, tmp_path, "deaf")
    time.sleep(1)  # it says so just before
    os.kill(fork.pid, signal.SIGTERM)
    status, _, err = ended(fork, tmp_path)
    check_ended(status, err, signal.SIGTERM)


def test_a_signal_while_a_model_is_evaluated_by_two_workers(tmp_path):
    """To the rank and to its workers, as from a terminal."""
    words = ["--model", "toy-random", "--subsets", "vqa,ground", "--limit", 2000, "--workers", 2]
    fork = begin_fork(lambda: as_script(evaluate, words), tmp_path, "-- in distribution")
    time.sleep(0.5)
    fork.send(signal.SIGINT)
    status, _, err = ended(fork, tmp_path)
    check_ended(status, err, signal.SIGINT)


def test_a_terminal_that_is_closed_lets_a_run_save(tmp_path):
    """Its signal comes, and from then on whatever is printed fails."""
    master, slave = os.openpty()

    def main():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where these tests run under nohup
        for number in (1, 2):
            os.dup2(slave, number)
        os.close(slave), os.close(master)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
        as_script(pretrain, [*ends.SMALL, "--steps", "5000", "--out", tmp_path / "out"])

    fork, log = Fork(main, tmp_path / "stdout"), tmp_path / "out/log.jsonl"
    os.close(slave)
    deadline = time.time() + LIMIT
    while not log.exists() or log.read_text().count("\n") < 3:
        assert time.time() < deadline and fork.poll() is None, os.read(master, 9999)
        time.sleep(0.01)
    os.close(master)
    fork.send(signal.SIGHUP)
    equal(fork.wait(), 128 + signal.SIGHUP, "as a shell has it")
    saved = [path.name for path in checkpoint.checkpoints_in(tmp_path / "out")]
    expect(saved, saved, "a checkpoint", "ranks.say: EIO")


def test_what_ended_the_reader_of_the_output_ends_no_run(monkeypatch):
    """Ctrl-C reaches `tee`, too. Before that a pipe that nobody reads ends the run, as any other
    program's."""

    def closed(text):
        raise BrokenPipeError(errno.EPIPE, "nobody reads it")

    monkeypatch.setattr(ranks.tqdm, "write", closed)
    monkeypatch.setattr(ending, "unsaid", [])
    with pytest.raises(BrokenPipeError):
        ranks.say("step 1")
    monkeypatch.setattr(ranks, "stop_asked", [ending.NotedSignal(signal.SIGINT, 0.0)])
    ranks.say("step 2")


def test_a_pool_of_processes_can_still_be_ended(tmp_path):
    """`multiprocessing` ends its own by SIGTERM, and waits for them."""
    status, _, err = forked(ends.use_a_pool, tmp_path)
    equal((status, err), (0, ""), "ending.be_a_child")


@pytest.mark.parametrize("name", ["pretrain", "contrastive"])
def test_a_step_that_takes_too_long_is_left(tmp_path, name, capsys):
    """Between two chunks, with the state before it saved; resumed, the run is the uninterrupted
    one, bit for bit. The handlers are those of before."""
    stage, flags = ends.WAYS[name]
    flags = [*flags, "--steps", "3", "--workers", "0"]
    handlers = [signal.getsignal(s) for s in ending.SIGNALS]
    equal(ends.left(stage, [*flags, "--out", f"{tmp_path}/a"]), 130, "SIGINT")
    equal([signal.getsignal(s) for s in ending.SIGNALS], handlers, "ending.forget_signals")
    assert "step 2 is left, as if it had not begun" in capsys.readouterr().out
    assert (tmp_path / "a/checkpoints/step-00000001").exists()
    stage.main(stage.Config.parse([*flags, "--out", f"{tmp_path}/a", "--resume"]))
    stage.main(stage.Config.parse([*flags, "--out", f"{tmp_path}/b"]))
    equal([signal.getsignal(s) for s in ending.SIGNALS], handlers, "ending.forget_signals")
    for part in ("model.safetensors",):
        a, b = (Path(tmp_path, x, part).read_bytes() for x in "ab")
        assert a == b, f"{part}: the left step has left something"


def test_a_short_step_is_finished(monkeypatch, tmp_path, capsys):
    """A signal in the midst of it, and time enough: the step counts."""
    stage, flags = ends.WAYS["pretrain"]
    monkeypatch.setattr(ends, "TOO_LONG", 1000.0)
    equal(ends.left(stage, [*flags, "--workers", "0", "--out", str(tmp_path)]), 130, "SIGINT")
    assert "stopped by a signal after step 2" in capsys.readouterr().out
    assert (tmp_path / "checkpoints/step-00000002").exists()


def test_all_ranks_leave_the_step_that_one_of_them_leaves(tmp_path):
    """The signal reaches rank 1 alone, in both stages and where the model is sharded."""
    statuses = on_ranks(2, lambda: ends.leave_steps(tmp_path), tmp_path)
    equal(statuses, [0, 0], said_on(tmp_path))
    codes = json.loads((tmp_path / "codes.json").read_text())
    equal(codes, dict.fromkeys(ends.WAYS, 143), "rank 0, which got none: checkpoint.stop")
    out = (tmp_path / "said-0.txt").read_text()
    equal(out.count("step 2 is left, as if it had not begun"), 3, out)
    for name in ends.WAYS:
        saved = tmp_path / name / "checkpoints/step-00000001/weights.safetensors"
        expect(load_file(saved), "nothing", "weights", name)


def test_a_checkpoint_that_is_there_is_not_written_again(shared, tmp_path):
    """The step after it was left: the state is the same."""
    folder = tmp_path / "checkpoints/step-00000003"
    folder.mkdir(parents=True)
    (folder / "mark").touch()
    cfg = ends.pretrain.Config(out=str(tmp_path))
    checkpoint.save_checkpoint(shared, [torch.optim.SGD(shared.parameters(), 0.1)], cfg, 3)
    equal([path.name for path in folder.parent.iterdir()], ["step-00000003"], "no other")
    assert (folder / "mark").exists()


# -------------------------------------------------------------------------------------------- help

COMMANDS = [
    check,
    compare_logs,
    condense,
    explain,
    export,
    figures,
    generate,
    lessons,
    look,
    merge,
    mine,
    search,
]


def test_every_script_begins_with_start():
    """In front of torch: a signal, or --help, may come first."""
    files = [Path(m.__file__) for m in (pretrain, contrastive, evaluate, *COMMANDS)]
    mains = [p for p in ROOT.glob("tools/*.py") if "\ndef main(" in p.read_text()]
    equal(set(mains) - set(files), set(), "COMMANDS")
    for path in files:
        imports = [x for x in path.read_text().splitlines() if x.startswith(("import ", "from "))]
        expect(imports[0].startswith("import plumbing.start"), imports[0], start.__name__, path)


@pytest.mark.parametrize("script", [pretrain, contrastive, evaluate, *COMMANDS])
def test_help_is_answered_without_torch(script, monkeypatch, capsys):
    """Within two seconds, then; it took ten. And it is the help of the script's own Config."""
    words = ["-m", script.__name__] if script in COMMANDS else [f"{script.__name__}.py"]
    command = [sys.executable, "-X", "importtime", *words, "--help"]
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    equal((done.returncode, "torch._C" in done.stderr), (0, False), done.stderr[-2000:])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        script.Config.parse(["--help"])
    # The usage above the docstring names the program, which is pytest here.
    said, want = (text.partition("\n\n")[2] for text in (done.stdout, capsys.readouterr().out))
    equal(said, want, "plumbing/start.py reads the same flags as the script declares")


@pytest.mark.parametrize("policy, spins", [(None, "2000"), ("ACTIVE", None)])
def test_threads_that_wait_spin_for_a_short_time(monkeypatch, policy, spins):
    """The scripts say so to OpenMP before torch is loaded, unless the user has said anything."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    script = str(ROOT / "pretrain.py")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", script, raising=False)
    monkeypatch.setattr(start, "watch_signals", lambda: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    start.begin()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    source = (ROOT / "pretrain.py").read_text()
    assert source.index("import plumbing.start") < source.index("import torch")
