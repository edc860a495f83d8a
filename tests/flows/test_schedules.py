"""A real Prefect server on the loopback interface: the clock, a work pool's worker, cancelling."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect_server import ask, started, wait_for

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.services,
    pytest.mark.timeout(3600),
]  # Prefect takes long to start
FLOWS = Path(__file__).parents[2] / "flows"
DAG = """\
stages:
  first:
    cmd: cp params.yaml one.txt
    params: [seed]
    outs: [one.txt]
  second:
    cmd: sh second.sh
    deps: [one.txt]
    outs: [two.txt]
"""


def runs(variables: dict[str, str], state: str, deployment: str) -> list[dict[str, Any]]:
    found = {"state": {"type": {"any_": [state]}}}
    return ask(variables, "flow_runs/filter", flow_runs=found, deployments={"name": {"any_": [deployment]}})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return small_project(tmp_path)


def small_project(folder: Path) -> Path:
    """A project of two stages with the flows' files in it."""
    (folder / ".dvc").mkdir()  # what `dvc init --no-scm` makes
    (folder / ".dvc/config").write_text("[core]\n    no_scm = True\n")
    (folder / "params.yaml").write_text((FLOWS.parent / "params.yaml").read_text())
    (folder / "dvc.yaml").write_text(DAG)
    (folder / "second.sh").write_text("cp one.txt two.txt\n")
    shutil.copytree(FLOWS, folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def served(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project whose flow is served every minute, while other tests run."""
    folder = small_project(tmp_path_factory.mktemp("served"))
    command = [sys.executable, "flows/pipeline.py", "--serve", "--cron", "* * * * *"]
    with started(command, folder, environment):
        yield folder


def test_a_worker_runs_the_deployment_and_cancelling_ends_every_child(
    environment: dict[str, str], project: Path, served: Path
) -> None:
    environment = {**environment, "SPO_ROOT": str(project)}
    (project / "second.sh").write_text("echo $$ > pid; sleep 600; cp one.txt two.txt\n")
    deploy = ["prefect", "--no-prompt", "deploy", "--prefect-file", "flows/prefect.yaml", "--name", "nightly"]
    done = subprocess.run(deploy, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    start = ["prefect", "deployment", "run", "spo/nightly"]
    before = {run["id"] for run in runs(environment, "COMPLETED", "nightly")}
    with started(["prefect", "worker", "start", "--pool", "spo"], project, environment):
        subprocess.run(start, cwd=project, env=environment, check=True, capture_output=True)
        wait_for(
            "the second stage", 300, lambda: (project / "pid").exists() and (project / "pid").read_text()
        )
        child = psutil.Process(int((project / "pid").read_text()))
        run = runs(environment, "RUNNING", "nightly")[0]["id"]
        state = {"type": "CANCELLING", "name": "Cancelling"}
        ask(environment, f"flow_runs/{run}/set_state", state=state, force=False)
        wait_for("the end of the stage", 600, lambda: not child.is_running())  # of 600 s
        wait_for("the cancelled state", 600, lambda: runs(environment, "CANCELLED", "nightly"))
        assert not (project / "two.txt").exists()
        (project / "second.sh").write_text("cp one.txt two.txt\n")  # the next run goes on
        subprocess.run(start, cwd=project, env=environment, check=True, capture_output=True)
        wait_for(
            "the next run",
            300,
            lambda: {run["id"] for run in runs(environment, "COMPLETED", "nightly")} - before,
        )
        assert (project / "two.txt").exists()


def test_a_served_flow_runs_by_the_clock(environment: dict[str, str], served: Path) -> None:
    done = wait_for("a scheduled run", 600, lambda: runs(environment, "COMPLETED", "spo"))
    assert done[0]["auto_scheduled"] and (served / "two.txt").exists()
    names = {
        task["name"].rsplit("-", 1)[0]
        for task in ask(environment, "task_runs/filter", flow_runs={"id": {"any_": [done[0]["id"]]}})
    }
    assert names == {"first", "second"}, "tasks have the names of the stages"
