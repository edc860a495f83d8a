"""Runs of the MLflow store in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spo.tracking.store import load_mlflow


def children(folder: Path, parent: str) -> dict[str, Any]:
    client = load_mlflow().MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    return {r.info.run_name: r for r in found}
