"""CLIPScore (arXiv 2104.08718, Eq. 1): w * max(cos, 0) of a CLIP's image and text embeddings, w = 2.5.

Departures from the published formula:
1. The paper begins each caption with "A photo depicts". Scores of text-to-image models leave that out, as
   torchmetrics does (there w = 100); here it is added only if `prefix` says so.
2. w is `weight` of the section, 2.5 if left out. Tables with CLIP scores of .33 or 33 have w = 1 or 100.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from spo import config
from spo.rewards import clip
from spo.rewards.similarity import ClipSimilarity


class ClipScore:
    """CLIPScore of images for prompts; only scores of the same CLIP and weight are comparable."""

    name = "clipscore"

    def __init__(
        self, settings: config.ClipScoreConfig, *, device: torch.device | str = "cpu", batch_size: int = 32
    ) -> None:
        """
        Raises:
            ValueError: a model or a tokenizer that is missing or does not fit.
        """
        self.batch_size, self.weight = batch_size, settings.weight
        self.prefix = f"{settings.prefix.strip()} " if settings.prefix else ""
        self.clip = ClipSimilarity(settings, "score.clipscore", device)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Score each image for its own prompt: 0 to `weight`.

        Raises:
            ValueError: another number of prompts than images, or a score that is not finite.
        """
        return clip.in_batches(self._score, images, prompts, name=self.name, batch_size=self.batch_size)

    def _score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.weight * self.clip.cosine(images, [f"{self.prefix}{p}" for p in prompts]).clamp(min=0)
