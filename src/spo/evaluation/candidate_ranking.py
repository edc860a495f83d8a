"""Measure how well a preference model ranks the candidates of one denoising step, where the truth is known.

SPO and LPO compare candidates of one step, which differ by little; accuracy on labelled pairs, whose images
differ in everything, hardly shows how well a model does so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from spo import config
from spo.diffusion.noise import SampleNoise
from spo.methods.stepwise.rollout import Rollout
from spo.scenes.oracle import Oracle
from spo.types import Backbone, Candidates, Conditioning, RewardModel

PROMPTS_AT_ONCE = 8
CANDIDATES = 4


class _BesideOracle:
    """A reward model that records the oracle's aesthetics of the images that it scores."""

    needs_images = True

    def __init__(self, reward_model: RewardModel, oracle: Oracle) -> None:
        self.reward_model, self.oracle = reward_model, oracle
        self.model = getattr(reward_model, "model", None)
        self.aesthetics: list[Tensor] = []

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        return self.reward_model.encode_text(prompts)

    def score(self, candidates: Candidates, text: Conditioning) -> Tensor:
        assert candidates.images is not None
        quality, _ = self.oracle.model.perceive(candidates.images.clamp(-1, 1).float().cpu())
        self.aesthetics.append(quality.mean(1))
        return self.reward_model.score(candidates, text)

    def taken(self) -> Tensor:
        """The oracle's aesthetics [N] of all images since the last call."""
        values, self.aesthetics = torch.cat(self.aesthetics), []
        return values


def candidate_ranking(
    backbone: Backbone,
    reward_model: RewardModel,
    oracle: Oracle,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
) -> dict[int, float]:
    """Correlate scores and the oracle's aesthetics within the candidates of a step, by its timestep.

    It covers all steps of rollouts of the base model over `steps` timesteps. The oracle scores the image
    predicted from each candidate, even if the reward model needs no images. Keys are x_t's timesteps.
    """
    schedule = backbone.schedule(steps).to(backbone.device)
    settings = config.Rollout(
        candidates=CANDIDATES, num_inference_steps=steps, guidance=guidance, divert_start_step=0
    )
    beside = _BesideOracle(reward_model, oracle)
    rollout = Rollout(settings, schedule, beside)
    scores: dict[int, list[Tensor]] = {}
    truth: dict[int, list[Tensor]] = {}
    for start in tqdm(range(0, len(prompts), PROMPTS_AT_ONCE), "candidate ranking", unit="batch"):
        part = list(prompts[start : start + PROMPTS_AT_ONCE])
        keys = [f"local judgement {i}" for i in range(start, start + len(part))]
        with backbone.inference():
            noise = SampleNoise(seed, keys, backbone.latent_shape, backbone.device)
            for ranked in rollout.run(backbone, part, noise):
                t = round(float(schedule.timesteps[ranked.step]))
                scores.setdefault(t, []).append(ranked.scores.float().cpu())
                truth.setdefault(t, []).append(beside.taken().view(CANDIDATES, len(part)))
    return {t: within_correlation(torch.cat(scores[t], 1), torch.cat(truth[t], 1)) for t in scores}


def within_correlation(scores: Tensor, truth: Tensor) -> float:
    """Pearson's correlation of scores [K,B] and truth [K,B] after each sample's mean over K is taken off; 0
    where one of them does not vary."""
    a, b = (x.double() - x.double().mean(0) for x in (scores, truth))
    spread = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / spread if spread > 0 else 0.0
