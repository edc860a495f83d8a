"""The step-aware preference model in training: both images of a pair get the same noise,
are predicted in one step and decoded.

Departures from the official code:
1. `preference.ema` averages the weights over training (0, as published, does not).
2. `preference.trained: heads` freezes the towers (all, as published, trains every weight).
3. Official code draws from the VAE's posterior anew each time it sees an image. Here images are encoded once:
   by the posterior's mean, or with `pairs.latents: sample`, as in the presets sd15 and sdxl, by one draw.
4. The learning rate is constant after the warm-up, or with `optimizer.decay: linear`, as in these presets,
   falls as in official code; its warm-up is linear in the updates.
5. These presets train 4,000 updates, and the rate is 0 at their end. `deepspeed_accelerator.py` of the
   official code has max_steps of 8,000 and 7,000, its recipe 4,000 updates; it is not known which of them
   made the released models.
6. An image without noise, as at t = 0 of the evaluation, is the decoded latents; theirs is the file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.config import Preference
from spo.diffusion import finite
from spo.diffusion.denoiser import GuidedDenoiser
from spo.diffusion.noise import SampleNoise
from spo.preference.model import ClipRewardModel, StepAwarePreferenceModel, token_ids
from spo.preference.trainer import NoisedPairs
from spo.runtime.transfer import send
from spo.types import Backbone, NoiseSchedule


def images_of(
    backbone: Backbone,
    schedule: NoiseSchedule,
    pairs: NoisedPairs,
    guidance: float,
    check: finite.FiniteCheck,
) -> tuple[Tensor, Tensor]:
    """Both images [P,3,H,W] in [-1,1] of P pairs of latents, with the same noise at the same t (Sec. 4.2).

    x_t = q(x_t | x_0), then x_0 predicted by the backbone with guidance, then decoded; without noise the
    stored latents are decoded.

    Args:
        check: notes all that must be finite on the way.
    """
    captions, timesteps = [*pairs.captions] * 2, pairs.timesteps.repeat(2)
    with backbone.inference():
        x_0 = send(torch.cat(pairs.latents), backbone.device)
        check.note(finite.STORED, x_0, captions)
        if pairs.noise is not None:
            denoiser = GuidedDenoiser.encode(backbone, pairs.captions, guidance, check).repeat(2)
            schedule = schedule.to(backbone.device)
            x_t = schedule.add_noise(x_0, pairs.noise.repeat(2, 1, 1, 1), timesteps)
            x_0 = schedule.predict_x0(denoiser(x_t, timesteps), timesteps, x_t)
        images = backbone.decode(x_0)
        check.note(finite.DECODER, images, captions, timesteps)
    first, second = images.clamp(-1, 1).chunk(2)
    return first, second


@dataclass(frozen=True)
class StepAwareTask:
    """A step-aware preference model as a `trainer.PreferenceTask`."""

    model: StepAwarePreferenceModel
    tokenizer: Any
    backbone: Backbone
    schedule: NoiseSchedule  # on the backbone's device
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
        trained = self.schedule.train_timesteps
        return trained[noise.integers(len(trained))], noise.draw()

    @torch.no_grad()
    def inputs(self, pairs: NoisedPairs, check: finite.FiniteCheck) -> Tensor:
        """Images [P,2,3,s,s] of the CLIP's size; in training without settings.noised those without noise."""
        if self._clean:
            pairs = replace(pairs, timesteps=torch.zeros_like(pairs.timesteps), noise=None)
        images = images_of(self.backbone, self.schedule, pairs, self.settings.guidance, check)
        return torch.stack([self.model.fitted(side) for side in images], dim=1)

    @property
    def _clean(self) -> bool:
        return self.model.training and not self.settings.noised

    def scores(self, inputs: Tensor, captions: Sequence[str], timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Images without noise are scored at t = 0."""
        timesteps = torch.zeros_like(timesteps) if self._clean else timesteps
        text = self.model.encode_text(token_ids(self.tokenizer, captions, self.model))
        images = torch.cat([inputs[:, 0], inputs[:, 1]])
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
