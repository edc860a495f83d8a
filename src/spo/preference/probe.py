"""What the step-aware preference model does in a stage, with random weights, to be timed or measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spo.preference.model import StepAwarePreferenceModel
from spo.training.probe import Run


def build(name: str, revision: str | None, step_condition: bool, device: str) -> StepAwarePreferenceModel:
    """The architecture of a CLIP-format folder or hub id, of which only config.json is read."""
    from transformers import CLIPConfig, CLIPModel

    how: dict[str, Any] = {"revision": revision}
    settings = CLIPConfig.from_pretrained(name, **how)
    with torch.device(device):
        model = StepAwarePreferenceModel(CLIPModel(settings), step_condition)
    return model.to(device).eval().requires_grad_(False)


def runs(model: StepAwarePreferenceModel, side: int, heads: bool) -> dict[str, Run]:
    """`judged` and `judged_trained` of `training.compute.Work`, for square images of `side` pixels.

    Args:
        heads: only these are trained.
    """
    projection: Any = model.model.text_projection
    width, device = projection.out_features, projection.weight.device

    def score(n: int) -> Tensor:
        images = torch.zeros(n, 3, side, side, device=device)
        text = torch.zeros(n, width, device=device)
        return model.score_features(images, text, torch.full((n,), 501, device=device))

    def train(n: int) -> None:
        if heads:
            model.train_heads()
        else:
            model.requires_grad_(True)
        score(n).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return {"judged": torch.no_grad()(score), "judged_trained": train}
