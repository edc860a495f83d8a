"""PickScore (arXiv 2305.01569): exp(logit_scale) * cos of a CLIP fine-tuned on Pick-a-Pic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from spo import config
from spo.rewards import clip
from spo.rewards.clip import preprocess
from spo.rewards.similarity import ClipSimilarity

__all__ = ["PickScore", "preprocess"]


class PickScore:
    """PickScore of images for prompts, about 17 to 24 with the released `yuvalkirstain/PickScore_v1`."""

    name = "pickscore"

    def __init__(
        self, settings: config.PickScoreConfig, *, device: torch.device | str = "cpu", batch_size: int = 32
    ) -> None:
        """
        Raises:
            ValueError: a model or a tokenizer that is missing or does not fit.
        """
        self.batch_size = batch_size
        self.clip = ClipSimilarity(settings, "score.pickscore", device)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Score each image for its own prompt.

        Raises:
            ValueError: another number of prompts than images, or a score that is not finite.
        """
        return clip.in_batches(self._score, images, prompts, name=self.name, batch_size=self.batch_size)

    def _score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.clip.model.logit_scale.exp() * self.clip.cosine(images, prompts)
