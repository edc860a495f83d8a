"""How work is cut to fit the memory of a device (`config.Device`).

What the models and one image, latent or pair take was counted at the real sizes of SD 1.5 and SDXL in fp16 by
`spo.estimate`, with a LoRA (docs/gpu.md). Smaller models take less, so that these budgets fit them too; for
larger ones, or fp32, name smaller numbers in the section `device`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spo.config import Device, Params
from spo.types import Budget

WHOLE = Budget()  # more at once is no faster
LEAST = Budget(1, 1, 1, True, True)


class Cost(NamedTuple):
    """GB (1e9 bytes) of a stage."""

    models: float  # that lie on the device throughout, with gradients and AdamW's state
    resting: float  # the same with `offload`
    pair: float  # of a forward with gradient; 0: the stage trains nothing
    recomputed: float  # the same with `checkpointing`


IMAGE = {"sd": 0.4, "sdxl": 1.65}  # of a VAE call
SAMPLE = {"sd": 0.14, "sdxl": 0.35}  # of a denoiser call with guidance
COSTS = {
    "sd": {
        "generate": Cost(2.2, 1.8, 0, 0),
    },
    "sdxl": {
        "generate": Cost(7.0, 5.3, 0, 0),
    },
}


def kind(stage: str, variant: str | None) -> str:
    """The name of a stage's row: of align its method, of preference the section that it trains."""
    if stage == "align":
        return variant or "spo"
    return "latent_preference" if variant == "latent" else stage


def memory(settings: Device) -> float:
    """Bytes to plan for: params.device.memory, or those of the accelerator; infinite on a CPU, whose memory is
    not the program's alone."""
    if settings.memory != "auto":
        return settings.memory * 1e9
    if not torch.cuda.is_available():
        return float("inf")
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def of(params: Params, kind: str) -> Budget:
    """The budget of a stage, as `kind` names it: what params.device says, the rest from the memory."""
    given = params.device.model_dump(exclude={"memory"})
    found = automatic(params.backbone.family, kind, memory(params.device))._asdict()
    return Budget(**{name: found[name] if value == "auto" else value for name, value in given.items()})


def automatic(family: str, kind: str, memory: float) -> Budget:
    """The fastest budget that fits: without offload and checkpointing if FEW pairs fit so.

    Args:
        memory: in bytes; a share of it is left to the allocator and the libraries.
    """
    if memory == float("inf"):
        return WHOLE
    free = memory / 1e9 - max(2.7, 0.16 * memory / 1e9)
    cost = COSTS[family].get(kind, COSTS[family]["generate"])
    ...
