"""Ranks that are forks of this process, with what torchrun would tell them. A rank that is started
afresh imports for five seconds before it does anything, and torchrun for three more: that is left
to tests of launcher, start and end (test_torchrun.py, test_ending.py)."""

import os
import signal
import socket
import sys
import time
import traceback

from plumbing import ending, ranks

LIMIT = 240  # seconds; ranks that wait for each other would never end
GRACE = 15  # seconds, for the others, when one has failed


def on_ranks(world, main, folder, apart=False) -> list:
    """main() on so many ranks. What rank r prints stands in FOLDER/said-r.txt; apart: each rank is
    a machine of its own, and works in the folder FOLDER/r. None is left behind. -> what each rank
    ended by: 0, another status, or "killed", since one had failed or the time was over."""
    torchrun = dict(WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    torchrun["LOCAL_WORLD_SIZE"] = 1 if apart else world
    running = {}  # process id -> rank
    try:
        for rank in range(world):
            torchrun.update(RANK=rank, LOCAL_RANK=0 if apart else rank)
            words = {name: str(value) for name, value in torchrun.items()}
            said, place = folder / f"said-{rank}.txt", folder / str(rank) if apart else "."
            running[fork(main, words, said, place)] = rank
        ended = wait(running)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return [ended.get(rank, "killed") for rank in range(world)]


def as_script(stage, words):
    """What `python STAGE.py WORDS` does, once all is imported."""
    ending.watch_signals()
    sys.argv = [f"{stage.__name__}.py", *map(str, words)]
    ranks.run(stage.main, stage.Config)


def said_on(folder) -> str:
    """The end of what the ranks printed."""
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("said-*.txt")))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait(running) -> dict:
    """Until all have ended, the time is over, or a rank has failed and GRACE is over; those that
    ended are taken out of {process id: rank}. -> {rank: status}."""
    ended, limit = {}, time.monotonic() + LIMIT
    while running and time.monotonic() < limit:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[running.pop(pid)] = os.waitstatus_to_exitcode(status)
                if status:
                    limit = min(limit, time.monotonic() + GRACE)
        time.sleep(0.01)
    return ended


def fork(main, environment, said, place) -> int:
    """-> the id of a new process, which does nothing but main()."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        ending.be_a_child()
        os.environ.update(environment)
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
        os.chdir(place)
        main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Past pytest, and past the destructors of several runs in one process, as no script has:
        # one of some forty such ends was an abort, after everything was written.
        os._exit(status)
