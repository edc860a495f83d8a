"""MLflow runs: one a stage, under one parent a `dvc repro`. MLflow neither fails nor delays a stage."""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from spo.runtime import processes
from spo.runtime.files import locked
from spo.runtime.messages import one_line
from spo.runtime.processes import is_main_process
from spo.runtime.signals import exit_on_sigterm
from spo.tracking import cached_stages, dvc_lock
from spo.tracking.delivery import BY_PARENT, Delivery
from spo.tracking.provenance import code, flatten, hardware, section, texts, versions
from spo.tracking.records import Run, folder, runs_here, warn
from spo.tracking.store import tracking_uri

PARENT_VARIABLE = "SPO_PARENT_RUN"  # a parent's key, or the id of a run that MLflow has


@contextmanager
def stage_run(stage: str, params: Mapping[str, Any], name: str | None = None) -> Iterator[Run]:
    """Open the MLflow run of a stage, named `stage` or `stage-name`; `params` is the whole params.yaml.

    An exception passes on; the run is FAILED (KILLED if interrupted) with its message as tag `error`.
    """
    if not is_main_process():
        yield Run()
        return
    run = _start(stage, params, name)
    delivers = bool(run.key) and BY_PARENT not in os.environ
    delivery = Delivery(tracking_uri(params.get("tracking")), run) if delivers else None
    status = "FINISHED"
    try:
        with exit_on_sigterm():
            yield run
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
        run.set_tags({"error": one_line(error)})
        raise
    finally:
        run.set_tags(hardware())
        run.end(status)
        if delivery:
            delivery.finish(stopped=status == "KILLED")


def open_parent(
    params: Mapping[str, Any], name: str | None = None, dvc: tuple[int, float] | None = None
) -> Run:
    """Open a run for others to be children of, by its `key` in SPO_PARENT_RUN; log all parameters.

    That of a `dvc repro` (pid and start) ends with each of its stages.
    """
    named = {"name": name or f"repro {datetime.now():%Y-%m-%d %H:%M:%S}", "experiment": params["name"]}
    known = {
        "params": texts(flatten(params)),
        "tags": code(),
        "lock": {n: e.hash for n, e in dvc_lock.read().items()},
        "dvc": dvc,
    }
    return Run.create(named | known, is_owned=dvc is None)


def close_parent(run: Run, params: Mapping[str, Any], status: str, reached: Collection[str]) -> list[str]:
    """End a parent, and return the names of the stages that are recorded as cached (see `settle`)."""
    cached = cached_stages.settle(run, params, reached)
    run.set_tags(code() | {"dvc.stages_cached": " ".join(cached)})
    run.end(status)
    return cached


def _start(stage: str, params: Mapping[str, Any], name: str | None) -> Run:
    """Begin the run of a stage, after DVC has finished all of its inputs."""
    tags = {f"version.{package}": version for package, version in versions().items()}
    try:
        for run in runs_here():
            run.close_if_dead()
        parent = _parent(params)
    except (OSError, ValueError) as error:
        warn(f"no parent run: {one_line(error)}")
        parent = Run()
    dvc = os.environ.get("DVC_STAGE")
    if dvc:
        tags |= {"dvc.stage": dvc, "dvc.cached": "false"}
        cached_stages.settle(parent, params, dvc_lock.ancestors(dvc_lock.read(), dvc))
    named = {"name": f"{stage}-{name}" if name else stage, "experiment": params["name"], "stage": dvc}
    shown = section(params, stage, name) if parent.key else flatten(params)
    known = {"params": texts(shown), "tags": tags if parent.key else tags | code()}
    return Run.create(named | known, parent.key)


def _parent(params: Mapping[str, Any]) -> Run:
    """Find the parent named by the environment, or that of the `dvc repro` above this process, if any.

    The first stage of a repro creates the parent; the others find it by the pid.
    """
    if given := os.environ.get(PARENT_VARIABLE):
        if re.fullmatch("[0-9a-f]{32}", given) or (re.fullmatch(r"[\w-]+", given) and Run(given).exists()):
            return Run(given)
        warn(f"{PARENT_VARIABLE} names no run: {given!r}")
        return Run()
    dvc = processes.dvc_above()
    if dvc is None:
        return Run()
    repro = (dvc.pid, dvc.create_time())
    folder().mkdir(parents=True, exist_ok=True)
    with locked(folder() / "parents"):
        for run in runs_here():
            pid, started = run.read().get("dvc") or (0, 0.0)
            if pid == repro[0] and abs(started - repro[1]) < 5:  # else another process had this pid before
                return run
        return open_parent(params, dvc=repro)
