"""The scorers of finished images: a new one is a file here, a line below and one in `config.Scorers`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spo.config import ScorerConfig
    from spo.types import Scorer

CLASSES = {
    "pickscore": ("spo.rewards.pickscore", "PickScore"),
    "hps": ("spo.rewards.hps", "Hps"),
    "aesthetic": ("spo.rewards.aesthetic", "Aesthetic"),
    "imagereward": ("spo.rewards.imagereward", "ImageReward"),
    "clipscore": ("spo.rewards.clipscore", "ClipScore"),
}


def load_scorer(name: str, settings: ScorerConfig, device: str, batch_size: int) -> Scorer:
    """Load the scorer `name` with its section; only its own module is imported."""
    module, cls = CLASSES[name]
    scorer: Scorer = getattr(import_module(module), cls)(settings, device=device, batch_size=batch_size)
    return scorer
