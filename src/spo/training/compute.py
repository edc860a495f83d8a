"""What a stage computes: samples that pass through each model, and their cost in forwards of the UNet."""

from __future__ import annotations

from dataclasses import astuple, dataclass

BACKWARD = 2  # a backward pass in forward passes, as usual
DOWN_PATH = 0.4  # down and mid blocks: .33 of SD 1.5's FLOPs, .43 of SDXL's, .37 of the scenes model's


@dataclass(frozen=True)
class Work:
    """Samples that pass through each model; guidance counts twice. `_trained`: forward and backward."""

    unet: int = 0
    unet_trained: int = 0
    down: int = 0  # the UNet's down path, which judges latents
    down_trained: int = 0
    decoded: int = 0  # images, by the VAE
    judged: int = 0  # images, by the vision tower of the step-aware preference model
    judged_trained: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, count: int) -> Work:
        return Work(*(count * samples for samples in astuple(self)))

    @property
    def unet_samples(self) -> int:
        """The passes through the UNet and its down path as forwards of one sample through the UNet."""
        trained = 1 + BACKWARD
        down = DOWN_PATH * (self.down + trained * self.down_trained)
        return round(self.unet + trained * self.unet_trained + down)
