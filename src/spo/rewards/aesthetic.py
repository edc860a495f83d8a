"""LAION's aesthetic predictor v2: a linear head on CLIP's image embedding, independent of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from spo import config
from spo.data import weights
from spo.data.preprocessing import announced
from spo.rewards import clip
from spo.rewards.pixels import preprocess
from spo.rewards.scorer import BatchedScorer
from spo.runtime import hub

__all__ = ["Aesthetic", "AestheticHead", "linear_head", "preprocess"]


def linear_head(dimension: int) -> nn.Sequential:
    """A network D-1024-128-64-16-1 without activations, which ImageReward has too; it trains with dropout."""
    return nn.Sequential(
        nn.Linear(dimension, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


class AestheticHead(nn.Module):
    """The released head, `linear_head` on normalised embeddings."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.layers = linear_head(dimension)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Rate projected CLIP image embeddings [N,D], which are normalised here; [N], about 1 to 10."""
        return self.layers(nn.functional.normalize(embeddings.float(), dim=-1))[:, 0]

    @classmethod
    def load(cls, path: str | Path) -> AestheticHead:
        """Load a head in evaluation mode from a .pth or .safetensors file, which determines D."""
        where = f"aesthetic head {path}"
        state = weights.load_state(Path(path), where)
        weights.check_keys({"layers.0.weight"} - state.keys(), (), where)
        head = cls(state["layers.0.weight"].shape[1])
        weights.fill(head, state, where)
        return head.eval().requires_grad_(False)


class Aesthetic(BatchedScorer):
    """The aesthetic score of images, about 1 to 10 with the released head on OpenAI's ViT-L/14.

    Prompts only name images in errors.
    """

    name = "aesthetic"

    def load(self, settings: config.AestheticConfig) -> None:
        source = settings.clip, settings.revision, self.size, "score.aesthetic.clip"
        self.clip = clip.load_model(*source, self.device)
        self.normalisation = announced(*source)
        self.head = AestheticHead.load(hub.local(settings.head)).to(self.device)
        width, expected = self.clip.config.projection_dim, self.head.layers[0].in_features
        if width != expected:
            raise ValueError(
                f"score.aesthetic.head: {settings.head} takes embeddings of {expected} numbers, "
                f"but {settings.clip} gives {width}; give the CLIP that the head was trained on"
            )

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.head(clip.image_features(self.clip, self.pixels(images)))

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """CLIP's embeddings [N,D] of N images, of which `normalised` and the scores are functions."""
        starts = range(0, len(images), self.batch_size)
        parts = [images[start : start + self.batch_size] for start in starts]
        return torch.cat([clip.image_features(self.clip, self.pixels(part)) for part in parts])

    def normalised(self, features: Tensor) -> Tensor:
        """Normalise embeddings [N,D]; those that are not finite are refused."""
        embeddings = nn.functional.normalize(features.float(), dim=-1)
        if not embeddings.isfinite().all():
            raise ValueError(f"{self.name}: an embedding of its CLIP is not finite; check its weights")
        return embeddings
