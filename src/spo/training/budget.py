"""Split work so that it fits the memory of a device (`config.Device`).

What the models and one image, latent or pair take was counted at the real sizes of SD 1.5, SDXL, SD 3.5
medium and FLUX.1 in 16 bits by `spo.estimate`, with a LoRA (docs/gpu.md). Smaller models take less, so that
these budgets fit them too; for larger ones, or fp32, name smaller numbers in the section `device`.
"""

from typing import NamedTuple

import torch

from spo.config import Device, Params
from spo.types import Budget

WHOLE = Budget()  # larger batches are no faster
LEAST = Budget(1, 1, 1, True, True)
FEW = 2  # pairs of a forward; with fewer, checkpointing is faster


class Cost(NamedTuple):
    """GB (1e9 bytes) of a stage in fp16, AdamW's state included."""

    sampled: float  # models while it samples, predicts or encodes
    trained: float  # models and gradients while it trains; the others may rest in host memory
    others: float
    pair: float  # activations of a forward with gradient
    recomputed: float  # the same with `checkpointing`


COUNTED = {"sd": 512, "sdxl": 1024, "sd3": 512, "flux": 512}  # side of the images, in pixels
ANNOUNCED = {"sd": 512, "sdxl": 1024, "sd3": 1024, "flux": 1024}  # by the files
IMAGE = {"sd": 0.4, "sdxl": 1.7, "sd3": 0.45, "flux": 0.45}  # of a VAE call
SAMPLE = {"sd": 0.15, "sdxl": 0.35, "sd3": 0.12, "flux": 0.2}  # of a denoiser call with guidance
# text encoders, which rest while the denoiser or the VAE works; those of transformers do so in any case
RESTING = {"sd": 0.25, "sdxl": 1.6, "sd3": 0.0, "flux": 0.0}
COSTS = {
    "sd": {
        "preference": Cost(17.9, 20.9, 2.2, 2.0, 0.4),
        "latent_preference": Cost(8.0, 8.4, 2.2, 2.2, 0.5),
        "spo": Cost(7.4, 1.8, 5.6, 1.7, 0.6),
        "diffusion_dpo": Cost(2.3, 1.8, 0.4, 1.8, 0.6),
        "lpo": Cost(3.2, 1.8, 1.4, 1.7, 0.6),
        "generate": Cost(2.2, 1.8, 0.4, 0, 0),
    },
    "sdxl": {
        "preference": Cost(22.7, 20.9, 7.0, 2.0, 0.5),
        "latent_preference": Cost(32.0, 37.5, 7.0, 18.0, 4.0),
        "spo": Cost(13.8, 6.6, 7.2, 23.5, 2.4),
        "diffusion_dpo": Cost(8.5, 6.6, 1.8, 12.0, 1.3),
        "lpo": Cost(12.7, 6.6, 6.1, 12.0, 1.3),
        "generate": Cost(7.1, 5.3, 1.8, 0, 0),
    },
    "sd3": {
        "preference": Cost(20.9, 20.9, 5.2, 2.0, 0.5),
        "latent_preference": Cost(28.7, 32.2, 0.2, 7.1, 0.9),
        "spo": Cost(9.6, 5.4, 4.2, 4.7, 0.5),
        "diffusion_dpo": Cost(5.6, 5.4, 0.2, 4.7, 0.5),
        "lpo": Cost(9.2, 5.4, 3.8, 4.7, 0.5),
        "generate": Cost(5.2, 5.0, 0.2, 0, 0),
    },
    "flux": {  # the latent reward model by LoRA: all of its weights would take 160 GB
        "preference": Cost(39.9, 20.9, 24.2, 2.0, 0.5),
        "latent_preference": Cost(20.8, 20.6, 0.2, 24.5, 2.5),
        "spo": Cost(29.0, 24.8, 4.2, 8.2, 0.8),
        "diffusion_dpo": Cost(25.0, 24.8, 0.2, 16.4, 1.5),
        "lpo": Cost(44.8, 24.8, 20.0, 8.2, 0.8),
        "generate": Cost(24.1, 23.9, 0.2, 0, 0),
    },
}


def kind(stage: str, variant: str | None) -> str:
    """The name of a stage's row: for align the method, for preference the section that it trains."""
    if stage == "align":
        return variant or "spo"
    return "latent_preference" if variant == "latent" else stage


def memory(settings: Device) -> float:
    """Bytes to plan for: device.memory, or those of the accelerator.

    Infinite on a CPU, whose memory is not the program's alone.
    """
    if settings.memory != "auto":
        return settings.memory * 2**30
    if not torch.cuda.is_available():
        return float("inf")
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def of(params: Params, kind: str) -> Budget:
    """The budget of a stage, as `kind` names it: what params.device says, the rest from the memory."""
    given = params.device.model_dump(exclude={"memory"})
    base = params.backbone
    found = automatic(base.family, kind, memory(params.device), base.image_size)._asdict()
    return Budget(**{name: found[name] if value == "auto" else value for name, value in given.items()})


def usable(memory: float) -> float:
    """Bytes that tensors may take: 23 GB on a card of 24 GiB (25.8 GB), 71 GB on one of 80 GiB (85.9 GB).

    The allocator's gaps, which grow with what is allocated, cuDNN and the CUDA context need the rest.
    """
    return memory - max(0.1 * memory, 0.2 * memory - 2.5e9)


def automatic(family: str, kind: str, memory: float, pixels: int | None = None) -> Budget:
    """The fastest budget that fits: without checkpointing and offload if FEW pairs fit so.

    Args:
        memory: of the device, in bytes.
        pixels: the side of the images; None: that of the family's files.
    """
    if memory == float("inf"):
        return WHOLE
    area = ((pixels or ANNOUNCED[family]) / COUNTED[family]) ** 2
    room, cost = usable(memory) / 1e9, COSTS[family].get(kind, COSTS[family]["generate"])
    cost = cost._replace(pair=cost.pair * area, recomputed=cost.recomputed * area)
    trained, choice = _training(cost, room)
    left = room - cost.sampled + (RESTING[family] if choice.offload else 0)
    return choice._replace(
        images=_between(left / area / IMAGE[family], WHOLE.images),
        samples=_between(left / area / SAMPLE[family], WHOLE.samples),
        pairs=trained,
    )


def _training(cost: Cost, room: float) -> tuple[int, Budget]:
    """Pairs of a forward, and whether with checkpointing and offload."""
    for checkpointing, offload in ((False, False), (True, False), (True, True)):
        left = room - cost.trained - (0 if offload else cost.others)
        pairs = left / ((cost.recomputed if checkpointing else cost.pair) or 1)
        if pairs >= FEW:
            break
    return _between(pairs, WHOLE.pairs), WHOLE._replace(checkpointing=checkpointing, offload=offload)


def _between(count: float, most: int) -> int:
    return max(1, min(most, int(count)))
