"""Online training on step pairs: the code of SPO and LPO, which differ only in their reward model."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from spo.config import Stepwise
from spo.diffusion.noise import SampleNoise, generator, shuffled
from spo.methods.stepwise.batch import StepBatch, StepPairs, batch_of, gathered
from spo.methods.stepwise.loss import batch_loss
from spo.methods.stepwise.rollout import Rollout
from spo.training import distributed
from spo.training.placement import on_device
from spo.types import Backbone, NoiseSchedule, RewardModel

PROMPTS = "outputs/prompts/train.txt"


class StepwiseMethod:
    """Online batches: a rollout of the current policy, with pairs from every diverted step."""

    name = "align"  # the section of params.yaml, for messages
    store_outputs = every_last_pair = False  # as of `Rollout`

    def __init__(
        self,
        config: Stepwise,
        schedule: NoiseSchedule,
        reward_model: RewardModel,
        prompts: Sequence[str],
        seed: int,
    ) -> None:
        """`schedule` has the sampler's timesteps, on the backbone's device."""
        if not prompts:
            raise ValueError(f"{self.name}: there are no training prompts; check the stage `prompts`")
        self.rollout = Rollout(
            config,
            schedule,
            reward_model,
            self.name,
            store_outputs=self.store_outputs,
            every_last_pair=self.every_last_pair,
        )
        self.config, self.schedule = config, schedule
        self.prompts, self.seed = list(prompts), seed
        self.iterations, self.guidance = config.iterations, config.guidance

    def loss(self, policy: Tensor, reference: Tensor, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `batch_loss`."""
        return batch_loss(policy, reference, batch, self.schedule, self.config)

    def collect(self, backbone: Backbone, iteration: int) -> tuple[list[list[StepBatch]], dict[str, float]]:
        """The valid pairs of one rollout, shuffled, in updates of at most config.batch_size.

        Without a valid pair: one batch of one pair of weight 0. The metrics by timestep are named by
        x_t's, as in `valid_fraction/t0701`. Each process rolls out its share of the prompts; all see all
        pairs, shuffle them in the same way and take their share of every update.
        """
        count = self.config.prompts_per_iteration
        distributed.check_shards(count, f"{self.name}.prompts_per_iteration")
        order = shuffled(len(self.prompts), iteration * count, count, self.seed)
        mine = distributed.shard(order)
        keys = [f"rollout {iteration} epoch {epoch} prompt {i}" for epoch, i in mine]
        scoring: Any = nullcontext()
        if backbone.budget.offload:
            scoring = on_device(self.rollout.reward_model.model, backbone.device)
        with backbone.inference(), scoring:
            noise = SampleNoise(self.seed, keys, backbone.latent_shape, backbone.device)
            steps = list(self.rollout.run(backbone, [self.prompts[i] for _, i in mine], noise))
        steps = gathered(steps)
        prompts = [self.prompts[i] for _, i in order]  # in the order of the gathered samples
        return self._updates(steps, prompts, iteration, backbone.budget.pairs), self._metrics(steps)

    def _updates(
        self, steps: list[StepPairs], prompts: list[str], iteration: int, most: int
    ) -> list[list[StepBatch]]:
        """In parts of at most `most` pairs."""
        valid = torch.cat([s.valid for s in steps]).nonzero().flatten().cpu()
        order = torch.randperm(len(valid), generator=generator(self.seed, f"pairs {iteration}"))
        chosen, weight = valid[order], 1.0
        if len(chosen) == 0:
            chosen, weight = torch.zeros(1, dtype=torch.int64), 0.0
        updates = []
        for update in chosen.split(self.config.batch_size):
            mine, share = distributed.shard(update), weight
            if len(mine) == 0:
                mine, share = update[:1], 0.0  # a process without pairs still takes part in the update
            parts = [part.tolist() for part in mine.split(most)]
            updates.append([batch_of(steps, p, share, prompts, self.schedule.timesteps) for p in parts])
        return updates

    def _metrics(self, steps: list[StepPairs]) -> dict[str, float]:
        valid = torch.stack([s.valid for s in steps]).float().cpu()
        scores = torch.stack([s.scores.float().mean() for s in steps]).cpu()
        metrics = {
            "pairs": float(valid.sum()),
            "valid_fraction": float(valid.mean()),
            "score": float(scores.mean()),
        }
        timesteps = self.schedule.timesteps.tolist()
        for row, s in enumerate(steps):
            name = f"t{timesteps[s.step]:04.0f}"
            metrics[f"valid_fraction/{name}"] = float(valid[row].mean())
            metrics[f"score/{name}"] = float(scores[row])
        return metrics


def training_prompts() -> list[str]:
    from spo.runtime.files import require

    return require(PROMPTS, "training prompts").read_text(encoding="utf-8").splitlines()


def sampler_schedule(section: Stepwise, backbone: Backbone) -> NoiseSchedule:
    """The schedule of a section's sampler, on the backbone's device."""
    return backbone.schedule(section.num_inference_steps).to(backbone.device)
