"""CLIPs in transformers' format, and the cosine on which PickScore and CLIPScore rest."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import CLIPModel, CLIPTokenizer

from spo import config
from spo.data import weights
from spo.data.preprocessing import announced
from spo.data.tokens import tokenize
from spo.rewards.scorer import BatchedScorer
from spo.runtime import hub


class ClipScorer(BatchedScorer):
    """A scorer by a frozen CLIP with its tokenizer."""

    def load(self, settings: config.PickScoreConfig | config.ClipScoreConfig) -> None:
        section = f"score.{self.name}"
        model = settings.model, settings.revision
        self.model = load_model(*model, self.size, f"{section}.model", self.device)
        text: Any = self.model.config.text_config
        own = settings.processor is None
        name, revision = model if own else hub.split_revision(str(settings.processor))
        key = f"{section}.model" if own else f"{section}.processor"
        self.tokenizer = load_tokenizer(name, revision, text.vocab_size, key)
        self.normalisation = announced(name, revision, self.size, key)
        self.length = min(self.tokenizer.model_max_length, text.max_position_embeddings)

    def cosine(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Return the cosine [B] of the embeddings of each image and its own prompt.

        No mask is needed: attention is causal, so tokens after the end token do not affect the embedding.
        """
        pixels = self.pixels(images)
        ids = tokenize(self.tokenizer, prompts, self.length).input_ids.to(self.device)
        text = self.model.get_text_features(input_ids=ids).pooler_output
        return cosine_similarity(image_features(self.model, pixels), text)


def image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Embed preprocessed pixels [B,3,h,w]: projected embeddings [B,D], not normalised."""
    return model.get_image_features(pixel_values=pixels).pooler_output


def load_model(
    name: str, revision: str | None, image_size: int, key: str, device: torch.device | str
) -> CLIPModel:
    """Load a frozen fp32 CLIP from a folder or hub id; `key` is the params key that names it."""
    model = weights.load_clip(name, revision, key)
    weights.check_image_size(model.config.vision_config.image_size, image_size, key.rpartition(".")[0])
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(name: str, revision: str | None, vocabulary: int, key: str) -> CLIPTokenizer:
    """Load CLIP's tokenizer for a model with `vocabulary` token embeddings from a folder or hub id."""
    files = "vocab.json, merges.txt or tokenizer.json"
    tokenizer = weights.load_tokenizer(CLIPTokenizer, name, revision, key, files)
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"{key}: {name} has {len(tokenizer)} tokens, but the model's vocabulary {vocabulary}"
        )
    return tokenizer
