"""The noise schedule of a rectified flow (arXiv 2209.03003, 2403.03206): x_t = (1 - sigma) x_0 + sigma eps.

The model predicts the velocity v = eps - x_0. A timestep is sigma * num_train_timesteps in fp32, no whole
number: half precision would round 750 to 752. Keys, defaults and sigmas are those of diffusers'
FlowMatchEulerDiscreteScheduler; keys by which it steps in another way are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spo.diffusion.schedule import unsupported
from spo.types import NoiseSchedule, Step

FLOW_SAMPLER = "FlowMatchEulerDiscreteScheduler"

# Other sigmas or steps than those of the pipelines of Stable Diffusion 3 and FLUX.
REFUSED = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("stochastic_sampling", "invert_sigmas"),
)
NUMBERS = ("shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """The descending timesteps of one sampler run on the path from noise (sigma 1) to data (sigma 0)."""

    timesteps: Tensor  # fp32 [N], descending
    trained: Tensor  # fp32 [T], the timesteps that the model was trained with

    @classmethod
    def from_config(
        cls,
        scheduler_config: Mapping[str, Any],
        num_inference_steps: int,
        image_tokens: int | None = None,
        last_sigma: float | None = None,
    ) -> FlowSchedule:
        """The schedule of a scheduler_config.json for a sampler of `num_inference_steps` steps.

        Args:
            image_tokens: of the transformer's input, which a dynamic shift needs.
            last_sigma: before the shift, of the last step. diffusers' FLUX pipeline has 1 / steps; None: the
                smallest that the model was trained with, as in its Stable Diffusion 3 pipeline.
        """
        config = scheduler_config
        check_flow(config)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; give 1 or more")
        total = config.get("num_train_timesteps", 1000)
        trained = torch.arange(total, 0, -1, dtype=torch.float64) / total
        if not config.get("use_dynamic_shifting", False):
            trained = _shifted(config, trained, image_tokens)
        last = float(trained[-1]) if last_sigma is None else last_sigma
        sigmas = torch.linspace(1, last, num_inference_steps, dtype=torch.float64)
        sigmas = _shifted(config, sigmas, image_tokens)
        if terminal := config.get("shift_terminal"):
            if num_inference_steps == 1:
                raise ValueError("num_inference_steps is 1; with shift_terminal give 2 or more")
            sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
        return cls(*((total * s).float() for s in (sigmas, trained)))

    def to(self, device: torch.device | str) -> FlowSchedule:
        """The same schedule with its tensors on `device`."""
        return replace(self, timesteps=self.timesteps.to(device), trained=self.trained.to(device))

    @property
    def train_timesteps(self) -> Tensor:
        """fp32 [T], moved by the shift as the sampler's are, where it does not depend on the image's size."""
        return self.trained

    def signal(self, timesteps: Tensor) -> Tensor:
        """1 - sigma [B,1,1,1]."""
        return 1 - self.noise(timesteps)

    def noise(self, timesteps: Tensor) -> Tensor:
        """sigma [B,1,1,1]."""
        assert timesteps.dtype not in (torch.float16, torch.bfloat16)  # they round timesteps
        return (timesteps / len(self.trained)).view(-1, 1, 1, 1)

    def step(self, timesteps: Tensor) -> Step:
        """To the next lower timestep of the sampler, and after the last one to sigma 0."""
        lower = torch.where(self.timesteps < timesteps[:, None], self.timesteps, 0).amax(1)
        sigma, following = self.noise(timesteps), self.noise(lower)
        kept = (1 - sigma) / (1 - following)
        # sigma^2 - kept^2 following^2, as a product: the difference of squares would lose digits
        added = (sigma - following) / (1 - following) * (sigma + kept * following)
        return Step(1 - following, following**2, sigma**2, added)

    def training_target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity eps - x_0."""
        return noise - x0

    def predict(self, model_output: Tensor, timesteps: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 = x - sigma v and eps = x + (1 - sigma) v."""
        sigma = self.noise(timesteps)
        return x_t - sigma * model_output, x_t + (1 - sigma) * model_output


def check_flow(config: Mapping[str, Any]) -> None:
    """Refuse what diffusers' scheduler of rectified flows would do and this package does not."""
    name = config.get("_class_name", FLOW_SAMPLER)
    if name != FLOW_SAMPLER:
        raise unsupported("_class_name", name, FLOW_SAMPLER)
    for key in REFUSED:
        if config.get(key) not in (None, False):
            raise unsupported(key, config[key], "false")
    if not isinstance(config.get("use_dynamic_shifting"), bool | None):
        raise unsupported("use_dynamic_shifting", config["use_dynamic_shifting"], "true or false")
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise unsupported("time_shift_type", kind, "exponential, linear")
    _check_numbers(config)


def _check_numbers(config: Mapping[str, Any]) -> None:
    for key in NUMBERS:
        if key in config and not isinstance(config[key], int | float):
            raise unsupported(key, config[key], "a number")
    steps, terminal = config.get("num_train_timesteps", 1000), config.get("shift_terminal")
    if not isinstance(steps, int) or steps < 1:
        raise unsupported("num_train_timesteps", steps, "a whole number from 1 on")
    if terminal is not None and not (isinstance(terminal, int | float) and 0 <= terminal < 1):
        raise unsupported("shift_terminal", terminal, "null, or a number in [0, 1)")


def _shifted(config: Mapping[str, Any], sigmas: Tensor, image_tokens: int | None) -> Tensor:
    """Sigmas moved towards 1 (arXiv 2403.03206, Eq. 23): by a factor, or by one for the image's size."""
    factor = config.get("shift", 1.0)
    if config.get("use_dynamic_shifting", False):
        factor = _dynamic_shift(config, image_tokens)
    if not factor > 0:
        raise unsupported("shift", factor, "a number above 0")
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def _dynamic_shift(config: Mapping[str, Any], image_tokens: int | None) -> float:
    """The factor for so many image tokens: linear in them, or its exponential (`calculate_shift`)."""
    if image_tokens is None:
        raise unsupported("use_dynamic_shifting", True, "false for a model without image tokens")
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = least + (image_tokens - low) * (most - least) / (high - low)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
