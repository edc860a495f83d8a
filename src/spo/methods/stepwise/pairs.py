"""Choices along a rollout: where to draw candidates, which two make a pair, which one is continued."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spo.config import Rollout
from spo.diffusion import ddim
from spo.diffusion.noise import SampleNoise
from spo.diffusion.schedule import Schedule
from spo.training import distributed
from spo.types import Conditioning, StepPair


def blocks(config: Rollout, schedule: Schedule, name: str = "align") -> list[list[int]]:
    """Runs of `inner_steps` steps (indices into schedule.timesteps), each judged once at its end.

    Candidates part at the first step of a block. As in the official SDXL code, where a block has
    several steps, none begins at the sampler's last step: the block before takes it in.

    Args:
        name: of the section of params.yaml, for messages.

    Raises:
        ValueError: the config leaves no step to draw candidates at.
    """
    low, high = config.timestep_range or (0, schedule.num_train_timesteps)
    deviations = ddim.standard_deviation(schedule, schedule.timesteps, config.eta).flatten()
    count, inner = len(schedule.timesteps), config.inner_steps
    steps = [
        i
        for i in range(config.divert_start_step, count)
        if deviations[i] > 0 and low <= schedule.timesteps[i] <= high
    ]
    if not steps:
        where = "" if config.timestep_range is None else f" within timestep_range {[low, high]}"
        raise ValueError(
            f"{name}.divert_start_step: {config.divert_start_step} leaves no step of {count}{where} "
            "to draw candidates at; lower it"
        )
    runs = [steps[start : start + inner] for start in range(0, len(steps), inner)]
    if inner > 1 and len(runs) > 1 and runs[-1] == [count - 1]:
        runs[-2:] = [runs[-2] + runs[-1]]
    return runs


def thresholds(config: Rollout, schedule: Schedule, blocks: list[list[int]]) -> list[float]:
    """The least gap of a valid pair in each block: from `threshold` to `threshold_end`, by its first step."""
    start = config.threshold
    end = start if config.threshold_end is None else config.threshold_end
    if config.threshold_by == "step":
        return torch.linspace(start, end, len(blocks)).tolist()
    timesteps = schedule.timesteps[torch.tensor([block[0] for block in blocks])]
    if config.threshold_by == "timestep":
        values = timesteps.double()
    else:
        values = ddim.standard_deviation(schedule, timesteps, config.eta).flatten().double()
    high, low = values.max(), values.min()
    share = (high - values) / (high - low).clamp(min=1e-12)
    return (start + (end - start) * share).tolist()


def select_pairs(scores: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best and worst of K candidates of each sample (Sec. 4.1).

    Args:
        scores: [K,B], logits of a preference.
        threshold: one number or [B], in [0,1).

    Returns:
        win, lose (int64 [B], indices into K) and valid (bool [B]): the softmax over these two scores
        differs by more than the threshold.
    """
    best, win = scores.max(dim=0)
    worst, lose = scores.min(dim=0)
    return win, lose, _gap(best, worst) > threshold


def random_pairs(scores: Tensor, threshold: float, noise: SampleNoise) -> tuple[Tensor, Tensor, Tensor]:
    """Two different candidates of each sample, drawn uniformly; returns as `select_pairs` does."""
    count = len(scores)
    first = noise.integers(count)
    second = (first + 1 + noise.integers(count - 1)) % count
    every = torch.arange(scores.shape[1], device=scores.device)
    first_wins = scores[first, every] >= scores[second, every]
    win, lose = torch.where(first_wins, first, second), torch.where(first_wins, second, first)
    return win, lose, _gap(scores[win, every], scores[lose, every]) > threshold


def choose(
    config: Rollout, scores: Tensor, threshold: float, noise: SampleNoise
) -> tuple[Tensor, Tensor, Tensor]:
    """The pair of each sample as config.pair_choice says; returns as `select_pairs` does."""
    if config.pair_choice == "random":
        return random_pairs(scores, threshold, noise)
    return select_pairs(scores, threshold)


def resample(config: Rollout, win: Tensor, lose: Tensor, noise: SampleNoise) -> Tensor:
    """The candidate int64 [B] whose latents the rollout continues from.

    Continuing from the winner or from the loser collapsed training in the paper (Sec. 4.1).
    """
    if config.resampler == "random":
        return noise.integers(config.candidates)
    return win if config.resampler == "win" else lose


def _gap(better: Tensor, worse: Tensor) -> Tensor:
    return torch.tanh((better.float() - worse.float()) / 2)  # softmax of two, first minus second


def gathered(pair: StepPair, conditioning: Conditioning) -> StepPair:
    """The samples of all processes, in the order of their ranks.

    Args:
        conditioning: of the samples of all processes.
    """
    return StepPair(
        distributed.gather(pair.x_t),
        distributed.gather(pair.timesteps),
        distributed.gather(pair.x_win),
        distributed.gather(pair.x_lose),
        conditioning,
        None if pair.x_t_lose is None else distributed.gather(pair.x_t_lose),
        None if pair.output is None else distributed.gather(pair.output),
    )


@dataclass(frozen=True)
class Rows:
    """The pairs of all steps, one after the other: row r is of sample r % B."""

    x_t: Tensor  # [N,C,h,w]
    timesteps: Tensor  # int64 [N]
    x_win: Tensor
    x_lose: Tensor
    x_t_lose: Tensor | None  # None: no pair has one of its own
    parted: Tensor  # bool [N]: the loser's x_t is another
    conditioning: Conditioning  # B samples
    output: Tensor | None = None  # of the rollout at x_t; None: not kept, or some pair has none

    @classmethod
    def of(cls, pairs: list[StepPair]) -> Rows:
        x_t, timesteps, x_win, x_lose = (
            torch.cat([getattr(p, name) for p in pairs]) for name in ("x_t", "timesteps", "x_win", "x_lose")
        )
        own = [p.x_t_lose is not None for p in pairs]
        x_t_lose = (
            torch.cat([p.x_t if p.x_t_lose is None else p.x_t_lose for p in pairs]) if any(own) else None
        )
        parted = torch.tensor(own, device=x_t.device).repeat_interleave(len(pairs[0].x_t))
        outputs = [p.output for p in pairs if p.output is not None]
        output = torch.cat(outputs) if len(outputs) == len(pairs) else None
        return cls(x_t, timesteps, x_win, x_lose, x_t_lose, parted, pairs[0].conditioning, output)

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The UNet samples of the pairs at `rows` int64 [P].

        A pair whose branches have parted has a second sample at the end.

        Returns:
            x_t [B,C,h,w], the row of each sample (int64 [B]), and for each pair the sample that its loser was
            drawn from (int64 [P]); None: no pair of any step has parted.
        """
        if self.x_t_lose is None:
            return self.x_t[rows], rows, None
        parted = self.parted[rows]
        x_t = torch.cat([self.x_t[rows], self.x_t_lose[rows[parted]]])
        second = len(rows) - 1 + parted.cumsum(0)
        lose_row = torch.where(parted, second, torch.arange(len(rows), device=rows.device))
        return x_t, torch.cat([rows, rows[parted]]), lose_row
