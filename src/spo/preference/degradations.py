"""Four ways to harm a picture, each by a strength from 0 to 1: what a judge of quality has to see.

Captions never name blur or grain, so a CLIP hardly sees them. Which of two copies of a picture is harmed
less teaches it to, without a label (arXiv 1707.08347 and 2310.14918 learn image quality so).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DEGRADATIONS = ("blur", "noise", "colour", "light")
# at strength 1
BLUR = 2 / 48  # standard deviation of the Gaussian, of the picture's shorter side
NOISE = 0.12  # standard deviation, of the range from black to white
COLOUR = 0.8  # share of saturation lost
LIGHT = 0.6  # share of light lost at the dark side
CHROMA = 0.3  # of the noise, against 1 of its luma
PRESENT = 0.6  # how often a degradation is there at all
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Draws:
    """The randomness of B harmed pictures."""

    strengths: Tensor  # [B,4] in [0,1]
    noise: Tensor  # [B,4,n,n], standard normal: luma, then three of colour; its grain is H / n pixels
    angle: Tensor  # [B] in radians: where the dark side lies

    @classmethod
    def of(cls, generators: list[torch.Generator], side: int) -> Draws:
        """One picture a generator, with noise of `side` points a side."""
        rows = []
        for g in generators:
            present = torch.rand(len(DEGRADATIONS), generator=g) < PRESENT
            strength = torch.rand(len(DEGRADATIONS), generator=g) * present
            angle = torch.rand((), generator=g) * 2 * math.pi
            rows.append((strength, torch.randn(4, side, side, generator=g), angle))
        return cls(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def but_one(self, generators: list[torch.Generator]) -> Draws:
        """The same harms but for one degradation of each picture, whose strength is another; other noise."""
        strengths, noise = [], []
        for before, g in zip(self.strengths, generators, strict=True):
            changed = before.clone()
            changed[int(torch.randint(len(DEGRADATIONS), (), generator=g))] = torch.rand((), generator=g)
            strengths.append(changed)
            noise.append(torch.randn(self.noise.shape[1:], generator=g))
        return Draws(torch.stack(strengths), torch.stack(noise), self.angle)

    def to(self, device: torch.device | str) -> Draws:
        return Draws(self.strengths.to(device), self.noise.to(device), self.angle.to(device))


def degrade(images: Tensor, draws: Draws) -> Tensor:
    """Images [B,3,H,W] in [-1,1], blurred, bleached, darkened on one side and made grainy, in that order."""
    blur, noise, colour, light = draws.strengths.T
    picture = _blurred((images + 1) / 2, blur * BLUR * min(images.shape[-2:]))
    grey = (picture * picture.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    picture = grey + _column(1 - COLOUR * colour) * (picture - grey)
    picture = picture * (1 - LIGHT * _column(light) * _ramp(draws.angle, images.shape[-2:]))
    picture = picture + NOISE * _column(noise) * _grain(draws.noise, images.shape[-2:])
    return picture.clamp(0, 1) * 2 - 1


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """By a Gaussian of `sigma` [B] pixels; 0 leaves a picture as it is."""
    count, channels, height, width = images.shape
    reach = math.ceil(2 * BLUR * min(height, width))
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(images, (reach,) * 4, mode="replicate").reshape(1, count * channels, height + 2 * reach, -1)
    for kernel in (weights[:, None, :, None], weights[:, None, None, :]):
        flat = F.conv2d(flat, kernel, groups=count * channels)
    return flat.view(images.shape)


def _ramp(angle: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """From 0 to 1 across the picture along `angle`, [B,1,H,W]."""
    y, x = (torch.linspace(-1, 1, side, device=angle.device) for side in size)
    along = x * _column(angle.cos()) + y[:, None] * _column(angle.sin())
    return (along / math.sqrt(2) + 1) / 2


def _grain(noise: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """Of standard deviation 1, [B,3,H,W]."""
    grain = noise[:, :1] + CHROMA * noise[:, 1:]
    grain = F.interpolate(grain, size=tuple(size), mode="bilinear", align_corners=False)
    return grain / grain.std((1, 2, 3), keepdim=True)
