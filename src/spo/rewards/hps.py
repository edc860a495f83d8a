"""Human Preference Score v2 and v2.1 (arXiv 2306.09341): 100 * cos of an open_clip model."""

import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import get_clean_fn
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, pad
from transformers import CLIPTokenizer

from spo import config
from spo.data import weights
from spo.data.preprocessing import OPENAI, Normalisation, read_normalisation
from spo.data.tokens import tokenize
from spo.rewards import clip
from spo.rewards.pixels import normalise, to_unit
from spo.rewards.scorer import BatchedScorer
from spo.runtime import hub
from spo.runtime.processes import is_main_process


def preprocess(image: Image.Image, size: int = 224, normalisation: Normalisation = OPENAI) -> Tensor:
    """Resize the longest side to `size`, zero-pad to a square and normalise: [3,size,size].

    Like the released scorer, unlike open_clip's transforms: bicubic with antialiasing on the tensor, without
    clamping to [0,1]; padding precedes normalisation, so it is black.
    """
    pixels = to_unit(image)
    scale = size / max(image.size)
    height, width = (max(1, round(side * scale)) for side in pixels.shape[1:])
    pixels = interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    left, top = (size - width) // 2, (size - height) // 2
    return normalise(pad(pixels, (left, size - width - left, top, size - height - top)), normalisation)


class Hps(BatchedScorer):
    """HPS of images for prompts, about 20 to 35 with the released weights; v2 and v2.1 are not comparable."""

    name = "hps"

    def load(self, settings: config.HpsConfig) -> None:
        model_config, self.normalisation = _model_config(settings.architecture)
        _say_activation(settings.architecture)
        self.model = _model(model_config, settings.architecture)
        weights.check_image_size(self.model.visual.image_size[0], self.size, "score.hps")
        where = f"score.hps.checkpoint: {settings.checkpoint}"
        weights.fill(self.model, weights.load_state(hub.local(settings.checkpoint), where), where)
        self.model.eval().requires_grad_(False).to(self.device)
        self.tokenizer = _tokenizer(settings, self.model.vocab_size)

    def preprocess(self, image: Image.Image) -> Tensor:
        return preprocess(image, self.size, self.normalisation)

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        ids = self.tokenizer(list(prompts), self.model.context_length).to(self.device)
        text = self.model.encode_text(ids)
        return 100 * cosine_similarity(self.model.encode_image(self.pixels(images)), text)


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str], length: int) -> Tensor:
    """Token ids [B,length] by another vocabulary, of texts as open_clip reads them, padded with 0 as there.

    It replaces HTML entities and full-width letters.
    """
    clean = get_clean_fn("lower")
    tokens = tokenize(tokenizer, [clean(text) for text in texts], length)
    return tokens.input_ids * tokens.attention_mask


def _model_config(architecture: str) -> tuple[dict[str, Any], Normalisation]:
    """The model config (embed_dim, vision_cfg, text_cfg) of an open_clip model name or a JSON file.

    A file may give mean and std too (`preprocess_cfg`); its resizing is not read, since HPS has its own.
    """
    key = "score.hps.architecture"
    if not architecture.endswith(".json"):
        known = open_clip.get_model_config(architecture) if architecture in open_clip.list_models() else None
        if known is None:
            raise ValueError(f"{key}: {architecture!r} is not a model of open_clip; HPSv2 is a ViT-H-14")
        return known, OPENAI
    content = weights.read_config(Path(architecture), key)
    prepared = content.get("preprocess_cfg", {})
    if not isinstance(prepared, dict):
        raise ValueError(f"{key}: {architecture}: preprocess_cfg must be an object, not {prepared!r}")
    own = read_normalisation(
        prepared.get("mean"), prepared.get("std"), f"{key}: {architecture}: preprocess_cfg"
    )
    return content.get("model_cfg", content), own  # nested in open_clip's files for the hub


@cache
def _say_activation(architecture: str) -> None:
    """Name the activation that is used where open_clip has two for a model: a weights file does not say."""
    plain = architecture.removesuffix("-quickgelu")
    names = {plain: "GELU", f"{plain}-quickgelu": "QuickGELU"}
    if is_main_process() and names.keys() <= set(open_clip.list_models()):
        used = names.pop(architecture)
        ((other, activation),) = names.items()
        print(
            f"spo: score.hps.architecture: {architecture} computes {used}; weights trained with {activation} "
            f"need {other}, and a weights file does not say which",
            file=sys.stderr,
        )


def _model(model_config: dict[str, Any], architecture: str) -> open_clip.CLIP:
    try:
        return open_clip.CLIP(**model_config)
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"score.hps.architecture: {architecture} is not a CLIP config with embed_dim, vision_cfg and "
            f"text_cfg ({error})"
        ) from None


def _tokenizer(settings: config.HpsConfig, vocabulary: int) -> Any:
    """The tokenizer of the folder that the section names, else that of the architecture's name."""
    if settings.tokenizer is not None:
        own = clip.load_tokenizer(settings.tokenizer, None, vocabulary, "score.hps.tokenizer")
        return partial(token_ids, own)
    if settings.architecture.endswith(".json"):
        raise ValueError("score.hps.tokenizer: must name a folder if score.hps.architecture is a file")
    return open_clip.get_tokenizer(settings.architecture)
