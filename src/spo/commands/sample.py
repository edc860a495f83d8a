"""`spo sample`: generate images of one prompt by the base or an aligned model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import VARIANTS, Params
from spo.runtime.files import atomic, require

if TYPE_CHECKING:
    from PIL import Image


def run(
    params: Params,
    prompt: str,
    method: str = "spo",
    seed: int = 0,
    guidance: float | None = None,
    output: Path = Path("sample.png"),
    n: int = 1,
    adapter: Path | None = None,
) -> Path:
    """Write n images side by side, with seeds seed, seed+1, ...; `adapter` replaces the variant's own."""
    from PIL import Image

    from spo import adapters
    from spo.data.prompts import flaw
    from spo.ingest.selection import check_vocabulary
    from spo.training import budget, distributed
    from spo.validation import generation

    if reason := flaw(prompt):
        raise ValueError(f"the prompt has {reason}; it cannot be encoded")
    if method not in VARIANTS:
        raise ValueError(f"--method {method}: unknown variant; known: {', '.join(VARIANTS)}")
    variant = params.generate.variant(method)
    kind = Image.registered_extensions().get(output.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(
            f"--output {output}: {output.suffix or 'no ending'} is no image format; give FILE.png"
        )
    given = {"guidance": guidance, "adapter": None if adapter is None else str(adapter)}
    variant = variant.model_copy(update={name: value for name, value in given.items() if value is not None})
    if params.prompts.vocabulary is not None:
        check_vocabulary([prompt], require(params.prompts.vocabulary, "vocabulary"))
    if variant.adapter is not None:
        require(variant.adapter, f"adapter of {method}")
    backbone = adapters.load(
        params.backbone, variant.adapter, distributed.device(), budget.of(params, "generate")
    )
    seeds = [seed + i for i in range(n)]
    images = list(generation.draw(backbone, params, variant, [prompt] * n, seeds))
    with atomic(output) as partial:
        _side_by_side(images).save(partial, kind)
    return output


def _side_by_side(images: list) -> Image.Image:
    """Images side by side; small ones are enlarged to a side of about 384 pixels for viewing."""
    from PIL import Image

    width, height = images[0].size
    factor = max(1, 384 // max(width, height))
    sheet = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        sheet.paste(image, (i * width, 0))
    return sheet.resize((sheet.width * factor, sheet.height * factor), Image.Resampling.BICUBIC)
