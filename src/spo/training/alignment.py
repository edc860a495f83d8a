"""Trains a backbone by a method: one policy and one reference forward per batch, then the method's loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.config import Lora
from spo.diffusion import finite
from spo.diffusion.denoiser import GuidedDenoiser
from spo.types import Backbone, Mean, Method, UNetBatch


class Alignment:
    """Fine-tunes what the backbone has trainable (a LoRA, or the UNet) by a method."""

    def __init__(self, name: str, backbone: Backbone, method: Method) -> None:
        """`name`: the method's section of params.yaml, as `align.spo`."""
        self.name, self.backbone, self.method = name, backbone, method
        self.iterations = method.iterations

    def parameters(self) -> list[torch.nn.Parameter]:
        return self.backbone.trainable_parameters()

    def collect(self, iteration: int) -> tuple[list[list[UNetBatch]], dict[str, float]]:
        updates, metrics = self.method.collect(self.backbone, iteration)
        if iteration == 0:
            updates[0] = [replace(part, first=True) for part in updates[0]]
        return updates, metrics

    def loss(self, batch: UNetBatch, check: finite.FiniteCheck) -> tuple[Tensor, dict[str, Mean]]:
        """The method's losses [P] and metrics.

        `check` notes inputs and outputs of the UNets. Losses do not always show that they are not finite: a
        clamped ratio, or logsigmoid, makes infinity finite.
        """
        prompts = batch.prompts
        if len(batch.x_t) == 2 * len(prompts):  # winners, then losers
            prompts = [*prompts, *prompts]
        check.note(finite.X_T, batch.x_t, prompts, batch.timesteps)
        denoiser = GuidedDenoiser.of(self.backbone, batch.conditioning, self.method.guidance, prompts, check)
        with torch.no_grad():
            reference = denoiser(batch.x_t, batch.timesteps, reference=True)
        policy = denoiser(batch.x_t, batch.timesteps)
        losses, metrics = self.method.loss(policy, reference, batch)
        return losses, {name: Mean(values.detach(), batch.weight) for name, values in metrics.items()}


def make_trainable(backbone: Any, lora: Lora | None, seed: int) -> None:
    """Add an adapter, whose first weights follow from `seed`; without one make the whole UNet trainable."""
    if lora is None:
        backbone.train_fully()
    else:
        backbone.add_lora(lora, seed)
    if backbone.budget.checkpointing:
        backbone.checkpoint_gradients()


def save(backbone: Any, lora: Lora | None, folder: Path) -> None:
    """Write what was trained: the adapter, or the pipeline with the whole UNet."""
    (backbone.save_pipeline if lora is None else backbone.save_lora)(folder)
