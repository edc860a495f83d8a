"""Run the DAG of dvc.yaml as a Prefect flow: a task a stage, retried if that can help, cancelled as a whole.

    python flows/pipeline.py --set align.spo.beta=20           run now, no server needed
    python flows/pipeline.py --serve --cron "0 3 * * *"        run every night; needs a server

DVC still decides what is out of date. `dvc repro` never needs this file.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")  # a busy machine

import changes
import serving
import subprocesses
from prefect import flow, get_run_logger, task  # noqa: E402
from prefect.artifacts import (  # noqa: E402
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
)
from prefect.cache_policies import NO_CACHE  # noqa: E402

from spo import config
from spo.commands import parallel, repro
from spo.evaluation import results
from spo.runtime import cores
from spo.runtime.messages import EXIT_FILE, TRANSIENT, redact
from spo.runtime.signals import exit_on_sigterm
from spo.tracking import cached_stages, delivery, dvc_lock, dvc_stages, runs
from spo.tracking.store import tracking_uri

ROOT = Path(__file__).resolve().parents[1]
CRON = "0 3 * * *"  # every day at 3


class StageError(RuntimeError):
    """A stage that failed; `transient` if another attempt may succeed."""

    def __init__(self, message: str, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


@flow(name="spo")
def pipeline(
    overrides: dict[str, Any] | None = None,
    force: bool = False,
    wait_minutes: float = 0,
    push: str | None = None,
) -> list[dict[str, Any]]:
    """Run the experiment; return the result of each stage: {stage, result, seconds}.

    Args:
        overrides: changes of params.yaml by dotted key, e.g. {"align.spo.beta": 20}; they stay in the file,
            unless the flow fails.
        force: run every stage, changed or not.
        wait_minutes: for another flow in this folder to end; 0: refuse at once.
        push: a DVC remote that gets the outputs and the run cache in the end, for clones elsewhere.

    Raises:
        ConfigError: a wrong override; nothing has been written or started then.
        StageError: a stage or the push failed.
    """
    with contextlib.chdir(ROOT):
        changes.merged(overrides or {})  # before waiting
        with alone(wait_minutes), changes.applied(overrides or {}) as params:
            done: list[dict[str, Any]] = []
            parent = runs.open_parent(params.model_dump())
            try:
                run_stages(params.processes, force, parent.key, done)
                status = "FINISHED"
            except BaseException as error:
                status = "FAILED" if isinstance(error, Exception) else "KILLED"
                subprocesses.end_all()  # stages run in threads, which this error does not reach
                raise
            finally:
                parent.set_tags({f"dvc.{row['stage']}": row["result"] for row in done})
                runs.close_parent(parent, params.model_dump(), status, [row["stage"] for row in done])
                delivery.sync(params.tracking, stopped=status == "KILLED")
            publish(done, params.tracking)
            if push:
                push_to(push)
    return done


def push_to(remote: str) -> None:
    """Send outputs and run cache: `dvc repro --pull` in a clone elsewhere then trains nothing.

    Raises:
        StageError: with the last lines of DVC's output.
    """
    command = [*repro.DVC, "push", "--run-cache", "--remote", remote]
    code, lines = subprocesses.execute(command, {}, get_run_logger().info)
    if code != 0:
        raise StageError(f"dvc push to {remote} failed: " + " | ".join(lines[-4:]), transient=True)


def run_stages(processes: int, force: bool, parent: str, done: list[dict[str, Any]]) -> None:
    """Run each stage as a task, independent ones in parallel; `done` gets the result of each.

    Raises:
        StageError: of the stage that failed, when those beside it have ended.
    """
    needs = stages()
    number, why = parallel.jobs_for(None, processes, needs)
    get_run_logger().info(f"{len(needs)} stages, up to {number} in parallel ({why})")

    def start(stage: str, share: int) -> Future[Any]:
        get_run_logger().info(f"stage {stage} starts")
        threads = max(1, cores.count() // (share * processes))
        submitted: Any = run_stage.with_options(name=stage).submit(stage, force, parent, threads)
        return submitted.wrapped_future  # of Prefect's threads; its declared type has no such field

    def is_success(future: Future[Any]) -> bool:
        state = future.result()
        if state.is_completed():
            done.append(state.result())
        else:
            failures.append(state)
        return bool(state.is_completed())

    failures: list[Any] = []
    parallel.schedule(needs, number, start, is_success)
    for state in failures:
        state.result()  # raises


def publish(done: Sequence[Mapping[str, Any]], configured: str | None) -> None:
    """Show results and timings, the grid of images and where the MLflow runs are on Prefect's page."""
    create_markdown_artifact(summary(done, comparisons()), key="spo-results")
    uri = redact(tracking_uri(configured))
    if uri.startswith("http"):
        create_link_artifact(uri, key="spo-mlflow", link_text="the runs in MLflow")
    grid = Path("reports/grid.png")
    if grid.exists():  # in the page itself: a server elsewhere cannot read this folder
        image = base64.b64encode(grid.read_bytes()).decode()
        create_image_artifact(f"data:image/png;base64,{image}", key="spo-grid")


