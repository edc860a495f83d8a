"""Whether the parts of a loaded pipeline fit each other and are what a text-to-image DDPM needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from spo.backbones.finite import check_finite_weights

# UNet config: (key, values that are supported, what another value announces)
UNET = (
    (
        "time_cond_proj_dim",
        (None,),
        "a model distilled to few steps (LCM), which takes the guidance as an input",
    ),
    ("class_embed_type", (None,), "a UNet that takes class labels"),
    ("num_class_embeds", (None,), "a UNet that takes class labels"),
    ("encoder_hid_dim_type", (None,), "a UNet that takes image embeddings"),
    ("addition_embed_type", (None, "text_time"), "a UNet that takes other embeddings"),
)


def check(pipeline: Any, sdxl: bool, where: str) -> None:
    """Compare the parts with each other.

    Raises:
        ValueError: one line with the part, the key and what would serve.
    """
    _check_latents(pipeline.unet.config, pipeline.vae, where)
    _check_text(pipeline, sdxl, where)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            _check_weights(part, f"{where}: {name}")


def latent_side(sample_size: Any, where: str) -> int:
    """Height and width of the latents, from a UNet's `sample_size`: a number, or a list of two equal ones.

    Raises:
        ValueError: null, or not square.
    """
    sides = list(sample_size) if isinstance(sample_size, list | tuple) else [sample_size]
    if len(set(sides)) != 1 or not isinstance(sides[0], int) or len(sides) > 2:
        raise ValueError(
            f"{where}: unet/config.json: sample_size is {sample_size!r}; give the side of square latents "
            "(64 for SD 1.5, 128 for SDXL)"
        )
    return sides[0]


def check_unet(unet: Mapping[str, Any], sdxl: bool, where: str) -> None:
    """Refuse a UNet whose config announces more inputs or outputs than text-to-image has.

    Args:
        unet: its config.json, read before its weights are.

    Raises:
        ValueError: with the key and what its value means.
    """
    place = f"{where}: unet/config.json"
    for key, known, meaning in UNET:
        if unet.get(key) not in known:
            raise ValueError(f"{place}: {key} {unet[key]!r} announces {meaning}; that is not supported")
    wanted = "text_time" if sdxl else None
    if unet.get("addition_embed_type") != wanted:
        found = unet.get("addition_embed_type")
        raise ValueError(f"{place}: addition_embed_type is {found!r}, must be {wanted!r} for the family")
    if unet.get("quantization_config"):
        raise ValueError(f"{place}: quantization_config announces quantized weights; give the full ones")
    channels = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if channels[0] != channels[1]:
        raise ValueError(
            f"{place}: in_channels {channels[0]}, out_channels {channels[1]}: a UNet for inpainting or "
            "editing, or one that predicts variances; give a text-to-image one"
        )
    latent_side(unet.get("sample_size"), where)


def _check_latents(unet: Any, vae: Any, where: str) -> None:
    channels = vae.config.latent_channels
    if channels != unet.in_channels:
        raise ValueError(
            f"{where}: the VAE has latent_channels {channels}, the UNet in_channels {unet.in_channels}"
        )
    mean, std = (vae.config.get(key) for key in ("latents_mean", "latents_std"))
    if (mean is None) != (std is None) or any(v is not None and len(v) != channels for v in (mean, std)):
        raise ValueError(
            f"{where}: vae/config.json: latents_mean and latents_std must both have {channels} numbers"
        )


def _check_text(pipeline: Any, sdxl: bool, where: str) -> None:
    encoders = [("text_encoder", "tokenizer")] + ([("text_encoder_2", "tokenizer_2")] if sdxl else [])
    width = 0
    for part, tokens in encoders:
        encoder, tokenizer = getattr(pipeline, part), getattr(pipeline, tokens)
        width += encoder.config.hidden_size
        if tokenizer is None or len(tokenizer) > encoder.config.vocab_size:
            count = "none" if tokenizer is None else f"{len(tokenizer)} tokens"
            raise ValueError(
                f"{where}: {tokens} has {count}, {part} a vocabulary of {encoder.config.vocab_size}"
            )
        if tokenizer.pad_token is None:
            raise ValueError(f"{where}: {tokens}: pad_token is missing; prompts are padded with it")
    unet = pipeline.unet.config
    takes = unet.cross_attention_dim
    if isinstance(takes, int) and takes != width:
        raise ValueError(
            f"{where}: unet/config.json: cross_attention_dim is {takes}, the text encoders give {width}"
        )
    if sdxl:
        pooled = pipeline.text_encoder_2.config.projection_dim
        needs = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        if pooled != needs:
            raise ValueError(
                f"{where}: unet/config.json: projection_class_embeddings_input_dim leaves {needs} numbers "
                f"for the pooled text, text_encoder_2 gives {pooled} (a refiner?)"
            )


def _check_weights(part: torch.nn.Module, place: str) -> None:
    if missing := [name for name, parameter in part.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{place} misses tensors: {missing[0]}; fetch it again, or it is of another model")
    check_finite_weights(part, place)
