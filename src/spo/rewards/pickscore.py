"""PickScore (arXiv 2305.01569): exp(logit_scale) * cos of a CLIP fine-tuned on Pick-a-Pic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from spo import config
from spo.rewards import clip
from spo.rewards.clip import preprocess

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
        self.device, self.batch_size, self.size = device, batch_size, settings.image_size
        self.model = clip.load_model(
            settings.model, settings.revision, settings.image_size, "score.pickscore.model", device
        )
        text: Any = self.model.config.text_config
        if settings.processor is None:
            source = settings.model, settings.revision, text.vocab_size, "score.pickscore.model"
        else:
            source = settings.processor, None, text.vocab_size, "score.pickscore.processor"
        self.tokenizer = clip.load_tokenizer(*source)
        self.length = min(self.tokenizer.model_max_length, text.max_position_embeddings)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Score each image for its own prompt.

        Raises:
            ValueError: another number of prompts than images, or a score that is not finite.
        """
        return clip.in_batches(self._score, images, prompts, name=self.name, batch_size=self.batch_size)

    def _score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = torch.stack([preprocess(image, self.size) for image in images]).to(self.device)
        ids = clip.token_ids(self.tokenizer, prompts, self.length).to(self.device)
        text = self.model.get_text_features(input_ids=ids).pooler_output
        image = clip.image_features(self.model, pixels)
        return self.model.logit_scale.exp() * cosine_similarity(image, text)
