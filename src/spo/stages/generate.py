"""Stage `generate`: pictures of one variant (the base, or an aligned model) for the test prompts.

Each batch is kept as soon as it is drawn, so that a stage that was killed goes on after the last one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import Params, Variant
from spo.runtime.files import require
from spo.runtime.fingerprint import fingerprint
from spo.runtime.workspace import SCRATCH
from spo.stages.common import stage

if TYPE_CHECKING:
    pass

OUTPUT = Path("outputs/images")
CODE = ("backbones", "data/images.py", "diffusion", "evaluation/generation.py", "types.py")  # that draws


def run(params: Params, item: str) -> None:
    from spo import backbones
    from spo.evaluation.generation import draw, save
    from spo.training import distributed
    from spo.training.checkpoint import CheckpointStore
    from spo.training.distributed import device

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
        if distributed.is_main_process():
            shutil.rmtree(scratch, ignore_errors=True)
        tracked.set_tags({"images": str(folder / "images.zip")})


def _scratch(params: Params, variant: Variant) -> Path:
    """Where the batches of these very pictures are kept: named by all that they are made from."""
    settings = params.generate
    drawn = [settings.split, settings.num_inference_steps, settings.eta, settings.seed, settings.batch_size]
    inputs = [Path(f"outputs/prompts/{settings.split}.txt"), Path("outputs/inputs/base.json")]
    if variant.adapter is not None:
        inputs.append(Path(variant.adapter))
    name = fingerprint(
        ("generate", params.backbone, variant, *map(str, drawn)), filter(Path.exists, inputs), CODE
    )
    return SCRATCH / "resume" / f"generate-{name}"
