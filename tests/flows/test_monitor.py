"""The champion's watch: what counts as a drop, and mistakes in one line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import serving
import yaml

FLOWS = Path(__file__).parents[2] / "flows"


@pytest.fixture(scope="module")
def monitor() -> ModuleType:
    specification = importlib.util.spec_from_file_location("spo_monitor", FLOWS / "monitor.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


ROWS = [{"metric": "pickscore", "mean_difference": 0.25}, {"metric": "hps", "mean_difference": -0.5}]


def test_a_drop_is_a_gain_below_its_bound(monitor: ModuleType) -> None:
    assert monitor.dropped(ROWS, {"pickscore": 0.25, "hps": -0.5}) == []
    (line,) = monitor.dropped(ROWS, {"pickscore": 0.2, "hps": -0.4})
    assert line == "hps: the champion's gain over the base is -0.5000, below -0.4"
    assert monitor.dropped([{"metric": "hps", "mean_difference": float("nan")}], {"hps": 0}), (
        "no number is no gain"
    )
    with pytest.raises(ValueError, match="no score 'oracle'; there are pickscore, hps"):
        monitor.dropped(ROWS, {"oracle": 0})


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere.txt"], 2, "nowhere.txt"),
        (["x.txt", "--at-least", "hps"], None, "is not SCORE=NUMBER"),
        (["x.txt", "--serve", "--cron", "every day"], None, "is no cron expression"),
        (["x.txt", "--cron", "0 6 * * 1"], None, "--cron needs --serve"),
    ],
)
def test_mistakes_are_one_line(
    monitor: ModuleType,
    arguments: list[str],
    status: int | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if status is None:
        with pytest.raises(SystemExit, match="2"):
            monitor.main(arguments)
    else:
        assert monitor.main(arguments) == status
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last


def test_an_empty_file_of_prompts_is_refused(monitor: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match="no prompt in it"):
        monitor.new_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert monitor.new_prompts(tmp_path / "p.txt") == ["one", "two"]


def test_a_prompt_in_several_spellings_counts_once(monitor: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("One  cat\na dog\none cat!\n")
    assert monitor.new_prompts(tmp_path / "p.txt") == ["One cat", "a dog"]


def test_a_prompt_that_cannot_be_encoded_is_refused_with_its_row(monitor: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(r'["a cat", "half \ud83d"]')
    with pytest.raises(ValueError, match="p.json: prompt 2 has half of a surrogate pair"):
        monitor.new_prompts(tmp_path / "p.json")


def test_deployments_name_flows_that_exist_with_their_parameters(
    monitor: ModuleType, pipeline: ModuleType
) -> None:
    settings = yaml.safe_load((FLOWS / "prefect.yaml").read_text())
    found = {"pipeline": pipeline.pipeline, "monitor": monitor.monitor}
    for deployment in settings["deployments"]:
        path, _, name = deployment["entrypoint"].partition(":")
        assert (FLOWS.parent / path).exists()
        assert set(deployment["parameters"]) == set(found[name].parameters.properties)
        for schedule in deployment.get("schedules", ()):
            assert serving.valid_cron(schedule["cron"])
