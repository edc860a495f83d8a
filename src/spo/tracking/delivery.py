"""Delivery of spools to an MLflow store, by a thread of the stage or, for all its stages, of `spo repro`."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from spo.runtime.signals import DELIVERY, STOPPED_DELIVERY
from spo.tracking.records import Waiting, is_refusal, load_mlflow, reason
from spo.tracking.spool import Spool, spools, warn
from spo.tracking.store import Store

PERIOD, PAUSE = 5.0, 30.0  # seconds between deliveries, and after one that failed
# set for the stages of a `spo repro`, which delivers what they log: each saves the import of MLflow (1.5 s)
BY_PARENT = "SPO_DELIVERED_BY_PARENT"


def start(uri: str, which: list[Spool], watch: Callable[[], None]) -> Delivery | Watch:
    """Deliver the spools of a stage, unless `spo repro` does; `watch` is called every PERIOD seconds."""
    return Watch(watch) if BY_PARENT in os.environ else Delivery(uri, which, watch)


@contextmanager
def for_stages(uri: str) -> Iterator[Mapping[str, str]]:
    """Deliver what stages log while they run as children of this process; yields variables for them.

    What is left at the end is for `runs.sync`.
    """
    store, stop = Store(uri), threading.Event()
    load_mlflow()  # here: imports of two threads may get into each other's way

    def work() -> None:
        while not stop.wait(PERIOD):
            for spool in spools():
                try:
                    if spool.header().get("uri") == store.name:
                        store.deliver(spool)
                except FileNotFoundError:  # another process has delivered and removed it
                    continue
                except Exception as error:
                    if not isinstance(error, Waiting) and not is_refusal(error):
                        stop.wait(PAUSE)  # it is away
                        break

    thread = threading.Thread(target=work, name="tracking", daemon=True)
    thread.start()
    try:
        yield {BY_PARENT: "1"}
    finally:
        stop.set()
        thread.join(STOPPED_DELIVERY)


class Watch:
    """Call a function every PERIOD seconds in a thread."""

    def __init__(self, watch: Callable[[], None]) -> None:
        self._watch, self._stop = watch, threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def finish(self, stopped: bool = False) -> None:
        self._stop.set()
        self._thread.join(STOPPED_DELIVERY)

    def _work(self) -> None:
        while not self._stop.wait(PERIOD):
            with contextlib.suppress(Exception):  # a measurement that fails costs no stage
                self._watch()


class Delivery:
    """Deliver spools in a thread, so that a slow or missing server costs the stage nothing.

    `watch` is called every PERIOD seconds, before a delivery.
    """

    def __init__(self, uri: str, which: list[Spool], watch: Callable[[], None] = lambda: None) -> None:
        self._store, self._spools, self._watch = Store(uri), which, watch
        self._stop, self._failed_at = threading.Event(), -PAUSE
        self._error: Exception | None = None
        load_mlflow()  # here: imports of two threads may get into each other's way
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def finish(self, stopped: bool = False) -> None:
        """Deliver once more, and warn in one line if something could not be delivered.

        `stopped`: by Ctrl-C or SIGTERM, so that somebody waits.
        """
        self._stop.set()
        place = "local" if self._store.uri.startswith("sqlite") else "remote"
        self._thread.join(STOPPED_DELIVERY if stopped else DELIVERY[place])
        left = sum(spool.left() for spool in self._spools)
        if left:
            why = reason(self._error)[:300] if self._error else "no answer yet"
            then = self._error.then if isinstance(self._error, Waiting) else "`spo sync` delivers them"
            warn(
                f"{left} records not delivered to {self._store.name} ({why}); "
                f"they are kept in .spo/spool, {then}"
            )

    def _work(self) -> None:
        while not self._stop.wait(PERIOD):
            with contextlib.suppress(Exception):  # a measurement that fails costs no delivery
                self._watch()
            self._try(self._spools)
        earlier = [s for s in spools() if s.header().get("uri") == self._store.name]
        self._try([*self._spools, *earlier])

    def _try(self, which: list[Spool]) -> None:
        """Deliver spools: one that has to wait does not hold up the others; a store that is away does."""
        if time.monotonic() - self._failed_at < PAUSE:
            return
        self._error = None
        for spool in which:
            try:
                self._store.deliver(spool)
            except Exception as error:
                self._error = self._error or error
                if not isinstance(error, Waiting) and not is_refusal(error):
                    self._failed_at = time.monotonic()
                    return
