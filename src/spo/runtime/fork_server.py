"""The process of which stages are forks (`runtime.forks`): it imports the large libraries, waits, and forks.

Run as a file, with the number of a listening socket and the modules to import. It imports the standard
library alone, so that nothing of `spo` is there before a fork.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
REQUEST = 10.0  # seconds that a request may take: one that is stopped meanwhile holds up all others


class _Server:
    """Waits for requests, and forks for each; reports to each asking process how its fork has ended."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening: socket.socket | None = listening
        self._asking: dict[int, socket.socket] = {}  # by fork
        self._waking, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        signal.set_wakeup_fd(self._woken.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in STOPS:
            signal.signal(
                number, signal.SIG_IGN
            )  # a scheduler sends it to all; forks take their time to save
        self._selector = selectors.DefaultSelector()  # a handler for each file that can be read
        self._selector.register(listening, selectors.EVENT_READ, self._fork)
        self._selector.register(self._waking, selectors.EVENT_READ, self._report_ended)
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._close)

    def serve(self) -> dict[str, Any] | None:
        """Return the request in each fork; None in this process, when nobody can ask any more."""
        while self._listening or self._asking:
            for key, _ in self._selector.select():
                if (request := key.data()) is not None:
                    return dict(request)
        return None

    def _fork(self) -> dict[str, Any] | None:
        if self._listening is None:
            return None
        try:
            connection = self._listening.accept()[0]
        except OSError:  # too many open files
            return None
        request, files = _received(connection)
        if request is None:
            return None
        signal.pthread_sigmask(
            signal.SIG_BLOCK, STOPS
        )  # a fork gets those that come before it can handle them
        try:
            pid = os.fork()
        except OSError:  # too many processes, or too little memory: the command runs by itself
            pid = -1
        if pid == 0:
            for other in (*self._asking.values(), connection, self._listening, self._waking, self._woken):
                other.close()
            _become(request, files)
            return request
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        if pid < 0:
            _refuse(connection, files)
            return None
        for file in files:
            os.close(file)
        self._asking[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, functools.partial(self._kill, pid))
        _answer(connection, pid)
        return None

    def _report_ended(self) -> None:
        self._waking.recv(4096)
        for pid in list(self._asking):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                connection = self._asking.pop(pid)
                with suppress(KeyError):  # its asking process is gone
                    self._selector.unregister(connection)
                _answer(connection, os.waitstatus_to_exitcode(status))
                connection.close()

    def _kill(self, pid: int) -> None:
        """The asking process is gone: nothing else comes from it."""
        if pid in self._asking:
            self._selector.unregister(self._asking[pid])
            os.kill(pid, signal.SIGKILL)

    def _close(self) -> None:
        """Who started this process has closed the other end: take no more requests."""
        if self._listening:
            self._selector.unregister(sys.stdin)
            self._selector.unregister(self._listening)
            self._listening.close()
            self._listening = None


def _received(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Return a request and the open files 0 to 2 of whoever asks; None if it went away meanwhile."""
    files: list[int] = []
    try:
        connection.settimeout(REQUEST)
        files = socket.recv_fds(connection, 1, 3)[1]
        with connection.makefile(encoding="utf-8") as lines:
            request = json.loads(lines.readline())
        connection.settimeout(None)
        return request, files
    except (OSError, ValueError):
        _refuse(connection, files)
        return None, []


def _refuse(connection: socket.socket, files: list[int]) -> None:
    """Leave the command to run by itself."""
    for file in files:
        os.close(file)
    connection.close()


def _answer(connection: socket.socket, number: int) -> None:
    with suppress(OSError):
        connection.sendall(f"{number}\n".encode())


def _become(request: Mapping[str, Any], files: list[int]) -> None:
    """Make this fork the process that `request` describes, as Python sets one up at its start."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    for changed in (signal.SIGCHLD, *STOPS):
        signal.signal(changed, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ[request["variable"]] = f"{os.getpid()} {request['process']}"
    os.chdir(request["folder"])
    sys.argv, sys.orig_argv, sys.path[:] = request["arguments"], request["command"], request["path"]
    sys.modules.pop("sitecustomize", None)
    with suppress(ModuleNotFoundError):
        importlib.import_module("sitecustomize")


class _End:
    """Ends this process with a status after all that is registered for its end.

    Python would then free each object of the libraries, one by one, in pages that forks share: 2.4 s.
    """

    def __init__(self) -> None:
        self.status = 1
        atexit.register(self._leave)  # to come last, register it first

    def _leave(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # whoever reads it is gone, or it is closed
                stream.flush()
        os._exit(self.status)


def _main(listening: int, large: Mapping[str, Sequence[str]]) -> None:
    end = _End()
    with socket.socket(fileno=listening) as given:
        for module, parts in large.items():
            for part in parts or ("__name__",):
                getattr(importlib.import_module(module), part)
        is_fork = _Server(given).serve() is not None
    try:
        if is_fork:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            runpy.run_module("spo", run_name="__main__", alter_sys=True)
        end.status = 0
    except KeyboardInterrupt:  # before the command could say it
        print("spo: stopped", file=sys.stderr)
        end.status = 130
    except SystemExit as left:
        end.status = left.code if isinstance(left.code, int) else int(left.code is not None)
        raise


if __name__ == "__main__":
    _main(int(sys.argv[1]), json.loads(sys.argv[2]))
