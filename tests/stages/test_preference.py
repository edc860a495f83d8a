"""What the stage reports of a training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from spo import config
from spo.data import latents
from spo.preference import trainer
from spo.stages import preference
from spo.tracking.curve import Curve
from spo.tracking.records import Run
from spo.training.clock import Clock


class Pairs:
    label_0 = torch.tensor([1.0, 0.5])
    captions = ("a", "b")

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("counted", [{}, {"skipped_updates": 2}])
def test_updates_that_were_skipped_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: dict[str, int]
) -> None:
    """Gradients that overflow in fp16 leave updates out: the number is that of those that happened."""
    params = config.validate(yaml.safe_load(config.preset("smoke")))
    summary = {"updates": 5, "pairs": 10, "iterations": 7, "training_seconds": 1.5, **counted}
    monkeypatch.setattr(latents, "latent_pairs", lambda *a: Pairs())
    monkeypatch.setattr(trainer, "train", lambda *a, **options: summary)
    monkeypatch.setattr(trainer, "evaluate", lambda *a, **options: {0: {"accuracy": 0.5, "n": 1}})
    settings = params.latent_preference.model_copy(update={"local_prompts": 0})
    backbone = SimpleNamespace(device="cpu", remember_prompts=lambda prompts: None)
    trained = SimpleNamespace(
        settings=settings, backbone=backbone, name="preference latent", finish=lambda: None
    )
    report = preference._train(params, trained, tmp_path, Curve(Run(), tmp_path), Clock())
    assert report["updates"] == 5 and report["training_seconds"] == 1.5
    assert report.get("skipped_updates") == counted.get("skipped_updates")
