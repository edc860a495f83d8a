"""A folder with an MLflow store of its own, a copy of `fresh_store`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spo.tracking.store import load_mlflow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a stage runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "SPO_PARENT_RUN", "DVC_STAGE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("spo.runtime.processes.dvc_above", lambda: None)
    return tmp_path


@pytest.fixture
def runs(folder: Path, fresh_store: Path) -> Callable[[], dict[str, Any]]:
    """The folder's default store; call it for the runs by name."""
    shutil.copy(fresh_store, folder / "mlflow.db")

    def read() -> dict[str, Any]:
        client = load_mlflow().MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        experiments = [e.experiment_id for e in client.search_experiments()]
        found = client.search_runs(experiments, max_results=100)
        named = {run.info.run_name: run for run in found}
        assert len(named) == len(found), "two runs of one name"
        return named

    return read
