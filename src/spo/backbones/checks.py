"""Check that the parts of a loaded pipeline fit each other and are those of a text-to-image DDPM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from spo.backbones.finite import check_finite_weights

# (key of the UNet's config, supported values, meaning of any other value)
UNET = (
    (
        "time_cond_proj_dim",
        (None,),
        "a model distilled to few steps (LCM), with the guidance scale as an input",
    ),
    ("class_embed_type", (None,), "a UNet that takes class labels"),
    ("num_class_embeds", (None,), "a UNet that takes class labels"),
    ("encoder_hid_dim_type", (None,), "a UNet that takes image embeddings"),
    ("addition_embed_type", (None, "text_time"), "a UNet with other additional embeddings"),
)


def check(pipeline: Any, sdxl: bool, where: str) -> None:
    """Check that UNet, VAE, text encoders and tokenizers fit each other, and that all weights are finite.

    Raises:
        ValueError: one line with the part, the key and the expected value.
    """
    _check_latents(pipeline.unet.config, pipeline.vae, where)
    _check_text(pipeline, sdxl, where)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            _check_weights(part, f"{where}: {name}")


def latent_side(sample_size: Any, where: str) -> int:
    """The side of the square latents, from a UNet's `sample_size`: a number, or a list of two equal numbers.

    Raises:
        ValueError: no positive number, or latents that are not square.
    """
    sides = list(sample_size) if isinstance(sample_size, list | tuple) else [sample_size]
    if len(set(sides)) != 1 or type(sides[0]) is not int or sides[0] < 1 or len(sides) > 2:
        raise ValueError(
            f"{where}: unet/config.json: sample_size is {sample_size!r}; give the side of square latents "
            "(64 for SD 1.5, 128 for SDXL)"
        )
    return sides[0]


def check_unet(unet: Mapping[str, Any], sdxl: bool, where: str) -> None:
    """Refuse a UNet whose config announces other inputs or outputs than those of a text-to-image UNet.

    Args:
        unet: the content of its config.json, read before the weights.

    Raises:
        ValueError: the key and the meaning of its value.
    """
    place = f"{where}: unet/config.json"
    for key, known, meaning in UNET:
        if unet.get(key) not in known:
            raise ValueError(f"{place}: {key} {unet[key]!r} announces {meaning}, which is not supported")
    expected = "text_time" if sdxl else None
    if (embeddings := unet.get("addition_embed_type")) != expected:
        raise ValueError(
            f"{place}: addition_embed_type is {embeddings!r}, but must be {expected!r} for the family"
        )
    if unet.get("quantization_config"):
        raise ValueError(
            f"{place}: quantization_config announces quantized weights; give those in fp16, bf16 or fp32"
        )
    channels = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if channels[0] != channels[1]:
        raise ValueError(
            f"{place}: in_channels {channels[0]}, out_channels {channels[1]}: a UNet for inpainting or "
            "editing, or one that predicts variances; give a text-to-image UNet"
        )
    latent_side(unet.get("sample_size"), where)


def _check_latents(unet: Any, vae: Any, where: str) -> None:
    channels = vae.config.latent_channels
    if channels != unet.in_channels:
        raise ValueError(
            f"{where}: the VAE has latent_channels {channels}, but the UNet in_channels {unet.in_channels}"
        )
    place = f"{where}: vae/config.json"
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor")
    if not _is_number(scale) or scale <= 0:
        raise ValueError(f"{place}: scaling_factor is {scale!r}; give a number above 0 (0.18215 for SD 1.5)")
    if shift is not None and not _is_number(shift):
        raise ValueError(f"{place}: shift_factor is {shift!r}; give a number, or null")
    mean, std = (vae.config.get(key) for key in ("latents_mean", "latents_std"))
    if mean is None and std is None:
        return
    for values in (mean, std):
        if (
            not isinstance(values, list | tuple)
            or len(values) != channels
            or not all(map(_is_number, values))
        ):
            raise ValueError(f"{place}: latents_mean and latents_std must both have {channels} numbers")
    if min(std) <= 0:
        raise ValueError(f"{place}: latents_std is {list(std)}; its numbers must be above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_text(pipeline: Any, sdxl: bool, where: str) -> None:
    encoders = [("text_encoder", "tokenizer")] + ([("text_encoder_2", "tokenizer_2")] if sdxl else [])
    width, lengths = 0, []
    for part, tokens in encoders:
        encoder, tokenizer = getattr(pipeline, part), getattr(pipeline, tokens)
        width += encoder.config.hidden_size
        if tokenizer is None or len(tokenizer) > encoder.config.vocab_size:
            count = "none" if tokenizer is None else f"{len(tokenizer)} tokens"
            raise ValueError(
                f"{where}: {tokens} has {count}, but {part} a vocabulary of {encoder.config.vocab_size}"
            )
        if tokenizer.pad_token is None:
            raise ValueError(f"{where}: {tokens}: pad_token is missing; prompts are padded with it")
        if tokenizer.vocab_size <= len(tokenizer.all_special_ids):  # transformers' result without files
            raise ValueError(
                f"{where}: {tokens} has an empty vocabulary; its folder needs tokenizer.json, "
                "or vocab.json and merges.txt"
            )
        length = tokenizer.model_max_length
        if not _is_number(length) or length < 3:
            raise ValueError(
                f"{where}: {tokens}: model_max_length is {length!r}; give a number (77 for CLIP)"
            )
        lengths.append(min(length, encoder.config.max_position_embeddings))
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{where}: tokenizer and tokenizer_2 pad to different lengths {lengths} (model_max_length)"
        )
    unet = pipeline.unet.config
    expected = unet.cross_attention_dim
    if isinstance(expected, int) and expected != width:
        raise ValueError(
            f"{where}: unet/config.json: cross_attention_dim is {expected}, the text encoders give {width}"
        )
    if sdxl:
        pooled = pipeline.text_encoder_2.config.projection_dim
        expected = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        if pooled != expected:
            raise ValueError(
                f"{where}: unet/config.json: projection_class_embeddings_input_dim leaves {expected} numbers "
                f"for the pooled text embedding, but text_encoder_2 gives {pooled} (a refiner?)"
            )


def _check_weights(part: torch.nn.Module, place: str) -> None:
    if missing := [name for name, parameter in part.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{place} lacks tensors: {missing[0]}; damaged, or of another model: get it again")
    check_finite_weights(part, place)
