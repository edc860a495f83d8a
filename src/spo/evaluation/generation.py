"""Images of prompts by a model: drawn batch by batch, resumable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import Params, Variant

if TYPE_CHECKING:
    from PIL import Image

    from spo.training.checkpoint import CheckpointStore
    from spo.types import Backbone


def draw(
    backbone: Backbone,
    params: Params,
    variant: Variant,
    prompts: list[str],
    seeds: list[int],
    kept: CheckpointStore | None = None,
) -> Iterator[Image.Image]:
    """One picture a prompt; its noise belongs to its seed, whatever the batch.

    Args:
        kept: each batch is saved there by the first process, and those that are there are not drawn again.
    """
    from itertools import islice

    from tqdm import tqdm

    from spo.data.images import pack, to_pil, unpack
    from spo.diffusion import finite
    from spo.diffusion.noise import SampleNoise
    from spo.diffusion.rollout import sample_latents
    from spo.diffusion.schedule import Schedule
    from spo.training import distributed

    settings = params.generate
    schedule = Schedule.from_config(backbone.scheduler_config, settings.num_inference_steps)

    def batch(part: slice) -> list[Image.Image]:
        noise = SampleNoise(0, seeds[part], backbone.latent_shape, backbone.device)
        with backbone.inference():
            x_0 = sample_latents(backbone, schedule, prompts[part], noise, variant.guidance, settings.eta)
            decoded = backbone.decode(x_0)
            finite.check_finite(finite.DECODER, decoded, prompts[part])
            return [to_pil(image) for image in decoded]

    size = settings.batch_size
    parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
    done = distributed.broadcast_int(sum(1 for _ in kept.whole()) if kept else 0)
    with tqdm(total=len(prompts), desc="generate", unit="image") as bar:
        for state in islice(kept.whole(), done) if kept and done else ():
            yield from unpack(state["pixels"])
            bar.update(len(state["pixels"]))
        for number, drawn in enumerate(distributed.map_round_robin(batch, parts[done:]), start=done):
            if kept and distributed.is_main_process():
                kept.save(number, {"pixels": pack(drawn)})
            yield from drawn
            bar.update(len(drawn))


def save(folder: Path, pictures: Iterator[Image.Image], prompts: list[str], seeds: list[int]) -> None:
    """Written by the first process; the others only draw their share."""
    from spo.data import images
    from spo.training import distributed

    if distributed.is_main_process():
        images.save_images(folder, pictures, prompts, seeds)
    else:
        for _ in pictures:
            pass
