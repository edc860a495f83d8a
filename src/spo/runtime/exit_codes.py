"""Exit codes of `spo`, by which a flow or scheduler decides whether another attempt may succeed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MISTAKE = 2  # in parameters or data: another attempt fails in the same way
TRANSIENT = os.EX_TEMPFAIL  # 75
STOPPED = 130  # by Ctrl-C or SIGTERM

OURS = "SPO_LAUNCHER"  # environment: the `spo` that launched this process
EXIT_FILE = "SPO_EXIT_FILE"  # environment: where `spo` leaves its exit code
BUSY = (429, 502, 503, 504)  # HTTP: too many requests, or a server that is away behind its proxy


class TransientError(ValueError):
    """A failure that may pass by itself: another process holds a lock, a server is away."""


def is_transient(error: BaseException) -> bool:
    """Whether the network, a server or another process caused an error, by the types of all before it."""
    chain = list(causes(error))
    if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in chain):
        return False  # a ConnectionError of huggingface_hub, but offline by HF_HUB_OFFLINE
    return any(_is_transient(cause) for cause in chain)


def exit_code(error: BaseException) -> int:
    return TRANSIENT if is_transient(error) else MISTAKE


def leave_exit_code(code: int) -> None:
    """Write the code to the file that EXIT_FILE names: `dvc repro` and torchrun hide what a stage ended with.

    A process that `spo` itself launched leaves that to the `spo` above.
    """
    if (path := os.environ.get(EXIT_FILE)) and OURS not in os.environ:
        with suppress(OSError):
            Path(path).write_text(str(code), encoding="utf-8")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and all that were being handled when it was raised, also under `from None`."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, BrokenPipeError):  # whoever reads our output has gone
        return False
    if isinstance(error, TransientError | ConnectionError | TimeoutError | BlockingIOError):
        return True
    response = getattr(error, "response", None)  # of requests and httpx; urllib has the code itself
    return getattr(response, "status_code", getattr(error, "code", None)) in BUSY
