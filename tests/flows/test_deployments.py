"""Deployments of flows/prefect.yaml on a real server: by an event, and with code from git."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect_server import ask, started, wait_for

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.services,
    pytest.mark.timeout(3600),
]  # Prefect takes long to start
ROOT = Path(__file__).parents[2]
DAG = """\
stages:
  prompts:
    cmd: cp data/prompts.txt prompts.txt && python -c "import yaml; p = yaml.safe_load(open('params.yaml'));
      open('train.txt', 'w').write(p['prompts']['train'])"
    params: [prompts.train]
    deps: [data]
    outs: [prompts.txt, train.txt]
"""


@pytest.fixture(scope="module")
def environment(environment: dict[str, str]) -> dict[str, str]:
    """Where the server is, for somebody with a name in git."""
    names = {f"GIT_{role}_{part}": "a@b" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    return {**environment, **names, "DVC_NO_ANALYTICS": "1"}


@pytest.fixture
def project(tmp_path: Path, environment: dict[str, str]) -> Path:
    """A git repository with one stage, data in a DVC remote, and the flows' files."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data/prompts.txt").write_text("a red circle\n")
    shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "dvc.yaml").write_text(DAG)
    (folder / ".gitignore").write_text(".spo\nmlflow.db*\nmlartifacts\nlog.txt\n__pycache__\n")
    shared = tmp_path / "shared"
    for command in (
        "git init -q -b trunk",
        "dvc init -q",
        f"dvc remote add -q -d team {shared}",
        "dvc add -q data",
        "dvc push -q",
        "git add -A",
        "git commit -q -m first",
    ):
        run(command, folder, environment)
    return folder


STAND_IN = """

def measure(params, prompts, seed):  # as if the champion had dropped
    return [{"metric": metric, "mean_difference": -1.0} for metric in params.registry.improves], "scenes-3"


def untrainable(params, prompts):  # data/ is not here: test_monitor.py asks it
    return None
"""


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def deploy(name: str, folder: Path, environment: dict[str, str]) -> None:
    run(f"prefect --no-prompt deploy --prefect-file flows/prefect.yaml --name {name}", folder, environment)


def finished(environment: dict[str, str], deployment: str) -> list[dict[str, Any]]:
    runs = ask(
        environment,
        "flow_runs/filter",
        deployments={"name": {"any_": [deployment]}},
        flow_runs={"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}},
    )
    return [{"state": r["state_type"], "parameters": r["parameters"]} for r in runs]


def test_a_champion_that_dropped_starts_a_training_on_the_prompts_where_it_did(
    environment: dict[str, str], project: Path
) -> None:
    variables = {**environment, "SPO_ROOT": str(project)}
    deploy("retrain", project, variables)
    emit = "import monitor; monitor.announce('tiny', 'tiny-3', ['pickscore: below 0'], 'new/prompts.txt')"
    with started(["prefect", "worker", "start", "--pool", "spo"], project, variables):
        other = {
            **variables,
            "PYTHONPATH": f"{project / 'flows'}{os.pathsep}{variables.get('PYTHONPATH', '')}",
        }
        subprocess.run([sys.executable, "-c", emit], env=other, check=True, capture_output=True)
        (done,) = wait_for("the training", 600, lambda: finished(environment, "retrain"))
    assert done["state"] == "COMPLETED", (project / "log.txt").read_text()[-3000:]
    assert done["parameters"]["overrides"] == {"prompts.train": "new/prompts.txt"}
    assert (project / "train.txt").read_text() == "new/prompts.txt"
    changed = yaml.safe_load((project / "params.yaml").read_text())
    assert changed["prompts"]["train"] == "new/prompts.txt", "the override stays, as one of `nightly` does"


def test_the_chain_of_weekly_and_retrain_succeeds_as_shipped(
    environment: dict[str, str], project: Path
) -> None:
    variables = {**environment, "SPO_ROOT": str(project)}
    with (project / "flows/monitor.py").open("a") as file:
        file.write(STAND_IN)
    deploy("weekly --name retrain", project, variables)
    shipped = yaml.safe_load((ROOT / "flows/prefect.yaml").read_text())["deployments"]
    (weekly,) = [d["parameters"] for d in shipped if d["name"] == "weekly"]
    trained = {"prompts.train": weekly["prompts"]}

    def retrained() -> list[dict[str, Any]]:
        return [r for r in finished(environment, "retrain") if r["parameters"].get("overrides") == trained]

    with started(["prefect", "worker", "start", "--pool", "spo"], project, variables):
        run("prefect deployment run spo-monitor/weekly", project, variables)
        (done,) = wait_for("the training", 600, retrained)
    assert done["state"] == "COMPLETED", (project / "log.txt").read_text()[-3000:]
    assert [run["state"] for run in finished(environment, "weekly")] == ["FAILED"], "it says so"
    assert (project / "train.txt").read_text() == weekly["prompts"]


def test_a_worker_elsewhere_takes_the_code_from_git_and_leaves_the_results_in_the_remote(
    environment: dict[str, str], project: Path, tmp_path: Path
) -> None:
    source = {"SPO_REPOSITORY": str(project), "SPO_BRANCH": "trunk"}
    deploy("from-git", project, {**environment, **source})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    push = json.dumps({"push": "team"})
    with started(["prefect", "worker", "start", "--pool", "spo"], elsewhere, environment):
        run(f"prefect deployment run spo/from-git --params '{push}'", elsewhere, environment)
        (done,) = wait_for("the run", 600, lambda: finished(environment, "from-git"))
    assert done["state"] == "COMPLETED", (elsewhere / "log.txt").read_text()[-3000:]
    assert not (project / "train.txt").exists() and not (project / "dvc.lock").exists()
    run(f"git clone -q {project} clone", tmp_path, environment)
    clone = tmp_path / "clone"
    shown = run("dvc repro --pull", clone, environment)
    assert "Stage 'prompts' is cached" in shown and "Running stage" not in shown, "nothing is trained again"
    assert (clone / "prompts.txt").read_text() == "a red circle\n"


def test_every_deployment_starts_a_flow_with_its_own_parameters() -> None:
    import inspect

    sys.path.insert(0, str(ROOT / "flows"))
    try:
        import monitor
        import pipeline
    finally:
        sys.path.pop(0)
    content = yaml.safe_load((ROOT / "flows/prefect.yaml").read_text())
    flows = {"pipeline": pipeline.pipeline, "monitor": monitor.monitor}
    for deployment in content["deployments"]:
        known = set(inspect.signature(flows[deployment["entrypoint"].split(":")[1]].fn).parameters)
        assert set(deployment["parameters"]) == known
        for trigger in deployment.get("triggers", ()):
            assert trigger["expect"] == [monitor.EVENT] and set(trigger["parameters"]) <= known
