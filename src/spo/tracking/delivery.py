"""Deliver runs to an MLflow store, in a thread of the stage or, for all its stages, of `spo repro`."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from spo.runtime.signals import DELIVERY, STOPPED_DELIVERY
from spo.tracking import cached_stages, dvc_lock
from spo.tracking.logged import is_away
from spo.tracking.records import Run, runs_here, warn
from spo.tracking.store import Store, load_mlflow, reason, tracking_uri

PERIOD, PAUSE = 5.0, 30.0  # seconds between deliveries, and after one that failed
# set for the stages of a `spo repro`, which delivers their logs: no stage imports MLflow (1.5 s)
BY_PARENT = "SPO_DELIVERED_BY_PARENT"


class Delivery:
    """Deliver a run, or its children, in a thread, so that a slow or missing server costs no stage time."""

    def __init__(self, uri: str, run: Run, children: bool = False) -> None:
        self._store, self._run, self._children = Store(uri), run, children
        self._stop, self._errors = threading.Event(), dict[str, Exception]()
        self._monitors: dict[str, Any] = {}  # of system metrics, by key
        load_mlflow()  # imported here: two threads that import at once may deadlock
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def finish(self, stopped: bool = False) -> None:
        """Deliver once more, in less time if the stage was stopped; warn in one line if that fails."""
        self._stop.set()
        place = "local" if self._store.uri.startswith("sqlite") else "remote"
        self._thread.join(STOPPED_DELIVERY if stopped else DELIVERY[place])
        if not self._children and self._run.exists() and self._run.is_pending():
            error = self._errors.get(self._run.key)
            why = reason(error)[:400] if error else "no answer yet"
            warn(f"{self._store.name}: {why}; the run stays in .spo/runs, `spo sync` delivers it")

    def _work(self) -> None:
        while not self._stop.wait(PAUSE if self._errors else PERIOD):
            self._errors = self._deliver()
        self._errors = self._deliver()
        if not self._errors:
            deliver(self._store, [run for run in runs_here() if not run.is_live()])  # left by earlier stages

    def _deliver(self) -> dict[str, Exception]:
        runs = runs_here(self._run) if self._children else [self._run]
        return deliver(self._store, runs, self._watch)

    def _watch(self, run: Run, run_id: str) -> None:
        """Have MLflow log the use of the machine to a stage's run as long as it is open."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        content = run.read()
        if content["status"] and run.key in self._monitors:
            self._monitors.pop(run.key).finish()
        elif not content["status"] and "lock" not in content and run.key not in self._monitors:
            self._monitors[run.key] = SystemMetricsMonitor(run_id, tracking_uri=self._store.uri)
            self._monitors[run.key].start()


@contextmanager
def for_stages(uri: str, parent: Run) -> Iterator[Mapping[str, str]]:
    """Deliver the runs of stages that are children of this process; yields variables for them."""
    delivery = Delivery(uri, parent, children=True)
    try:
        yield {BY_PARENT: "1"}
    finally:
        delivery.finish(stopped=True)


def deliver(
    store: Store, runs: Sequence[Run], watch: Callable[[Run, str], None] = lambda run, run_id: None
) -> dict[str, Exception]:
    """Deliver runs, and return the errors by key: a refused run delays no other, an unreachable store all.

    `watch` is called with each run that was delivered, and its id.
    """
    errors: dict[str, Exception] = {}
    for run in runs:
        try:
            run.close_if_dead()
            if run.is_pending() or run.is_live():
                watch(run, store.deliver(run))
        except Exception as error:
            if run.exists():  # else another process has removed it
                errors[run.key] = error
            if is_away(error):
                break
    return errors


def sync(uri: str | None = None, stopped: bool = False) -> tuple[int, int]:
    """Deliver every run to `uri` or the experiment's store: (delivered, left). Print each reason once.

    Args:
        stopped: by Ctrl-C or SIGTERM: a server that does not answer is not waited for long.
    """
    for run in runs_here():
        run.close_if_dead()
    store, before = Store(uri or tracking_uri()), [run for run in runs_here() if run.is_pending()]
    errors: dict[str, Exception] = {}
    work = threading.Thread(target=lambda: errors.update(deliver(store, before)), daemon=True)
    work.start()
    work.join(STOPPED_DELIVERY if stopped else None)
    why = ["no answer yet"] if work.is_alive() else dict.fromkeys(map(reason, errors.values()))
    for line in why:
        warn(f"{store.name}: {line}")
    left = sum(run.exists() and run.is_pending() for run in before)
    return len(before) - left, left


def is_recorded(experiment: str, uri: str | None = None) -> bool:
    """Whether the store has a run of every stage of dvc.lock; True if it cannot be reached."""
    store = Store(uri or tracking_uri())
    try:
        ended = {name: run for name, run in cached_stages.last_runs().items() if run["status"] == "FINISHED"}
        # the last stage of a plain `dvc repro` has a run, but no hash: any entry of it will do
        return all(
            (name in ended and dvc_lock.HASH not in ended[name]["tags"])
            or store.find(experiment, **{dvc_lock.HASH: entry.hash})
            for name, entry in dvc_lock.read().items()
        )
    except Exception as error:
        warn(f"{store.name}: {reason(error)}")
        return True
