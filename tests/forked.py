"""Processes that are forks of this one, with all that it has imported. One that is started afresh
imports for five seconds before it does anything, and torchrun for three more: that is left to tests
of the start itself (test_scripts.py, test_ending.py) and of torchrun (test_torchrun.py)."""

import os
import signal
import socket
import sys
import time
import traceback

from plumbing import ending, ranks

LIMIT = 240  # seconds; processes that wait for each other would never end
GRACE = 15  # seconds, for the other ranks, when one has failed


def as_script(stage, words):
    """What `python STAGE.py WORDS` does, once all is imported."""
    ending.watch_signals()
    sys.argv = [f"{stage.__name__}.py", *map(str, words)]
    ranks.run(stage.main, stage.Config)


class Fork:
    """main() in a new process, in a group of its own; what it prints stands in the file `said`, and
    stderr in another one, if one is given. It ends with this process, whatever ends that."""

    def __init__(self, main, said, stderr=None, environment=(), folder="."):
        self.status = None  # as of subprocess; None while it runs
        sys.stdout.flush()
        self.pid = os.fork()
        # Here and there: whoever comes first.
        os.setpgid(self.pid, self.pid)
        if self.pid:
            return
        status = 1
        try:
            ending.be_a_child()
            os.environ.update(environment)
            sys.stdout = print_to(said, 1)
            sys.stderr = print_to(stderr or said, 2)
            os.chdir(folder)
            main()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            # Past pytest, and past the destructors of several runs in one process, as no script
            # has: one of some forty such ends was an abort, after everything was written.
            os._exit(status)

    def poll(self):
        """-> its status, None while it runs."""
        if self.status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if done else None
        return self.status

    def wait(self):
        """-> its status. Fails where it does not end."""
        end = time.monotonic() + LIMIT
        while self.poll() is None:
            assert time.monotonic() < end, "it does not end"
            time.sleep(0.01)
        return self.status

    def alive(self) -> bool:
        """Whether a process of its group is there, itself or one that it has left behind."""
        try:
            self.poll()
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def send(self, number):
        """A signal to it and to all of its group, as from a terminal."""
        os.killpg(self.pid, number)

    def kill(self):
        """It and all of its group, where they are still there."""
        if self.alive():
            self.send(signal.SIGKILL)
        self.wait()


def print_to(path, number):
    """A file in the place of a stream of this process. -> it, for Python."""
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, number)
    return os.fdopen(output, "w", buffering=1)


def on_ranks(world, main, folder, apart=False) -> list:
    """main() on so many ranks. What rank r prints stands in FOLDER/said-r.txt; apart: each rank is
    a machine of its own, and works in the folder FOLDER/r. None is left behind. -> their statuses;
    -9 where it was ended here, since another one had failed or the time was over."""
    torchrun = dict(WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    torchrun["LOCAL_WORLD_SIZE"] = 1 if apart else world
    forks, limit = [], time.monotonic() + LIMIT
    try:
        for rank in range(world):
            torchrun.update(RANK=rank, LOCAL_RANK=0 if apart else rank)
            words = {name: str(value) for name, value in torchrun.items()}
            place = folder / str(rank) if apart else "."
            forks.append(Fork(main, folder / f"said-{rank}.txt", None, words, place))
        while None in (statuses := [fork.poll() for fork in forks]) and time.monotonic() < limit:
            if any(statuses):
                limit = min(limit, time.monotonic() + GRACE)
            time.sleep(0.01)
    finally:
        for fork in forks:
            fork.kill()
    return [fork.status for fork in forks]


def said_on(folder) -> str:
    """The end of what the ranks printed."""
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("said-*.txt")))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
