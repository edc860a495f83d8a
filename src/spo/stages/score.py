"""Stage `score`: PickScore, HPS and aesthetic (in scenes, the oracle too) of one variant's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spo.config import Params
from spo.stages.common import METRICS, first_process, require, stage, write_json

OUTPUT = Path("outputs/scores")


def run(params: Params, item: str) -> None:
    import pandas as pd

    from spo.data import images
    from spo.stages.generate import device

    folder = require(Path("outputs/images") / item, f"pictures of {item}")
    with stage("score", params, item) as tracked:
        pictures, prompts, seeds = zip(*images.load_images(folder), strict=True)
        columns = score_images(params, list(pictures), list(prompts), device())
        if not first_process():
            return
        frame = pd.DataFrame({"index": range(len(prompts)), "prompt": prompts, "seed": seeds, **columns})
        OUTPUT.mkdir(parents=True, exist_ok=True)
        frame.to_csv(OUTPUT / f"{item}.csv", index=False, float_format="%.6f")
        means = {name: sum(values) / len(values) for name, values in columns.items()}
        write_json(METRICS / f"score_{item}.json", {k: round(v, 6) for k, v in means.items()})
        tracked.log_metrics(means, step=0)


def score_images(
    params: Params, pictures: list[Any], prompts: list[str], device: str
) -> dict[str, list[float]]:
    """Each scorer's numbers and, where there is one, the oracle's."""
    columns = held_apart(params, pictures, prompts, device)
    if params.score.oracle is not None:
        import torch

        from spo.data.images import to_tensor
        from spo.scenes.oracle import Oracle

        columns |= Oracle(params.score.oracle).score(torch.stack([to_tensor(p) for p in pictures]), prompts)
    return columns


def held_apart(
    params: Params, pictures: list[Any], prompts: list[str], device: str
) -> dict[str, list[float]]:
    """The numbers of the scorers that no method learns from, one scorer in memory at a time."""
    from spo.rewards.aesthetic import Aesthetic
    from spo.rewards.hps import Hps
    from spo.rewards.pickscore import PickScore

    score = params.score
    columns: dict[str, list[float]] = {}
    kinds: tuple[tuple[Any, Any], ...] = (
        (PickScore, score.pickscore),
        (Hps, score.hps),
        (Aesthetic, score.aesthetic),
    )
    for kind, settings in kinds:
        scorer = kind(settings, device=device, batch_size=score.batch_size)
        columns[scorer.name] = scorer.score(pictures, prompts)
    return columns
