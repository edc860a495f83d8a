"""How a process is stopped: the signals, and how long each step of a stop may take.

A stop is Ctrl-C (SIGINT) or SIGTERM. The limits below are in the order in which they expire; each is
longer than everything that must end before it, so that no process is killed while it saves or delivers.

1. A stage that is not training ends at once; where Python drops the Ctrl-C, it comes again after REPEAT.
   The stage's last delivery to MLflow takes STOPPED_DELIVERY at most.
2. A stage that hangs (a broken import can leave another thread waiting) is ended by the kernel after CTRL_C.
3. A training finishes the current step and saves it, within SAVE, and delivers like 1.
4. The launcher of several processes kills those that have not ended after LAUNCHER_KILL.
5. A stage whose `dvc repro` or launcher has exited stops itself as 3, and exits after WATCHDOG_KILL.
6. A cancelled flow kills what remains of `dvc repro` and its stage after FLOW_KILL.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

# All in seconds. MLflow gets its last records when a stage has done its work: a SQLite file, which may have
# to be set up first (8 s on two cores, more when they are busy), is sure to take them; a server that has not
# taken them in DELIVERY is not waited for any longer, and `spo sync` delivers later.
DELIVERY = {"local": 120.0, "remote": 15.0}
REPEAT = 0.05  # until Ctrl-C comes again where Python dropped it (2 of 8 times in `generate`, in sqlalchemy)
STOPPED_DELIVERY = 10.0  # a user who pressed Ctrl-C waits; the records stay in .spo/runs
CTRL_C = 40  # whole seconds, for the kernel's clock: on overloaded cores 9 to 13 s pass beside the delivery
SAVE = 120.0  # a step of the default experiment is saved within 9 s on two cores; larger models take longer
LAUNCHER_KILL = SAVE + 20.0  # a save, a delivery and Python's exit
WATCHDOG_POLL = 0.5  # how often a stage checks that its parent is alive
WATCHDOG_KILL = LAUNCHER_KILL + 10.0  # an orphaned launcher has ended its processes by then
FLOW_KILL = WATCHDOG_KILL + 10.0  # the flow is the outermost; it does not wait after all have ended
# No process waits in a collective for the long work of another; only the time to fetch models differs between
# machines. A process that has died is noticed at once.
COLLECTIVE = timedelta(minutes=30)

LAUNCHED = "TORCHELASTIC_RUN_ID"  # environment: set by torch's launcher for what it starts

Handler = Callable[[int, FrameType | None], Any]


def arm_ctrl_c() -> None:
    """Let the kernel end this process CTRL_C seconds after a Ctrl-C, even if Python drops it.

    Python drops an exception that is raised in a finaliser or a callback of a weak reference, and reports it
    to `sys.unraisablehook`: then Ctrl-C comes once more.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if signal.getitimer(signal.ITIMER_REAL)[0] == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(CTRL_C)
        signal.default_int_handler(number, frame)

    def repeat(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            return sys.__unraisablehook__(dropped)
        timer = threading.Timer(REPEAT, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        with suppress(RuntimeError):  # no thread can start any more: the process is ending
            timer.start()

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = repeat


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Yield a list that is filled when SIGTERM or Ctrl-C arrives, so that the current step is saved.

    A second Ctrl-C stops at once. A second SIGTERM does not: it comes from the watchdog when `dvc repro` got
    the first one too. Under a launcher no second signal does: it passes on what the terminal sent already.
    """
    stopped: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stopped and LAUNCHED not in os.environ:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is complete")
        stopped.append(number)

    with _handlers({signal.SIGTERM: note, signal.SIGINT: note}):
        yield stopped


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM (a cancelled flow, a scheduler) into an exception, so that the MLflow run is ended too.

    Where another handler is set already nothing changes.
    """
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    with _handlers({signal.SIGTERM: lambda number, _: sys.exit(128 + number)}):
        yield


class Children:
    """Commands that this process runs, and the stops that have arrived.

    The commands get the terminal's Ctrl-C themselves; SIGTERM is passed on to them.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._processes: list[subprocess.Popen[Any]] = []

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command; `options` as of `subprocess.Popen`."""
        process = subprocess.Popen(command, **options)
        self._processes.append(process)
        if signal.SIGTERM in self.received:  # it came before there was a process to pass it on to
            process.terminate()
        return process

    def note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if number == signal.SIGTERM:
            for process in list(self._processes):
                process.send_signal(number)


@contextmanager
def children() -> Iterator[Children]:
    """Yield what starts commands that may end in their own time after a stop; the body waits for them.

    After the body a Ctrl-C becomes KeyboardInterrupt, and SIGTERM SystemExit.
    """
    found = Children()
    with _handlers({signal.SIGINT: found.note, signal.SIGTERM: found.note}):
        yield found
    if signal.SIGTERM in found.received:
        raise SystemExit(128 + signal.SIGTERM)
    if found.received:
        raise KeyboardInterrupt


@contextmanager
def _handlers(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Set signal handlers, and restore the previous ones.

    Outside the main thread, which alone receives signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
