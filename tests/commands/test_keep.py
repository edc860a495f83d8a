"""`spo keep`: what it writes is what the report reads, and a report of other parameters is refused."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from spo import config
from spo.commands import keep
from spo.evaluation import kept_runs

ROW = {"method": "spo", "baseline": "base", "metric": "hps", "mean_method": 2.0, "mean_baseline": 1.0}
ROW |= {"mean_difference": 1.0, "ci_low": 0.5, "ci_high": 1.5, "win_rate": 0.75, "n": 4}


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Params:
    """A finished run of the smoke preset in the working folder."""
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(config.preset("smoke"))
    report = {"cmd": "spo report", "params": {"params.yaml": {"seed": raw["seed"], "align": raw["align"]}}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"report": report}}))
    for folder in ("metrics", "training"):
        (tmp_path / "reports" / folder).mkdir(parents=True)
    trained = {"training_seconds": 40.0, "unet_samples": 1000, "iterations": 10, "selected_iteration": 10}
    files = {"comparisons": [ROW], "metrics/preference": {"training_seconds": 2.0, "unet_samples": 50}}
    for name, content in {**files, "metrics/align_spo": trained}.items():
        (tmp_path / f"reports/{name}.json").write_text(json.dumps(content))
    curve = {"step": [0, 10], "validation/gain": [0.0, 1.5]}
    pd.DataFrame(curve).to_csv(tmp_path / "reports/training/spo.csv", index=False)
    return config.validate(raw)


def test_what_is_kept_is_read_by_the_report(params: config.Params) -> None:
    assert keep.run(params, "first") == Path("reports/runs/first.json")
    other = params.model_copy(update={"seed": 5}).model_dump(mode="json")
    (run,) = kept_runs.read(other)
    assert run.name == "first" and run.changes == {"seed": 0}
    (row,) = run.comparisons
    assert row["mean_difference"] == 1.0 and row["n"] == 4
    column, course = run.courses["spo"]
    assert column == "validation/gain" and course.unet_samples == [50, 1050] and course.selected == 1


def test_a_report_of_other_parameters_is_refused(params: config.Params) -> None:
    with pytest.raises(ValueError, match="keep: the report is of a run with seed = 0, params.yaml has 7"):
        keep.run(params.model_copy(update={"seed": 7}), "first")
    Path("dvc.lock").unlink()
    with pytest.raises(ValueError, match="dvc.lock has no report"):
        keep.run(params, "first")
    with pytest.raises(ValueError, match="a name is of letters"):
        keep.run(params, "../first")
