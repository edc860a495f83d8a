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

    done = distributed.broadcast(sum(1 for _ in cache.states()) if cache else 0)
    columns: dict[str, list[float]] = {}
    for state in cache.states() if cache and distributed.is_main_process() else ():
        columns |= state
    for number, score in enumerate(_scorers(params, device)):
        if number < done:
            continue
        scores = score(images, prompts)
        if cache and distributed.is_main_process():
            cache.save(number, scores)
        columns |= scores
    return columns


def _scorers(params: Params, device: str) -> list[Callable[[list[Any], list[str]], dict[str, list[float]]]]:
    """Functions of (images, prompts) that give scores by metric; each loads and releases its model."""
    from functools import partial

    from spo.rewards import load_scorer

    score = params.score

    def reward(name: str, settings: Any, images: list[Any], prompts: list[str]) -> dict[str, list[float]]:
        return {name: load_scorer(name, settings, device, score.batch_size).score(images, prompts)}

    def oracle(images: list[Any], prompts: list[str]) -> dict[str, list[float]]:
        import torch

        from spo.data.images import to_tensor
        from spo.scenes.oracle import Oracle

        assert score.oracle is not None
        return Oracle(score.oracle).score(torch.stack([to_tensor(p) for p in images]), prompts)

    rewards = [partial(reward, name, settings) for name, settings in score.configured().items()]
    return [*rewards, oracle] if score.oracle is not None else list(rewards)
