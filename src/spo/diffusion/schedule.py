"""The noise schedule of a diffusion model and the timesteps that a sampler visits.

Arithmetic is at least fp32, whatever the model's dtype: coefficients are fp32 and promote what they
meet. Keys, defaults and rounding are those of diffusers' DDIMScheduler, so the scheduler_config of any
discrete-time DDPM serves. Keys that say how another sampler steps (solver order, Karras sigmas) are not
read, as there; keys that announce another forward process are refused.

Departures from diffusers' DDIMScheduler:
1. `clip_sample` is off where the file does not name it: latents are not confined to [-1, 1], and diffusers'
   Stable Diffusion pipeline switches it off.
2. A step ends at the next timestep of the list. There it ends T // N before its own, which is another one for
   `linspace` (10 steps: 999 to 899, and the next is 888) and for `trailing` where N does not divide T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spo.types import NoiseSchedule, Step

# Schedulers of diffusers for models that were trained as a discrete-time DDPM (arXiv 2006.11239).
_NAMES = """
    DDIM DDIMInverse DDIMParallel DDPM DDPMParallel PNDM LMSDiscrete HeunDiscrete EulerDiscrete
    EulerAncestralDiscrete KDPM2Discrete KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverMultistepInverse
    DPMSolverSinglestep DPMSolverSDE DEISMultistep UniPCMultistep SASolver
