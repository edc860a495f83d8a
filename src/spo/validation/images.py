"""The images of one validation, their scores and their diversity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from spo.config import Params, Validation, Variant
from spo.runtime.files import require

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from spo.types import Backbone
    from spo.validation.scorers import Scorers

PROMPTS = Path("outputs/prompts/validation.txt")
SEED = 2**20  # of the first image; far from the seeds of `generate`
SIDE, GAP = 144, 4  # pixels, of each image in the row


@dataclass(frozen=True)
class Validated:
    """What one validation measured."""

    scores: dict[str, list[float]]  # of each prompt, a mean over its images, by scorer
    oracle: dict[str, float]  # means, where there is an oracle
    diversity: float
    row: Image.Image  # the first image of each prompt


def sections(params: Params) -> list[Any]:
    """The sections on which the images and their scores depend."""
    return [params.score, params.generate.model_copy(update={"suites": {}, "images_per_prompt": 1})]


def validate(
    backbone: Backbone, params: Params, settings: Validation, method: str, scorers: Scorers
) -> Validated:
    """Generate and score validation images."""
    images, prompts = generate(backbone, params, settings, getattr(params.generate, method).guidance)
    n = settings.images
    scores, embeddings = scorers.score(images, prompts)
    columns = {
        name: [fmean(values[i : i + n]) for i in range(0, len(values), n)] for name, values in scores.items()
    }
    oracle = {name: fmean(columns.pop(name)) for name in list(columns) if name.startswith("oracle_")}
    return Validated(columns, oracle, diversity(embeddings.unflatten(0, (-1, n))), _row(images[::n]))


def generate(
    backbone: Backbone, params: Params, settings: Validation, guidance: float
) -> tuple[list[Image.Image], list[str]]:
    """Generate `settings.images` images of each of the first validation prompts.

    Returns:
        The images, and the prompt of each.
    """
    from spo.validation.generation import draw

    lines = require(PROMPTS, "validation prompts").read_text(encoding="utf-8").splitlines()
    if len(lines) < settings.prompts:
        raise ValueError(
            f"{PROMPTS}: {len(lines)} prompts, fewer than the {settings.prompts} of validation.prompts; "
            "lower it or raise prompts.n_validation"
        )
    prompts = [line for line in lines[: settings.prompts] for _ in range(settings.images)]
    seeds = [SEED + i for i in range(len(prompts))]
    return list(draw(backbone, params, Variant(guidance=guidance), prompts, seeds)), prompts


def diversity(embeddings: Tensor) -> float:
    """The mean of 1 - cos over pairs of images of one prompt; normalised embeddings [prompts,images,D]."""
    images = embeddings.shape[1]
    cosines = (embeddings @ embeddings.transpose(1, 2)).sum((1, 2)) - embeddings.square().sum((1, 2))
    return 1 - float((cosines / (images * (images - 1))).mean())


def _row(images: Sequence[Image.Image]) -> Image.Image:
    """The images side by side."""
    from PIL import Image, ImageOps

    row = Image.new("RGB", (len(images) * (SIDE + GAP) - GAP, SIDE), "white")
    for i, image in enumerate(images):
        row.paste(ImageOps.contain(image.convert("RGB"), (SIDE, SIDE)), (i * (SIDE + GAP), 0))
    return row
