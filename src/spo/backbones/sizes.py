"""Parameters and FLOPs of a checkpoint, from its config files alone: no weights are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from spo import config
from spo.backbones import scheduler
from spo.backbones.checks import latent_side
from spo.backbones.parts import settings_of
from spo.runtime import hub
from spo.runtime.messages import first_line

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
    used = scheduler_config(settings)
    side = latent_side(unet.config.sample_size, "backbone.checkpoint")
    return Sizes(_count(unet), _count(vae), (unet.config.in_channels, side, side), _flops(unet, side), used)


def empty_models(settings: config.Backbone) -> tuple[Any, Any]:
    """Build UNet and VAE from their configs on the meta device, without weights.

    Raises:
        ValueError: config files that cannot be reached.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    how = {"revision": settings.revision}
    unet = unet_config(settings)
    place = {"subfolder": "vae", **how} if settings.vae is None else {}
    name = settings.vae or settings.described_by
    vae = described(settings, "vae/config.json", lambda: AutoencoderKL.load_config(name, **place))
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(unet), AutoencoderKL.from_config(vae)


def scheduler_config(settings: config.Backbone) -> dict[str, Any]:
    """Read scheduler_config.json, with the overrides of params.yaml.

    Raises:
        ValueError: a file that cannot be reached or read.
    """
    from diffusers import DDIMScheduler

    how = {"subfolder": "scheduler", "revision": settings.revision}
    announced = described(
        settings, "scheduler_config.json", lambda: DDIMScheduler.load_config(settings.described_by, **how)
    )
    return {**announced, **scheduler.overridden(settings.scheduler)}


def unet_config(settings: config.Backbone) -> dict[str, Any]:
    """Read the UNet's config.json.

    Raises:
        ValueError: a file that cannot be reached or read.
    """
    from diffusers import UNet2DConditionModel

    place = {"subfolder": "unet", "revision": settings.revision}
    return described(
        settings, "unet/config.json", lambda: UNet2DConditionModel.load_config(settings.described_by, **place)
    )


def described(settings: config.Backbone, file: str, load: Callable[[], Any]) -> dict[str, Any]:
    """Return the content of a config file of the base, by its name in a diffusers folder.

    Raises:
        ValueError: it cannot be reached.
    """
    try:
        hub.check(settings.described_by)
        content = load()
    except (OSError, ValueError) as error:
        if refused := hub.refusal(settings.described_by, error):
            raise ValueError(f"backbone: {settings.described_by}: {refused}") from None
        reason = first_line(error)
        key = "config" if settings.is_single_file else "checkpoint"
        raise ValueError(
            f"backbone: {settings.described_by} cannot be reached ({reason}); give the folder of a local "
            f"copy in backbone.{key} (and backbone.vae)"
        ) from None
    return settings_of(content, f"backbone: {settings.described_by}: {file}")


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
