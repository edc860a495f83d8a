"""The cosine of image and text embeddings of a CLIP, on which PickScore and CLIPScore rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from spo import config
from spo.data.preprocessing import announced
from spo.rewards import clip
from spo.runtime.hub import split_revision


class ClipSimilarity:
    """A frozen CLIP with its tokenizer."""

    def __init__(
        self,
        settings: config.PickScoreConfig | config.ClipScoreConfig,
        key: str,
        device: torch.device | str,
    ) -> None:
        """
        Args:
            key: the section of params.yaml, for messages.

        Raises:
            ValueError: a model or a tokenizer that is missing or does not fit.
        """
        self.device, self.size = device, settings.image_size
        self.model = clip.load_model(
            settings.model, settings.revision, settings.image_size, f"{key}.model", device
        )
        text: Any = self.model.config.text_config
        if settings.processor is None:
            source = settings.model, settings.revision, text.vocab_size, f"{key}.model"
        else:
            source = *split_revision(settings.processor), text.vocab_size, f"{key}.processor"
        self.tokenizer = clip.load_tokenizer(*source)
        name, revision, _, named_by = source
        self.normalisation = announced(name, revision, settings.image_size, named_by)
        self.length = min(self.tokenizer.model_max_length, text.max_position_embeddings)

    def preprocess(self, image: Image.Image) -> Tensor:
        return clip.preprocess(image, self.size, self.normalisation)

    def cosine(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """The cosine [B] of each image and its own prompt."""
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        ids = clip.token_ids(self.tokenizer, prompts, self.length).to(self.device)
        text = self.model.get_text_features(input_ids=ids).pooler_output
        return cosine_similarity(clip.image_features(self.model, pixels), text)
