"""Classifier-free guidance (arXiv 2207.12598): the one guided forward of the package."""

from __future__ import annotations

import torch
from torch import Tensor

from spo.types import Backbone, Conditioning


def is_guided(guidance: float) -> bool:
    """Whether the unconditional prediction takes part: above 1, as in diffusers' pipelines."""
    return guidance > 1


def guided(
    backbone: Backbone,
    x_t: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    guidance: float,
    reference: bool = False,
) -> Tensor:
    """u + guidance * (c - u) [B,C,h,w], in one UNet call on the doubled batch.

    Args:
        unconditional: of the empty prompt, B samples; not needed at guidance 1 and below, which is c alone.
        reference: of the weights before fine-tuning.
    """
    if not is_guided(guidance):
        return backbone.predict(x_t, timesteps, conditioning, reference=reference)
    assert unconditional is not None and len(unconditional) == len(conditioning) == len(x_t)
    both = backbone.predict(
        torch.cat([x_t, x_t]),
        torch.cat([timesteps, timesteps]),
        Conditioning.cat([unconditional, conditioning]),
        reference=reference,
    )
    without, with_prompt = both.chunk(2)
    return without + guidance * (with_prompt - without)
