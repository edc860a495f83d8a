"""MLflow runs: one for every stage, under one parent a `dvc repro`. No stage fails or waits for MLflow.

What is logged is written to the spool at once; a thread delivers it every few seconds, and `spo sync`
delivers what a server that was away did not get.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from spo.runtime import processes
from spo.runtime.files import digest, locked, read_json, write_json
from spo.runtime.messages import one_line, redact
from spo.runtime.processes import is_main_process
from spo.runtime.signals import exit_on_sigterm
from spo.runtime.workspace import home
from spo.tracking import cached_stages, delivery, dvc_lock, system
from spo.tracking.provenance import code, flatten, hardware, section, versions
from spo.tracking.records import Waiting, is_refusal, reason
from spo.tracking.spool import Spool, close_dead, spools, warn
from spo.tracking.store import Store, sqlite_uri

PARENT_VARIABLE = "SPO_PARENT_RUN"  # a parent's key, or the id of a run that MLflow has


def tracking_uri(configured: str | None = None) -> str:
    """Return params.yaml's URI, else the environment's, else that of a sqlite file in this folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(home() / "mlflow.db")


class Run:
    """A run's logging calls: no-ops without a spool (no place to write, or not the main process)."""

    def __init__(self, spool: Spool | None) -> None:
        self.spool = spool
        self._at_zero: dict[str, float] = {}
        self._curves: set[str] = set()

    @property
    def key(self) -> str:
        """Return the value for SPO_PARENT_RUN."""
        return self.spool.key if self.spool else ""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step; those of a whole run (seconds, accuracy) at step 0."""
        values = {k: float(v) for k, v in metrics.items()}
        if step == 0:
            self._at_zero |= values
        else:
            self._curves |= values.keys()
        self._write("metrics", step=int(step), metrics=values)

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._write("params", params={k: str(v) for k, v in params.items()})

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Log a small file by reference: if it changes before it is delivered, it is not sent."""
        path = Path(path).absolute()
        self._write("artifact", path=str(path), folder=folder, sha256=digest(path))

    def log_image(self, path: Path | str, key: str, step: int) -> None:
        """Log a picture by step, for the step slider of MLflow's UI; a copy is kept until it is delivered."""
        if self.spool is None:
            return
        try:
            kept = self.spool.keep(Path(path)).absolute()
        except OSError as error:
            warn(f"{path} is not logged: {one_line(error)}")
            return
        self._write("image", path=str(kept), key=key, step=int(step))

    def log_model(
        self, path: Path, kind: str, step: int, scores: Mapping[str, float], params: Mapping[str, Any]
    ) -> None:
        """Log a kept checkpoint as MLflow's LoggedModel: the weights by path and SHA-256, not stored again.

        Args:
            path: of the weights, a file or a folder; a folder's hash is the tag dvc.out.PATH of the run.
            kind: MLflow's model type, e.g. "adapter".
            step: of its last update.
            scores: of its validation, also logged as metrics of the run.
        """
        tags = {"weights": str(path), **({"weights.sha256": sha} if (sha := digest(path)) else {})}
        values = {k: float(v) for k, v in scores.items()}
        named = {k: str(v) for k, v in params.items()}
        self._write("model", kind=kind, step=int(step), metrics=values, params=named, tags=tags)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._write("tags", tags={k: str(v) for k, v in tags.items()})

    def end(self, status: str, **child: str | None) -> None:
        """End the run; with `child` (its name), `stage` (of DVC) and `key`, a child of a shared run."""
        self._write("end", status=status, **child)

    def note_lock(self) -> None:
        """Note dvc.lock as it is now, before DVC changes it."""
        self._write("lock", hashes=dvc_lock.hashes())

    def summary(self) -> dict[str, float]:
        """Return the metrics of the whole run: all that were only logged at step 0."""
        return {k: v for k, v in self._at_zero.items() if k not in self._curves}

    def _write(self, op: str, **fields: Any) -> None:
        if self.spool is None:
            return
        try:
            self.spool.append(op, **fields)
        except OSError as error:
            warn(f"{self.spool.path} cannot be written, the run logs nothing more: {one_line(error)}")
            self.spool = None


@contextmanager
def stage_run(stage: str, params: Mapping[str, Any], name: str | None = None) -> Iterator[Run]:
    """Open the MLflow run of a stage, named `stage` or `stage-name`; `params` is the whole params.yaml.

    An exception passes on; the run is FAILED (KILLED if interrupted) with its message as tag `error`.
    """
    if not is_main_process():
        yield Run(None)
        return
    title = f"{stage}-{name}" if name else stage
    parent = _parent(params)
    if stage_of_dvc := os.environ.get("DVC_STAGE"):  # DVC is through with all that this stage is made from
        _settle(parent, params, dvc_lock.ancestors(dvc_lock.read(), stage_of_dvc))
    run = _start(params, title, parent)
    run.log_params(section(params, stage, name) if parent.spool else flatten(params))
    own = [r.spool for r in (parent, run) if r.spool]
    delivering = delivery.start(tracking_uri(params.get("tracking")), own, _watched(run))
    status = "FINISHED"
    try:
        with exit_on_sigterm():
            yield run
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
        run.set_tags({"error": one_line(error)})
        raise
    finally:
        if run.summary():
            parent.log_metrics({f"{title}/{k}": v for k, v in run.summary().items()})
        run.set_tags(hardware())
        run.end(status)
        parent.end(status, child=title, stage=os.environ.get("DVC_STAGE"), key=run.key)
        delivering.finish(stopped=status == "KILLED")


