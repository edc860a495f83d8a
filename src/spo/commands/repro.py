"""`spo repro`: a `dvc repro` with one parent run, several stages at the same time where they allow it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from spo.commands import stages_at_once
from spo.config import Params
from spo.runtime import cores, forks, launch
from spo.runtime.signals import run_in_foreground
from spo.tracking import delivery, dvc_lock, dvc_stages, runs
from spo.tracking.store import tracking_uri

DVC = (sys.executable, "-m", "dvc")


def run(params: Params, arguments: Sequence[str] = (), jobs: int | None = None) -> int:
    """Bring all stages up to date, or run `dvc repro ARGUMENTS`; record skipped stages too.

    Args:
        jobs: how many stages may run at the same time (`stages_at_once.at_once` where it is None); with
            arguments DVC runs its stages in turn.

    Returns:
        The exit status.

    Raises:
        ValueError: `jobs` is below 1, or with arguments; or DVC refuses dvc.yaml.
    """
    if jobs is not None and (jobs < 1 or arguments):
        raise ValueError(f"--jobs {jobs}: give a number of at least 1, and no arguments of dvc repro")
    needs = {} if arguments else dvc_stages.out_of_date()
    settings = params.model_dump()
    parent = runs.open_parent(settings)
    status = "KILLED"
    try:
        variables = {runs.PARENT_VARIABLE: parent.key} if parent.key else {}
        if not arguments and not needs:
            print("Data and pipelines are up to date.")
            code = 0
        else:
            with delivery.for_stages(tracking_uri(params.tracking), parent) as delivered:
                variables |= delivered
                code = _in_turn(arguments, variables) if arguments else _all(params, needs, jobs, variables)
        status = "FAILED" if code else "FINISHED"
    finally:
        # with arguments, or after an error, DVC has not come to every stage
        complete = status == "FINISHED" and not arguments
        runs.close_parent(parent, settings, status, dvc_lock.read() if complete else ())
        delivery.sync(params.tracking)
    return code


def _in_turn(arguments: Sequence[str], variables: Mapping[str, str]) -> int:
    return run_in_foreground([*DVC, "repro", *arguments], {**os.environ, **variables})


def _all(params: Params, needs: dvc_stages.Needs, jobs: int | None, variables: Mapping[str, str]) -> int:
    """Run all stages of `needs`, and return the exit status."""
    number, why = stages_at_once.at_once(jobs, params.processes) if len(needs) > 1 else (1, "it is one")
    with _forks(needs, stages_at_once.OUTPUT if number > 1 else {}) as fork:
        variables = {**variables, **fork}
        if number == 1:
            _say(f"{len(needs)} stages in turn ({why})")
            return _in_turn((), variables)
        _say(f"{len(needs)} stages, up to {number} at a time ({why}); `spo repro --jobs 1` runs them in turn")
        outcome = stages_at_once.run(needs, number, params.processes, variables)
    if not outcome.failed:
        return 0
    rest = f"; not run: {', '.join(outcome.left)}" if outcome.left else ""
    _say(f"failed: {', '.join(outcome.failed)} (for the reason in its lines above){rest}")
    return 1


@contextmanager
def _forks(needs: dvc_stages.Needs, variables: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Have stages start as forks where that helps: on a processor, where two of them or more load a model."""
    heavy = [stage for stage in needs if stage.split("@")[0] in launch.MODELS]
    if len(heavy) < 2 or sys.platform != "linux" or stages_at_once.accelerator():
        yield {}
        return
    environment = {**os.environ, **variables}
    cores.set_threads(environment)  # how they wait
    with forks.ready(environment) as variable:
        yield variable


def _say(line: str) -> None:
    print(f"spo: {line}", file=sys.stderr, flush=True)


def record_if_new(params: Params) -> bool:
    """Record a reproduction that has no runs in MLflow: it was pulled, or `dvc repro` had nothing to do.

    Not if params.yaml, code or data differ from dvc.lock, nor if MLflow is away.
    """
    if delivery.is_recorded(params.name, params.tracking):
        return False
    if subprocess.run([*DVC, "status", "--quiet"], capture_output=True).returncode != 0:
        return False
    settings = params.model_dump()
    runs.close_parent(runs.open_parent(settings), settings, "FINISHED", dvc_lock.read())
    return True
