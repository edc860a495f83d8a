"""`spo sample`: a picture of one prompt by the base model or an aligned one."""

from __future__ import annotations

from pathlib import Path

from spo.config import VARIANTS, Params


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
    """Write n pictures, side by side, at seeds seed, seed+1, ...; `adapter` instead of the method's own.

    Raises:
        ValueError: unknown variant, words outside the vocabulary, or nothing trained yet.
    """
    from spo import backbones
    from spo.data.prompts import check_vocabulary, flaw
    from spo.evaluation import generation
    from spo.runtime.files import require
    from spo.training import distributed

    if reason := flaw(prompt):
        raise ValueError(f"the prompt has {reason}; it cannot be encoded")
    if method not in VARIANTS:
        raise ValueError(f"--method {method}: there are {', '.join(VARIANTS)}")
    variant = getattr(params.generate, method)
    if guidance is not None:
        variant = variant.model_copy(update={"guidance": guidance})
    if adapter is not None:
        variant = variant.model_copy(update={"adapter": str(adapter)})
    if params.prompts.vocabulary is not None:
        check_vocabulary([prompt], require(params.prompts.vocabulary, "vocabulary"))
    if variant.adapter is not None:
        require(variant.adapter, f"adapter of {method}")
    backbone = backbones.load_aligned(params.backbone, variant.adapter, distributed.device())
    seeds = [seed + i for i in range(n)]
    pictures = list(generation.draw(backbone, params, variant, [prompt] * n, seeds))
    _side_by_side(pictures, output)
    return output


def _side_by_side(pictures: list, output: Path) -> None:
    """Small pictures are enlarged to about 384 pixels a side, so that a person can look at them."""
    from PIL import Image

    width, height = pictures[0].size
    factor = max(1, 384 // max(width, height))
    sheet = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * width, 0))
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * factor, sheet.height * factor), Image.Resampling.BICUBIC).save(output)
