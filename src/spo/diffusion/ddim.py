"""DDIM (arXiv 2010.02502) as a Gaussian transition p(x_{t-1} | x_t): its mean and std, draw and density.

Written for any Gaussian path x_t = a x_0 + b eps that steps to (a', b'): with std = eta (b' / b)
sqrt(b^2 - (a / a')^2 b'^2) the mean is a' x_0 + sqrt(b'^2 - std^2) eps. For DDPM (a^2 + b^2 = 1) these are
DDIM's Eq. 12 and 16; for rectified flow (a = 1 - b) eta 0 is Euler's step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from spo.types import NoiseSchedule


@dataclass(frozen=True)
class Transition:
    """p(x_{t-1} | x_t) = Normal(mean, std^2), and the x_0 predicted on the way."""

    x0: Tensor  # [B,C,h,w]
    mean: Tensor  # [B,C,h,w]
    std: Tensor  # [B,1,1,1], >= 0

    def select(self, rows: Tensor | slice) -> Transition:
        """The samples at `rows` (int64 or bool [N], or a slice)."""
        return Transition(self.x0[rows], self.mean[rows], self.std[rows])


def transition(
    schedule: NoiseSchedule, model_output: Tensor, timesteps: Tensor, x_t: Tensor, eta: float
) -> Transition:
    """One sampler step from x_t [B,C,h,w] at timesteps [B], which may differ in the batch.

    Args:
        eta: in [0,1]; 0 is deterministic, 1 has the variance of DDPM's posterior.
    """
    assert x_t.ndim == 4 and model_output.shape == x_t.shape and timesteps.shape == x_t.shape[:1]
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; DDIM needs a value in [0, 1]")
    x0, eps = schedule.predict(model_output, timesteps, x_t)
    step, std = schedule.step(timesteps), standard_deviation(schedule, timesteps, eta)
    # never below 0 in exact arithmetic; rounding could make it so
    direction = (step.noise_variance - std**2).clamp(min=0).sqrt()
    return Transition(x0=x0, mean=step.signal * x0 + direction * eps, std=std)


def standard_deviation(schedule: NoiseSchedule, timesteps: Tensor, eta: float) -> Tensor:
    """sigma_t(eta) [B,1,1,1] of the step that starts at `timesteps` [B] (Eq. 16)."""
    step = schedule.step(timesteps)
    return eta * (step.noise_variance / step.noise_variance_before * step.added_variance).sqrt()


def sample(transition: Transition, noise: Tensor) -> Tensor:
    """x_{t-1} [B,C,h,w] from standard normal `noise` [B,C,h,w]; [K,B,C,h,w] gives K candidates."""
    return transition.mean + transition.std * noise


def divergence(one: Transition, other: Transition) -> Tensor:
    """KL(one || other) [B] in nats of two steps with the same std > 0: |mean - mean'|^2 / (2 std^2)."""
    return ((one.mean - other.mean) / one.std).square().flatten(1).sum(1) / 2


def log_prob(transition: Transition, x_prev: Tensor) -> Tensor:
    """log p(x_prev | x_t) [B] in nats, as the mean over latent dimensions; needs std > 0.

    The mean, not the sum, fixes the scale of SPO's beta and clip.
    """
    density = (
        -((x_prev - transition.mean) ** 2) / (2 * transition.std**2)
        - transition.std.log()
        - 0.5 * math.log(2 * math.pi)
    )
    return density.flatten(1).mean(1)
