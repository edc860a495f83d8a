"""The whole flow on a small project: one parent in MLflow, retries, what Prefect shows."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from prefect.logging import disable_run_logger

from spo.tracking.delivery import BY_PARENT

pytestmark = pytest.mark.smoke


class Tasks:
    """In the place of the task `run_stage`: no server, no DVC; `fails` names the stage that fails."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.ran = fails, []

    def with_options(self, name: str) -> Tasks:
        return self

    def submit(self, stage: str, force: bool, parent: str, threads: int) -> SimpleNamespace:
        self.ran.append((stage, force, parent))
        future: Future[Any] = Future()
        row = {"stage": stage, "result": "ran", "seconds": 1.0}
        future.set_result(Ended(row, ValueError(stage) if stage == self.fails else None))
        return SimpleNamespace(wrapped_future=future)


class Ended:
    """A task's last state."""

    def __init__(self, row: dict[str, Any], error: Exception | None) -> None:
        self.row, self.error = row, error

    def is_completed(self) -> bool:
        return self.error is None

    def result(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return self.row


@pytest.mark.parametrize("fails", ["", "second"])
def test_all_stages_have_one_parent_that_ends_as_they_do(
    pipeline: ModuleType, project: Path, fresh_store: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(fresh_store, project / "mlflow.db")
    tasks, pages = Tasks(fails), []
    monkeypatch.setattr(pipeline, "run_stage", tasks)
    monkeypatch.setattr(pipeline, "create_markdown_artifact", lambda page, key: pages.append(page))
    before = (project / "params.yaml").read_text()
    expected = pytest.raises(ValueError, match="^second$") if fails else nullcontext()
    with disable_run_logger(), expected:
        done = pipeline.pipeline.fn({"seed": 5}, force=True)
        assert [row["stage"] for row in done] == ["first", "second"]
    (parent,) = {key for _, _, key in tasks.ran}
    assert parent and [stage for stage, force, _ in tasks.ran if force] == ["first", "second"]
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("scenes").experiment_id])
    assert run.info.status == ("FAILED" if fails else "FINISHED") and run.data.params["seed"] == "5"
    assert run.data.tags["dvc.first"] == "ran" and ("dvc.second" in run.data.tags) == (not fails)
    assert ((project / "params.yaml").read_text() == before) == bool(fails)
    assert len(pages) == (not fails) and all("| second | ran |" in page for page in pages)


@pytest.mark.nightly
@pytest.mark.services
def test_the_flow_by_a_prefect_server(
    pipeline: ModuleType, project: Path, fresh_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages under one parent in MLflow; a transient failure is tried again."""
    import mlflow
    from prefect.client.orchestration import get_client
    from prefect.testing.utilities import prefect_test_harness

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(fresh_store, project / "mlflow.db")
    quick = pipeline.run_stage.with_options(retry_delay_seconds=0)
    monkeypatch.setattr(pipeline, "run_stage", quick)
    (project / "second.sh").write_text(
        "[ -e tried ] || { touch tried; echo 75 > $SPO_EXIT_FILE; exit 75; }\n"
        f"{BY_PARENT}=1 {sys.executable} - <<'END'\n"  # else it imports MLflow too
        "from spo import config\n"
        "from spo.tracking import runs\n"
        "with runs.stage_run('second', config.load().model_dump()) as run:\n"
        "    run.log_metrics({'seconds': 1})\n"
        "END\n"
        "cp one.txt two.txt\n"
    )
    with prefect_test_harness(server_startup_timeout=600):
        done = pipeline.pipeline({"seed": 5})
        with get_client(sync_client=True) as client:
            tasks = {run.name.rsplit("-", 1)[0]: run for run in client.read_task_runs()}
            artifacts = client.read_artifacts()
    assert [row["result"] for row in done] == ["ran", "ran"]
    assert yaml.safe_load((project / "one.txt").read_text())["seed"] == 5
    assert set(tasks) == {"first", "second"}
    assert (tasks["first"].run_count, tasks["second"].run_count) == (1, 2)
    assert "| second | ran |" in str(artifacts[0].data)
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("scenes").experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    (child,) = [r for r in runs if r is not parent]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.info.status == child.info.status == "FINISHED"
    assert parent.data.tags["dvc.first"] == "ran" and parent.data.params["seed"] == "5"
