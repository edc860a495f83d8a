"""End a stage when what started it (`dvc repro`, the launcher of its processes) is gone, however it went.

DVC killed by SIGKILL or SIGTERM leaves its stages alive and writing. The kernel's own signal at a
parent's death would not do: between DVC and the stage there is a shell, which lives on, and the signal
follows the thread that started the process, not the process. So a thread polls the processes above.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spo.runtime import ancestors
from spo.runtime.signals import LAUNCHED, WATCHDOG_KILL, WATCHDOG_POLL

if TYPE_CHECKING:
    import psutil

STAGE = "DVC_STAGE"  # set by DVC for what it starts


@contextmanager
def tied_to_starter() -> Iterator[None]:
    """Send SIGTERM to this process when the `dvc repro` or the launcher above it ends meanwhile.

    Nothing happens to a process that neither of them started.

    Raises:
        ValueError: what started this process is gone already.
    """
    parents = ancestors.above()
    repro = ancestors.dvc_ancestor((p.pid, p.create_time(), _command(p)) for p in parents)
    above: dict[str, psutil.Process] = {}
    if repro:
        above["`dvc repro`"] = next(p for p in parents if p.pid == repro[0])
    if STAGE in os.environ and not above:  # it took seconds to get here
        raise ValueError("the `dvc repro` that started this stage is gone: stopped before it wrote anything")
    if LAUNCHED in os.environ and parents:
        above["launcher"] = parents[0]
    if not above:
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(above, done), name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(above: dict[str, psutil.Process], done: threading.Event) -> None:
    while not done.wait(WATCHDOG_POLL):
        gone = next((name for name, process in above.items() if not _is_alive(process)), None)
        if gone is None:
            continue
        print(f"spo: the {gone} above (process {above[gone].pid}) is gone: stopping", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
        if not done.wait(WATCHDOG_KILL):
            os._exit(128 + signal.SIGTERM)
        return


def _is_alive(process: psutil.Process) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _command(process: psutil.Process) -> list[str]:
    import psutil

    try:
        return process.cmdline()
    except psutil.Error:
        return []
