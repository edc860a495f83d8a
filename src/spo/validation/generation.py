"""Generate images of prompts batch by batch; an interrupted run can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import Generate, Params, Variant

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
    cache: CheckpointStore | None = None,
) -> Iterator[Image.Image]:
    """Generate one image per prompt; its noise depends on its seed, not on the batch.

    Args:
        cache: the main process saves each batch there; cached batches are not generated again.
    """
    from itertools import islice

    from tqdm import tqdm

    from spo.data.images import pack, to_pil, unpack
    from spo.diffusion import finite
    from spo.diffusion.noise import SampleNoise
    from spo.diffusion.rollout import sample_latents
    from spo.training import distributed

    settings = params.generate
    schedule = backbone.schedule(settings.num_inference_steps)

    def batch(part: slice) -> list[Image.Image]:
        noise = SampleNoise(0, seeds[part], backbone.latent_shape, backbone.device)
        with backbone.inference():
            x_0 = sample_latents(backbone, schedule, prompts[part], noise, variant.guidance, settings.eta)
            decoded = backbone.decode(x_0)
            finite.check_finite(finite.DECODER, decoded, prompts[part])
            return [to_pil(image) for image in decoded.cpu()]  # one copy, not one an image

    size = settings.batch_size
    parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
    done = distributed.broadcast(sum(1 for _ in cache.states()) if cache else 0)
    if parts[done:]:
        backbone.remember_prompts(prompts)
    with tqdm(total=len(prompts), desc="generate", unit="image") as bar:
        for state in islice(cache.states(), done) if cache and done else ():
            yield from unpack(state["pixels"])
            bar.update(len(state["pixels"]))
        for number, drawn in enumerate(distributed.map_round_robin(batch, parts[done:]), start=done):
            if cache and distributed.is_main_process():
                cache.save(number, {"pixels": pack(drawn)})
            yield from drawn
            bar.update(len(drawn))


def each_image(prompts: list[str], settings: Generate) -> tuple[list[str], list[int]]:
    """The prompt and the seed of each image: `images_per_prompt` of each prompt, one after the other."""
    repeated = [prompt for prompt in prompts for _ in range(settings.images_per_prompt)]
    return repeated, [settings.seed + i for i in range(len(repeated))]


def save(folder: Path, images: Iterator[Image.Image], prompts: list[str], seeds: list[int]) -> None:
    """Save images from the main process; the other processes only generate their part."""
    from spo.data.images import save_images
    from spo.training import distributed

    if distributed.is_main_process():
        save_images(folder, images, prompts, seeds)
    else:
        for _ in images:
            pass
