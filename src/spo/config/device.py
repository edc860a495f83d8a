"""The section `device`: how work is cut to fit a card."""

from typing import Annotated, Literal

from pydantic import Field

from spo.config.base import Positive, Section

Auto = Literal["auto"]


class Device(Section):
    """How much a call takes, and what leaves the card meanwhile; `auto`: from its memory (training.budget).

    No key changes a result, so no stage depends on one.
    """

    memory: Annotated[float, Field(gt=0, le=10_000)] | Auto = "auto"  # GiB, as cards are named
    images: Positive | Auto = "auto"  # of a VAE call
    samples: Positive | Auto = "auto"  # latents of a denoiser call without gradient; guidance doubles them
    pairs: Positive | Auto = "auto"  # of a forward with gradient
    checkpointing: bool | Auto = "auto"  # activations are computed again in the backward pass
    offload: bool | Auto = "auto"  # text encoders, VAE and reward model rest in host memory between uses
