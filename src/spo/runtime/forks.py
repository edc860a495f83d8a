"""Stages as forks of one process that has imported the large libraries, so that each starts at once.

Importing torch, diffusers and transformers takes 5.4 s of processor time, and `spo repro` runs a score of
stages. It starts a process (`ready`, fork_server.py) that imports them and waits at a socket. The
command of a stage (`ask`) hands its arguments, environment, folder and open files to that process, passes
signals on to the fork that runs the stage, and ends as it ends. Nothing of `spo` is imported before the fork:
a stage runs the code that is there when it starts. This file imports the standard library alone: every
command reads it first.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SOCKET = "SPO_FORKS"  # environment: the path of the socket at which the process waits
ASKED_BY = "SPO_ASKED_BY"  # environment of a fork: its own process number, and that of who asked for it
SERVER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fork_server.py")
STAGES = ("prompts", "pairs", "preference", "align", "generate", "score", "report")  # `inputs` imports little
LARGE: dict[str, tuple[str, ...]] = {  # what these import, and names of them that come when asked for
    "torch": (),
    "accelerate": (),
    "diffusers": ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "DDIMScheduler", "DDPMScheduler"),
    "transformers": ("CLIPModel", "CLIPProcessor", "CLIPTextModelWithProjection", "CLIPTokenizer"),
    "peft": (),
    "open_clip": (),
    "pandas": (),
    "pyarrow.parquet": (),
}


def ask() -> int | None:
    """Have this command run by a fork and return its exit status; None where none is offered.

    A fork asks for no other, nor does one of several processes, most of which show no progress (tqdm reads
    that when it is imported).

    Ctrl-C and SIGTERM are passed on, any number of times. A fork whose asking process is killed is killed.
    """
    path = os.environ.get(SOCKET)
    if not path or asked_by() is not None or "RANK" in os.environ:
        return None
    pid: list[int] = []
    early: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not pid:
            early.append(number)
        else:
            with suppress(ProcessLookupError):
                os.kill(pid[0], number)

    def started(process: int) -> None:
        pid.append(process)
        for number in early:
            pass_on(number, None)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ended = _ended(path, started)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if ended is not None:
        return ended if ended >= 0 else 128 - ended
    for missed in early:
        os.kill(os.getpid(), missed)
    return None


def _ended(path: str, started: Callable[[int], None]) -> int | None:
    """Ask at the socket, call `started` with the fork's number, and return how it ended; None if none began.

    As subprocess says it: -9 for a fork that was killed, which it was too where nothing is said in the end.
    """
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw", encoding="utf-8") as lines:
        try:
            connection.connect(path)
            socket.send_fds(connection, [b"\n"], [0, 1, 2])
            print(json.dumps(_request()), file=lines, flush=True)
            process = lines.readline()
        except OSError:
            return None
        if not process:  # it ended before it had imported all
            return None
        started(int(process))
        return int(lines.readline() or -signal.SIGKILL)


def _request() -> dict[str, Any]:
    return {
        "variable": ASKED_BY,
        "process": os.getpid(),
        "arguments": sys.argv,
        "command": sys.orig_argv,
        "path": sys.path,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }


def asked_by() -> int | None:
    """Return the process whose work this fork does; None in a process that is no fork."""
    fork, command = fork_and_command()
    return command if fork == os.getpid() else None


def fork_and_command() -> tuple[int, int]:
    """Return the numbers of this fork, or the one above this process, and of who asked; else zeros."""
    fork, command = os.environ.get(ASKED_BY, "0 0").split()
    return int(fork), int(command)


@contextmanager
def ready(
    environment: Mapping[str, str] | None = None, large: Mapping[str, Sequence[str]] = LARGE
) -> Iterator[dict[str, str]]:
    """Start the process, and yield the variable that commands find it by; it ends after the last fork.

    No variable where a socket cannot be made, as in a folder with a long name: stages import by themselves.

    Args:
        environment: of the process, for what libraries read when they are imported; None: as of this one.
        large: the modules that it imports, and names in them that are imported when they are first asked for.
    """
    with tempfile.TemporaryDirectory(prefix="spo-") as folder, socket.socket(socket.AF_UNIX) as listening:
        path = os.path.join(folder, "forks")
        try:
            listening.bind(path)
        except OSError:
            yield {}
            return
        listening.listen()
        # one thread, so that nothing but it is there at a fork; a stage sets the number that it shall have
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-P", "-u", SERVER, str(listening.fileno()), json.dumps(large)],
            env={**(os.environ if environment is None else environment), **threads},
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            start_new_session=True,  # a terminal's Ctrl-C comes to a fork once, from the command
        )
        listening.close()  # a command that comes when the process is gone is refused, and runs by itself
        assert process.stdin is not None
        try:
            yield {SOCKET: path}
        finally:
            process.stdin.close()
            process.wait()
