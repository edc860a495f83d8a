"""Score images by every scorer of the experiment."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spo.config import Params

if TYPE_CHECKING:
    from spo.training.checkpoint import CheckpointStore


def score_images(
    params: Params,
    images: list[Any],
    prompts: list[str],
    device: str,
    cache: CheckpointStore | None = None,
) -> dict[str, list[float]]:
    """Score images by each scorer, with one scorer in memory at a time.

    Args:
        cache: the main process saves the scores of each scorer there; cached scores are not computed again.

    Returns:
        A list of scores by metric.
    """
    from spo.training import distributed

    done = distributed.broadcast_int(sum(1 for _ in cache.whole()) if cache else 0)
    columns: dict[str, list[float]] = {}
    for state in cache.whole() if cache and distributed.is_main_process() else ():
        columns |= state
    for number, score in enumerate(_scorers(params, device)):
        if number < done:
            continue
        scores = score(images, prompts)
        if cache and distributed.is_main_process():
            cache.save(number, scores)
        columns |= scores
    return columns


def score_without_oracle(
    params: Params, images: list[Any], prompts: list[str], device: str
) -> dict[str, list[float]]:
    """Score images by all scorers but the oracle, which chooses nothing."""
    scorers = params.score.model_copy(update={"oracle": None})
    return score_images(params.model_copy(update={"score": scorers}), images, prompts, device)


def _scorers(params: Params, device: str) -> list[Callable[[list[Any], list[str]], dict[str, list[float]]]]:
    """Functions of (images, prompts) that give scores by metric; each loads and releases its model."""
    from functools import partial

    from spo.rewards.aesthetic import Aesthetic
    from spo.rewards.hps import Hps
    from spo.rewards.pickscore import PickScore

    score = params.score

    def reward(kind: Any, settings: Any, images: list[Any], prompts: list[str]) -> dict[str, list[float]]:
        scorer = kind(settings, device=device, batch_size=score.batch_size)
        return {scorer.name: scorer.score(images, prompts)}

    def oracle(images: list[Any], prompts: list[str]) -> dict[str, list[float]]:
        import torch

        from spo.data.images import to_tensor
        from spo.scenes.oracle import Oracle

        assert score.oracle is not None
        return Oracle(score.oracle).score(torch.stack([to_tensor(p) for p in images]), prompts)

    kinds: tuple[tuple[Any, Any], ...] = (
        (PickScore, score.pickscore),
        (Hps, score.hps),
        (Aesthetic, score.aesthetic),
    )
    rewards = [partial(reward, kind, settings) for kind, settings in kinds]
    return [*rewards, oracle] if score.oracle is not None else list(rewards)
