"""The types that stages, methods and models share. Imports nothing of the package.

Shapes: images [B,3,H,W] in [-1,1]; latents [B,C,h,w]; timesteps [B], int64 for DDPM and float32 for flows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor


class Budget(NamedTuple):
    """How work is split to fit the memory of a device; changes no result (`config.Device`)."""

    images: int = 16  # of a VAE call
    samples: int = 128  # latents of a denoiser call without gradient; guidance doubles them
    pairs: int = 4096  # of a forward with gradient
    checkpointing: bool = False  # activations are computed again in the backward pass
    offload: bool = False  # models rest in host memory while they are not needed


@dataclass(frozen=True)
class Conditioning:
    """The inputs of a UNet or a reward model besides x_t and t; methods only pass them on.

    `tensors` holds whatever the model put there (text embeddings, pooled embeddings, SDXL's time ids), each
    with the batch as its first dimension.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def repeat(self, n: int) -> Conditioning:
        """Tile the batch n times: sample b of copy k is at k * B + b, as in x.view(n, B, ...)."""
        return Conditioning({k: v.repeat(n, *[1] * (v.ndim - 1)) for k, v in self.tensors.items()})

    def select(self, indices: Tensor | slice) -> Conditioning:
        """The samples at `indices` (int64 or bool [N], or a slice)."""
        return Conditioning({k: v[indices] for k, v in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join batches of the same backbone, in order."""
        return Conditioning({k: torch.cat([p.tensors[k] for p in parts]) for k in parts[0].tensors})


@dataclass(frozen=True, kw_only=True)
class Batch:
    """P weighted pairs: one optimizer update, or a part of one whose gradients are accumulated."""

    weight: Tensor  # [P], 0 for padding
    timesteps: Tensor  # [B], B >= P; the first P are the pairs'
    prompts: Sequence[str] = ()  # of the P pairs, for messages


@dataclass(frozen=True, kw_only=True)
class UNetBatch(Batch):
    """The B >= P samples that policy and reference predict; methods add what their losses need.

    A method may give the UNet more samples than it has pairs (Diffusion-DPO: winners, then losers).
    """

    x_t: Tensor  # [B,C,h,w]
    conditioning: Conditioning  # B samples
    first: bool = False  # of the first update, where a method measures the gauges FIRST_UPDATE too


FIRST_UPDATE = "first_update/"  # how names of metrics begin whose largest value counts, logged once


class Mean(NamedTuple):
    """A metric as values [P] and the weights [P] of their mean over parts of a batch and processes.

    Of a metric of FIRST_UPDATE it is the largest value with weight.
    """

    values: Tensor
    weights: Tensor


@dataclass(frozen=True)
class PreferencePair:
    """One labelled pair of images, as stored by the `pairs` stage."""

    caption: str
    image_0: bytes  # an encoded image (jpg, png)
    image_1: bytes
    label_0: float  # 1, 0 or .5 (tie); label_0 + label_1 = 1
    label_1: float
    weight: float = 1.0  # 1 / num_example_per_prompt


class Step(NamedTuple):
    """What a sampler step from x_t to x_t' needs of a noise schedule; all [B,1,1,1], fp32.

    In the form in which each schedule loses no digits.
    """

    signal: Tensor  # at the end of the step
    noise_variance: Tensor  # at the end of the step, noise'^2; 0 after the last step
    noise_variance_before: Tensor  # at its start, noise^2
    added_variance: Tensor  # of q(x_t | x_t'): noise^2 - (signal / signal')^2 noise'^2


class NoiseSchedule(Protocol):
    """A Gaussian path x_t = signal x_0 + noise eps, and the timesteps of one sampler run on it.

    Timesteps are opaque outside: int64 for discrete DDPM, float32 for flows.
    """

    timesteps: Tensor  # [N], descending

    @property
    def train_timesteps(self) -> Tensor:
        """[T], those that the model was trained with; a uniform draw of them is a draw for training."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same schedule with its tensors on `device`."""
        ...

    def signal(self, timesteps: Tensor) -> Tensor:
        """The factor of x_0 at timesteps [B], as [B,1,1,1]."""
        ...

    def noise(self, timesteps: Tensor) -> Tensor:
        """The factor of eps at timesteps [B], as [B,1,1,1]."""
        ...

    def step(self, timesteps: Tensor) -> Step:
        """The sampler step that starts at timesteps [B], which may differ in the batch."""
        ...

    def training_target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model's output at add_noise(x0, noise, timesteps) should be [B,C,h,w]."""
        ...

    def predict(self, model_output: Tensor, timesteps: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """The x_0 and eps [B,C,h,w] that a model output at x_t stands for."""
        ...

    def predict_x0(self, model_output: Tensor, timesteps: Tensor, x_t: Tensor) -> Tensor:
        """The x_0 [B,C,h,w] that a model output at x_t stands for."""
        return self.predict(model_output, timesteps, x_t)[0]

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = signal x_0 + noise eps; all [B,C,h,w]."""
        return self.signal(timesteps) * x0 + self.noise(timesteps) * noise


class Backbone(Protocol):
    """A text-to-image latent diffusion model. Nothing outside `backbones/` knows its family."""

    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]  # H, W
    budget: Budget

    @property
    def device(self) -> torch.device: ...

    def schedule(self, num_inference_steps: int) -> NoiseSchedule:
        """The model's noise schedule for a sampler of so many steps, on the CPU."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning: ...

    def remember_prompts(self, prompts: Sequence[str]) -> None:
        """Encode prompts that a stage will use, before the denoiser needs the device's memory.

        Does nothing where the text encoders are small.
        """
        ...

    def guided(self, conditioning: Conditioning, guidance: float) -> tuple[Conditioning, float]:
        """The text with what the model takes of a guidance scale as an input, and the scale of
        classifier-free guidance that is left: all of it for most models."""
        ...

    def empty_prompt(self) -> Conditioning:
        """The empty prompt, encoded once."""
        ...

    def rest(self) -> None:
        """Move the UNet to host memory until the next prediction, with budget.offload."""
        ...

    def predict(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        *,
        reference: bool = False,
        copies: int = 1,
    ) -> Tensor:
        """The UNet's raw output [B,C,h,w]; with `reference`, of the weights before fine-tuning.

        copies: the number of equal parts of which x_t and timesteps consist, each with a text of its own.
        """
        ...

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images in [-1,1] to scaled latents: the posterior's mean, or with `noise` [B,C,h,w] a sample."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to images around [-1,1], not clamped: the preference model resizes first."""
        ...

    def trainable_parameters(self) -> list[torch.nn.Parameter]: ...

    def feature_model(self) -> Any:
        """A copy of the denoiser's first part as it is now, and of small text encoders (`FirstPart`)."""
        ...

    def inference(self) -> AbstractContextManager[None]:
        """Evaluation mode without gradients."""
        ...


@dataclass(frozen=True)
class Candidates:
    """N candidates for the next latent, or some of them."""

    latents: Tensor  # [N,C,h,w], with the noise of `timesteps`
    timesteps: Tensor  # [N], of the noise that is left in the latents; 0 after the last step
    step_timesteps: Tensor  # [N], of the denoising step that drew them: one noisier than `timesteps`
    # [N,3,H,W] around [-1,1], decoded from the x_0 that the UNet predicts from each; None: not needed
    images: Tensor | None


class RewardModel(Protocol):
    """Scores candidates by their prompt and timestep. Text is encoded once per prompt."""

    model: Any  # torch.nn.Module, which leaves the device while no candidates are scored
    needs_images: bool  # otherwise nothing is predicted and decoded for it

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """The model's inputs for B prompts."""
        ...

    def score(self, candidates: Candidates, text: Conditioning) -> Tensor:
        """Scores [N] of N candidates and their own prompts."""
        ...


class Method(Protocol):
    """An alignment method: how its batches are collected, and a pure loss of two UNet outputs."""

    iterations: int
    guidance: float  # of the training forward; 1: the conditional prediction alone

    def collect(self, backbone: Backbone, iteration: int) -> tuple[list[list[Any]], dict[str, float]]:
        """As `training.loop.Objective.collect`; the batches are UNetBatches of the method's own class."""
        ...

    def loss(self, policy: Tensor, reference: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [P] and metrics [P] of the UNet outputs [B,C,h,w] of policy and reference at batch.x_t.

        In the first update policy and reference are the same; with batch.first there are metrics of
        FIRST_UPDATE, by how much they differ.
        """
        ...


class Scorer(Protocol):
    """Scores finished images. Higher is better."""

    name: str

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        """One number for each image and its own prompt; lengths must agree."""
        ...
