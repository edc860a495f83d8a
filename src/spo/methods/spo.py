"""Step-aware Preference Optimization (arXiv 2406.04314, Sec. 4; the loss is Eq. 4).

Departures from the paper (P) or the official code (C); those of the rollout are in stepwise/rollout.py:
1. C runs each UNet twice a pair; win and lose share x_t, so one policy and one reference forward give
   all four log-probs. Same numbers.
2. P has no clamp on the log-ratio; C has it, and so have we, written without exp. Same values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.config import Params, Spo
from spo.diffusion import ddim
from spo.diffusion.denoiser import is_guided
from spo.diffusion.noise import SampleNoise, generator, shuffled
from spo.diffusion.schedule import Schedule
from spo.methods.spec import BACKWARD, Cost, MethodSpec
from spo.methods.stepwise import pairs as step_pairs
from spo.methods.stepwise.rollout import JudgedStep, Rollout
from spo.training import distributed
from spo.types import Backbone, RewardModel, UNetBatch

PREFERENCE_MODEL, PROMPTS = "outputs/preference", "outputs/prompts/train.txt"


@dataclass(frozen=True, kw_only=True)
class SpoBatch(UNetBatch):
    """P pairs of candidates for the step from x_t. Sample p is pair p's.

    Where the branches of pair p have parted, x_lose[p] was drawn from sample lose_row[p] (a sample of its own
    at the end of the batch), else from sample p.
    """

    x_win: Tensor  # [P,C,h,w]
    x_lose: Tensor  # [P,C,h,w]
    lose_row: Tensor | None = None  # int64 [P]; None: p for every pair


def spo_loss(
    policy_win: Tensor,
    policy_lose: Tensor,
    reference_win: Tensor,
    reference_lose: Tensor,
    *,
    beta: float,
    clip: float,
) -> Tensor:
    """-log sigmoid(beta (r_win - r_lose)) [B] from four log-probs [B] (Eq. 4).

    r = log(policy / reference), clamped to [log(1 - clip), log(1 + clip)]: outside, the gradient is 0.
    """
    low, high = math.log(1 - clip), math.log(1 + clip)
    ratio_win = (policy_win - reference_win).clamp(low, high)
    ratio_lose = (policy_lose - reference_lose).clamp(low, high)
    return -F.logsigmoid(beta * (ratio_win - ratio_lose))


def batch_loss(
    policy_output: Tensor, reference_output: Tensor, batch: SpoBatch, schedule: Schedule, config: Spo
) -> tuple[Tensor, dict[str, Tensor]]:
    """SPO's losses [P] of two UNet outputs [B,C,h,w] at batch.x_t, and its metrics [P]."""
    policy = ddim.transition(schedule, policy_output, batch.timesteps, batch.x_t, config.eta)
    reference = ddim.transition(schedule, reference_output, batch.timesteps, batch.x_t, config.eta)
    policy_win, policy_lose = _log_probs(policy, batch)
    reference_win, reference_lose = _log_probs(reference, batch)
    losses = spo_loss(
        policy_win, policy_lose, reference_win, reference_lose, beta=config.beta, clip=config.clip
    )
    win, lose = (policy_win - reference_win).detach(), (policy_lose - reference_lose).detach()
    low, high = math.log(1 - config.clip), math.log(1 + config.clip)
    return losses, {
        "kl": ddim.divergence(policy, reference)[: len(losses)].detach(),
        "win_log_ratio": win,
        "lose_log_ratio": lose,
        "clipped_fraction": torch.stack([(r < low) | (r > high) for r in (win, lose)]).float().mean(0),
        "implicit_accuracy": (win > lose).float(),
    }


def _log_probs(step: ddim.Transition, batch: SpoBatch) -> tuple[Tensor, Tensor]:
    """log p [P] of the winners and of the losers."""
    if batch.lose_row is None:
        return ddim.log_prob(step, batch.x_win), ddim.log_prob(step, batch.x_lose)
    win, lose = step.select(slice(len(batch.x_win))), step.select(batch.lose_row)
    return ddim.log_prob(win, batch.x_win), ddim.log_prob(lose, batch.x_lose)


