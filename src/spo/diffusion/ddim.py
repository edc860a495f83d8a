"""DDIM (arXiv 2010.02502) as a Gaussian transition p(x_{t-1} | x_t): its mean and std, draw and density."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from spo.diffusion.schedule import Schedule


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
    schedule: Schedule, model_output: Tensor, timesteps: Tensor, x_t: Tensor, eta: float
) -> Transition:
    """One sampler step from x_t [B,C,h,w] at timesteps int64 [B], which may differ in the batch (Eq. 12, 16).

    Args:
        eta: in [0,1]; 0 is deterministic, 1 has the variance of DDPM's posterior.
    """
    assert x_t.ndim == 4 and model_output.shape == x_t.shape and timesteps.shape == x_t.shape[:1]
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; DDIM needs a value in [0, 1]")
    x0, eps = schedule.predict(model_output, timesteps, x_t)
    previous, std = schedule.alpha_previous(timesteps), standard_deviation(schedule, timesteps, eta)
    # never below 0 in exact arithmetic; rounding could make it so
    direction = (1 - previous - std**2).clamp(min=0).sqrt()
    return Transition(x0=x0, mean=previous.sqrt() * x0 + direction * eps, std=std)


def standard_deviation(schedule: Schedule, timesteps: Tensor, eta: float) -> Tensor:
    """sigma_t(eta) [B,1,1,1] of the step that starts at `timesteps` [B] (Eq. 16)."""
    alpha, previous = schedule.alpha(timesteps), schedule.alpha_previous(timesteps)
    return eta * ((1 - previous) / (1 - alpha) * (1 - alpha / previous)).sqrt()


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
