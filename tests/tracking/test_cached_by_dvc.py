"""Cached stages with DVC itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow_runs import children

from spo.commands import repro
from spo.tracking.store import load_mlflow

DAG = """\
stages:
  pairs:
    cmd: python stage.py pairs
    params: [seed]
    deps: [stage.py]
    outs: [pairs.txt]
  report:
    cmd: python stage.py report
    params: [report]
    deps: [pairs.txt]
    outs: [report.txt]
"""
STAGE = """\
import sys
from spo import config
from spo.tracking import runs
name = sys.argv[1]
params = config.load().model_dump()
with runs.stage_run(name, params) as run:
    run.log_metrics({"rows": params["seed"]})
    open(f"{name}.txt", "w").write(name)
"""


@pytest.mark.nightly
@pytest.mark.smoke
def test_with_dvc_itself(folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bare repros, a changed key, `spo repro` and `spo sync` with nothing to do, a temporary experiment."""
    from spo import config

    (folder / "params.yaml").write_text(config.preset("smoke").replace("name: smoke", "name: tiny"))
    (folder / "dvc.yaml").write_text(DAG)
    (folder / "stage.py").write_text(STAGE)
    (folder / ".gitignore").write_text("/.spo\n/mlflow.db*\n/mlartifacts\n/*.txt\n")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    me = ("-c", "user.name=me", "-c", "user.email=me@here")

    def do(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def parents() -> list[Any]:
        client = load_mlflow().MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("tiny").experiment_id
        every = client.search_runs([experiment], order_by=["start_time"], max_results=100)
        return [r for r in every if "mlflow.parentRunId" not in r.data.tags]

    def cached(parent: Any) -> dict[str, str]:
        found = children(folder, parent.info.run_id)
        return {name: r.data.tags["dvc.cached"] for name, r in found.items()}

    do("git", "init", "-q")
    do("dvc", "init", "-q")
    do("dvc", "repro", "-q")
    do("git", "add", "-A")
    do("git", *me, "commit", "-qm", "one")
    do("spo", "sync")
    assert [cached(p) for p in parents()] == [{"pairs": "false", "report": "false"}]
    do("dvc", "repro", "-q", "-s", "report", "--force")
    do("spo", "sync")
    assert cached(parents()[1]) == {"pairs": "true", "report": "false"}
    do("spo", "repro")
    assert cached(parents()[2]) == {"pairs": "true", "report": "true"}
    one = children(folder, parents()[0].info.run_id)
    three = children(folder, parents()[2].info.run_id)
    assert three["pairs"].data.tags["origin_run_id"] == one["pairs"].info.run_id
    assert do("spo", "sync").startswith("0 runs")
    do("git", *me, "commit", "-qam", "two", "--allow-empty")
    do("dvc", "exp", "run", "-q", "--temp", "-S", "report.grid_prompts=3")
    assert cached(parents()[3]) == {"pairs": "true", "report": "false"}
    assert repro.record_if_new(config.load()) is False
