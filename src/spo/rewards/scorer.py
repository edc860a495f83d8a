"""The base class of all scorers: batches of images, each with its own prompt, and checks of both."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from spo.data.preprocessing import OPENAI, Normalisation
from spo.data.prompts import flaw
from spo.rewards.pixels import preprocess


class BatchedScorer(ABC):
    """Scores images for their prompts, `batch_size` at a time; the section `score.NAME` has its settings."""

    name: str
    normalisation: Normalisation = OPENAI

    def __init__(self, settings: Any, *, device: torch.device | str = "cpu", batch_size: int = 32) -> None:
        self.settings, self.size = settings, settings.image_size
        self.device, self.batch_size = device, batch_size
        self.load(settings)

    @abstractmethod
    def load(self, settings: Any) -> None:
        """Load the files of the section `settings` onto the device."""

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Score N images, each for its own prompt; higher is better."""
        if len(images) != len(prompts):
            raise ValueError(
                f"{self.name}: {len(images)} images, but {len(prompts)} prompts; give one prompt per image"
            )
        for prompt in prompts:
            if reason := flaw(prompt):
                raise ValueError(
                    f"{self.name}: the prompt {ascii(prompt)[:100]} has {reason}; it cannot be encoded"
                )
        scores: list[float] = []
        parts = [slice(start, start + self.batch_size) for start in range(0, len(images), self.batch_size)]
        single = len(parts) == 1  # a caller with many small batches shows a bar of its own
        with tqdm(total=len(images), desc=self.name, unit="image", disable=single) as bar, torch.no_grad():
            for part in parts:
                values = self.score_batch(images[part], prompts[part]).tolist()
                self._check_finite(values, prompts[part])
                scores += values
                bar.update(len(values))
        return scores

    @abstractmethod
    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Score B images without gradients: [B]."""

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the pixels [3,size,size] that the image encoder takes."""
        return preprocess(image, self.size, self.normalisation)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocess B images: [B,3,size,size] on the scorer's device."""
        return torch.stack([self.preprocess(image) for image in images]).to(self.device)

    def _check_finite(self, scores: Sequence[float], prompts: Sequence[str]) -> None:
        for value, prompt in zip(scores, prompts, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"{self.name}: the score for prompt {prompt[:100]!r} is {value}; check its weights"
                )
