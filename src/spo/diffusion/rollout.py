"""Prompts to latents: the plain DDIM sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from spo.diffusion import ddim, finite
from spo.diffusion.denoiser import GuidedDenoiser
from spo.diffusion.noise import SampleNoise
from spo.diffusion.schedule import Schedule
from spo.types import Backbone


def sample_latents(
    backbone: Backbone,
    schedule: Schedule,
    prompts: Sequence[str],
    noise: SampleNoise,
    guidance: float,
    eta: float,
    on_step: Callable[[int, ddim.Transition, Tensor], None] | None = None,
) -> Tensor:
    """x_0 latents [B,C,h,w] of B prompts by DDIM over schedule.timesteps, without gradients.

    Args:
        noise: of B samples; the first draw is x_T, each step with eta > 0 takes another.
        on_step: called after step i with (i, the transition, the x_{t-1} drawn from it).

    Raises:
        ValueError: something on the way is NaN or infinite; looked at after the last step.
    """
    assert len(prompts) == len(noise)
    schedule = schedule.to(backbone.device)
    check = finite.FiniteCheck(schedule.timesteps)
    with backbone.inference():
        denoiser = GuidedDenoiser.encode(backbone, prompts, guidance)
        check.note_text(denoiser.conditioning, prompts)
        check.note_text(denoiser.unconditional, [""] * len(prompts))
        x_t = noise.draw()
        for i, t in enumerate(schedule.timesteps):
            timesteps = t.expand(len(prompts))
            output = denoiser(x_t, timesteps)
            check.note(finite.UNET, output, prompts, timesteps)
            step = ddim.transition(schedule, output, timesteps, x_t, eta)
            x_t = ddim.sample(step, noise.draw()) if eta > 0 else step.mean
            check.note(finite.LATENTS, x_t, prompts, timesteps)
            if on_step is not None:
                on_step(i, step, x_t)
    check.check()
    return x_t
