"""Score images by every scorer of the experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from spo.config import Params

if TYPE_CHECKING:
    from spo.training.checkpoint import CheckpointStore
    from spo.types import Scorer


def score_images(
    params: Params,
    images: Sequence[Any],
    prompts: Sequence[str],
    device: str,
    cache: CheckpointStore | None = None,
    once: Callable[[str, Callable[[], Any]], Any] = lambda name, load: load(),
) -> dict[str, list[float]]:
    """Score images by each scorer, with one scorer in memory at a time.

    Args:
        images: read a batch at a time by each scorer, so that `data.images.Pictures` are never all in memory.
        cache: the main process saves the scores of each scorer there; cached scores are not computed again.
        once: gives the scorer of a name, which it may have retained, or loads it.

    Returns:
        A list of scores by metric.
    """
    from spo.training import distributed

    done = distributed.broadcast(sum(1 for _ in cache.states()) if cache else 0)
    columns: dict[str, list[float]] = {}
    for state in cache.states() if cache and distributed.is_main_process() else ():
        columns |= state
    for number, score in enumerate(_scorers(params, device, once)):
        if number < done:
            continue
        scores = score(images, prompts)
        if cache and distributed.is_main_process():
            cache.save(number, scores)
        columns |= scores
    return columns


def _shared(scorer: Scorer, images: Sequence[Any], prompts: Sequence[str], size: int) -> list[float]:
    """The scores of all images, of which each process scores every n-th batch: the same for any n."""
    from tqdm import tqdm

    from spo.training import distributed

    if len(images) != len(prompts):
        raise ValueError(f"{scorer.name}: {len(images)} images, but {len(prompts)} prompts")
    parts = [slice(start, start + size) for start in range(0, len(images), size)]
    with tqdm(total=len(images), desc=scorer.name, unit="image") as bar:

        def batch(part: slice) -> list[float]:
            scores = scorer.score(images[part], prompts[part])
            bar.update(len(scores) * distributed.count())
            return scores

        return [value for scores in distributed.map_round_robin(batch, parts) for value in scores]


def _scorers(
    params: Params, device: str, once: Callable[[str, Callable[[], Any]], Any]
) -> list[Callable[[Sequence[Any], Sequence[str]], dict[str, list[float]]]]:
    """Functions of (images, prompts) that give scores by metric; each loads and releases its model."""
    from functools import partial

    from spo.rewards import load_scorer

    score = params.score

    def reward(
        name: str, settings: Any, images: Sequence[Any], prompts: Sequence[str]
    ) -> dict[str, list[float]]:
        scorer = once(name, lambda: load_scorer(name, settings, device, score.batch_size))
        return {name: _shared(scorer, images, prompts, score.batch_size)}

    def oracle(images: Sequence[Any], prompts: Sequence[str]) -> dict[str, list[float]]:
        import torch

        from spo.data.images import to_tensor
        from spo.scenes.oracle import CHUNK, Oracle

        folder = score.oracle
        assert folder is not None
        scorer = once("oracle", lambda: Oracle(folder))
        parts = [slice(start, start + CHUNK) for start in range(0, len(images), CHUNK)]
        scores = [
            scorer.score(torch.stack([to_tensor(image) for image in images[part]]), prompts[part])
            for part in parts
        ]
        return {metric: [value for part in scores for value in part[metric]] for metric in Oracle.metrics}

    rewards = [partial(reward, name, settings) for name, settings in score.configured().items()]
    return [*rewards, oracle] if score.oracle is not None else list(rewards)
