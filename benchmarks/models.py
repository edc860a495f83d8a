"""The models that are measured: a base model without an adapter, and a preference model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo import backbones, config
from spo.backbones.stable_diffusion import StableDiffusion
from spo.diffusion.noise import generator
from spo.preference.model import StepAwarePreferenceModel, load_tokenizer
from spo.types import NoiseSchedule

SEED = 0


@dataclass
class Models:
    """The models with which both sides of a comparison start."""

    backbone: StableDiffusion
    spm: StepAwarePreferenceModel
    tokenizer: Any  # of the preference model
    params: config.Params
    prompts: list[str]

    def schedule(self, steps: int) -> NoiseSchedule:
        return self.backbone.schedule(steps).to(self.backbone.device)

    def some_prompts(self, count: int) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in range(count)]


def load(params: config.Params) -> Models:
    """The base model of an experiment, and its preference model as it starts."""
    backbone = backbones.load(params.backbone, "cpu")
    name = params.preference.init
    spm = StepAwarePreferenceModel.from_clip(name).eval().requires_grad_(False)
    prompts = Path(str(params.prompts.train)).read_text(encoding="utf-8").splitlines()
    return Models(backbone, spm, load_tokenizer(name), params, prompts)


def perturb(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """Give adapters small weights, so that policy and reference differ; returns copies of them."""
    for number, parameter in enumerate(parameters):
        drawn = torch.randn(parameter.shape, generator=generator(SEED, number)) * 0.01
        parameter.data.copy_(drawn)
    return [p.detach().clone() for p in parameters]


def restore(parameters: list[torch.nn.Parameter], start: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
