"""The latent reward model in training (arXiv 2502.01051, Sec. 3.2), on noised pairs of latents.

As in the paper, both images of a pair have the same timestep of the sampler and independent noises; the loss
is the cross entropy of the two scores. Nothing is decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spo.config import LatentPreference
from spo.diffusion import finite
from spo.diffusion.noise import SampleNoise
from spo.preference.latent import LatentPreferenceModel, LatentRewardModel
from spo.preference.trainer import NoisedPairs
from spo.runtime.transfer import send
from spo.types import Backbone, NoiseSchedule


@dataclass(frozen=True)
class LatentTask:
    """A latent reward model as a `trainer.PreferenceTask`."""

    model: LatentPreferenceModel
    backbone: Backbone
    schedule: NoiseSchedule  # with the sampler's timesteps, on the backbone's device
    settings: LatentPreference
    seed: int = 0  # of the adapter
    name = "latent_preference"

    def prepare(self) -> None:
        self.model.make_trainable(self.settings, self.seed)
        if self.backbone.budget.checkpointing:
            self.model.encoder.checkpoint_gradients()

    def draw(self, keys: list[str], seed: int) -> tuple[Tensor, Tensor]:
        """Uniform timesteps of the sampler, and two noises [P,2,C,h,w], one for each image of a pair."""
        shape = (2, *self.backbone.latent_shape)
        noise = SampleNoise(seed, keys, shape, self.backbone.device)
        return self.schedule.timesteps[noise.integers(len(self.schedule.timesteps))], noise.draw()

    @torch.no_grad()
    def inputs(self, pairs: NoisedPairs, check: finite.FiniteCheck) -> Tensor:
        """Latents [P,2,C,h,w]."""
        x_t, noise = send(torch.cat(pairs.latents), self.backbone.device), pairs.noise
        check.note(finite.STORED, x_t, [*pairs.captions] * 2)
        if noise is not None:
            both = torch.cat([noise[:, 0], noise[:, 1]])
            x_t = self.schedule.add_noise(x_t, both, pairs.timesteps.repeat(2))
        return torch.stack(x_t.chunk(2), dim=1)

    def scores(self, inputs: Tensor, captions: Sequence[str], timesteps: Tensor) -> tuple[Tensor, Tensor]:
        x_t, text = torch.cat([inputs[:, 0], inputs[:, 1]]), self.model.encode_text(captions).repeat(2)
        score_0, score_1 = self.model.score(x_t, text, timesteps.repeat(2)).chunk(2)
        return score_0, score_1

    def reward_model(self) -> LatentRewardModel:
        return LatentRewardModel(self.model, "candidate")

    def finish(self) -> None:
        """Merge the adapter. Half precision rounds W + BA: the model is measured as saved."""
        self.model.encoder.merge_lora()

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder, self.backbone)
