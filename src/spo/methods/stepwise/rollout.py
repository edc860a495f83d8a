"""The rollout of the stepwise methods: at each diverted step K candidates are scored, and two make a pair.

Section 4.1 of SPO (arXiv 2406.04314).

Departures from the paper (P) or the official code (C):
1. C encodes the preference model's text at every step; here it is encoded once per prompt.
2. C decodes and scores in one batch; here in calls of the device's budget. Same numbers.
3. The threshold may change over the diverted steps (`threshold_end`); C has one for all.
4. With inner steps the branches diverge after the first: then winner and loser have an x_t each, as in C.
5. A step without variance (the last one of a flow, and where set_alpha_to_one) has no density and gives no
   pair. Nor does one from pure noise (the first one of a flow): its candidates would be fresh noise.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from spo import config
from spo.diffusion import ddim, finite
from spo.diffusion.denoiser import GuidedDenoiser
from spo.diffusion.noise import SampleNoise
from spo.methods.stepwise import pairs as step_pairs
from spo.methods.stepwise.batch import StepPairs
from spo.types import Backbone, Candidates, Conditioning, NoiseSchedule, RewardModel

EVERY_PAIR = -1.0  # a threshold: no gap is below 0


class Rollout:
    """DDIM from x_T with `settings.candidates` branches at the diverted steps."""

    def __init__(
        self,
        settings: config.Rollout,
        schedule: NoiseSchedule,
        reward_model: RewardModel,
        name: str = "align",
        *,
        store_outputs: bool = False,
        every_last_pair: bool = False,
    ) -> None:
        """
        Args:
            schedule: has the sampler's timesteps, on the backbone's device.
            name: of the section of params.yaml, for messages.
            store_outputs: pairs have the UNet's output at x_t, for a loss that reads it.
            every_last_pair: at the sampler's last step every pair is valid, whatever its gap.
        """
        self.blocks = step_pairs.blocks(settings, schedule, name)
        self.thresholds = step_pairs.thresholds(settings, schedule, self.blocks)
        if every_last_pair and self.blocks[-1][-1] + 1 == len(schedule.timesteps):
            self.thresholds[-1] = EVERY_PAIR
        self.settings, self.schedule, self.reward_model = settings, schedule, reward_model
        self.store_outputs = store_outputs

    def run(self, backbone: Backbone, prompts: list[str], noise: SampleNoise) -> Iterator[StepPairs]:
        """Yield the pairs of every diverted step for B prompts; `noise` is of B samples.

        Raises:
            NotFiniteError: an intermediate value is NaN or infinite. It is read after the last step, so that
                no step waits for the device.
        """
        check = finite.FiniteCheck(self.schedule.timesteps)
        denoiser = GuidedDenoiser.encode(backbone, prompts, self.settings.guidance, check)
        branched = denoiser.repeat(self.settings.candidates)
        text = self.reward_model.encode_text(prompts).repeat(self.settings.candidates)
        every = torch.arange(len(prompts), device=backbone.device)
        x_t, output, i = noise.draw(), None, 0
        for block, threshold in zip(self.blocks, self.thresholds, strict=True):
            while i < block[0]:
                step, _ = self._step(denoiser, i, x_t, output)
                x_t, output, i = ddim.sample(step, noise.draw()), None, i + 1
            step, output = self._step(denoiser, i, x_t, output)
            branches, log_probs = self._branch(branched, block, step, noise)
            scores, outputs = self._score(branched, text, check, block[-1], branches[-1])
            win, lose, valid = step_pairs.choose(self.settings, scores, threshold, noise)
            chosen = torch.stack([win, lose], 1), every[:, None]
            pairs = StepPairs(
                step=i,
                x_t=x_t,
                x_win=branches[0][win, every],
                x_lose=branches[0][lose, every],
                valid=valid,
                scores=scores,
                conditioning=denoiser.conditioning,
                log_probs=log_probs[0][chosen],
                output=output if self.store_outputs else None,
            )
            yield pairs
            for i, after, known in zip(block[1:], branches[1:], log_probs[1:], strict=True):
                pairs = pairs.following(i, after[win, every], after[lose, every], known[chosen])
                yield pairs
            following = step_pairs.resample(self.settings, win, lose, noise), every
            x_t, i = branches[-1][following], block[-1] + 1
            output = None if outputs is None else outputs[following]
        check.check()

    def _step(
        self, denoiser: GuidedDenoiser, i: int, x_t: Tensor, output: Tensor | None = None
    ) -> tuple[ddim.Transition, Tensor]:
        """The transition from x_t [B,C,h,w] at step i, and the UNet's output, which may be known already."""
        timesteps = self.schedule.timesteps[i].expand(len(x_t))
        if output is None:
            output = denoiser(x_t, timesteps)
        return ddim.transition(self.schedule, output, timesteps, x_t, self.settings.eta), output

    def _branch(
        self, denoiser: GuidedDenoiser, block: list[int], step: ddim.Transition, noise: SampleNoise
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The latents [K,B,C,h,w] of the branches after each step of the block, whose first is `step`, and
        their log-probs [K,B].
        """
        k = self.settings.candidates
        branches = [ddim.sample(step, noise.draw_many(k))]
        log_probs = [torch.stack([ddim.log_prob(step, latents) for latents in branches[0]])]
        for i in block[1:]:
            step, _ = self._step(denoiser, i, branches[-1].flatten(0, 1))
            latents = ddim.sample(step, noise.draw_many(k).flatten(0, 1))
            branches.append(latents.view_as(branches[-1]))
            log_probs.append(ddim.log_prob(step, latents).view_as(log_probs[0]))
        return branches, log_probs

    def _score(
        self,
        denoiser: GuidedDenoiser,
        text: Conditioning,
        check: finite.FiniteCheck,
        i: int,
        candidates: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [K,B] of the candidates [K,B,C,h,w] of step i, and the UNet's outputs if it was needed.

        Each is scored at the timestep of its own noise; after the last step the latents themselves are x_0.
        """
        latents, steps = candidates.flatten(0, 1), self.schedule.timesteps
        last = i + 1 == len(steps)
        drawn_at = steps[i].expand(len(latents))
        timesteps = (steps.new_zeros(()) if last else steps[i + 1]).expand(len(latents))
        check.note(finite.LATENTS, latents, denoiser.prompts, drawn_at)
        needs_images, x_0, outputs = self.reward_model.needs_images, latents, None
        if needs_images and not last:
            outputs = denoiser(latents, timesteps)
            x_0 = self.schedule.predict_x0(outputs, timesteps, latents)
            check.note(finite.LATENTS, x_0, denoiser.prompts, timesteps)
        scores, size = [], denoiser.backbone.budget.samples
        for rows in (slice(start, start + size) for start in range(0, len(latents), size)):
            images = denoiser.backbone.decode(x_0[rows]) if needs_images else None
            if images is not None:
                check.note(finite.DECODER, images, denoiser.prompts[rows], timesteps[rows])
            part = Candidates(latents[rows], timesteps[rows], drawn_at[rows], images)
            scores.append(self.reward_model.score(part, text.select(rows)))
        check.note(finite.SCORE, torch.cat(scores), denoiser.prompts, timesteps)
        outputs = None if outputs is None else outputs.view_as(candidates)
        return torch.cat(scores).view(candidates.shape[:2]), outputs
