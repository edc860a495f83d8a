"""The scorers of a training's validations: loaded once, in host memory while they do not score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo.config import Params
from spo.rewards.scorer import BatchedScorer
from spo.training import placement
from spo.validation.scoring import load, score_images

if TYPE_CHECKING:
    from spo.rewards.aesthetic import Aesthetic


class Scorers:
    """The scorers of `score`, one at a time on the device."""

    def __init__(self, params: Params, device: str) -> None:
        self.params, self.device = params, device
        self._loaded: dict[str, Any] = {}
        self._models: dict[str, list[tuple[nn.Module, torch.device]]] = {}  # and where they compute

    def score(self, images: list[Any], prompts: list[str]) -> tuple[dict[str, list[float]], Tensor]:
        """Score N images.

        Returns:
            Scores as of `score_images`, and the embeddings [N,D] of the aesthetic scorer's CLIP, which sees
            each image once for both.
        """
        try:
            aesthetic = self._once("aesthetic")
            features = aesthetic.features(images)
            seen = _Seen(aesthetic, images, features)

            def scorer(name: str) -> Any:
                return seen if name == "aesthetic" else self._once(name)

            columns = score_images(self.params, images, prompts, self.device, scorer=scorer)
            return columns, aesthetic.normalised(features)
        finally:
            self._rest()

    def _once(self, name: str) -> Any:
        """The scorer where it computes, loaded if it is not yet; the others leave their device."""
        self._rest()
        if name not in self._loaded:
            self._loaded[name] = load(self.params, name, self.device)
            self._models[name] = [(m, next(m.parameters()).device) for m in _models(self._loaded[name])]
        for model, place in self._models[name]:
            placement.move(model, place)
        return self._loaded[name]

    def _rest(self) -> None:
        for models in self._models.values():
            for model, _ in models:
                placement.move(model, "cpu")


def _models(value: Any) -> Iterator[nn.Module]:
    """The models that a scorer consists of."""
    if isinstance(value, nn.Module):
        yield value
    elif type(value).__module__.startswith("spo."):
        for part in getattr(value, "__dict__", {}).values():
            yield from _models(part)


class _Seen(BatchedScorer):
    """The aesthetic scorer of images that its CLIP has embedded already."""

    name = "aesthetic"

    def __init__(self, scorer: Aesthetic, images: Sequence[Any], features: Tensor) -> None:
        super().__init__(scorer.settings, device=scorer.device, batch_size=scorer.batch_size)
        self.head = scorer.head
        self.features = {id(image): row for image, row in zip(images, features, strict=True)}

    def load(self, settings: Any) -> None:
        """Nothing: the scorer is loaded."""

    def score_batch(self, images: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        return self.head(torch.stack([self.features[id(image)] for image in images]))
