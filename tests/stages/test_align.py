"""What the methods make of params.yaml."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from spo import config
from spo.diffusion.schedule import Schedule
from spo.methods import method_spec
from spo.preference import model

SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_spo_reads_its_preference_model_and_prompts(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outputs/preference").mkdir(parents=True)
    Path("outputs/prompts").mkdir()
    Path("outputs/prompts/train.txt").write_text("a red circle\n", encoding="utf-8")
    Path("params.yaml").write_text(config.preset("smoke"), encoding="utf-8")
    calls: list[tuple] = []
    monkeypatch.setattr(model, "load_reward_model", lambda *a: calls.append(a))
    params = config.load("params.yaml")
    backbone = SimpleNamespace(
        device=torch.device("cpu"),
        schedule=partial(Schedule.from_config, SCHEDULER),
        remember_prompts=lambda prompts: None,
    )
    method = method_spec("spo").build(params, backbone)
    assert calls == [(Path("outputs/preference"), backbone.device)]
    assert method.prompts == ["a red circle"]


def test_every_method_has_a_section_and_a_variant() -> None:
    assert set(config.METHODS) <= set(config.VARIANTS)
    assert all(method_spec(name).name == name for name in config.METHODS)
