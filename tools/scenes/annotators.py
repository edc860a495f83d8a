"""Synthetic annotators, who compare two images of one caption as Pick-a-Pic's users do.

An annotator values mostly whether an image shows its caption (layout), less its aesthetics (taste, with
individual weights of the four quality factors), chooses with noise, and calls close pairs a tie. The
constants were chosen by the statistics of the labels alone: about 12 % ties, 72-76 % of the other labels
agree with the average blend, at most 62 % with aesthetics alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spo.scenes.world import QUALITY

TASTE = 0.5  # median weight of aesthetics against a weight of 1 for layout
TASTE_SPREAD = 0.5  # standard deviation of the logarithm of that weight over annotators
LEANING = 4.0  # Dirichlet concentration of an annotator's weights of the quality factors
TEMPERATURE = 0.2  # of the Bradley-Terry choice
TIE = 0.024  # smaller differences of the blend are ties


@dataclass(frozen=True)
class Annotators:
    """Annotators [A] with individual tastes."""

    taste: Tensor  # [A]
    leanings: Tensor  # [A,4], each row sums to 1

    @classmethod
    def draw(cls, n: int, generator: torch.Generator) -> Annotators:
        """Draw n annotators."""
        taste = TASTE * (TASTE_SPREAD * torch.randn(n, generator=generator)).exp()
        gamma = torch._standard_gamma(torch.full((n, len(QUALITY)), LEANING), generator=generator)
        return cls(taste, gamma / gamma.sum(1, keepdim=True))

    def value(self, who: Tensor, quality: Tensor, layout: Tensor) -> Tensor:
        """The value [N] of image i for annotator who[i], from quality [N,4] and layout [N]."""
        return layout + self.taste[who] * (self.leanings[who] * quality).sum(1)

    def compare(self, who: Tensor, value_0: Tensor, value_1: Tensor, generator: torch.Generator) -> Tensor:
        """Draw label_0 [N] by Bradley-Terry: 1, 0, or .5 for a tie."""
        difference = value_0 - value_1
        chosen = torch.rand(len(who), generator=generator) < torch.sigmoid(difference / TEMPERATURE)
        return torch.where(difference.abs() < TIE, 0.5, chosen.float())

    def rate(self, who: Tensor, quality: Tensor, generator: torch.Generator) -> Tensor:
        """Rate aesthetics alone on a scale of 1 to 10, as in the data of LAION's aesthetic predictor."""
        taste = (self.leanings[who] * quality).sum(1)
        return (1 + 9 * taste + torch.randn(len(who), generator=generator)).clamp(1, 10)


def blend(quality: Tensor, layout: Tensor) -> Tensor:
    """The value [N] of images for the average annotator."""
    return layout + TASTE * quality.mean(1)
