"""Stage `score`: PickScore, HPS and aesthetic (in scenes, the oracle too) of one variant's pictures.

Each scorer's numbers are kept as soon as they are there, so that a stage that was killed goes on after them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import Params
from spo.stages.common import METRICS, SCRATCH, fingerprint, first_process, require, stage, write_json

if TYPE_CHECKING:
    from spo.training.checkpoint import CheckpointStore

OUTPUT = Path("outputs/scores")


def run(params: Params, item: str) -> None:
    import pandas as pd

    from spo.data import images
    from spo.stages.generate import device
    from spo.training.checkpoint import CheckpointStore

    folder = require(Path("outputs/images") / item, f"pictures of {item}")
    with stage("score", params, item) as tracked:
        pictures, prompts, seeds = zip(*images.load_images(folder), strict=True)
        scratch = _scratch(params, folder)
        kept = CheckpointStore(scratch, keep=None)
        columns = score_images(params, list(pictures), list(prompts), device(), kept)
        if not first_process():
            return
        frame = pd.DataFrame({"index": range(len(prompts)), "prompt": prompts, "seed": seeds, **columns})
        OUTPUT.mkdir(parents=True, exist_ok=True)
        frame.to_csv(OUTPUT / f"{item}.csv", index=False, float_format="%.6f")
        means = {name: sum(values) / len(values) for name, values in columns.items()}
        write_json(METRICS / f"score_{item}.json", {k: round(v, 6) for k, v in means.items()})
        tracked.log_metrics(means, step=0)
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(params: Params, folder: Path) -> Path:
    """Where the numbers of these very pictures are kept: named by all that they are made from."""
    roles = ("pickscore", "hps", "aesthetic", "oracle")
    inputs = [folder, *(path for role in roles if (path := Path(f"outputs/inputs/{role}.json")).exists())]
    return SCRATCH / "resume" / f"score-{fingerprint(('score', params.score), inputs)}"


def score_images(
    params: Params,
    pictures: list[Any],
    prompts: list[str],
    device: str,
    kept: CheckpointStore | None = None,
) -> dict[str, list[float]]:
    """Each scorer's numbers, one scorer in memory at a time.

    Args:
        kept: each scorer's are saved there by the first process, and those that are there are not made again.
    """
    from spo.training import distributed

    done = distributed.of_first(sum(1 for _ in kept.whole()) if kept else 0)
    columns: dict[str, list[float]] = {}
    for state in kept.whole() if kept and distributed.is_first() else ():
        columns |= state
    for number, score in enumerate(_scorers(params, device)):
        if number < done:
            continue
        found = score(pictures, prompts)
        if kept and distributed.is_first():
            kept.save(number, found)
        columns |= found
    return columns


def held_apart(
    params: Params, pictures: list[Any], prompts: list[str], device: str
) -> dict[str, list[float]]:
    """The numbers of the scorers alone, without the oracle's."""
    score = params.score
    alone = score.model_copy(update={"oracle": None})
    return score_images(params.model_copy(update={"score": alone}), pictures, prompts, device)


def _scorers(params: Params, device: str) -> list[Callable[[list[Any], list[str]], dict[str, list[float]]]]:
    """(pictures, prompts) to named numbers; each loads its model when it is called, and lets it go."""
    from functools import partial

    from spo.rewards.aesthetic import Aesthetic
    from spo.rewards.hps import Hps
    from spo.rewards.pickscore import PickScore

    score = params.score

    def reward(kind: Any, settings: Any, pictures: list[Any], prompts: list[str]) -> dict[str, list[float]]:
        scorer = kind(settings, device=device, batch_size=score.batch_size)
        return {scorer.name: scorer.score(pictures, prompts)}

    def oracle(pictures: list[Any], prompts: list[str]) -> dict[str, list[float]]:
        import torch

        from spo.data.images import to_tensor
        from spo.scenes.oracle import Oracle

        assert score.oracle is not None
        return Oracle(score.oracle).score(torch.stack([to_tensor(p) for p in pictures]), prompts)

    kinds: tuple[tuple[Any, Any], ...] = (
        (PickScore, score.pickscore),
        (Hps, score.hps),
        (Aesthetic, score.aesthetic),
    )
    rewards = [partial(reward, kind, settings) for kind, settings in kinds]
    return [*rewards, oracle] if score.oracle is not None else list(rewards)
