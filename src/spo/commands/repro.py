"""`spo repro`: a `dvc repro` with one parent run, and with independent stages in parallel."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from spo.commands import parallel
from spo.config import Params
from spo.runtime.signals import children
from spo.tracking import delivery, dvc_lock, dvc_stages, runs
from spo.tracking.store import tracking_uri

DVC = (sys.executable, "-m", "dvc")


def run(params: Params, arguments: Sequence[str] = (), jobs: int | None = None) -> int:
    """Bring all stages up to date, or run `dvc repro ARGUMENTS`; record skipped ones too; return its status.

    Args:
        jobs: how many stages may run in parallel (`parallel.jobs_for` where it is None); with arguments DVC
            runs its stages sequentially.
    """
    if jobs is not None and (jobs < 1 or arguments):
        raise ValueError(f"--jobs {jobs}: give a number of at least 1, and no arguments of dvc repro")
    needs = {} if arguments else dvc_stages.out_of_date()
    settings = params.model_dump()
    parent = runs.open_parent(settings)
    status = "KILLED"
    try:
        variables = {runs.PARENT_VARIABLE: parent.key} if parent.key else {}
        code = 0
        if not arguments and not needs:
            print("Data and pipelines are up to date.")
        else:
            with delivery.for_stages(tracking_uri(params.tracking), parent) as delivered:
                variables |= delivered
                code = _by_dvc(arguments, variables) if arguments else _all(params, needs, jobs, variables)
        status = "FAILED" if code else "FINISHED"
    finally:
        # with arguments, or after an error, DVC has not checked every stage
        complete = status == "FINISHED" and not arguments
        runs.close_parent(parent, settings, status, dvc_lock.read() if complete else ())
        delivery.sync(params.tracking, stopped=status == "KILLED")
    return code


def _by_dvc(arguments: Sequence[str], variables: Mapping[str, str]) -> int:
    with children() as started:
        return started.start([*DVC, "repro", *arguments], env={**os.environ, **variables}).wait()


def _all(params: Params, needs: dvc_stages.Needs, jobs: int | None, variables: Mapping[str, str]) -> int:
    """Run all stages of `needs`, and return the exit status."""
    number, why = parallel.jobs_for(jobs, params.processes) if len(needs) > 1 else (1, "there is one")
    if number == 1:
        _say(f"{len(needs)} stages, one at a time ({why})")
        return _by_dvc((), variables)
    _say(f"{len(needs)} stages, up to {number} in parallel ({why}); `spo repro --jobs 1` runs one at a time")
    failed, left = parallel.run(needs, number, params.processes, variables)
    if not failed:
        return 0
    rest = f"; not run: {', '.join(left)}" if left else ""
    _say(f"failed: {', '.join(failed)} (for the reason in its lines above){rest}")
    return 1


def _say(line: str) -> None:
    print(f"spo: {line}", file=sys.stderr, flush=True)


def record_if_new(params: Params) -> bool:
    """Record a reproduction that has no runs in MLflow: it was pulled, or `dvc repro` had nothing to do.

    Does nothing if params.yaml, code or data differ from dvc.lock, or if MLflow is unreachable.
    """
    if delivery.is_recorded(params.name, params.tracking):
        return False
    if subprocess.run([*DVC, "status", "--quiet"], capture_output=True).returncode != 0:
        return False
    settings = params.model_dump()
    runs.close_parent(runs.open_parent(settings), settings, "FINISHED", dvc_lock.read())
    return True
