"""Stage `generate`: pictures of one variant (the base, or an aligned model) for the test prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import Params, Variant
from spo.stages.common import require, stage

if TYPE_CHECKING:
    from PIL import Image

    from spo.types import Backbone

OUTPUT = Path("outputs/images")


def run(params: Params, item: str) -> None:
    from spo import backbones

    variant: Variant = getattr(params.generate, item)
    split = params.generate.split
    prompts = require(f"outputs/prompts/{split}.txt", f"{split} prompts").read_text().splitlines()
    with stage("generate", params, item) as tracked:
        if variant.adapter is not None:
            require(variant.adapter, f"adapter of {item}")
        backbone = backbones.load_aligned(params.backbone, variant.adapter, device())
        seeds = [params.generate.seed + i for i in range(len(prompts))]
        folder = OUTPUT / item
        save(folder, draw(backbone, params, variant, prompts, seeds), prompts, seeds)
        tracked.set_tags({"images": str(folder / "images.zip")})


def draw(
    backbone: Backbone, params: Params, variant: Variant, prompts: list[str], seeds: list[int]
) -> Iterator[Image.Image]:
    """One picture a prompt; its noise belongs to its seed, whatever the batch."""
    from tqdm import tqdm

    from spo import processes
    from spo.data.images import to_pil
    from spo.diffusion.noise import SampleNoise
    from spo.diffusion.rollout import sample_latents
    from spo.diffusion.schedule import Schedule

    settings = params.generate
    schedule = Schedule.from_config(backbone.scheduler_config, settings.num_inference_steps)

    def batch(part: slice) -> list[Image.Image]:
        noise = SampleNoise(0, seeds[part], backbone.latent_shape, backbone.device)
        with backbone.inference():
            x_0 = sample_latents(backbone, schedule, prompts[part], noise, variant.guidance, settings.eta)
            return [to_pil(image) for image in backbone.decode(x_0)]

    size = settings.batch_size
    parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
    with tqdm(total=len(prompts), desc="generate", unit="image") as bar:
        for drawn in processes.in_turn(batch, parts):
            yield from drawn
            bar.update(len(drawn))


def save(folder: Path, pictures: Iterator[Image.Image], prompts: list[str], seeds: list[int]) -> None:
    """Written by the first process; the others only draw their share."""
    from spo import processes
    from spo.data import images

    if processes.is_first():
        images.save_images(folder, pictures, prompts, seeds)
    else:
        for _ in pictures:
            pass


def device() -> str:
    """The accelerator of this process if it has one."""
    from spo import processes

    return str(processes.state().device)
