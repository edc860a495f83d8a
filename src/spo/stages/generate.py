"""Stage `generate`: images of the test prompts by one variant (the base or an aligned model).

Each batch is cached when it is complete, so that a killed stage resumes after the last one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from spo.config import Params, Variant
from spo.runtime.files import require
from spo.runtime.fingerprint import fingerprint
from spo.runtime.workspace import SCRATCH
from spo.stages.common import stage

OUTPUT = Path("outputs/images")
# what generates the images
CODE = ("backbones", "data/images.py", "diffusion", "evaluation/generation.py", "types.py")


def run(params: Params, name: str) -> None:
    """Write outputs/images/NAME for the variant `name`."""
    from spo import backbones
    from spo.evaluation.generation import draw, save
    from spo.training import distributed
    from spo.training.checkpoint import CheckpointStore
    from spo.training.distributed import device

    variant: Variant = getattr(params.generate, name)
    split = params.generate.split
    prompts = require(f"outputs/prompts/{split}.txt", f"{split} prompts").read_text().splitlines()
    if not prompts:
        raise ValueError(f"outputs/prompts/{split}.txt: is empty; run `dvc repro prompts`")
    with stage("generate", params, name) as tracked:
        if variant.adapter is not None:
            require(variant.adapter, f"adapter of {name}")
        backbone = backbones.load_aligned(params.backbone, variant.adapter, device())
        seeds = [params.generate.seed + i for i in range(len(prompts))]
        folder = OUTPUT / name
        scratch = _scratch(params, variant)
        cache = CheckpointStore(scratch, keep=None)
        save(folder, draw(backbone, params, variant, prompts, seeds, cache), prompts, seeds)
        if distributed.is_main_process():
            shutil.rmtree(scratch, ignore_errors=True)
        tracked.set_tags({"images": str(folder / "images.zip")})


def _scratch(params: Params, variant: Variant) -> Path:
    """The cache of batches, named by a fingerprint of everything on which the images depend."""
    settings = params.generate
    sampling = [
        settings.split,
        settings.num_inference_steps,
        settings.eta,
        settings.seed,
        settings.batch_size,
    ]
    inputs = [Path(f"outputs/prompts/{settings.split}.txt"), Path("outputs/inputs/base.json")]
    if variant.adapter is not None:
        inputs.append(Path(variant.adapter))
    name = fingerprint(
        ("generate", params.backbone, variant, *map(str, sampling)), filter(Path.exists, inputs), CODE
    )
    return SCRATCH / "resume" / f"generate-{name}"
