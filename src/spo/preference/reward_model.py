"""A trained preference model as the reward model that scores SPO's candidates.

Departure from the official code:
1. A score may be the mean over moved copies of a picture (`align.spo.views`; 1, as published, is the picture
   alone). Candidates of one step differ by little, and where they meet the borders of a CLIP's patches is
   chance: in scenes the mean over four copies raised the correlation of scores with the annotators' view of
   quality, within the candidates of a step, from .20 to .29 and from .35 to .48 (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.preference.model import StepAwarePreferenceModel, load_tokenizer, token_ids


class ClipRewardModel:
    """A trained model and its tokenizer as a `types.RewardModel`: fp32, no gradients.

    The score is the mean over `views` x `views` copies of a picture, each moved by another part of a patch.
    """

    def __init__(self, model: StepAwarePreferenceModel, tokenizer: Any, views: int = 1) -> None:
        """
        Raises:
            ValueError: `views` is more than a patch has pixels a side; then copies would repeat.
        """
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        patch = model.model.config.vision_config.patch_size
        if views > patch:
            reason = f"{views} is more than a patch of the judge has pixels a side; give {patch} or less"
            raise ValueError(f"align.spo.views: {reason}")
        moves = [math.floor((i + 0.5) * patch / views - patch / 2 + 0.5) for i in range(views)]  # all differ
        self._moves = [(x, y) for x in moves for y in moves]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        ids = token_ids(self.tokenizer, prompts, self.model)
        return self.model.encode_text(ids)

    @torch.no_grad()
    def score_images(self, images: Tensor, text: Tensor, timesteps: Tensor) -> Tensor:
        fitted = self.model.fitted(images)
        views = [_moved(fitted, x, y) for x, y in self._moves]
        return torch.stack([self.model.score_features(view, text, timesteps) for view in views]).mean(0)


def _moved(images: Tensor, x: int, y: int) -> Tensor:
    """Images [B,C,H,W] moved to the left by x and up by y pixels; what was at the border is repeated."""
    height, width = images.shape[-2:]
    reach = max(abs(x), abs(y))
    padded = F.pad(images, (reach,) * 4, mode="replicate") if reach else images
    return padded[..., reach + y : reach + y + height, reach + x : reach + x + width]


def load_reward_model(folder: str | Path, device: torch.device | str, views: int = 1) -> ClipRewardModel:
    """What the stage `preference` wrote; `views` as of ClipRewardModel."""
    model = StepAwarePreferenceModel.from_pretrained(folder).to(device)
    return ClipRewardModel(model, load_tokenizer(str(folder)), views)
