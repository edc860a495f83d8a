"""Parameters and FLOPs of a checkpoint, from its config files alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spo import config
from spo.backbones import loading
from spo.backbones.description import describe, latent_side

TEXT_TOKENS = 77


@dataclass(frozen=True)
class Sizes:
    """Sizes and compute of a checkpoint."""

    unet_parameters: int
    vae_parameters: int
    latent_shape: tuple[int, int, int]
    unet_flops: int  # of one sample's forward pass
    scheduler_config: dict[str, Any]


def measure(settings: config.Backbone) -> Sizes:
    """Measure a checkpoint on the meta device.

    Raises:
        ValueError: config files that cannot be reached.
    """
    unet, vae = empty_models(settings)
    used = dict(describe(settings).scheduler_config)
    side = latent_side(unet.config.sample_size)
    return Sizes(_count(unet), _count(vae), (unet.config.in_channels, side, side), _flops(unet, side), used)


def empty_models(settings: config.Backbone) -> tuple[Any, Any]:
    """UNet and VAE of a checkpoint on the meta device."""
    return loading.empty_models(describe(settings))


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _flops(unet: Any, side: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    shape, width = unet.config, unet.config.cross_attention_dim
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        x = torch.empty(1, shape.in_channels, side, side)
        added = None
        if shape.addition_embed_type == "text_time":
            pooled = shape.projection_class_embeddings_input_dim - 6 * shape.addition_time_embed_dim
            added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        unet(x, torch.empty(1), torch.empty(1, TEXT_TOKENS, width), added_cond_kwargs=added)
    return counter.get_total_flops()
