"""docs/experiments.md: its grid and its artifacts, on the real dvc.yaml whose stages a stand-in runs."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import time
from pathlib import Path

import experiments
import pytest
from many_runs import ARTIFACTS, GRID, KEEP

PAGE = Path(__file__).parents[2] / "docs/experiments.md"
SPO = ["inputs", "align@spo", "generate@spo", "score@spo", "report"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> experiments.Experiment:
    return experiments.settled(tmp_path_factory)


@pytest.mark.nightly
@pytest.mark.smoke
def test_a_grid_runs_every_combination_and_nothing_that_no_value_touches(
    project: experiments.Experiment,
) -> None:
    queue, status, run, show, stop = GRID
    project(queue)
    assert project(status).count("Queued") == 4
    ran = project.stages(run)
    project(stop)
    end = time.monotonic() + 1200
    while "0 active, 0 idle" not in (shown := project(status)):
        assert time.monotonic() < end, shown
        time.sleep(4)  # each look is a process of DVC, 1.5 s of the processor that the work needs
    assert shown.count("Success") == 4
    assert set(ran) == set(SPO), "data, preference model and Diffusion-DPO stay"
    by_figure = show.replace("spo.gain", "figure")
    table = list(csv.DictReader(project(f"{by_figure} --csv --no-pager 2>/dev/null").splitlines()))
    rows = [row for row in table if row["Experiment"]]
    tried = {(row["align.spo.beta"], row["align.spo.threshold"]) for row in rows}
    assert tried == {(b, t) for b in ("5", "10") for t in ("0.2", "0.4")}
    figures = [float(row["reports/metrics/report.json:figure"]) for row in rows]
    assert figures == sorted(figures) and len(set(figures)) == 4
    apply, branch = KEEP
    name = rows[0]["Experiment"]
    project(branch.replace("NAME BRANCH", f"{name} best"))
    assert "best" in project("git branch --list best")
    project(apply.replace("NAME", name))
    assert project.stages() == [], "an experiment comes with its outputs"
    project("git checkout --quiet . && dvc checkout --quiet --force")


@pytest.mark.nightly
@pytest.mark.smoke
def test_another_repository_gets_an_artifact_without_a_clone(
    project: experiments.Experiment, tmp_path: Path
) -> None:
    tag, push, data, get = ARTIFACTS
    shared, origin = tmp_path / "shared", tmp_path / "origin.git"
    project(f"git init -q --bare -b main {origin} && git remote set-url origin {origin}")
    project(f"dvc remote add --quiet --force -d team {shared} && git commit --quiet -am remote")
    paths = {"adapter": "outputs/align/spo", "preference-model": "outputs/preference"}
    project("git push -q origin HEAD:main")
    for artifact in paths:
        project(tag.replace("adapter", artifact))
        project(push.replace("adapter", artifact))
    assert paths["adapter"] in data
    project(data.replace(paths["adapter"], " ".join(paths.values())))
    other = experiments.Experiment(tmp_path / "other")
    other.folder.mkdir()
    other("git init -q && dvc init -q")
    got = get.replace("https://example.org/owner/project.git", str(origin))
    for artifact, path in paths.items():
        kept = sorted(p.name for p in (project.folder / path).iterdir())
        other(got.replace("adapter", artifact).replace("--out spo-lora", f"--out {artifact}"))
        assert sorted(p.name for p in (other.folder / artifact).iterdir()) == kept and kept
    other(got.replace("--rev v1.0.0 --out spo-lora", "--out highest"))
    assert sorted(p.name for p in (other.folder / "highest").iterdir())
    refused = other.run(got.replace("v1.0.0", "v9.0.0"))
    assert refused.returncode != 0 and "Traceback" not in refused.stderr


def test_the_page_finds_the_best_step_over_runs(
    tmp_path: Path,
    fresh_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from spo.tracking.runs import stage_run

    shutil.copy(fresh_store, tmp_path / "mlflow.db")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spo.runtime.processes.dvc_above", lambda: None)
    Path("adapter").write_bytes(b"weights")
    for step, gain in ((20, 0.5), (40, 0.9), (60, 0.7)):
        with stage_run("align", {"name": "scenes", "seed": step}, "spo") as run:
            run.log_metrics({"validation/gain": gain})
            run.log_model(Path("adapter"), "adapter", step, "validation/")
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    capsys.readouterr()
    exec(script, {})
    import mlflow

    mlflow.set_tracking_uri(None)
    assert capsys.readouterr().out.split()[0] == "40"


def test_the_page_names_the_artifacts_of_the_dag() -> None:
    import yaml

    named = yaml.safe_load((PAGE.parents[1] / "dvc.yaml").read_text())["artifacts"]
    assert set(named) == {"adapter", "preference-model"}
    for name in named:
        assert f"`{name}`" in PAGE.read_text()
    assert subprocess.run(["git", "check-ref-format", "refs/tags/adapter@v1.0.0"]).returncode == 0
