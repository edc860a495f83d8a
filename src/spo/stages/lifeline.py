"""A stage ends when the `dvc repro` that started it is gone, however it went.

DVC killed by SIGKILL or SIGTERM leaves its stages alive and writing. The kernel's own signal at a
parent's death would not do: between DVC and the stage there is a shell, which lives on, and the signal
follows the thread that started the process, not the process. So a thread looks after DVC.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spo.tracking import dvc_ancestor

if TYPE_CHECKING:
    import psutil

PERIOD = 0.5  # seconds between two looks
GRACE = 120.0  # seconds to finish and save the step in hand


@contextmanager
def tied_to_dvc() -> Iterator[None]:
    """Within it, the end of the `dvc repro` above this process is SIGTERM; without one, nothing happens."""
    import psutil

    parents = psutil.Process().parents()
    found = dvc_ancestor((p.pid, p.create_time(), _command(p)) for p in parents)
    dvc = next((p for p in parents if found and p.pid == found[0]), None)
    if dvc is None:
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(dvc, done), name="lifeline", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(dvc: psutil.Process, done: threading.Event) -> None:
    while not done.wait(PERIOD):
        if _is_alive(dvc):
            continue
        print(f"spo: `dvc repro` (process {dvc.pid}) is gone: stopping", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
        if not done.wait(GRACE):
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
