"""Prompts to latents: the plain DDIM sampler."""

from collections.abc import Sequence

from torch import Tensor

from spo.diffusion import ddim, finite
from spo.diffusion.denoiser import GuidedDenoiser
from spo.diffusion.noise import SampleNoise
from spo.types import Backbone, NoiseSchedule


def sample_latents(
    backbone: Backbone,
    schedule: NoiseSchedule,
    prompts: Sequence[str],
    noise: SampleNoise,
    guidance: float,
    eta: float,
) -> Tensor:
    """x_0 latents [B,C,h,w] of B prompts by DDIM over schedule.timesteps, without gradients.

    Args:
        noise: of B samples; the first draw is x_T, each step with eta > 0 takes another.

    Raises:
        NotFiniteError: an intermediate value is NaN or infinite; this is read after the last step.
    """
    assert len(prompts) == len(noise)
    schedule = schedule.to(backbone.device)
    check = finite.FiniteCheck(schedule.timesteps)
    with backbone.inference():
        denoiser = GuidedDenoiser.encode(backbone, prompts, guidance, check)
        x_t = noise.draw()
        for t in schedule.timesteps:
            timesteps = t.expand(len(prompts))
            step = ddim.transition(schedule, denoiser(x_t, timesteps), timesteps, x_t, eta)
            x_t = ddim.sample(step, noise.draw()) if eta > 0 else step.mean
            check.note(finite.LATENTS, x_t, prompts, timesteps)
    check.check()
    return x_t