class SpoMethod:
    """Online batches: a rollout of the current policy, judged at every diverted step."""

    def __init__(
        self, config: Spo, schedule: Schedule, reward_model: RewardModel, prompts: Sequence[str], seed: int
    ) -> None:
        """`schedule` has the sampler's timesteps, on the backbone's device.

        Raises:
            ValueError: the config has no step to draw candidates at, a clip of 1 or more, or there are no
                prompts.
        """
        if config.clip >= 1:
            raise ValueError(f"align.spo.clip: {config.clip} is not below 1; the paper's is 0.1")
        if not prompts:
            raise ValueError("align.spo: there are no training prompts; look at the prompts stage")
        self.rollout = Rollout(config, schedule, reward_model)
        self.config, self.schedule = config, schedule
        self.prompts, self.seed = list(prompts), seed
        self.iterations, self.guidance = config.iterations, config.guidance

    def loss(self, policy: Tensor, reference: Tensor, batch: SpoBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `batch_loss`."""
        return batch_loss(policy, reference, batch, self.schedule, self.config)

    def collect(self, backbone: Backbone, iteration: int) -> tuple[list[list[SpoBatch]], dict[str, float]]:
        """The valid pairs of one rollout, shuffled, in updates of at most config.batch_size.

        Without a valid pair: one batch of one pair of weight 0. The metrics by timestep are named by
        x_t's, as in `valid_fraction/t0701`. Each process rolls out its share of the prompts; all see all
        pairs, shuffle them alike and take their share of every update.
        """
        count = self.config.prompts_per_iteration
        distributed.check_shards(count, "align.spo.prompts_per_iteration")
        order = shuffled(len(self.prompts), iteration * count, count, self.seed)
        mine = distributed.shard(order)
        keys = [f"rollout {iteration} epoch {epoch} prompt {i}" for epoch, i in mine]
        with backbone.inference():
            noise = SampleNoise(self.seed, keys, backbone.latent_shape, backbone.device)
            judged = list(self.rollout.run(backbone, [self.prompts[i] for _, i in mine], noise))
        judged = [step.gathered() for step in judged]
        prompts = [self.prompts[i] for _, i in order]  # in the order of the gathered samples
        return self._updates(judged, prompts, iteration), self._metrics(judged)

    def _updates(self, judged: list[JudgedStep], prompts: list[str], iteration: int) -> list[list[SpoBatch]]:
        """Indexing copies, so the batches are ordinary tensors, whatever `inference` made."""
        rows = step_pairs.Rows.of([j.pair for j in judged])
        valid = torch.cat([j.valid for j in judged]).nonzero().flatten()
        order = torch.randperm(len(valid), generator=generator(self.seed, f"pairs {iteration}"))
        chosen, weight = valid[order.to(valid.device)], 1.0
        if len(chosen) == 0:
            chosen, weight = torch.zeros(1, dtype=torch.int64, device=rows.x_t.device), 0.0
        size = -(-self.config.batch_size // self.config.gradient_accumulation)
        updates = []
        for update in chosen.split(self.config.batch_size):
            mine, share = distributed.shard(update), weight
            if len(mine) == 0:
                mine, share = update[:1], 0.0  # a process without pairs still takes part in the update
            updates.append([_batch(rows, part, share, prompts) for part in mine.split(size)])
        return updates

    def _metrics(self, judged: list[JudgedStep]) -> dict[str, float]:
        valid = torch.stack([j.valid for j in judged]).float().cpu()
        scores = torch.stack([j.scores.float().mean() for j in judged]).cpu()
        metrics = {
            "pairs": float(valid.sum()),
            "valid_fraction": float(valid.mean()),
            "score": float(scores.mean()),
        }
        for row, j in enumerate(judged):
            name = f"t{int(self.schedule.timesteps[j.step]):04d}"
            metrics[f"valid_fraction/{name}"] = float(valid[row].mean())
            metrics[f"score/{name}"] = float(scores[row])
        return metrics


def _batch(rows: step_pairs.Rows, chosen: Tensor, weight: float, prompts: Sequence[str]) -> SpoBatch:
    """The pairs at `chosen` int64 [P]; row r is of prompt r % len(prompts)."""
    x_t, samples, lose_row = rows.inputs(chosen)
    size = len(rows.conditioning)
    return SpoBatch(
        x_t=x_t,
        timesteps=rows.timesteps[samples],
        conditioning=rows.conditioning.select(samples % size),
        weight=torch.full((len(chosen),), weight, device=x_t.device),
        prompts=[prompts[r % size] for r in chosen.tolist()],
        x_win=rows.x_win[chosen],
        x_lose=rows.x_lose[chosen],
        lose_row=lose_row,
    )


def _build(params: Params, backbone: Backbone) -> SpoMethod:
    from spo.preference.reward_model import load_reward_model
    from spo.runtime.files import require

    section = params.align.spo
    reward_model = load_reward_model(require(PREFERENCE_MODEL, "preference model"), backbone.device)
    prompts = require(PROMPTS, "training prompts").read_text().splitlines()
    schedule = Schedule.from_config(backbone.scheduler_config, section.num_inference_steps)
    return SpoMethod(section, schedule.to(backbone.device), reward_model, prompts, params.seed)


def _cost(config: Spo, scheduler_config: Mapping[str, Any]) -> Cost:
    blocks = step_pairs.blocks(config, Schedule.from_config(scheduler_config, config.num_inference_steps))
    pairs = sum(len(block) for block in blocks)  # of a prompt
    plain = blocks[0][0] + 1  # later blocks continue from the outputs at the candidates
    final = blocks[-1][-1] + 1 == config.num_inference_steps  # final latents are judged as they are
    branched = config.candidates * (pairs - final)
    trained = sum(2 * len(block) - 1 for block in blocks)  # two samples where the branches have parted
    samples = (plain + branched + trained * (2 + BACKWARD)) * (1 + is_guided(config.guidance))
    prompts = config.iterations * config.prompts_per_iteration
    updates = config.iterations * -(-pairs * config.prompts_per_iteration // config.batch_size)
    most = f"at most {prompts * pairs} pairs, {updates} updates"
    return Cost(prompts * samples, f"{prompts} rollouts in {config.iterations} iterations; {most}")


SPEC = MethodSpec(
    name="spo",
    title="SPO",
    paper="Step-aware Preference Optimization (arXiv 2406.04314)",
    reads=(PREFERENCE_MODEL, PROMPTS),
    trained_first=("preference",),
    divergence="kl",
    build=_build,
    cost=_cost,
)
