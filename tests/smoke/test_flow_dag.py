"""The whole DAG on the flow-matching base of scenes: the smoke preset with the base of scenes-flow."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import clones
import pytest
import yaml

from spo import config

pytestmark = [pytest.mark.nightly, pytest.mark.smoke, pytest.mark.timeout(3600)]


def test_every_method_trains_a_transformer_on_flow_matching(copy: Path) -> None:
    params = yaml.safe_load((copy / "params.yaml").read_text(encoding="utf-8"))
    flow = yaml.safe_load(config.preset("scenes-flow"))
    params["backbone"] = flow["backbone"]
    for method in ("spo", "diffusion_dpo", "lpo"):
        modules = flow["align"][method]["lora"]["target_modules"]
        params["align"][method]["lora"]["target_modules"] = modules
    (copy / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")

    variables = clones.environment(copy)
    variables["PATH"] = f"{clones.FORKED}{os.pathsep}{variables['PATH']}"
    done = clones.run(copy, "dvc", "repro", variables=variables)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    rows = json.loads((copy / "reports/comparisons.json").read_text(encoding="utf-8"))
    assert {"spo", "diffusion_dpo", "lpo"} <= {row["method"] for row in rows}
    for method in ("spo", "diffusion_dpo", "lpo"):
        with (copy / f"reports/training/{method}.csv").open(encoding="utf-8") as file:
            first = [row["first_update/policy_to_reference"] for row in csv.DictReader(file)]
        assert [float(value) for value in first if value] == [0.0], method
