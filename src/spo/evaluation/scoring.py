"""Scores of images by every scorer of the experiment."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spo.config import Params

if TYPE_CHECKING:
    from spo.training.checkpoint import CheckpointStore


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

    done = distributed.broadcast_int(sum(1 for _ in kept.whole()) if kept else 0)
    columns: dict[str, list[float]] = {}
    for state in kept.whole() if kept and distributed.is_main_process() else ():
        columns |= state
    for number, score in enumerate(_scorers(params, device)):
        if number < done:
            continue
        found = score(pictures, prompts)
        if kept and distributed.is_main_process():
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
