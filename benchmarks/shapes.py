"""Models with random weights in the shapes of SD 1.5 and SDXL, or tiny ones of the same classes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
)

from benchmarks.models import SEED, Models
from spo import backbones
from spo.api import load_params
from spo.backbones.stable_diffusion import StableDiffusion
from spo.preference.model import StepAwarePreferenceModel

DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
PROMPTS = ["a large red circle above a small blue star on sand", "a small green ring on slate"]
FAMILIES = {"sd15": "sd", "sdxl": "sdxl"}


@dataclass(frozen=True)
class Shape:
    """Widths of a family's models. `second`: of SDXL's other text encoder, with its layers and heads."""

    unet: dict[str, Any]
    vae: tuple[int, ...]
    text: tuple[int, int, int]  # width, layers, heads
    second: tuple[int, int, int] | None
    scaling: float


SHAPES = {
    "sd15": Shape(
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        (128, 256, 512, 512),
        (768, 12, 12),
        None,
        0.18215,
    ),
    "sdxl": Shape(
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (128, 256, 512, 512),
        (768, 12, 12),
        (1280, 32, 20),
        0.13025,
    ),
}
BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "sample_size": 8,
}
TINY = {
    "sd15": Shape(
        {**BLOCKS, "cross_attention_dim": 32, "attention_head_dim": 8}, (32, 32), (32, 2, 4), None, 0.18215
    ),
    "sdxl": Shape(
        {
            **BLOCKS,
            "cross_attention_dim": 32 + 48,
            "attention_head_dim": (4, 8),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 48 + 6 * 8,
        },
        (32, 32),
        (32, 2, 4),
        (48, 2, 4),
        0.13025,
    ),
}
VIT_H = ((1280, 32, 16, 14, 224), (1024, 24, 16))  # vision: width, layers, heads, patch, side; text
TINY_CLIP = ((32, 2, 4, 8, 16), (32, 2, 4))


def load(
    name: str, words: Any, tiny: bool, device: str, dtype: torch.dtype, small_model: bool = False
) -> Models:
    """A base without an adapter and a preference model of ViT-H/14's shape, with the preset's settings.

    Args:
        name: sd15 or sdxl, of the shape and the preset.
        words: a CLIP tokenizer.
        small_model: a tiny preference model, where it is not used.
    """
    shape = (TINY if tiny else SHAPES)[name]
    params = load_params(name)
    torch.manual_seed(SEED)
    with torch.device(device):
        pipeline = _pipeline(shape, words)
        spm = StepAwarePreferenceModel(_clip(words, *(TINY_CLIP if tiny or small_model else VIT_H)))
    pipeline.to(device=device, dtype=dtype)
    text = backbones.FAMILIES[FAMILIES[name]](pipeline)
    backbone = StableDiffusion(pipeline, text, False, dict(pipeline.scheduler.config))
    spm = spm.to(device).eval().requires_grad_(False)
    return Models(backbone, spm, words, params, PROMPTS)


def _pipeline(shape: Shape, words: Any) -> Any:
    parts: dict[str, Any] = {
        "unet": UNet(**shape.unet),
        "vae": _vae(shape),
        "text_encoder": CLIPTextModel(_text_config(words, *shape.text)),
        "tokenizer": words,
        "scheduler": DDIMScheduler(**DDIM, steps_offset=1, set_alpha_to_one=False),
    }
    if shape.second is None:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**parts)
    second = _text_config(words, *shape.second)
    parts |= {"text_encoder_2": CLIPTextModelWithProjection(second), "tokenizer_2": words}
    return StableDiffusionXLPipeline(**parts)


def _vae(shape: Shape) -> AutoencoderKL:
    count = len(shape.vae)
    return AutoencoderKL(
        block_out_channels=shape.vae,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        layers_per_block=2,
        latent_channels=4,
        sample_size=shape.unet["sample_size"] * 2 ** (count - 1),
        scaling_factor=shape.scaling,
    )


def _text_config(words: Any, width: int, layers: int, heads: int) -> Any:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return CLIPTextConfig(
        vocab_size=49408 if width > 100 else len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=words.model_max_length,
        projection_dim=width,
        **{name: getattr(words, name) for name in names},
    )


def _clip(words: Any, vision: tuple[int, int, int, int, int], text: tuple[int, int, int]) -> Any:
    width, layers, heads, patch, side = vision
    seen = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=side,
    )
    return CLIPModel(
        CLIPConfig(text_config=_text_config(words, *text), vision_config=seen, projection_dim=text[0])
    )


def tokenizer() -> Any:
    """The small world's; no other is at hand without a network."""
    from spo.scenes import world
    from tools.scenes import tokenizer as words

    with tempfile.TemporaryDirectory() as folder:
        return words.save(world.vocabulary(), Path(folder))
