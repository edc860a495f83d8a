"""Ctrl-C that ends a stage for certain.

Python drops an exception that is raised in a finaliser or in a callback of a weak reference, and one that
breaks off the import system's own work can leave another thread waiting for ever (both seen in `generate`).
So KeyboardInterrupt waits until they are through; the kernel's clock ends what stays all the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType

PATIENCE = 20  # seconds after Ctrl-C until the process is ended
AGAIN = 0.05  # seconds until Ctrl-C is tried again where Python would lose it
DEAF = ("/weakref.py", "/_weakrefset.py")  # files whose callbacks run where an exception is dropped


def install() -> None:
    signal.signal(signal.SIGINT, _interrupted)


def _interrupted(number: int, frame: FrameType | None) -> None:
    if signal.getitimer(signal.ITIMER_REAL)[0] == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE)
    if not deaf(frame):
        raise KeyboardInterrupt
    again = threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    with contextlib.suppress(RuntimeError):  # no thread can start any more: the process is ending
        again.start()


def deaf(frame: FrameType | None) -> bool:
    """Whether Python would lose an exception here, or be harmed by it."""
    while frame is not None and frame.f_code.co_filename == __file__:  # a second Ctrl-C meets this handler
        frame = frame.f_back
    if frame is not None and frame.f_code.co_filename == "<frozen importlib._bootstrap>":
        return True
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename.endswith(DEAF):
            return True
        frame = frame.f_back
    return False
