"""Choices along a rollout: where to draw candidates, which two make a pair, which one is continued."""

import math

import torch
from torch import Tensor

from spo.config import Rollout
from spo.diffusion import ddim
from spo.diffusion.noise import SampleNoise
from spo.types import NoiseSchedule


def blocks(config: Rollout, schedule: NoiseSchedule, name: str = "align") -> list[list[int]]:
    """Runs of `inner_steps` steps (indices into schedule.timesteps), each scored once at its end.

    The branches diverge at the first step of a block. As in the official SDXL code, where a block has
    several steps, none begins at the sampler's last step: the block before takes it in.

    Args:
        name: of the section of params.yaml, for messages.
    """
    low, high = config.timestep_range or (0, math.inf)
    deviations = ddim.standard_deviation(schedule, schedule.timesteps, config.eta).flatten()
    signals = schedule.signal(schedule.timesteps).flatten()  # 0: x_t is noise alone
    count, inner = len(schedule.timesteps), config.inner_steps
    steps = [
        i
        for i in range(config.divert_start_step, count)
        if deviations[i] > 0 and signals[i] > 0 and low <= schedule.timesteps[i] <= high
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


def thresholds(config: Rollout, schedule: NoiseSchedule, blocks: list[list[int]]) -> list[float]:
    """The gap above which a pair is valid in each block: from `threshold` to `threshold_end`, by the block's
    first step."""
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
