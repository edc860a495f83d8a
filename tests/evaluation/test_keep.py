"""`spo keep`: what it saves is what the report reads, and a report of other parameters is refused."""

import json
from pathlib import Path

import pytest
import yaml

from spo import config
from spo.evaluation import seeds

ROW = {"method": "spo", "baseline": "base", "metric": "hps", "mean_method": 2.0, "mean_baseline": 1.0}
ROW |= {"mean_difference": 1.0, "ci_low": 0.5, "ci_high": 1.5, "win_rate": 0.75, "n": 4}


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Params:
    """The report of a run of the smoke preset in the working folder."""
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(config.preset("smoke"))
    report = {"cmd": "spo report", "params": {"params.yaml": {"seed": raw["seed"], "align": raw["align"]}}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"report": report}}))
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/comparisons.json").write_text(json.dumps([ROW]))
    return config.validate(raw)


def test_what_is_saved_is_read_by_the_report_of_another_seed(params: config.Params) -> None:
    assert seeds.save(params) == Path("reports/seeds/0.json")
    found = seeds.read(params.model_copy(update={"seed": 5}))
    (row,) = found.comparisons[0]
    assert row["mean_difference"] == 1.0 and row["n"] == 4 and not found.others


def test_a_report_of_other_parameters_is_refused(params: config.Params) -> None:
    with pytest.raises(ValueError, match="keep: the report is of a run with seed = 0, params.yaml has 7"):
        seeds.save(params.model_copy(update={"seed": 7}))
    Path("dvc.lock").unlink()
    with pytest.raises(ValueError, match="dvc.lock has no report"):
        seeds.save(params)
