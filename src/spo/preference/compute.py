"""What the training of a preference model computes."""

from __future__ import annotations

from spo.config import LatentPreference, Preference
from spo.diffusion.denoiser import is_guided
from spo.training.compute import Work


def work(settings: Preference | LatentPreference) -> Work:
    """What the updates of a training compute.

    The step-aware model's CLIP sees what the frozen UNet predicts; the latent reward model runs the down
    path, and back where it is trained.
    """
    samples = 2 * settings.steps * settings.batch_size
    if isinstance(settings, LatentPreference):
        samples *= 1 + is_guided(settings.feature_guidance)
        return Work(down=samples) if settings.trained == "heads" else Work(down_trained=samples)
    unet = samples * (1 + is_guided(settings.guidance)) if settings.noised else 0
    return Work(unet=unet, decoded=samples, judged_trained=samples)


def unet_samples(settings: Preference | LatentPreference) -> int:
    """UNet forwards of one sample in a training; guidance counts twice, a backward pass as two."""
    return work(settings).unet_samples
