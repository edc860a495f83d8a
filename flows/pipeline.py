"""The DAG of dvc.yaml as a Prefect flow: one task a stage, retried when that can help, cancelled as a whole.

    python flows/pipeline.py --set align.spo.beta=20           run now, no server needed
    python flows/pipeline.py --serve --cron "0 3 * * *"        stay, and run every night; needs a server

DVC still decides what is out of date. `dvc repro` never needs this file.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")  # a busy machine

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
from spo.config import overrides as changes
from spo.runtime.messages import redact
from spo.tracking import runs

ROOT = Path(__file__).resolve().parents[1]
DVC = [sys.executable, "-m", "dvc"]
CRON = "0 3 * * *"  # every day at 3
# what a later attempt may not meet again: locks of DVC and of a stage, and the network
PASSING = re.compile(
    r"Unable to acquire lock|is being blocked by|already runs in this folder|database is locked"
    r"|Connection (refused|reset|aborted|error)|ConnectionError|ConnectTimeout|Read timed out"
    r"|Temporary failure in name resolution|Max retries exceeded|\b(429|502|503|504) (Client|Server) Error"
)


class StageError(RuntimeError):
    """A stage that failed; `passing` if another attempt may do better."""

    def __init__(self, message: str, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing


@flow(name="spo")
def pipeline(
    overrides: dict[str, Any] | None = None, force: bool = False, wait_minutes: float = 0
) -> list[dict[str, Any]]:
    """Run the experiment; what each stage did: {stage, result, seconds}.

    Args:
        overrides: changes of params.yaml by dotted key, e.g. {"align.spo.beta": 20}; they stay in the file.
        force: run every stage, changed or not.
        wait_minutes: for another flow in this folder to end; 0: refuse at once.

    Raises:
        ConfigError: a wrong override; nothing has been written or started then.
        StageError: a stage failed.
    """
    with contextlib.chdir(ROOT):
        params = changes.merged(overrides or {})
        with alone(wait_minutes):
            changes.write(overrides or {})
            done: list[dict[str, Any]] = []
            parent = runs.open_parent(params.model_dump())
            try:
                every = stages()
                for number, stage in enumerate(every, 1):
                    get_run_logger().info(f"stage {number} of {len(every)}: {stage}")
                    named = run_stage.with_options(name=stage)
                    done.append(named(stage, force, parent.key))
                status = "FINISHED"
            except BaseException as error:
                status = "FAILED" if isinstance(error, Exception) else "KILLED"
                raise
            finally:
                parent.set_tags({f"dvc.{row['stage']}": row["result"] for row in done})
                skipped = [row["stage"] for row in done if row["result"] != "ran"]
                runs.close_parent(parent, params.model_dump(), status, skipped)
                runs.sync(params.tracking)
            publish(done, params.tracking)
    return done


def publish(done: Sequence[Mapping[str, Any]], configured: str | None) -> None:
    """What Prefect's page shows: results and timings, the grid of pictures, where the MLflow runs are."""
    create_markdown_artifact(summary(done, comparisons()), key="spo-results")
    uri = redact(runs.tracking_uri(configured))
    if uri.startswith("http"):
        create_link_artifact(uri, key="spo-mlflow", link_text="the runs in MLflow")
    grid = Path("reports/grid.png")
    if grid.exists():  # in the page itself: a server elsewhere cannot read this folder
        picture = base64.b64encode(grid.read_bytes()).decode()
        create_image_artifact(f"data:image/png;base64,{picture}", key="spo-grid")


def can_pass(task: Any, run: Any, state: Any) -> bool:
    """Prefect asks this before it tries a failed stage again."""
    try:
        state.result()
    except StageError as error:
        return error.passing
    except Exception:
        return False
    return False


@task(retries=2, retry_delay_seconds=[10, 60], retry_condition_fn=can_pass, cache_policy=NO_CACHE)
def run_stage(stage: str, force: bool = False, parent: str = "") -> dict[str, Any]:
    """One stage by DVC: {stage, result (ran, restored or unchanged), seconds}.

    Raises:
        StageError: with the last lines of what it said.
    """
    line = [*DVC, "repro", "--single-item", *(["--force"] if force else []), stage]
    variables = {runs.PARENT_VARIABLE: parent} if parent else {}
    started = time.monotonic()
    code, lines = subprocesses.execute(line, variables, get_run_logger().info)
    if code != 0:
        told = [line for line in lines if line.strip() and not line.startswith("tracking:")]
        passing = any(PASSING.search(line) for line in told)
        raise StageError(f"stage {stage} failed: " + " | ".join(told[-4:]), passing)
    return {"stage": stage, "result": result(lines), "seconds": round(time.monotonic() - started, 1)}


def result(lines: Sequence[str]) -> str:
    """What DVC did, from what it said."""
    text = "\n".join(lines)
    if "Running stage" in text:
        return "ran"
    return "restored" if "is cached - skipping run" in text else "unchanged"


def stages() -> list[str]:
    """All stages of dvc.yaml in its order, where each comes after those that it needs."""
    done = subprocess.run([*DVC, "stage", "list", "--name-only"], capture_output=True, text=True)
    if done.returncode != 0:
        raise StageError(f"dvc stage list: {done.stderr.strip()}", passing=False)
    return done.stdout.split()


@contextlib.contextmanager
def alone(wait_minutes: float = 0) -> Iterator[None]:
    """One flow at a time in a folder, so that overrides of one do not get into another.

    Raises:
        StageError: another flow runs, after `wait_minutes` still.
    """
    end = time.monotonic() + 60 * wait_minutes
    lock = Path(".spo/locks/flow")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    told = f"another flow runs in {ROOT}; wait for it (wait_minutes) or cancel it"
                    raise StageError(told, passing=True) from None
                time.sleep(1)
        yield


def comparisons() -> list[dict[str, Any]]:
    path = Path("reports/comparisons.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def summary(done: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """The page that Prefect shows: comparisons, and what each stage did in what time."""
    lines = ["## Comparisons", ""]
    if rows:
        lines += ["| method | baseline | metric | difference | 95 % interval | win rate | n |"]
        lines += ["|---|---|---|---:|---|---:|---:|"]
    for r in rows:
        interval = f"[{r['ci_low']:+.3f}, {r['ci_high']:+.3f}]"
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
    parser.add_argument("--wait", type=float, default=0, metavar="MINUTES", help="for another flow to end")
    serving.add_options(parser, CRON)
    told = parser.parse_args(arguments)
    serving.check(parser, told, CRON)
    parameters = {"overrides": dict(told.set), "force": told.force, "wait_minutes": told.wait}
    os.chdir(ROOT)
    try:
        changes.merged(parameters["overrides"])  # before a server starts
        if told.serve:
            pipeline.serve(name="spo", cron=told.cron, parameters=parameters)
        else:
            # by an exit, which ends Prefect's temporary server too
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
            pipeline(**parameters)
    except (config.ConfigError, StageError) as error:
        print(f"pipeline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
