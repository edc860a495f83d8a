"""LPO's rollout with candidates scored together, against scoring each candidate of a prompt alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.measure import Case
from benchmarks.models import SEED, Models, perturb
from spo.methods.lpo import LpoMethod
from spo.preference.latent import LatentPreferenceModel, LatentRewardModel
from spo.types import Candidates, Conditioning, RewardModel


class OneCandidateAtATime:
    """The same scoring in K calls of one candidate of every prompt, the text encoded in each."""

    def __init__(self, model: RewardModel) -> None:
        self.model, self.needs_images = model, model.needs_images
        self.prompts: Sequence[str] = []

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        self.prompts = prompts
        return self.model.encode_text(prompts)

    def score(self, candidates: Candidates, text: Conditioning) -> Tensor:
        scores = []
        for rows in torch.arange(len(text), device=candidates.latents.device).split(len(self.prompts)):
            one = Candidates(
                latents=candidates.latents[rows],
                timesteps=candidates.timesteps[rows],
                step_timesteps=candidates.step_timesteps[rows],
                images=None,
            )
            scores.append(self.model.score(one, self.model.encode_text(self.prompts)))
        return torch.cat(scores)


def cases(models: Models, prompts: int, steps: int, tolerance: float = 1e-4) -> Iterator[Case]:
    """A rollout with a latent reward model of random heads."""
    changes = {"threshold": 0.0, "threshold_end": None, "iterations": 1}
    changes |= {"prompts_per_iteration": prompts, "num_inference_steps": steps}
    settings = models.params.align.section("lpo").model_copy(update=changes)
    assert settings.lora is not None and prompts * settings.candidates <= 64
    backbone, guidance = models.backbone, models.params.latent_preference.feature_guidance
    torch.manual_seed(SEED)
    model = LatentPreferenceModel(backbone.feature_model(), guidance).to(backbone.device)
    reward_model = LatentRewardModel(model, settings.judged_at)
    backbone.add_lora(settings.lora, SEED)
    perturb(backbone.trainable_parameters())
    schedule = models.schedule(settings.num_inference_steps)

    def rollout(reward_model: RewardModel) -> Tensor:
        method = LpoMethod(settings, schedule, reward_model, models.prompts, SEED)
        updates, _ = method.collect(backbone, 0)
        return torch.cat([batch.x_win for (batch,) in updates])

    yield Case(
        "LPO: rollout and preference scores",
        "a call for each candidate",
        "prompt",
        prompts,
        lambda: rollout(reward_model),
        lambda: rollout(OneCandidateAtATime(reward_model)),
        tolerance,
    )
