"""The champion's watch: what counts as a drop, and mistakes in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import changes
import jinja2
import pytest
import serving
import yaml
from prefect.events.schemas.events import Resource, ResourceSpecification

from spo import config
from spo.data.prompts import key

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
    with pytest.raises(ValueError, match="unknown score 'oracle'; known: pickscore, hps"):
        monitor.dropped(ROWS, {"oracle": 0})


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere.txt"], 2, "nowhere.txt"),
        (["x.txt", "--at-least", "hps"], None, "is not SCORE=NUMBER"),
        (["x.txt", "--serve", "--cron", "every day"], None, "is no cron expression"),
        (
            ["x.txt", "--serve", "--cron", "0 3 30 2 *"],
            None,
            "'0 3 30 2 *' never fires: there is no such date",
        ),
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
        found[name].validate_parameters(deployment["parameters"])
        for schedule in deployment.get("schedules", ()):
            assert serving.next_dates({k: v for k, v in schedule.items() if k != "active"})


@pytest.mark.parametrize(
    "schedule",
    [
        {"cron": "0 3 31 2 *"},
        {"cron": "0 0 31 4,6,9,11 *"},
        {"rrule": "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30"},
        {"rrule": "DTSTART:20200101T000000\nRRULE:FREQ=DAILY;COUNT=2"},
    ],
)
def test_a_schedule_that_never_fires_is_refused(schedule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="never fires: there is no such date"):
        serving.next_dates(schedule)


def test_the_dates_of_a_schedule_are_those_of_the_calendar() -> None:
    days = [(d.day, d.month) for d in serving.next_dates({"cron": "0 3 29 2 *"})]
    assert days == [(29, 2)] * 3
    (berlin,) = serving.next_dates({"cron": "0 3 24 12 *", "timezone": "Europe/Berlin"}, count=1)
    assert f"{berlin:%d %H:%M %Z}" == "24 03:00 CET"
    assert len(serving.next_dates({"interval": 3600})) == 3
    for wrong in ({"interval": 0}, {"cron": "0 3 * * *", "timezone": "Mars/One"}, {}):
        with pytest.raises(ValueError, match="is no (interval|cron|schedule) expression"):
            serving.next_dates(wrong)


def test_serving_begins_with_the_next_three_dates(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[dict[str, Any]] = []
    flow = SimpleNamespace(serve=lambda **options: asked.append(options))
    serving.serve(flow, "spo", "0 3 29 2 *", {"seed": 1})
    line = capsys.readouterr().out
    assert line.startswith("next runs: ") and line.count("-02-29 03:00 UTC") == 3 and line.count("\n") == 1
    serving.serve(flow, "spo", None, {})
    assert capsys.readouterr().out == "" and [o["cron"] for o in asked] == ["0 3 29 2 *", None]


def deployment(name: str) -> dict[str, Any]:
    settings = yaml.safe_load((FLOWS / "prefect.yaml").read_text())
    (found,) = [d for d in settings["deployments"] if d["name"] == name]
    return found


@pytest.fixture
def dropped(monitor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The events of a champion that dropped on whatever prompts it is asked for."""
    events: list[dict[str, Any]] = []
    rows = [
        {"metric": metric, "mean_difference": -1.0}
        for metric in config.load(FLOWS.parent / "params.yaml").registry.improves
    ]
    monkeypatch.setattr(monitor, "measure", lambda params, prompts, seed: (rows, "scenes-1"))
    monkeypatch.setattr(monitor, "create_table_artifact", lambda *_, **__: None)
    monkeypatch.setattr(monitor, "emit_event", lambda name, **event: events.append(event))
    return events


def starts_retrain(event: dict[str, Any]) -> bool:
    (trigger,) = deployment("retrain")["triggers"]
    return ResourceSpecification(trigger["match"]).matches(Resource(event["resource"]))


needs_data = pytest.mark.skipif(not (FLOWS.parent / "data").exists(), reason="needs `make data`")


@needs_data
def test_the_shipped_weekly_hands_retrain_prompts_that_it_can_train_on(
    monitor: ModuleType, pipeline: ModuleType, dropped: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(monitor.QualityDropped) as raised:
        monitor.monitor.fn(**deployment("weekly")["parameters"])
    (event,) = dropped
    assert "no new training" not in str(raised.value) and starts_retrain(event)
    (trigger,) = deployment("retrain")["triggers"]
    template = jinja2.Template(json.dumps(trigger["parameters"]))
    asked = json.loads(template.render(event={"payload": event["payload"]}))
    pipeline.pipeline.validate_parameters(asked)
    monkeypatch.chdir(FLOWS.parent)
    params = changes.merged(asked["overrides"])
    assert monitor.untrainable(params, params.prompts.train) is None


@needs_data
def test_a_drop_on_the_evaluation_prompts_starts_no_training(
    monitor: ModuleType, dropped: list[dict[str, Any]]
) -> None:
    with pytest.raises(
        monitor.QualityDropped, match="no new training: .*prompts.n_train is 1200, but only 68"
    ):
        monitor.monitor.fn("data/prompts/evaluation.txt")
    assert not starts_retrain(dropped[0])


@needs_data
def test_the_shipped_new_prompts_are_in_no_other_list() -> None:
    new = {key(line) for line in (FLOWS / "new_prompts.txt").read_text(encoding="utf-8").splitlines()}
    for name in ("train", "evaluation"):
        others = (FLOWS.parent / f"data/prompts/{name}.txt").read_text(encoding="utf-8").splitlines()
        assert new.isdisjoint(map(key, others))
