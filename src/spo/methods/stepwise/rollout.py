"""The rollout of the stepwise methods: at each diverted step K candidates are judged and make a pair.

Section 4.1 of SPO (arXiv 2406.04314).

Departures from the paper (P) or the official code (C):
1. C encodes the preference model's text at every step; here once a prompt.
2. C decodes and scores in one batch; here in calls of the device's budget. Same numbers.
3. The threshold may change over the diverted steps (`threshold_end`); C keeps it constant.
4. With inner steps the branches part after the first: then winner and loser have an x_t each, as in C.
5. A step without variance (the last one where set_alpha_to_one) has no density and gives no pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spo import config
from spo.diffusion import ddim, finite
from spo.diffusion.denoiser import GuidedDenoiser
from spo.diffusion.noise import SampleNoise
from spo.diffusion.schedule import Schedule
from spo.methods.stepwise import pairs as step_pairs
from spo.training import distributed
from spo.types import Backbone, Conditioning, RewardModel, StepPair


@dataclass(frozen=True)
class JudgedStep:
    """The pairs of all B samples at one diverted step, valid or not."""

    step: int  # index of x_t's timestep in the schedule
    pair: StepPair
    valid: Tensor  # bool [B]
    scores: Tensor  # [K,B]


def gathered(judged: list[JudgedStep]) -> list[JudgedStep]:
    """The steps of a rollout with the samples of all processes.

    The conditioning is the same at every step, and as large as the latents: it is sent once.
    """
    if distributed.count() == 1:
        return judged
    conditioning = distributed.gather_conditioning(judged[0].pair.conditioning)
    return [
        JudgedStep(
            j.step,
            step_pairs.gathered(j.pair, conditioning),
            distributed.gather(j.valid),
            distributed.gather(j.scores.T).T,
        )
        for j in judged
    ]


@dataclass(frozen=True)
class _Prompts:
    """B prompts, encoded once a rollout for the UNet and for the reward model."""

    denoiser: GuidedDenoiser
    text: Conditioning  # of the reward model, B samples
    prompts: list[str]
    check: finite.FiniteCheck  # of the whole rollout

    def repeat(self, k: int) -> _Prompts:
        """Copies in the order of candidates.flatten(0, 1)."""
        return _Prompts(self.denoiser.repeat(k), self.text.repeat(k), self.prompts * k, self.check)

    def predict(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The UNet's output [B,C,h,w] at x_t."""
        outputs = self.denoiser(x_t, timesteps)
        self.check.note(finite.UNET, outputs, self.prompts, timesteps)
        return outputs


class _AllCandidates:
    """N candidates of step i: what is predicted from them, when it is asked for."""

    def __init__(
        self, backbone: Backbone, schedule: Schedule, i: int, latents: Tensor, prompts: _Prompts
    ) -> None:
        self.backbone, self.schedule, self.latents, self.prompts = backbone, schedule, latents, prompts
        self._last = i + 1 == len(schedule.timesteps)
        own = schedule.timesteps.new_zeros(()) if self._last else schedule.timesteps[i + 1]
        self.timesteps, self.step_timesteps = (t.expand(len(latents)) for t in (own, schedule.timesteps[i]))
        self.outputs: Tensor | None = None  # of the UNet; None: not asked for, or no step is left

    @cached_property
    def x0(self) -> Tensor:
        """The x_0 predicted from each; after the last step the latents themselves."""
        if self._last:
            return self.latents
        self.outputs = self.prompts.predict(self.latents, self.timesteps)
        return self.schedule.predict_x0(self.outputs, self.timesteps, self.latents)


class _Candidates:
    """Some of the candidates of a step, as a `types.Candidates`."""

    def __init__(self, every: _AllCandidates, rows: slice) -> None:
        self._every, self._rows = every, rows
        self.latents, self.timesteps = every.latents[rows], every.timesteps[rows]
        self.step_timesteps = every.step_timesteps[rows]

    @cached_property
    def images(self) -> Tensor:
        every, x0 = self._every, self._every.x0[self._rows]
        check, prompts = every.prompts.check, every.prompts.prompts[self._rows]
        check.note(finite.LATENTS, x0, prompts, self.timesteps)
        images = every.backbone.decode(x0)
        check.note(finite.DECODER, images, prompts, self.timesteps)
        return images


class Rollout:
    """DDIM from x_T with `settings.candidates` branches at the diverted steps."""

    def __init__(
        self,
        settings: config.Rollout,
        schedule: Schedule,
        reward_model: RewardModel,
        name: str = "align",
        *,
        keep_outputs: bool = False,
    ) -> None:
        """
        Args:
            schedule: has the sampler's timesteps, on the backbone's device.
            name: of the section of params.yaml, for messages.
            keep_outputs: pairs have the UNet's output at x_t, for a loss that reads it.

        Raises:
            ValueError: the settings leave no step to draw candidates at.
        """
        self.blocks = step_pairs.blocks(settings, schedule, name)
        self.thresholds = step_pairs.thresholds(settings, schedule, self.blocks)
        self.settings, self.schedule, self.reward_model = settings, schedule, reward_model
        self.keep_outputs = keep_outputs

    def run(self, backbone: Backbone, prompts: list[str], noise: SampleNoise) -> Iterator[JudgedStep]:
        """Yield the pairs of every diverted step for B prompts; `noise` is of B samples.

        Raises:
            ValueError: something on the way is NaN or infinite; looked at after the last step, so that no
                step waits for the device.
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
            block, threshold = self.blocks[starts[i]], self.thresholds[starts[i]]
            branches = self._branch(block, step, noise, branched)
            scores, outputs = self._score(backbone, block[-1], branches[-1], branched)
            win, lose, valid = step_pairs.choose(self.settings, scores, threshold, noise)
            kept = output if self.keep_outputs else None
            for index, pair in self._pairs(block, x_t, kept, branches, win, lose, own.denoiser):
                yield JudgedStep(index, pair, valid, scores)
            following = step_pairs.resample(self.settings, win, lose, noise), every
            x_t, i = branches[-1][following], block[-1] + 1
            output = None if outputs is None else outputs[following]
        own.check.check()

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
        output: Tensor | None,
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
            yield i, StepPair(x_t, timesteps, x_win, x_lose, denoiser.conditioning, x_t_lose, output)
            x_t, x_t_lose, output = x_win, x_lose, None

    def _score(
        self, backbone: Backbone, i: int, candidates: Tensor, prompts: _Prompts
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [K,B] of the candidates [K,B,C,h,w] of step i, and the UNet's outputs where it ran."""
        flat = candidates.flatten(0, 1)
        every, check = _AllCandidates(backbone, self.schedule, i, flat, prompts), prompts.check
        check.note(finite.LATENTS, flat, prompts.prompts, every.step_timesteps)
        parts = []
        size = backbone.budget.samples
        for rows in (slice(start, start + size) for start in range(0, len(flat), size)):
            parts.append(self.reward_model.score(_Candidates(every, rows), prompts.text.select(rows)))
        scores = torch.cat(parts)
        check.note(finite.SCORE, scores, prompts.prompts, every.timesteps)
        outputs = None if every.outputs is None else every.outputs.view_as(candidates)
        return scores.view(candidates.shape[:2]), outputs
