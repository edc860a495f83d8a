"""What the stage `align` makes of params.yaml."""

from pathlib import Path
from types import SimpleNamespace

import torch

from spo import config
from spo.preference import reward_model
from spo.stages import align


def test_the_judge_of_spo_is_told_its_views(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outputs/preference").mkdir(parents=True)
    Path("outputs/prompts").mkdir()
    Path("outputs/prompts/train.txt").write_text("a red circle\n")
    Path("params.yaml").write_text(config.preset("smoke"))
    told: list[tuple] = []
    monkeypatch.setattr(reward_model, "load_judge", lambda *a: told.append(a))
    params = config.load("params.yaml")
    scheduler = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    backbone = SimpleNamespace(device=torch.device("cpu"), scheduler_config=scheduler)
    method = align._spo(params, backbone)
    assert told == [(Path("outputs/preference"), backbone.device, 2)]
    assert method.prompts == ["a red circle"] and params.align.spo.views == 2
