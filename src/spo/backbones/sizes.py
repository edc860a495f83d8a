"""The config files of a checkpoint: no weights are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spo import config
from spo.backbones import scheduler
from spo.backbones.parts import settings_of
from spo.runtime import hub
from spo.runtime.messages import first_line


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
