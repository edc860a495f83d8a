"""The champion's watch on a schedule: its event, read back from a real Prefect server."""

import sys
from pathlib import Path
from typing import Any

import clones
import pytest
import yaml
from prefect_server import ask, server, wait_for

EVENT = "spo.champion.dropped"
TWICE = """
import runpy, sys

sys.path.insert(0, "flows")
codes = []
for bound in sys.argv[1:]:  # in one process, which takes 6 s to import all
    sys.argv = ["flows/monitor.py", "new.txt", "--at-least", bound]
    try:
        runpy.run_path("flows/monitor.py", run_name="__main__")
    except SystemExit as end:
        codes.append(end.code or 0)
print(codes)
"""
pytestmark = [pytest.mark.nightly, pytest.mark.smoke, pytest.mark.services]


def test_a_drop_is_an_event_and_a_failed_run(copy: Path, tmp_path: Path) -> None:
    params = yaml.safe_load((copy / "params.yaml").read_text())
    params["registry"] = {
        "improves": [],
        "holds": {"pickscore": 1e6},
        "min_prompts": 2,
    }  # whatever two updates made of it
    (copy / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert "champion" in clones.must(copy, "spo", "register")
    lines = (copy / "outputs/prompts/test.txt").read_text().splitlines()
    (copy / "new.txt").write_text("\n".join(lines[:2]))
    (tmp_path / "prefect").mkdir()
    with server(tmp_path / "prefect") as variables:
        prefect = {k: v for k, v in variables.items() if k.startswith("PREFECT_")}

        def events() -> list[dict[str, Any]]:
            return ask(variables, "events/filter", filter={"event": {"name": [EVENT]}})["events"]

        bounds = ("pickscore=-1e6", "pickscore=1e6")
        done = clones.run(copy, sys.executable, "-c", TWICE, *bounds, variables=prefect)
        assert done.stdout.splitlines()[-1] == "[0, 1]" and "below 1e+06" in done.stderr, done.stderr
        (event,) = wait_for("the event", 600, events)
        states = [run["state_type"] for run in ask(variables, "flow_runs/filter", sort="START_TIME_ASC")]
    assert states == ["COMPLETED", "FAILED"]
    assert event["resource"]["prefect.resource.id"] == "spo.model.smoke"
    (reason,) = event["payload"]["reasons"]
    assert event["payload"]["version"].startswith("smoke-1-") and "below 1e+06" in reason
