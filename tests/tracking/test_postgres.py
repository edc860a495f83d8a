"""Runs on a real PostgreSQL, as a team's MLflow server has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from spo.tracking.curve import Curve
from spo.tracking.delivery import sync
from spo.tracking.runs import open_parent, stage_run
from spo.tracking.store import load_mlflow

pytestmark = [pytest.mark.services, pytest.mark.nightly]
PARAMS: dict[str, Any] = {"name": "tiny", "seed": 3, "tracking": None, "align": {"spo": {"beta": 10}}}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[list[str], list[str], str]]:
    """(command to start it, command to stop it, its URI); started."""
    pytest.importorskip(
        "psycopg2", reason="PostgreSQL's driver is not installed: pip install psycopg2-binary"
    )
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL here (Debian: apt-get install postgresql)")
    binaries, user = found[-1].parent, None
    if os.geteuid() == 0:  # it does not run as root
        user = "postgres"
    folder = Path(tempfile.mkdtemp(prefix="spo-postgres-"))  # pytest keeps its own folders to their owner
    if user:
        shutil.chown(folder, user)
    port = free_port()

    def run(*command: str) -> None:
        done = subprocess.run(command, user=user, cwd="/", capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr

    data = str(folder / "data")
    run(str(binaries / "initdb"), "-D", data, "-U", "spo", "--auth=trust")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    control = [str(binaries / "pg_ctl"), "-D", data, "-w", "-l", str(folder / "log")]
    start, stop = [*control, "-o", options, "start"], [*control, "-m", "fast", "stop"]
    run(*start)
    uri = f"postgresql+psycopg2://spo@127.0.0.1:{port}/postgres"
    yield [user or "", *start], [user or "", *stop], uri
    subprocess.run(stop, user=user, cwd="/", capture_output=True)
    shutil.rmtree(folder)


def control(command: list[str]) -> None:
    subprocess.run(command[1:], user=command[0] or None, cwd="/", check=True, capture_output=True)


def test_runs_reach_it_and_wait_while_it_is_away(
    server: tuple[list[str], list[str], str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, stop, uri = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("SPO_PARENT_RUN", open_parent(PARAMS, "nightly").key)
    with stage_run("align", PARAMS, "spo") as run:
        curve = Curve(run, folder / "scratch")
        curve.resume(0)
        for step in range(50):
            curve.log({"loss": 1 / (1 + step)}, step)
    control(stop)
    began = time.monotonic()
    with stage_run("generate", PARAMS, "spo") as run:
        run.log_metrics({"seconds": 2.0})
    assert time.monotonic() - began < 300, "a stage does not wait for a server that is gone"
    control(start)
    sync(None)
    client = load_mlflow().MlflowClient(uri)
    found = {
        r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    }
    assert {"nightly", "align-spo", "generate-spo"} <= set(found)
    losses = client.get_metric_history(found["align-spo"].info.run_id, "loss")
    assert [m.step for m in losses] == list(range(50)), "each metric once, in order"
    assert found["generate-spo"].data.metrics["seconds"] == 2.0
    assert found["generate-spo"].data.tags["mlflow.parentRunId"] == found["nightly"].info.run_id