def is_retryable(task: Any, run: Any, state: Any) -> bool:
    """Decide whether Prefect retries a failed stage."""
    try:
        state.result()
    except StageError as error:
        return error.transient
    except Exception:
        return False
    return False


@task(retries=2, retry_delay_seconds=[10, 60], retry_condition_fn=is_retryable, cache_policy=NO_CACHE)
def run_stage(stage: str, force: bool = False, parent: str = "", threads: int = 0) -> dict[str, Any]:
    """Run one stage by DVC: {stage, result (ran, restored or unchanged), seconds}.

    Args:
        threads: of torch, where OMP_NUM_THREADS is not set; 0: as `spo` chooses.

    Raises:
        StageError: with the last lines of its output; transient if `spo` ended with that exit code.
    """
    command = [*parallel.COMMAND, *(["--force"] if force else []), stage]
    before, started = dvc_lock.read(), time.monotonic()
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as exit_file:
        variables = {EXIT_FILE: exit_file.name} | ({runs.PARENT_VARIABLE: parent} if parent else {})
        if threads and cores.THREADS not in os.environ:
            variables[cores.THREADS] = str(threads)
        code, lines = subprocesses.execute(command, variables, get_run_logger().info)
        if code != 0:
            output = [line for line in lines if line.strip() and not line.startswith("tracking:")]
            transient = exit_file.read().strip() == str(TRANSIENT)
            raise StageError(f"stage {stage} failed: " + " | ".join(output[-4:]), transient)
    done = "ran" if force else result(stage, before.get(stage), dvc_lock.read().get(stage), parent)
    return {"stage": stage, "result": done, "seconds": round(time.monotonic() - started, 1)}


def result(stage: str, before: dvc_lock.Entry | None, after: dvc_lock.Entry | None, parent: str) -> str:
    """Tell from dvc.lock before and after whether a stage ran, was restored by DVC or is unchanged.

    A stage without a command of `spo` that ran and gave the same outputs counts as unchanged.
    """
    if cached_stages.has_run(parent, stage):
        return "ran"
    if before == after:
        return "unchanged"
    return "restored" if parent and after is not None and after.is_tracked else "ran"


def stages() -> dict[str, tuple[str, ...]]:
    """Return {stage: those that it needs} of dvc.yaml, in the order in which DVC runs them."""
    needs = dvc_stages.needs()
    return {stage: needs[stage] for stage in needs if not stage.endswith(".dvc")}  # data files


@contextlib.contextmanager
def alone(wait_minutes: float = 0) -> Iterator[None]:
    """Hold the folder for one flow at a time, so that overrides of one do not get into another.

    Raises:
        StageError: another flow runs, after `wait_minutes` still.
    """
    end = time.monotonic() + 60 * wait_minutes
    lock = Path(".spo/locks/flow")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    message = f"another flow runs in {ROOT}; wait for it (wait_minutes) or cancel it"
                    raise StageError(message, transient=True) from None
                time.sleep(1)
        yield


def comparisons() -> list[dict[str, Any]]:
    path = Path("reports/comparisons.json")
    return results.read_comparisons(path) if path.exists() else []


def summary(done: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the page that Prefect shows: comparisons, and the result and time of each stage."""
    lines = ["## Comparisons", ""]
    if rows:
        lines += ["| method | baseline | metric | difference | 95 % interval | win rate | n |"]
        lines += ["|---|---|---|---:|---|---:|---:|"]
    for r in rows:
        interval = "–" if r["ci_low"] is None else f"[{r['ci_low']:+.3f}, {r['ci_high']:+.3f}]"
        lines.append(
            f"| {r['method']} | {r['baseline']} | {r['metric']} | {r['mean_difference']:+.3f} "
            f"| {interval} | {r['win_rate']:.0%} | {r['n']} |"
        )
    lines += ["", "## Stages", "", "| stage | result | seconds |", "|---|---|---:|"]
    lines += [f"| {d['stage']} | {d['result']} | {d['seconds']:.1f} |" for d in done]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or serve the flow; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run the experiment as a Prefect flow.")
    parser.add_argument("--set", action="append", type=changes.parse, default=[], metavar="KEY=VALUE")
    parser.add_argument("--force", action="store_true", help="run every stage, changed or not")
    parser.add_argument("--push", metavar="REMOTE", help="a DVC remote for outputs and run cache")
    parser.add_argument("--wait", type=float, default=0, metavar="MINUTES", help="for another flow to end")
    serving.add_options(parser, CRON)
    options = parser.parse_args(arguments)
    serving.check(parser, options, CRON)
    parameters = {"overrides": dict(options.set), "force": options.force, "wait_minutes": options.wait}
    parameters["push"] = options.push
    os.chdir(ROOT)
    try:
        changes.merged(parameters["overrides"])  # before a server starts
        if options.serve:
            serving.serve(pipeline, "spo", options.cron, parameters)
        else:
            with exit_on_sigterm():  # which ends Prefect's temporary server too
                pipeline(**parameters)
    except (config.ConfigError, StageError) as error:
        print(f"pipeline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
