"""The CLIPs: PickScore, HPS and aesthetic in their real formats, and their training on labels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from spo.data.images import CLIP_MEAN, CLIP_STD
from tools.scenes.base_model import WIDTH, text_config, to_float, tokens
from tools.scenes.fit import fit
from tools.scenes.render import SIZE

PREFERENCE_STEPS, PREFERENCE_BATCH, PREFERENCE_RATE = 500, 64, 1e-4
LOGIT_SCALE = 8.0  # at the start of the training on preferences

# (images in [-1,1], token ids) -> normalised image features, normalised text features, scale
Features = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs of images uint8 of one caption each, and who won."""

    pixels_0: Tensor  # [N,3,48,48]
    pixels_1: Tensor
    captions: list[str]
    label_0: Tensor  # [N], 1, 0 or .5


def normalise(images: Tensor) -> Tensor:
    return ((images + 1) / 2 - CLIP_MEAN) / CLIP_STD


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        projection_dim=WIDTH,
    )
    text = text_config(len(tokenizer), tokenizer)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def clip_features(model: CLIPModel) -> Features:
    def features(images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = model(pixel_values=normalise(images), input_ids=ids)
        return out.image_embeds, out.text_embeds, model.logit_scale.exp()

    return features


def prefer(
    name: str,
    model: nn.Module,
    features: Features,
    labelled: LabelledPairs,
    tokenizer: CLIPTokenizer,
    work: Path,
    seed: int,
) -> None:
    """Fine-tune a whole CLIP on labelled pairs (cross-entropy of the two scores), in place. A high rate or
    a logit scale of its own loses the quality features of the start CLIP."""
    ids = tokens(tokenizer, labelled.captions)
    logit_scale: Any = model.logit_scale
    logit_scale.data.fill_(math.log(LOGIT_SCALE))

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(ids), (PREFERENCE_BATCH,), generator=generator)
        images = to_float(torch.cat([labelled.pixels_0[index], labelled.pixels_1[index]]))
        image, text, scale = features(images, ids[index])
        score_0, score_1 = (scale * (image * text.repeat(2, 1)).sum(-1)).chunk(2)
        return F.binary_cross_entropy_with_logits(score_0 - score_1, labelled.label_0[index])

    settings: dict[str, Any] = {"steps": PREFERENCE_STEPS, "lr": PREFERENCE_RATE, "warm": 0.06}
    fit(name, model, loss, work=work, seed=seed, weight_decay=0.1, ema=0.98, **settings)


def save_pickscore(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def new_open_clip(tokenizer: CLIPTokenizer) -> tuple[open_clip.CLIP, dict[str, object], Features]:
    """An open_clip model, its config file's content, and its features."""
    vision = {"image_size": SIZE, "patch_size": 8, "width": WIDTH, "layers": 4, "head_width": WIDTH // 4}
    text = {"context_length": tokenizer.model_max_length, "vocab_size": len(tokenizer), "width": WIDTH}
    config = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": {**text, "heads": 4, "layers": 2}}
    model = open_clip.CLIP(**config)

    def features(images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = model.encode_image(normalise(images), normalize=True)
        return image, model.encode_text(ids, normalize=True), model.logit_scale.exp()

    return model, config, features


def save_hps(
    model: open_clip.CLIP, config: dict[str, object], tokenizer: CLIPTokenizer, folder: Path
) -> None:
    """As the released HPSv2 file: the weights under the key `state_dict`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_scenes_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


class RatedClip(nn.Module):
    """A CLIP and the LAION predictor's head on its normalised projected image embedding."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        sizes = (WIDTH, 1024, 128, 64, 16, 1)
        linears = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
        drops = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
        # the released head: dropout after the first three, no activations
        self.layers = nn.Sequential(
            linears[0], drops[0], linears[1], drops[1], linears[2], drops[2], linears[3], linears[4]
        )

    def forward(self, images: Tensor) -> Tensor:
        embedding = self.clip.get_image_features(pixel_values=normalise(images))
        embedding = getattr(embedding, "pooler_output", embedding)
        return self.layers(F.normalize(embedding, dim=-1))[:, 0]


def train_aesthetic(model: RatedClip, pixels: Tensor, ratings: Tensor, work: Path, seed: int) -> None:
    """Regress ratings [N] from 1 to 10, in place."""

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pixels), (64,), generator=generator)
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))  # dropout
        return F.mse_loss(model(to_float(pixels[index])), ratings[index])

    fit("aesthetic", model, loss, steps=700, lr=5e-4, work=work, seed=seed, ema=0.98)


def save_aesthetic(model: RatedClip, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """A CLIP folder, and head.pth with the released file's keys (layers.0, 2, 4, 6, 7)."""
    model.clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(model.layers.state_dict(prefix="layers."), folder / "head.pth")


def fresh_clip(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    torch.manual_seed(seed)
    model = new_clip(tokenizer)
    model.logit_scale.data.fill_(math.log(10))
    return model
