"""How a process of ours ends. At a signal (Ctrl-C, SIGTERM, a closed terminal) a command ends
within five seconds; a training run first ends its step, or leaves one that takes too long, and
saves its state. Both print one line, and their exit status is 130, 143 or 129. At an error a
process ends at once. It never waits for other ranks or for loader processes. (plumbing/start.py
switches this on.)"""

import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from plumbing.errors import InputError

OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)  # sent to all that run in it
SIGNALS = (*OF_A_TERMINAL, signal.SIGTERM)
UNWIND = 3.0  # seconds that a command has to put its files in order
SAME_SIGNAL = 2.0  # seconds: a second signal within them is the first one again, see `obey`
LEAVE_STEP = 5.0  # seconds that a step may go on after a signal, see `overdue`

# ---------------------------------------------------------------------------------------- signals


class Stopped(KeyboardInterrupt):
    """A signal, raised in the main thread. Not an Exception: nobody takes it for a failure."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class StepLeft(Exception):
    """A step that would end too late after a signal is left in its midst, by all ranks alike."""


class NotedSignal(NamedTuple):
    """A signal that a training run has noted."""

    number: int
    time: float  # seconds, of time.monotonic


pipes = []  # kept open, see watch_signals; empty in a process that is not ours to end
stop_asked = []  # NotedSignals; looked at after each step, and between its chunks
unwinding = threading.Event()  # a Stopped is on its way
handlers_before = {}  # while a training run notes signals: what they did before, by number


def on_signal(number, frame):
    """In the main thread, between two lines of Python."""
    if handlers_before:
        stop_asked.append(NotedSignal(number, time.monotonic()))
    elif not unwinding.is_set():  # a second one must not break into what the first one began
        unwinding.set()
        raise Stopped(number)


def ending_signals() -> list:
    """The signals that end this process: under nohup a closed terminal is none."""
    is_off = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not is_off]


def note_signals():
    """From here on signals are noted, and the training run ends itself by them."""
    if not handlers_before and threading.current_thread() is threading.main_thread():
        for number in ending_signals():
            handlers_before[number] = signal.signal(number, on_signal)


def forget_signals():
    """The training run is over: signals do what they did before it."""
    for number, handler in handlers_before.items():
        signal.signal(number, handler or signal.SIG_DFL)
    handlers_before.clear()
    stop_asked.clear()


def overdue() -> bool:
    """Whether a signal waits so long already that the step is better left: whoever sent it
    (torchrun, a cluster) kills the process some 30 seconds later."""
    return bool(stop_asked) and time.monotonic() - stop_asked[0].time > LEAVE_STEP


def obey(pipe):
    """The thread that ends the process where its main thread cannot: that may be inside one call of
    C (an import, a collective, reading 13 GB) for minutes."""
    first = None
    while True:
        number = pipe.recv(1)[0]
        if number not in SIGNALS:
            continue
        first = first or time.monotonic()
        if handlers_before:
            # Trap: Ctrl-C reaches a rank twice, from the terminal and from torchrun.
            if time.monotonic() - first > SAME_SIGNAL:
                leave(f"ended by a second {signal.Signals(number).name}", 128 + number)
        else:
            time.sleep(UNWIND)
            leave(f"ended by {signal.Signals(number).name}", 128 + number)


def watch_signals():
    """Once a process, in its main thread."""
    inside, outside = socket.socketpair()
    outside.setblocking(False)
    # Written by the C handler itself, whatever the main thread is doing.
    signal.set_wakeup_fd(outside.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=obey, args=(inside,), daemon=True).start()
    pipes.extend((inside, outside))
    for number in ending_signals():
        signal.signal(number, on_signal)
    # Blocked around a fork: a child must not answer a signal in its parent's place.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
        after_in_child=be_a_child,
    )


def ignore_terminal():
    """What a terminal sends is for the parent of this process, which ends it."""
    for number in OF_A_TERMINAL:
        signal.signal(number, signal.SIG_IGN)


def be_a_child(deaf=False):
    """What a forked process does first: it leaves the terminal's signals to its parent, and ends
    with it. deaf: SIGTERM, too, for the parent still needs its work (a training step its batch)."""
    signal.set_wakeup_fd(-1)
    ignore_terminal()
    # Trap: not for all. A multiprocessing.Pool is ended by SIGTERM, and joined.
    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    # A signal would be no help: what kills a rank with -9 sends none.
    threading.Thread(target=outlive_nobody, args=(os.getppid(),), daemon=True).start()


def outlive_nobody(parent):
    """Trap: a rank that is killed leaves its children; they hold its sockets open, and the other
    ranks would wait for it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


# ------------------------------------------------------------------------------------------ ending

leaving = threading.Lock()  # the line is printed once
unsaid = []  # what the disk under the output said, when it was full


def leave(message="", status=1):
    """Ends this process with at most one line, which names the script, and an exit status. In
    somebody else's process (a test, a notebook) it is a SystemExit."""
    if not pipes:
        raise SystemExit(f"{script_name()}: {message}" if message else status)
    if not leaving.acquire(blocking=False):
        time.sleep(1)  # another thread is at it; unless nobody reads what it prints
        os._exit(status)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads it
        status = status or 128 + signal.SIGPIPE
    except (OSError, ValueError) as e:  # a full disk below it
        unsaid.append(str(e))
    if unsaid:
        message, status = message or f"not all that it printed is there: {unsaid[0]}", status or 1
    try:
        if message:
            line = "\n" if sys.stderr.isatty() else ""  # below a progress bar
            print(f"{line}{script_name()}: {message}", file=sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
    # Not through destructors: they may wait for the other ranks, or for loader processes.
    os._exit(status)


def script_name() -> str:
    """As errors say it: pretrain.py; of `python -m tools.merge` merge."""
    path = Path(sys.argv[0])
    return path.stem if path.parent.name == "tools" else path.name


def leave_by(error):
    """Ends this process by what nobody caught: one line for what a user can put right and for a
    signal, else the traceback."""
    if not pipes and not isinstance(error, InputError):
        raise error
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            leave(status=1)
        leave(status=error.code or 0)
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        leave(f"ended by {signal.Signals(number).name}", 128 + number)
    if isinstance(error, InputError):
        leave(str(error))
    if isinstance(error, BrokenPipeError) and not output_is_read():
        leave(status=128 + signal.SIGPIPE)  # as of any program in front of `| head`
    try:
        traceback.print_exception(error)
    finally:
        leave()


def output_is_read() -> bool:
    """Whether both outputs still have a reader."""
    poll = select.poll()
    for fd in (1, 2):
        poll.register(fd, 0)  # POLLERR is reported unasked
    return not any(event & select.POLLERR for _, event in poll.poll(0))
