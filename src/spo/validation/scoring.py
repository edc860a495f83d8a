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
    scorer: Callable[[str], Any] | None = None,
) -> dict[str, list[float]]:
    """Score images by each scorer, with one scorer in memory at a time.

    Args:
        images: read a batch at a time by each scorer: `data.images.LazyImages` are never all in memory.
        cache: the main process saves the scores of each scorer there; cached scores are not computed again.
        scorer: returns the scorer of a name, which it may have loaded before; default: `load`.

    Returns:
        A list of scores by metric.
    """
    from spo.training import distributed

    size, scorer = params.score.batch_size, scorer or (lambda name: load(params, name, device))
    done = distributed.broadcast(sum(1 for _ in cache.states()) if cache else 0)
    columns: dict[str, list[float]] = {}
    for state in cache.states() if cache and distributed.is_main_process() else ():
        columns |= state
    names = [*params.score.configured(), *(["oracle"] if params.score.oracle is not None else [])]
    for number, name in enumerate(names[done:], start=done):
        # no variable refers to the scorer, so that it is freed before the next one is loaded
        scores = _scores(name, scorer(name), images, prompts, size)
        if cache and distributed.is_main_process():
            cache.save(number, scores)
        columns |= scores
    return columns


def load(params: Params, name: str, device: str) -> Any:
    """Load a scorer of `score`, or the oracle."""
    settings = getattr(params.score, name)
    if name == "oracle":
        from spo.scenes.oracle import Oracle

        return Oracle(settings)
    from spo.rewards import load_scorer

    return load_scorer(name, settings, device, params.score.batch_size)


def _scores(
    name: str, scorer: Any, images: Sequence[Any], prompts: Sequence[str], size: int
) -> dict[str, list[float]]:
    """Scores by metric, of which the oracle has two."""
    if name != "oracle":
        return {name: _shared(scorer, images, prompts, size)}
    import torch

    from spo.data.images import to_tensor
    from spo.scenes.oracle import CHUNK

    scores: dict[str, list[float]] = {metric: [] for metric in scorer.metrics}
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        found = scorer.score(torch.stack([to_tensor(image) for image in images[part]]), prompts[part])
        for metric, values in scores.items():
            values += found[metric]
    return scores


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
