"""CLIPScore (arXiv 2104.08718, Eq. 1): w * max(cos, 0) of a CLIP's image and text embeddings, w = 2.5.

Departures from the published formula:
1. The paper begins each caption with "A photo depicts". Scores of text-to-image models leave that out, as
   torchmetrics does (there w = 100); here it is added only if `prefix` says so.
2. w is `weight` of the section, 2.5 if left out. Tables with CLIP scores of .33 or 33 have w = 1 or 100.
"""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from spo.rewards.clip import ClipScorer


class ClipScore(ClipScorer):
    """CLIPScore of images for prompts, 0 to w; only scores of the same CLIP and weight are comparable."""

    name = "clipscore"

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        prefix = f"{self.settings.prefix.strip()} " if self.settings.prefix else ""
        return self.settings.weight * self.cosine(images, [f"{prefix}{p}" for p in prompts]).clamp(min=0)
