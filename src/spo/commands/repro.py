"""`spo repro`: a `dvc repro` with one parent run, and with independent stages in parallel."""

import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from spo.commands import forecast, parallel, progress
from spo.config import Params
from spo.runtime.files import read_json
from spo.runtime.signals import children
from spo.runtime.workspace import METRICS
from spo.tracking import delivery, dvc_lock, dvc_stages, runs
from spo.tracking.store import tracking_uri

DVC = (sys.executable, "-m", "dvc")
PAGE = Path("reports/report.html")


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
    if complete:
        progress.console().print("\n".join(_result()), end="")
    return code


def _by_dvc(arguments: Sequence[str], variables: Mapping[str, str]) -> int:
    with children() as started:
        return started.start([*DVC, "repro", *arguments], env={**os.environ, **variables}).wait()


def _all(params: Params, needs: dvc_stages.Needs, jobs: int | None, variables: Mapping[str, str]) -> int:
    """Run all stages of `needs`, and return the exit status."""
    out, work = progress.console(), forecast.known(params.name, needs)
    number, why = parallel.jobs_for(jobs, params.processes, needs, work)
    rate = forecast.rate()
    threads = parallel.threads_for(number, params.processes)
    seconds = None
    if work:
        together = max(parallel.longest(needs, work), sum(work.values()) / number)
        seconds = together / rate / forecast.speedup(threads)
    out.print("\n".join(plan(params.name, needs, [s for s in dvc_lock.read() if s not in needs], seconds)))
    out.print(f"{number} at a time ({why}); what stages print: {progress.LOGS}/STAGE.log")
    shown = progress.Progress(len(needs), out)
    with shown.live:
        failed, left = parallel.run(needs, number, params.processes, variables, shown, work)
    forecast.remember(
        params.name, {s: t * rate * forecast.speedup(threads) for s, t in shown.seconds.items()}
    )
    if not failed:
        return 0
    rest = f"; not run: {', '.join(left)}" if left else ""
    print(f"spo: failed: {', '.join(failed)} (for the reason in its lines above){rest}", file=sys.stderr)
    return 1


def plan(name: str, run: Collection[str], current: Collection[str], seconds: float | None) -> list[str]:
    """What `spo repro` will do: stages that run, stages that are up to date, and about how long it takes."""
    if seconds is None:
        how_long = "for how long is not known before a first run"
    else:
        how_long = f"about {forecast.text(seconds)} here"
    lines = [f"{name}: {len(run)} stages to run, {how_long}", f"  run: {_grouped(run)}"]
    return [*lines, f"  up to date: {_grouped(current)}"] if current else lines


def _grouped(stages: Collection[str]) -> str:
    """Stages with the items of each in brackets, such as align (spo, lpo)."""
    items: dict[str, list[str]] = {}
    for stage in stages:
        name, _, item = stage.partition("@")
        items.setdefault(name, []).extend([item] if item else [])
    return ", ".join(f"{name} ({', '.join(own)})" if own else name for name, own in items.items())


def _result() -> Iterator[str]:
    """What the experiment found, what it cost, and where the page is; nothing without a page."""
    if not PAGE.exists():
        return
    from spo.evaluation import results, verdict

    numbers = read_json(METRICS / "report.json", "numbers of the report")
    taken = {
        method: own["seconds"]
        for method, own in numbers.items()
        if isinstance(own, dict) and "seconds" in own
    }
    yield verdict.headline(results.read_comparisons())
    yield verdict.cost(taken)
    yield f"{PAGE}: all figures; reports/gallery.html: all images; `make ui`: MLflow\n"


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
