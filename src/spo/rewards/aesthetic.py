"""LAION's aesthetic predictor v2: a linear head on CLIP's image embedding, independent of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from spo import config
from spo.data.preprocessing import announced
from spo.rewards import clip
from spo.rewards.clip import preprocess
from spo.rewards.head import linear_head
from spo.runtime import hub

__all__ = ["Aesthetic", "AestheticHead", "preprocess"]


class AestheticHead(nn.Module):
    """A linear network D-1024-128-64-16-1: the released head has no activations."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.layers = linear_head(dimension)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Rate projected CLIP image embeddings [N,D], which are normalised here; [N], about 1 to 10."""
        return self.layers(nn.functional.normalize(embeddings.float(), dim=-1))[:, 0]

    @classmethod
    def load(cls, path: str | Path) -> AestheticHead:
        """Load a head in evaluation mode from a .pth or .safetensors file, which determines D.

        Raises:
            ValueError: no such file, or weights of another model.
        """
        where = f"aesthetic head {path}"
        state = clip.load_state(Path(path), where)
        clip.check_keys({"layers.0.weight"} - state.keys(), (), where)
        head = cls(state["layers.0.weight"].shape[1])
        clip.fill(head, state, where)
        return head.eval().requires_grad_(False)


class Aesthetic:
    """The aesthetic score of images, about 1 to 10 with the released head on OpenAI's ViT-L/14."""

    name = "aesthetic"

    def __init__(
        self, settings: config.AestheticConfig, *, device: torch.device | str = "cpu", batch_size: int = 32
    ) -> None:
        """
        Raises:
            ValueError: a CLIP or a head that is missing, or that do not fit each other.
        """
        self.device, self.batch_size, self.size = device, batch_size, settings.image_size
        self.clip = clip.load_model(
            settings.clip, settings.revision, settings.image_size, "score.aesthetic.clip", device
        )
        self.normalisation = announced(
            settings.clip, settings.revision, settings.image_size, "score.aesthetic.clip"
        )
        self.head = AestheticHead.load(hub.local(settings.head)).to(device)
        width, expected = self.clip.config.projection_dim, self.head.layers[0].in_features
        if width != expected:
            raise ValueError(
                f"score.aesthetic.head: {settings.head} takes embeddings of {expected} numbers, "
                f"but {settings.clip} gives {width}; give the CLIP that the head was trained on"
            )

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Score each image; prompts only name images in errors.

        Raises:
            ValueError: another number of prompts than images, or a score that is not finite.
        """
        return clip.in_batches(self._score, images, prompts, name=self.name, batch_size=self.batch_size)

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed N images: CLIP's normalised embeddings [N,D]; raises as `normalised`."""
        return self.normalised(self.features(images))

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """CLIP's embeddings [N,D] of N images, of which `normalised` and the scores are functions."""
        size = self.batch_size
        return torch.cat(
            [self._features(images[start : start + size]) for start in range(0, len(images), size)]
        )

    def normalised(self, features: Tensor) -> Tensor:
        """
        Raises:
            ValueError: an embedding that is not finite.
        """
        embeddings = nn.functional.normalize(features.float(), dim=-1)
        if not embeddings.isfinite().all():
            raise ValueError(f"{self.name}: an embedding of its CLIP is not finite; check its weights")
        return embeddings

    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = [preprocess(image, self.size, self.normalisation) for image in images]
        return clip.image_features(self.clip, torch.stack(pixels).to(self.device))

    def _score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.head(self._features(images))
