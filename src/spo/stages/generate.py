"""Stage `generate`: images of the test prompts by one variant (the base or an aligned model).

Each batch is cached when it is complete, so that a killed stage resumes after the last one.
"""

import shutil
from pathlib import Path

from spo.config import VARIANTS, Params, Variant
from spo.runtime.files import read_text, require
from spo.runtime.fingerprint import resume_folder
from spo.stages.common import of_suite, run_name, stage, write_nothing

OUTPUT, PROMPTS = Path("outputs/images"), Path("outputs/prompts")
# what generates the images
CODE = (
    *("adapters", "backbones", "data/images.py", "data/tokens.py", "diffusion", "types.py"),
    "validation/generation.py",
)


def run(params: Params, name: str, suite: str | None = None) -> None:
    """Write outputs/images/NAME, or outputs/images/suites/SUITE/NAME, for the variant `name`."""
    variant: Variant | None = getattr(params.generate, name)
    title = run_name(name, suite)
    if variant is None:
        with stage("generate", params, title):
            folder = of_suite(OUTPUT, suite) / name
            write_nothing(f"generate {title}", f"generate.{name} is null", [folder], {})
        return
    from spo import adapters
    from spo.training import budget, distributed
    from spo.training.checkpoint import CheckpointStore
    from spo.training.distributed import device
    from spo.validation.generation import draw, each_image, save

    file = _prompts_file(params, suite)
    lines = read_text(file, f"{suite or params.generate.split} prompts").splitlines()
    if not lines:
        raise ValueError(f"{file}: is empty; run `dvc repro prompts`")
    with stage("generate", params, title):
        if variant.adapter is not None:
            require(variant.adapter, f"adapter of {name}")
        backbone = adapters.load(params.backbone, variant.adapter, device(), budget.of(params, "generate"))
        prompts, seeds = each_image(lines, params.generate)
        folder = of_suite(OUTPUT, suite) / name
        scratch = _scratch(params, title, variant, file)
        cache = CheckpointStore(scratch, keep=None)
        save(folder, draw(backbone, params, variant, prompts, seeds, cache), prompts, seeds)
        if distributed.is_main_process():
            shutil.rmtree(scratch, ignore_errors=True)


def _prompts_file(params: Params, suite: str | None) -> Path:
    if suite is None:
        return PROMPTS / f"{params.generate.split}.txt"
    params.generate.check_suite(suite)
    return of_suite(PROMPTS, suite).with_suffix(".txt")


def _scratch(params: Params, title: str, variant: Variant, prompts: Path) -> Path:
    """The cache of batches, named by everything on which the images depend."""
    settings = str(params.generate.model_dump(exclude={*VARIANTS, "suites"}))
    inputs = [prompts, Path("outputs/inputs/base.json")]
    if variant.adapter is not None:
        inputs.append(Path(variant.adapter))
    return resume_folder("generate", (title, params.backbone, variant, settings), inputs, CODE)
