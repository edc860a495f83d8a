"""Processes that a launcher other than ours started: heartbeats, so that a lost one ends all.

A process that is killed closes its connections, and the collective in which the others wait fails at once. A
machine without power or network closes nothing: the others would wait for signals.COLLECTIVE. So a thread of
each process renews a key in the store through which they joined. Process 0 reads the keys of all, the others
that of process 0: a few small requests a process every BEAT seconds. The first that fails leaves its reason
in the store, so that all end with the same line and exit code.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from spo.runtime import launch
from spo.runtime.exit_codes import TRANSIENT, TransientError, leave_exit_code
from spo.runtime.signals import BEAT, LOST, LOST_KILL

T = TypeVar("T")
LEFT = "left"
HOLD = 3 * BEAT  # seconds in which the others look for a reason
REASON = "reason"  # key: why all end
# what torch says when another process or its store is gone: its classes, and words of gloo's messages
BROKEN = ("DistError", "gloo", "onnection closed", "onnection reset", "Broken pipe")

AGAIN = "start all nodes again to resume from the last checkpoint"

_joined: Peers | None = None


class Peers:
    """The heartbeat of this process, and those that it watches."""

    def __init__(
        self,
        store: Any,
        rank: int,
        count: int,
        *,
        beat: float = BEAT,
        lost: float = LOST,
        kill: float = LOST_KILL,
        hold: float = HOLD,
    ) -> None:
        """
        Args:
            store: torch's, with a connection of its own: a thread that waits holds the connection.
            beat: seconds between two heartbeats.
            lost: seconds without one after which a process is lost.
            kill: seconds that the main thread then has to end by itself.
            hold: seconds to wait for an answer of the store, and for the others to read a reason.
        """
        self.rank, self.count = rank, count
        self._store, self._beat, self._lost, self._kill, self._hold_for = store, beat, lost, kill, hold
        self._watched = range(1, count) if rank == 0 else [0]
        self._names: dict[int, str] = {}
        self._reason: tuple[str, int] | None = None
        self.found: tuple[str, int] | None = None  # why this process ends
        self._signs: dict[int, str] = {}
        self._heard: dict[int, float] = {}
        self._ended, self._ending = threading.Event(), threading.Lock()
        self._signing = threading.Lock()  # so that no heartbeat is written over LEFT

    def start(self) -> None:
        """Wait until all have joined, then begin the heartbeat.

        Raises:
            RuntimeError: torch's, when some did not join within the store's timeout.
        """
        me = f"process {self.rank} on {socket.gethostname()}"
        self._store.set(f"name/{self.rank}", me)
        if self.rank == 0:
            self._store.wait([f"name/{other}" for other in self._watched])
            self._names = {other: self._store.get(f"name/{other}").decode() for other in self._watched}
            self._store.set("all", "joined")
        self._store.wait(["all"])
        self._heard = dict.fromkeys(self._watched, time.monotonic())
        for work in (self._give, self._watch):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def leave(self) -> None:
        """Say that this process has done its part, so that nobody waits for it."""
        if self._ended.is_set():  # after `tell`; a heartbeat that never returns may hold the lock
            return
        with self._signing:
            with suppress(RuntimeError):  # the store has left before
                self._store.set(f"sign/{self.rank}", LEFT)
                self._store.set(f"seen/{self.rank}", LEFT)
            self._ended.set()

    def tell(self, message: str, code: int) -> bool | None:
        """Leave the reason for which all end; False if there is one already, None if the store is gone.

        Process 0, with which the store may end, waits until the others have it.
        """
        self._ended.set()
        where = "" if self.rank == 0 else f" (process {self.rank} on {socket.gethostname()})"
        mine = json.dumps({"message": message + where, "code": code})

        def offer() -> bool:
            first = bool(self._store.compare_set(REASON, "", mine).decode() == mine)
            self._store.set(f"seen/{self.rank}", REASON)
            return first

        first = self._asked(offer, None if self._reason is None else False)
        if self.rank == 0:
            self._asked(self._hold, None)
        return first

    def _asked(self, request: Callable[[], T], otherwise: T) -> T:
        """What a request to the store gives; `otherwise` if its machine is gone, which may never answer."""
        answers: list[T] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(request())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(self._hold_for)
        return answers[0] if answers else otherwise

    def _hold(self) -> None:
        """Wait until the others know the reason, or until they should."""
        end = time.monotonic() + self._hold_for
        others = [f"seen/{other}" for other in self._watched]
        while not self._store.check(others) and time.monotonic() < end:
            time.sleep(self._beat / 20)

    def reason(self) -> tuple[str, int] | None:
        """The message and exit code that another process has left, if any."""
        if self._reason is None:
            self._asked(self._look, None)
        return self._reason

    def _look(self) -> None:
        if self._reason is None and self._store.check([REASON]):
            left = json.loads(self._store.get(REASON))
            self._reason = left["message"], left["code"]
            self._store.set(f"seen/{self.rank}", REASON)

    def _give(self) -> None:
        for number in _counted(self._ended, self._beat):
            try:
                with self._signing:
                    if self._ended.is_set():
                        return None
                    self._store.set(f"sign/{self.rank}", str(number))
                for other in self._watched:
                    self._hear(other)
                self._look()
                found = self._reason
            except RuntimeError:
                found = f"the connection to process 0 of {self.count} broke; {AGAIN}", TRANSIENT
            if found:
                return self._end(*found)
        return None

    def _hear(self, other: int) -> None:
        key = f"sign/{other}"
        sign = self._store.get(key).decode() if self._store.check([key]) else ""
        if sign == LEFT or sign != self._signs.get(other):
            self._signs[other], self._heard[other] = sign, time.monotonic()

    def _watch(self) -> None:
        """Apart from `_give`: a request to a machine that is gone may never return."""
        for _ in _counted(self._ended, self._beat):
            now = time.monotonic()
            silent = [r for r, heard in self._heard.items() if now - heard > self._lost]
            if silent:
                message = f"no sign of life from {self._named(silent)} for {self._lost:g} s; {AGAIN}"
                return self._end(message, TRANSIENT)

    def _named(self, ranks: list[int]) -> str:
        if self.rank:
            return f"process 0 of {self.count}"
        more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
        return ", ".join(self._names[r] for r in ranks[:3]) + more

    def _end(self, message: str, code: int) -> None:
        """End this process, unless its main thread, which waits for the others, does so first."""
        self.found = message, code
        if self._ended.wait(self._kill) or not self._ending.acquire(blocking=False):
            return
        fail(message, code)
        sys.stderr.flush()
        os._exit(code)


def join(store: Any, rank: int, count: int) -> None:
    """Begin the heartbeat that the others watch; `store` and errors as of Peers."""
    global _joined
    joining = Peers(store, rank, count)
    joining.start()
    _joined = joining
    atexit.register(_joined.leave)


def lost(error: RuntimeError) -> Exception | None:
    """What to raise for an error of a collective: the reason that another process left, or that one is lost.

    None where no others have joined, or the error is not of a connection.
    """
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if _joined is None or not any(word in kinds or word in str(error) for word in BROKEN):
        return None
    message, code = _joined.reason() or (
        f"the connection to another of the {_joined.count} processes broke; {AGAIN}",
        TRANSIENT,
    )
    return _as_error(message, code)


def check() -> None:
    """For what waits outside a collective.

    Raises:
        ValueError: another process failed; with its reason.
        TransientError: another process is lost.
    """
    if _joined is not None and _joined.found is not None:
        raise _as_error(*_joined.found)


def _as_error(message: str, code: int) -> Exception:
    return (TransientError if code == TRANSIENT else ValueError)(message)


def fail(message: str, code: int) -> None:
    """Say why this process ends, once a machine at most; leave the reason to the others and to a flow."""
    first = _joined.tell(message, code) if _joined else None
    handed = launch.report_to_launcher(message, code)
    if _is_speaker(first, handed) if launch.is_started_by_others() else not handed:
        print(f"spo: {message}", file=sys.stderr)
    leave_exit_code(code)


def tell(message: str, code: int) -> None:
    """Leave the reason for which this process ends to the others, if any have joined."""
    if _joined:
        _joined.tell(message, code)


def _is_speaker(first: bool | None, handed: bool) -> bool:
    """Whether this one of several processes says it: the main one does, and the one that failed first.

    Where nobody knows who was first (None), or a launcher has the lines of the others, that is one a machine.
    """
    if launch.is_main_process():
        return True
    alone = os.environ.get("LOCAL_RANK", "0") == "0"
    return alone if first is None or (first and handed) else first


def _counted(ended: threading.Event, period: float) -> Iterator[int]:
    """Yield 1, 2, ... every `period` seconds, the first at once, until `ended`."""
    number = 0
    while not ended.wait(period if number else 0):
        number += 1
        yield number
