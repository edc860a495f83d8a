"""Classifier-free guidance (arXiv 2207.12598): the one guided forward of the package."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from spo.diffusion import finite
from spo.types import Backbone, Conditioning


def is_guided(guidance: float) -> bool:
    """Whether the unconditional prediction is needed: above 1, as in diffusers' pipelines."""
    return guidance > 1


@dataclass(frozen=True)
class GuidedDenoiser:
    """A backbone's UNet with the text of B prompts and a guidance scale: a function of x_t and t."""

    backbone: Backbone
    conditioning: Conditioning  # B samples
    unconditional: Conditioning | None  # B samples of the empty prompt; None: no guidance
    guidance: float
    prompts: Sequence[str] = ()  # B, for the messages of `check`
    check: finite.FiniteCheck | None = None  # notes the text and all outputs

    @classmethod
    def encode(
        cls,
        backbone: Backbone,
        prompts: Sequence[str],
        guidance: float,
        check: finite.FiniteCheck | None = None,
    ) -> Self:
        """Encode the text of B prompts, and of as many empty ones where guidance needs them."""
        return cls.of(backbone, backbone.encode_prompts(prompts), guidance, prompts, check)

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        conditioning: Conditioning,
        guidance: float,
        prompts: Sequence[str] = (),
        check: finite.FiniteCheck | None = None,
    ) -> Self:
        """As `encode`, for text that is encoded already."""
        conditioning, scale = backbone.guided(conditioning, guidance)
        unconditional = None
        if is_guided(scale):
            empty = backbone.empty_prompt().repeat(len(conditioning))
            unconditional, _ = backbone.guided(empty, guidance)
        if check is not None:
            check.note_text(conditioning, prompts)
            check.note_text(unconditional, [""] * len(conditioning))
        return cls(backbone, conditioning, unconditional, scale, prompts, check)

    def __call__(self, x_t: Tensor, timesteps: Tensor, *, reference: bool = False) -> Tensor:
        """u + guidance * (c - u) [B,C,h,w] at x_t [B,C,h,w], in one UNet call on the doubled batch.

        At guidance 1 and below it is c alone, as in diffusers' pipelines. `reference`: of the weights before
        fine-tuning.
        """
        assert len(self.conditioning) == len(x_t) == len(timesteps)
        output = self._guided(x_t, timesteps, reference)
        if self.check is not None:
            part = finite.REFERENCE if reference else finite.UNET
            self.check.note(part, output.detach(), self.prompts, timesteps)
        return output

    def _guided(self, x_t: Tensor, timesteps: Tensor, reference: bool) -> Tensor:
        if self.unconditional is None:
            return self.backbone.predict(x_t, timesteps, self.conditioning, reference=reference)
        both = self.backbone.predict(
            torch.cat([x_t, x_t]),
            torch.cat([timesteps, timesteps]),
            Conditioning.cat([self.unconditional, self.conditioning]),
            reference=reference,
            copies=2,
        )
        without, with_prompt = both.chunk(2)
        return without + self.guidance * (with_prompt - without)

    def repeat(self, k: int) -> Self:
        """For k copies of the batch, in the order of candidates [K,B,...].flatten(0, 1)."""
        empty = None if self.unconditional is None else self.unconditional.repeat(k)
        return replace(
            self,
            conditioning=self.conditioning.repeat(k),
            unconditional=empty,
            prompts=[*self.prompts] * k,
        )
