"""What a checkpoint weighs and costs, from its config files alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spo import config

TEXT_TOKENS = 77


@dataclass(frozen=True)
class Sizes:
    unet_parameters: int
    vae_parameters: int
    latent_shape: tuple[int, int, int]
    unet_flops: int  # of one sample's forward
    scheduler_config: dict[str, Any]


def measure(settings: config.Backbone) -> Sizes:
    """
    Raises:
        ValueError: a checkpoint, or what describes a single file, that cannot be reached.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    name, how = settings.described_by, {"revision": settings.revision}
    try:
        told = UNet2DConditionModel.load_config(name, subfolder="unet", **how)
        vae = AutoencoderKL.load_config(
            settings.vae or name, **({} if settings.vae else {"subfolder": "vae", **how})
        )
        scheduler = DDIMScheduler.load_config(name, subfolder="scheduler", **how)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ValueError(
            f"backbone: {name} cannot be reached ({reason}); give the folder of a local copy in "
            f"backbone.{'checkpoint' if name == settings.checkpoint else 'config'} (and backbone.vae)"
        ) from None
    with torch.device("meta"):
        unet, decoder = UNet2DConditionModel.from_config(told), AutoencoderKL.from_config(vae)
    side = unet.config.sample_size
    return Sizes(
        _count(unet), _count(decoder), (unet.config.in_channels, side, side), _flops(unet), dict(scheduler)
    )


def lora_parameters(settings: config.Backbone, lora: config.Lora) -> int:
    """Numbers in an adapter: rank * (inputs + outputs) of every target layer."""
    from diffusers import UNet2DConditionModel

    told = UNet2DConditionModel.load_config(
        settings.described_by, subfolder="unet", revision=settings.revision
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(told)
    return sum(
        lora.rank * (layer.in_features + layer.out_features)
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(tuple(f".{t}" for t in lora.target_modules))
    )


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _flops(unet: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    shape, width = unet.config, unet.config.cross_attention_dim
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        x = torch.empty(1, shape.in_channels, shape.sample_size, shape.sample_size)
        added = None
        if shape.addition_embed_type == "text_time":
            pooled = shape.projection_class_embeddings_input_dim - 6 * shape.addition_time_embed_dim
            added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        unet(x, torch.empty(1), torch.empty(1, TEXT_TOKENS, width), added_cond_kwargs=added)
    return counter.get_total_flops()
