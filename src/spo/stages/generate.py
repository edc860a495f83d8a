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
    from spo.data import images

    variant: Variant = getattr(params.generate, item)
    split = params.generate.split
    prompts = require(f"outputs/prompts/{split}.txt", f"{split} prompts").read_text().splitlines()
    with stage("generate", params, item) as tracked:
        if variant.adapter is not None:
            require(variant.adapter, f"adapter of {item}")
        backbone = backbones.load_aligned(params.backbone, variant.adapter, device())
        seeds = [params.generate.seed + i for i in range(len(prompts))]
        folder = OUTPUT / item
        images.save_images(folder, draw(backbone, params, variant, prompts, seeds), prompts, seeds)
        tracked.set_tags({"images": str(folder / "images.zip")})


def draw(
    backbone: Backbone, params: Params, variant: Variant, prompts: list[str], seeds: list[int]
) -> Iterator[Image.Image]:
    """One picture a prompt; its noise belongs to its seed, whatever the batch."""
    from tqdm import tqdm

    from spo.data.images import to_pil
    from spo.diffusion.noise import SampleNoise
    from spo.diffusion.rollout import sample_latents
    from spo.diffusion.schedule import Schedule

    settings = params.generate
    schedule = Schedule.from_config(backbone.scheduler_config, settings.num_inference_steps)
    with tqdm(total=len(prompts), desc="generate", unit="image") as bar:
        for start in range(0, len(prompts), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            noise = SampleNoise(0, seeds[part], backbone.latent_shape, backbone.device)
            with backbone.inference():
                x_0 = sample_latents(backbone, schedule, prompts[part], noise, variant.guidance, settings.eta)
                decoded = backbone.decode(x_0)
            for image in decoded:
                yield to_pil(image)
            bar.update(len(prompts[part]))


def device() -> str:
    """The accelerator of this process if it has one."""
    from accelerate import PartialState

    return str(PartialState().device)
