"""Stage `generate`: pictures of one variant (the base, or an aligned model) for the test prompts.

Each batch is kept as soon as it is drawn, so that a stage that was killed goes on after the last one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import Params, Variant
from spo.stages.common import SCRATCH, fingerprint, require, stage

if TYPE_CHECKING:
    from PIL import Image

    from spo.checkpoint import CheckpointStore
    from spo.types import Backbone

OUTPUT = Path("outputs/images")


def run(params: Params, item: str) -> None:
    from spo import backbones, processes
    from spo.checkpoint import CheckpointStore

    variant: Variant = getattr(params.generate, item)
    split = params.generate.split
    prompts = require(f"outputs/prompts/{split}.txt", f"{split} prompts").read_text().splitlines()
    if not prompts:
        raise ValueError(f"outputs/prompts/{split}.txt: holds no prompts; run `dvc repro prompts`")
    with stage("generate", params, item) as tracked:
        if variant.adapter is not None:
            require(variant.adapter, f"adapter of {item}")
        backbone = backbones.load_aligned(params.backbone, variant.adapter, device())
        seeds = [params.generate.seed + i for i in range(len(prompts))]
        folder = OUTPUT / item
        scratch = _scratch(params, variant)
        kept = CheckpointStore(scratch, keep=None)
        save(folder, draw(backbone, params, variant, prompts, seeds, kept), prompts, seeds)
        if processes.is_first():
            shutil.rmtree(scratch, ignore_errors=True)
        tracked.set_tags({"images": str(folder / "images.zip")})


def _scratch(params: Params, variant: Variant) -> Path:
    """Where the batches of these very pictures are kept: named by all that they are made from."""
    settings = params.generate
    drawn = [settings.split, settings.num_inference_steps, settings.eta, settings.seed, settings.batch_size]
    inputs = [Path(f"outputs/prompts/{settings.split}.txt"), Path("outputs/inputs/base.json")]
    if variant.adapter is not None:
        inputs.append(Path(variant.adapter))
    name = fingerprint(("generate", params.backbone, variant, *map(str, drawn)), filter(Path.exists, inputs))
    return SCRATCH / "resume" / f"generate-{name}"


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

    from spo import processes
    from spo.data.images import pack, to_pil, unpack
    from spo.diffusion import finite
    from spo.diffusion.noise import SampleNoise
    from spo.diffusion.rollout import sample_latents
    from spo.diffusion.schedule import Schedule

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
    done = processes.of_first(sum(1 for _ in kept.whole()) if kept else 0)
    with tqdm(total=len(prompts), desc="generate", unit="image") as bar:
        for state in islice(kept.whole(), done) if kept and done else ():
            yield from unpack(state["pixels"])
            bar.update(len(state["pixels"]))
        for number, drawn in enumerate(processes.in_turn(batch, parts[done:]), start=done):
            if kept and processes.is_first():
                kept.save(number, {"pixels": pack(drawn)})
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
