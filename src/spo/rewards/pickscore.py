"""PickScore (arXiv 2305.01569): exp(logit_scale) * cos of a CLIP fine-tuned on Pick-a-Pic."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from spo.rewards.clip import ClipScorer
from spo.rewards.pixels import preprocess

__all__ = ["PickScore", "preprocess"]


class PickScore(ClipScorer):
    """PickScore of images for prompts, about 17 to 24 with the released `yuvalkirstain/PickScore_v1`."""

    name = "pickscore"

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.model.logit_scale.exp() * self.cosine(images, prompts)
