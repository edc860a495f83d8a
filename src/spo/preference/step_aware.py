"""The step-aware preference model in training: pairs are noised alike, predicted in one step and decoded.

Departures from the official code:
1. `preference.ema` averages the weights over training (0, as published, does not).
2. `preference.trained: heads` leaves the towers as they are (all, as published, trains every weight).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.config import Preference
from spo.diffusion.noise import SampleNoise
from spo.diffusion.schedule import Schedule
from spo.preference.model import StepAwarePreferenceModel, token_ids
from spo.preference.noising import clean_pair, noised_pair
from spo.preference.reward_model import ClipRewardModel
from spo.types import Backbone


@dataclass(frozen=True)
class StepAware:
    """A `trainer.Trained` model, and the backbone that shows it what is predicted from noisy latents."""

    model: StepAwarePreferenceModel
    tokenizer: Any
    backbone: Backbone
    schedule: Schedule
    settings: Preference
    name = "preference"

    def prepare(self) -> None:
        if self.settings.trained == "heads":
            self.model.train_heads()
        if self.backbone.budget.checkpointing:
            self.model.checkpoint_gradients()

    def draw(self, keys: list[str], seed: int) -> tuple[Tensor, Tensor]:
        """Uniform timesteps, and one noise [P,C,h,w] for both images of a pair."""
        noise = SampleNoise(seed, keys, self.backbone.latent_shape, self.backbone.device)
        return noise.integers(self.schedule.num_train_timesteps), noise.draw()

    @torch.no_grad()
    def shown(
        self,
        latents: tuple[Tensor, Tensor],
        captions: Sequence[str],
        timesteps: Tensor,
        noise: Tensor | None,
    ) -> Tensor:
        """As `Trained.shown`: images [P,2,3,s,s] of the CLIP's size; in training without settings.noised
        those without noise."""
        if noise is None or self._clean:
            images = clean_pair(self.backbone, latents, captions, None if self._clean else timesteps)
        else:
            conditioning = self.backbone.encode_prompts(captions)
            schedule = self.schedule.to(self.backbone.device)
            guidance = self.settings.guidance
            images = noised_pair(
                self.backbone, schedule, latents, timesteps, noise, conditioning, guidance, captions
            )
        return torch.stack([self.model.fitted(side) for side in images], dim=1)

    @property
    def _clean(self) -> bool:
        return self.model.training and not self.settings.noised

    def scores(self, shown: Tensor, captions: Sequence[str], timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """As `Trained.scores`; images without noise are scored at t = 0."""
        timesteps = torch.zeros_like(timesteps) if self._clean else timesteps
        text = self.model.encode_text(token_ids(self.tokenizer, captions, self.model))
        images = torch.cat([shown[:, 0], shown[:, 1]])
        scores = self.model.score_features(images, text.repeat(2, 1), timesteps.repeat(2))
        score_0, score_1 = scores.chunk(2)
        return score_0, score_1

    def reward_model(self) -> ClipRewardModel:
        return ClipRewardModel(self.model, self.tokenizer)

    def finish(self) -> None:
        """Nothing: the model is saved as it was trained."""

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
