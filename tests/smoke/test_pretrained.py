"""The DAG with released weights in place of all training, from a local hub cache, and without one method."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import clones
import hub_cache
import pytest
import yaml

pytestmark = [pytest.mark.nightly, pytest.mark.smoke, pytest.mark.timeout(3600)]

COMMIT = "b" * 40
WEIGHTS = "pytorch_lora_weights.safetensors"


def test_nothing_is_trained_and_dvc_yaml_stays(copy: Path, tmp_path: Path) -> None:
    cache, lora = tmp_path / "hub", (copy / "outputs/align/spo" / WEIGHTS).read_bytes()
    hub_cache.add(cache, "own/spo", {WEIGHTS: lora, "README.md": b"---\nlicense: mit\n---\n"}, COMMIT)
    shutil.copytree(copy / "outputs/align/diffusion_dpo", copy / "dpo")
    params = yaml.safe_load((copy / "params.yaml").read_text())
    params["pairs"]["source"] = None
    params["align"]["spo"]["pretrained"] = f"own/spo@{COMMIT}"
    params["align"]["diffusion_dpo"]["pretrained"] = f"dpo/{WEIGHTS}"
    params["align"]["lpo"] = params["generate"]["lpo"] = None
    params["report"]["baselines"] = ["base", "base_high_guidance", "diffusion_dpo"]
    (copy / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    before = json.loads((copy / "reports/comparisons.json").read_text())

    variables = clones.environment(copy) | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    variables["PATH"] = f"{clones.FORKED}{os.pathsep}{variables['PATH']}"
    done = clones.run(copy, "dvc", "repro", variables=variables)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    said = done.stdout + done.stderr
    for stage in (
        "pairs",
        "preference",
        "preference_clean_only",
        "preference_latent",
        "align lpo",
        "score lpo",
    ):
        assert f"spo: {stage}: nothing to do" in said
    after = json.loads((copy / "reports/comparisons.json").read_text())
    assert {row["method"] for row in after} == {row["method"] for row in before} - {"lpo"}
    same = {(r["method"], r["baseline"], r["metric"]): r["mean_difference"] for r in before}
    assert all(r["mean_difference"] == same[r["method"], r["baseline"], r["metric"]] for r in after)
    assert (copy / "outputs/align/spo" / WEIGHTS).read_bytes() == lora
    assert clones.run(copy, "git", "diff", "--stat", "dvc.yaml").stdout == ""
    assert json.loads(clones.run(copy, "dvc", "status", "--json").stdout) == {}
