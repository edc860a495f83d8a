"""The rollout of SPO: at each diverted step K candidates are judged and make a pair (Sec. 4.1).

Departures from the paper (P) or the official code (C):
1. C encodes the preference model's text at every step; here once a prompt.
2. C decodes and scores in one batch; here at most CHUNK samples at once. Same numbers.
3. The threshold may change over the diverted steps (`threshold_end`); C keeps it constant.
4. With inner steps the branches part after the first: then winner and loser have an x_t each, as in C.
5. A step without variance (the last one where set_alpha_to_one) has no density and gives no pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo import config
from spo.diffusion import ddim, finite
from spo.diffusion.denoiser import GuidedDenoiser
from spo.diffusion.noise import SampleNoise
from spo.diffusion.schedule import Schedule
from spo.methods.stepwise import pairs as step_pairs
from spo.training import distributed
from spo.types import Backbone, RewardModel, StepPair

CHUNK = 64  # samples a UNet, decoder or reward model call; guidance doubles the UNet's


@dataclass(frozen=True)
class JudgedStep:
    """The pairs of all B samples at one diverted step, valid or not."""

    step: int  # index of x_t's timestep in the schedule
    pair: StepPair
    valid: Tensor  # bool [B]
    scores: Tensor  # [K,B]

    def gathered(self) -> JudgedStep:
        """With the samples of all processes."""
        scores = distributed.gather(self.scores.T).T
        return JudgedStep(self.step, step_pairs.gathered(self.pair), distributed.gather(self.valid), scores)


@dataclass(frozen=True)
class _Prompts:
    """B prompts, encoded once a rollout for the UNet and for the reward model."""

    denoiser: GuidedDenoiser
    text: Tensor  # [B,D], of the reward model
    prompts: list[str]
    check: finite.FiniteCheck  # of the whole rollout

    def repeat(self, k: int) -> _Prompts:
        """Copies in the order of candidates.flatten(0, 1)."""
        return _Prompts(self.denoiser.repeat(k), self.text.repeat(k, 1), self.prompts * k, self.check)

    def predict(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The UNet's output [B,C,h,w] at x_t, CHUNK samples at a time."""
        outputs = torch.cat(
            [self.denoiser.select(part)(x_t[part], timesteps[part]) for part in _chunks(len(x_t))]
        )
        self.check.note(finite.UNET, outputs, self.prompts, timesteps)
        return outputs


