"""The computation of a preference model's training."""

from spo.config import LatentPreference, Preference
from spo.diffusion.denoiser import is_guided
from spo.training.compute import DOWN_PATH, TRAINED


def unet_samples(settings: Preference | LatentPreference) -> int:
    """UNet forwards of one sample in a training; guidance counts twice, a backward pass as two.

    The step-aware model's CLIP gets the frozen UNet's predictions; the latent reward model runs the down
    path, and its backward pass if it is trained.
    """
    samples = 2 * settings.steps * settings.batch_size
    if not isinstance(settings, LatentPreference):
        return samples * (1 + is_guided(settings.guidance)) if settings.noised else 0
    samples *= 1 + is_guided(settings.feature_guidance)
    return round(samples * DOWN_PATH * (1 if settings.trained == "heads" else TRAINED))