def _watched(run: Run) -> Callable[[], None]:
    """Return a function that logs the system metrics; their steps count from 1."""
    steps = itertools.count(1)
    return lambda: run.log_metrics(system.sample(), step=next(steps))


def open_parent(params: Mapping[str, Any], name: str | None = None) -> Run:
    """Open a run for others to be children of, by its `key` in SPO_PARENT_RUN; log all parameters."""
    run = _create(params, name or f"repro {datetime.now():%Y-%m-%d %H:%M:%S}", None, True, code())
    run.log_params(flatten(params))
    run.note_lock()
    return run


def close_parent(run: Run, params: Mapping[str, Any], status: str, reached: Collection[str]) -> list[str]:
    """End a parent, and return the names of the stages that are recorded as cached.

    `reached`: the stages that DVC came to and ended well, whether they ran or not.
    """
    cached = _settle(run, params, reached)
    run.set_tags(code() | {"dvc.stages_cached": " ".join(cached)})
    run.end(status)
    return cached


def ran(parent: str, stage: str) -> bool:
    """Whether a stage ran to its end under the parent of this key."""
    spool = Spool.find(parent)
    return spool is not None and cached_stages.has_run(spool, stage)


def sync(uri: str | None = None) -> tuple[int, int]:
    """Deliver every spool to `uri`, or to where stages would log: (records delivered, records left).

    It says why some are left, each reason once.
    """
    close_dead()
    store, delivered = Store(uri or tracking_uri()), 0
    reasons: set[str] = set()
    for spool in spools():
        try:
            delivered += store.deliver(spool)
        except Exception as error:
            if (why := reason(error)) not in reasons:
                reasons.add(why)
                warn(f"{store.name}: {why}")
            if not isinstance(error, Waiting) and not is_refusal(error):
                break  # it is away
    return delivered, sum(spool.left() for spool in spools())


def _where(params: Mapping[str, Any]) -> dict[str, str]:
    return {"uri": redact(tracking_uri(params.get("tracking"))), "experiment": params["name"]}


def _parents() -> Path:
    return home() / ".spo/parents"


def _settle(parent: Run, params: Mapping[str, Any], reached: Collection[str]) -> list[str]:
    if parent.spool is None:
        return []
    try:
        _parents().mkdir(parents=True, exist_ok=True)
        with locked(
            _parents() / "settle"
        ):  # two stages that start at once would record the same cached stage
            return cached_stages.settle(parent.spool, params, _where(params), reached)
    except OSError as error:
        warn(f"cached stages are not recorded: {one_line(error)}")
        return []


def _start(params: Mapping[str, Any], title: str, parent: Run) -> Run:
    tags = {f"version.{package}": version for package, version in versions().items()}
    if "DVC_STAGE" in os.environ:
        tags |= {"dvc.stage": os.environ["DVC_STAGE"], "dvc.cached": "false"}
    if parent.spool is None:
        tags |= code()
    return _create(params, title, parent.key or None, False, tags)


def _create(
    params: Mapping[str, Any], name: str, parent: str | None, shared: bool, tags: dict[str, str]
) -> Run:
    fields = {"name": name, "parent": parent, **_where(params)}
    try:
        return Run(Spool.create(**fields, shared=shared, tags=tags))
    except OSError as error:
        warn(f"the run {name} logs nothing: {one_line(error)}")
        return Run(None)


def _parent(params: Mapping[str, Any]) -> Run:
    """Find the parent named by the environment, or that of the `dvc repro` above this process; else none."""
    given = os.environ.get(PARENT_VARIABLE)
    try:
        if given:
            spool = Spool.find(given) if re.fullmatch(r"[\w-]+", given) else None
            if spool is None:
                warn(f"{PARENT_VARIABLE} names no run: {given!r}")
            return Run(spool)
        dvc = processes.dvc_above()
        return _parent_of((dvc.pid, dvc.create_time()), params) if dvc else Run(None)
    except (OSError, ValueError) as error:
        warn(f"no parent run: {one_line(error)}")
        return Run(None)


def _parent_of(repro: tuple[int, float], params: Mapping[str, Any]) -> Run:
    """Return the one parent of all stages of a repro: the first makes it, the others find it by the pid."""
    pid, started = repro
    _parents().mkdir(parents=True, exist_ok=True)
    record = _parents() / f"{pid}.json"
    with locked(_parents() / "lock"):
        if record.exists():
            known = read_json(record, "run of the reproduction", keys=("run", "started"), then="remove it")
            spool = Spool.find(known["run"])
            if spool is not None and abs(known["started"] - started) < 5:  # else the pid was used before
                return Run(spool)
        run = open_parent(params)
        write_json(record, {"started": started, "run": run.key})
        return run