class Rollout:
    """DDIM from x_T with `settings.candidates` branches at the diverted steps."""

    def __init__(self, settings: config.Rollout, schedule: Schedule, reward_model: RewardModel) -> None:
        """`schedule` has the sampler's timesteps, on the backbone's device.

        Raises:
            ValueError: the settings leave no step to draw candidates at.
        """
        self.blocks = step_pairs.blocks(settings, schedule)
        self._thresholds = step_pairs.thresholds(settings, schedule, self.blocks)
        self.settings, self.schedule, self.reward_model = settings, schedule, reward_model

    def run(self, backbone: Backbone, prompts: list[str], noise: SampleNoise) -> Iterator[JudgedStep]:
        """Yield the pairs of every diverted step for B prompts; `noise` is of B samples.

        Raises:
            ValueError: something on the way is NaN or infinite.
        """
        own = self._encode(backbone, prompts)
        branched = own.repeat(self.settings.candidates)
        starts = {block[0]: number for number, block in enumerate(self.blocks)}
        every = torch.arange(len(prompts), device=backbone.device)
        x_t, output, i = noise.draw(), None, 0
        while i <= self.blocks[-1][-1]:
            timesteps = self.schedule.timesteps[i].expand(len(prompts))
            if output is None:
                output = own.predict(x_t, timesteps)
            step = ddim.transition(self.schedule, output, timesteps, x_t, self.settings.eta)
            if i not in starts:
                x_t, output, i = ddim.sample(step, noise.draw()), None, i + 1
                continue
            block, threshold = self.blocks[starts[i]], self._thresholds[starts[i]]
            branches = self._branch(block, step, noise, branched)
            scores, outputs = self._score(backbone, block[-1], branches[-1], branched)
            win, lose, valid = step_pairs.choose(self.settings, scores, threshold, noise)
            for index, pair in self._pairs(block, x_t, branches, win, lose, own.denoiser):
                yield JudgedStep(index, pair, valid, scores)
            following = step_pairs.resample(self.settings, win, lose, noise), every
            x_t, i = branches[-1][following], block[-1] + 1
            output = None if outputs is None else outputs[following]

    def _encode(self, backbone: Backbone, prompts: list[str]) -> _Prompts:
        denoiser = GuidedDenoiser.encode(backbone, prompts, self.settings.guidance)
        check = finite.FiniteCheck(self.schedule.timesteps)
        check.note_text(denoiser.conditioning, prompts)
        check.note_text(denoiser.unconditional, [""] * len(prompts))
        return _Prompts(denoiser, self.reward_model.encode_text(prompts), prompts, check)

    def _branch(
        self, block: list[int], step: ddim.Transition, noise: SampleNoise, prompts: _Prompts
    ) -> list[Tensor]:
        """The latents [K,B,C,h,w] of the branches after each step of the block; `step` is its first."""
        k = self.settings.candidates
        branches = [ddim.sample(step, noise.draw_many(k))]
        for i in block[1:]:
            flat = branches[-1].flatten(0, 1)
            timesteps = self.schedule.timesteps[i].expand(len(flat))
            output = prompts.predict(flat, timesteps)
            step = ddim.transition(self.schedule, output, timesteps, flat, self.settings.eta)
            branches.append(ddim.sample(step, noise.draw_many(k).flatten(0, 1)).view_as(branches[-1]))
        return branches

    def _pairs(
        self,
        block: list[int],
        x_t: Tensor,
        branches: list[Tensor],
        win: Tensor,
        lose: Tensor,
        denoiser: GuidedDenoiser,
    ) -> Iterator[tuple[int, StepPair]]:
        """Every step of the block and its pair; all have the label of the judgement at the end."""
        every = torch.arange(len(x_t), device=x_t.device)
        x_t_lose = None
        for i, after in zip(block, branches, strict=True):
            timesteps = self.schedule.timesteps[i].expand(len(x_t))
            x_win, x_lose = after[win, every], after[lose, every]
            yield i, StepPair(x_t, timesteps, x_win, x_lose, denoiser.conditioning, x_t_lose)
            x_t, x_t_lose = x_win, x_lose

    def _score(
        self, backbone: Backbone, i: int, candidates: Tensor, prompts: _Prompts
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [K,B] of the candidates [K,B,C,h,w] of step i, and the UNet's outputs at them.

        Each is judged by the x_0 predicted from it, at its own timestep; final latents as they are, at 0.

        Raises:
            ValueError: something of the rollout so far is NaN or infinite, scores among it.
        """
        flat, outputs = candidates.flatten(0, 1), None
        if i + 1 < len(self.schedule.timesteps):
            timesteps = self.schedule.timesteps[i + 1].expand(len(flat))
            outputs = prompts.predict(flat, timesteps)
            x0 = self.schedule.predict_x0(outputs, timesteps, flat)
        else:
            timesteps, x0 = torch.zeros(len(flat), dtype=torch.int64, device=flat.device), flat
        check = prompts.check
        check.note(finite.LATENTS, x0, prompts.prompts, timesteps)
        parts = []
        for part in _chunks(len(flat)):
            images = backbone.decode(x0[part])
            check.note(finite.DECODER, images, prompts.prompts[part], timesteps[part])
            parts.append(self.reward_model.score_images(images, prompts.text[part], timesteps[part]))
        scores = torch.cat(parts)
        check.note(finite.SCORE, scores, prompts.prompts, timesteps)
        check.check()
        return scores.view(candidates.shape[:2]), None if outputs is None else outputs.view_as(candidates)


def _chunks(n: int) -> Sequence[slice]:
    return [slice(start, start + CHUNK) for start in range(0, n, CHUNK)]