"""
DISCRETE_SAMPLERS = frozenset(f"{name}Scheduler" for name in _NAMES.split())

FLAGS = ("clip_sample", "rescale_betas_zero_snr", "set_alpha_to_one", "thresholding", "use_flow_sigmas")


@dataclass(frozen=True)
class Schedule(NoiseSchedule):
    """alpha-bar of the forward process q(x_t | x_0) and the descending timesteps of one sampler run."""

    alphas_cumprod: Tensor  # fp32 [T]
    final_alpha_cumprod: Tensor  # fp32 [], stands for the timestep before the first
    timesteps: Tensor  # int64 [N], descending
    prediction_type: str = "epsilon"  # or v_prediction
    clip_range: float | None = None  # predicted x_0 is clamped to +-clip_range

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any], num_inference_steps: int) -> Schedule:
        """The schedule of a scheduler_config.json for a sampler of `num_inference_steps` steps."""
        config = scheduler_config
        check_process(config)
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise unsupported("prediction_type", prediction_type, "epsilon, v_prediction")
        if config.get("thresholding", False):
            raise unsupported("thresholding", True, "false (it is meant for pixels, not for latents)")
        betas = _betas(config)
        if config.get("rescale_betas_zero_snr", False):
            if prediction_type == "epsilon":  # x_T holds nothing of x_0: eps alone cannot give it back
                raise unsupported("prediction_type", prediction_type, "v_prediction with zero terminal SNR")
            betas = _rescale_zero_terminal_snr(betas)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        to_one = config.get("set_alpha_to_one", True)
        return cls(
            alphas_cumprod=alphas_cumprod,
            final_alpha_cumprod=torch.tensor(1.0) if to_one else alphas_cumprod[0],
            timesteps=_timesteps(config, len(betas), num_inference_steps),
            prediction_type=prediction_type,
            clip_range=config.get("clip_sample_range", 1.0) if config.get("clip_sample", False) else None,
        )

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def train_timesteps(self) -> Tensor:
        """int64 [T]."""
        return torch.arange(self.num_train_timesteps, device=self.timesteps.device)

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its tensors on `device`."""
        return replace(
            self,
            alphas_cumprod=self.alphas_cumprod.to(device),
            final_alpha_cumprod=self.final_alpha_cumprod.to(device),
            timesteps=self.timesteps.to(device),
        )

    def alpha(self, timesteps: Tensor) -> Tensor:
        """alpha-bar at `timesteps` int64 [B], any in [0, T), as [B,1,1,1]."""
        return self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)

    def alpha_previous(self, timesteps: Tensor) -> Tensor:
        """alpha-bar at the end of the sampler step from `timesteps` [B], as [B,1,1,1].

        That of the next timestep in the list; of a timestep that is not in the list, T // N before it.
        """
        visited = timesteps[:, None] == self.timesteps  # [B,N]
        following = torch.nn.functional.pad(self.timesteps[1:], (0, 1), value=-1)
        elsewhere = timesteps - self.num_train_timesteps // len(self.timesteps)
        previous = torch.where(visited.any(1), (visited * following).sum(1), elsewhere)
        known = self.alphas_cumprod[previous.clamp(min=0)]
        return torch.where(previous >= 0, known, self.final_alpha_cumprod).view(-1, 1, 1, 1)

    def signal(self, timesteps: Tensor) -> Tensor:
        """sqrt(alpha-bar) [B,1,1,1] (DDPM, arXiv 2006.11239, Eq. 4)."""
        return self.alpha(timesteps).sqrt()

    def noise(self, timesteps: Tensor) -> Tensor:
        """sqrt(1 - alpha-bar) [B,1,1,1] (DDPM, Eq. 4)."""
        return (1 - self.alpha(timesteps)).sqrt()

    def step(self, timesteps: Tensor) -> Step:
        alpha, previous = self.alpha(timesteps), self.alpha_previous(timesteps)
        return Step(previous.sqrt(), 1 - previous, 1 - alpha, 1 - alpha / previous)

    def training_target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model's output at add_noise(x0, noise, t) should be: eps, or v (arXiv 2202.00512)."""
        if self.prediction_type == "epsilon":
            return noise
        return self.signal(timesteps) * noise - self.noise(timesteps) * x0

    def predict(self, model_output: Tensor, timesteps: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """The x_0 (clamped where the config says so) and eps that a model output at x_t stands for."""
        signal, sigma = self.signal(timesteps), self.noise(timesteps)
        if self.prediction_type == "epsilon":
            x0, eps = (x_t - sigma * model_output) / signal, model_output
        else:
            x0, eps = signal * x_t - sigma * model_output, signal * model_output + sigma * x_t
        if self.clip_range is not None:
            x0 = x0.clamp(-self.clip_range, self.clip_range)
        return x0, eps


def check_process(config: Mapping[str, Any]) -> None:
    """Refuse all but discrete-time DDPMs: EDM, flow matching, continuous time, consistency models."""
    name = config.get("_class_name", "DDIMScheduler")
    if str(name) not in DISCRETE_SAMPLERS:
        raise unsupported("_class_name", name, "a model trained as discrete-time DDPM (DDIMScheduler, ...)")
    for key in FLAGS:
        if not isinstance(config.get(key), bool | None):
            raise unsupported(key, config[key], "true or false")
    if config.get("use_flow_sigmas", False):
        raise unsupported("use_flow_sigmas", True, "a model that was not trained by flow matching")
    if config.get("timestep_type", "discrete") != "discrete":
        raise unsupported("timestep_type", config["timestep_type"], "discrete")
    if "learned" in str(config.get("variance_type") or ""):
        raise unsupported("variance_type", config["variance_type"], "a model that predicts no variance")


def _betas(config: Mapping[str, Any]) -> Tensor:
    """fp32 [T]."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    kind, steps = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":  # arXiv 2102.09672, Eq. 17
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(steps)])
    raise unsupported("beta_schedule", kind, "linear, scaled_linear, squaredcos_cap_v2")


def _rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """The same schedule, stretched so that x_T is pure noise (arXiv 2305.08891, Algorithm 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    bar = root**2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def _timesteps(config: Mapping[str, Any], total: int, count: int) -> Tensor:
    """int64 [count], descending (arXiv 2305.08891, Table 2)."""
    if not 1 <= count <= total:
        raise ValueError(
            f"num_inference_steps is {count}; the model was trained with {total}: give 1 to {total}"
        )
    spacing, offset = config.get("timestep_spacing", "leading"), config.get("steps_offset", 0)
    if not isinstance(offset, int) or offset < 0:
        raise unsupported("steps_offset", offset, "a whole number from 0 on")
    if spacing == "leading":
        steps = [i * (total // count) + offset for i in reversed(range(count))]
    elif spacing == "trailing":
        steps = [round(total - i * (total / count)) - 1 for i in range(count)]
    elif spacing == "linspace":
        gap = (total - 1) / max(count - 1, 1)
        steps = [round(i * gap) for i in reversed(range(count))]
    else:
        raise unsupported("timestep_spacing", spacing, "leading, trailing, linspace")
    if steps[0] >= total:
        raise ValueError(
            f"scheduler_config: {count} steps with steps_offset {offset} reach timestep "
            f"{steps[0]} of {total}; lower num_inference_steps or steps_offset"
        )
    return torch.tensor(steps, dtype=torch.int64)


def unsupported(key: str, value: object, known: str) -> ValueError:
    return ValueError(f"scheduler_config: {key} {value!r} is not supported; use {known}")
