"""The nouns that stages, methods and models share. Imports nothing of the package.

Shapes: images [B,3,H,W] in [-1,1]; latents [B,C,h,w]; timesteps int64 [B].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is told besides x_t and t; methods only pass it on.

    `tensors` holds whatever the backbone put there (text embeddings, SDXL's pooled embeddings and
    time ids), each with the batch as its first dimension.
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


@dataclass(frozen=True)
class Batch:
    """One optimizer update, or with `accumulate` a part of it: UNet inputs, and what the loss needs beside.

    A method may give the UNet more samples than it has pairs (Diffusion-DPO: winners, then losers).
    """

    x_t: Tensor  # [B,C,h,w]
    timesteps: Tensor  # int64 [B]
    conditioning: Conditioning  # B samples
    weight: Tensor  # [P], 0 for padding
    targets: Mapping[str, Tensor] = field(default_factory=dict)  # each [P,...]
    accumulate: bool = False  # the next batch belongs to the same update
    prompts: Sequence[str] = ()  # of the P pairs, for messages


@dataclass(frozen=True)
class StepPair:
    """Two candidates for the next latent, drawn from the same x_t (SPO, Sec. 4.1).

    After the first of several inner steps the two branches have parted: each has an x_t of its own.
    """

    x_t: Tensor  # [B,C,h,w]
    timesteps: Tensor  # int64 [B]
    x_win: Tensor  # [B,C,h,w]
    x_lose: Tensor  # [B,C,h,w]
    conditioning: Conditioning  # B samples
    x_t_lose: Tensor | None = None  # [B,C,h,w]; None: x_t


@dataclass(frozen=True)
class PreferencePair:
    """One judged pair of images, as stored by the `pairs` stage."""

    caption: str
    image_0: bytes  # an encoded image (jpg, png)
    image_1: bytes
    label_0: float  # 1, 0 or .5 (tie); label_0 + label_1 = 1
    label_1: float
    weight: float = 1.0  # 1 / num_example_per_prompt


class Backbone(Protocol):
    """A text-to-image latent diffusion model. Nothing outside `backbones/` knows its family."""

    scheduler_config: Mapping[str, Any]
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]  # H, W

    @property
    def device(self) -> torch.device: ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning: ...

    def predict(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, *, reference: bool = False
    ) -> Tensor:
        """The UNet's raw output [B,C,h,w]; with `reference`, of the weights before fine-tuning."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1,1] to scaled latents (the posterior's mean)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to images around [-1,1], not clamped: the preference model resizes first."""
        ...

    def trainable_parameters(self) -> list[torch.nn.Parameter]: ...

    def inference(self) -> AbstractContextManager[None]:
        """Evaluation mode without gradients."""
        ...


class LatentPairs(Protocol):
    """N judged pairs of encoded images, read a few at a time."""

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def label_0(self) -> Tensor:
        """[N], of the first image: 1 preferred, 0 not, .5 tie."""
        ...

    @property
    def weight(self) -> Tensor:
        """[N]"""
        ...

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The scaled latents of both images [P,C,h,w] of the pairs at int64 [P]."""
        ...


class Judge(Protocol):
    """A preference model that is told the timestep. Text is encoded once a prompt."""

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Normalised text features [B,D]."""
        ...

    def score_images(self, images: Tensor, text: Tensor, timesteps: Tensor) -> Tensor:
        """Scores [B] of images in [-1,1] at `timesteps`."""
        ...


class Method(Protocol):
    """An alignment method: how its batches come about, and a pure loss of two UNet outputs."""

    iterations: int
    guidance: float  # of the training forward; 1 = the conditional prediction alone
    schedule: Any
    config: Any
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]

    def collect(self, backbone: Backbone, iteration: int) -> tuple[list[Batch], dict[str, float]]:
        """The updates of one iteration: a function of the weights, the seed and `iteration` alone."""
        ...


class Scorer(Protocol):
    """Judges finished images. Higher is better."""

    name: str

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        """One number for each image and its own prompt; lengths must agree."""
        ...
