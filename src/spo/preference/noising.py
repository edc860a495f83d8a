"""The image that the preference model sees of a noisy latent: the one predicted from it in one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spo.diffusion import finite
from spo.diffusion.denoiser import GuidedDenoiser
from spo.diffusion.schedule import Schedule
from spo.types import Backbone, Conditioning


def noised_pair(
    backbone: Backbone,
    schedule: Schedule,
    sides: tuple[Tensor, Tensor],
    timesteps: Tensor,
    noise: Tensor,
    captions: Conditioning,
    guidance: float,
    prompts: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """Both images [B,3,H,W] in [-1,1] of B pairs of latents, with the same noise at the same t (Sec. 4.2).

    x_t = q(x_t | x_0), then x_0 predicted by the backbone with guidance, then decoded.

    Raises:
        ValueError: something on the way is NaN or infinite; `prompts` are the B captions, for that message.
    """
    check, prompts = finite.FiniteCheck(), [*prompts, *prompts]
    count = len(timesteps)
    with backbone.inference():
        x_0 = torch.cat(sides).to(backbone.device)
        t = timesteps.repeat(2)
        check.note(finite.STORED, x_0, prompts)
        check.note_text(captions, prompts[:count])
        x_t = schedule.add_noise(x_0, noise.repeat(2, 1, 1, 1), t)
        output = GuidedDenoiser.of(backbone, captions.repeat(2), guidance)(x_t, t)
        check.note(finite.UNET, output, prompts, t)
        decoded = backbone.decode(schedule.predict_x0(output, t, x_t))
        check.note(finite.DECODER, decoded, prompts, t)
    check.check()
    images = decoded.clamp(-1, 1)
    return images[:count], images[count:]


def clean_pair(
    backbone: Backbone,
    sides: tuple[Tensor, Tensor],
    prompts: Sequence[str] = (),
    timesteps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both images of B pairs without noise; raises as `noised_pair`, with `timesteps` [B] named if given."""
    check, prompts = finite.FiniteCheck(), [*prompts, *prompts]
    with backbone.inference():
        x_0 = torch.cat(sides).to(backbone.device)
        check.note(finite.STORED, x_0, prompts)
        decoded = backbone.decode(x_0)
        at = None if timesteps is None else timesteps.repeat(2)
        check.note(finite.DECODER, decoded, prompts, at)
    check.check()
    images = decoded.clamp(-1, 1)
    return images[: len(sides[0])], images[len(sides[0]) :]
