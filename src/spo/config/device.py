"""The section `device`: how work is split to fit a GPU."""

from typing import Annotated, Literal

from pydantic import Field

from spo.config.base import Positive, Section

Auto = Literal["auto"]


class Device(Section):
    """The sizes of calls, and what is offloaded; `auto`: chosen from the GPU's memory (training.budget).

    No key changes a result, so no stage depends on one.
    """

    memory: Annotated[float, Field(gt=0, le=10_000)] | Auto = "auto"  # GiB, as in a GPU's name
    images: Positive | Auto = "auto"  # of a VAE call
    samples: Positive | Auto = "auto"  # latents of a denoiser call without gradient; guidance doubles them
    pairs: Positive | Auto = "auto"  # of a forward with gradient
    checkpointing: bool | Auto = "auto"  # activations are recomputed in the backward pass
    offload: bool | Auto = "auto"  # text encoders, VAE and reward model rest in host memory between uses
