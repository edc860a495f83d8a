"""Sections of the scorers of finished images."""

from __future__ import annotations

from abc import ABC, abstractmethod

from spo.config.base import Positive, Rate, Section

Source = tuple[str | None, str | None]  # a path, URL or hub id, and the revision of a hub id


class ScorerConfig(Section, ABC):
    """The files of a scorer."""

    @abstractmethod
    def sources(self) -> dict[str, Source]:
        """What it reads, by the key that names it; a path is None if the section has none."""


class PickScoreConfig(ScorerConfig):
    """PickScore: a folder or hub id of its CLIP."""

    model: str
    processor: str | None = None  # folder or hub id of the tokenizer; None: that of the model
    revision: str | None = None
    image_size: Positive = 224

    def sources(self) -> dict[str, Source]:
        return {"model": (self.model, self.revision), "processor": (self.processor, None)}


class HpsConfig(ScorerConfig):
    """Human Preference Score v2 or v2.1: an open_clip model."""

    architecture: str  # an open_clip model name, or a model config file (.json)
    checkpoint: str
    tokenizer: str | None = None  # a folder; None: open_clip's default for the architecture
    image_size: Positive = 224

    def sources(self) -> dict[str, Source]:
        own = self.architecture if self.architecture.endswith(".json") else None
        return {
            "checkpoint": (self.checkpoint, None),
            "tokenizer": (self.tokenizer, None),
            "architecture": (own, None),
        }


class AestheticConfig(ScorerConfig):
    """LAION's aesthetic predictor: a CLIP (folder or hub id) and the weights of its head."""

    clip: str
    head: str
    revision: str | None = None
    image_size: Positive = 224

    def sources(self) -> dict[str, Source]:
        return {"clip": (self.clip, self.revision), "head": (self.head, None)}


class ImageRewardConfig(ScorerConfig):
    """ImageReward: a BLIP with a reward head, in the released files."""

    checkpoint: str  # ImageReward.pt
    med_config: str  # med_config.json, of the text encoder
    tokenizer: str = "google-bert/bert-base-uncased"  # folder or hub id
    image_size: Positive = 224

    def sources(self) -> dict[str, Source]:
        names = ("checkpoint", "med_config", "tokenizer")
        return {name: (getattr(self, name), None) for name in names}


class ClipScoreConfig(ScorerConfig):
    """CLIPScore: weight * max(cos, 0) of any CLIP, a folder or hub id."""

    model: str
    processor: str | None = None  # folder or hub id of the tokenizer; None: that of the model
    revision: str | None = None
    image_size: Positive = 224
    weight: Rate = 2.5  # w of the paper; 1: the cosine itself; 100: torchmetrics
    prefix: str | None = None  # before each prompt; the paper's is "A photo depicts"

    def sources(self) -> dict[str, Source]:
        return {"model": (self.model, self.revision), "processor": (self.processor, None)}


class Scorers(Section):
    """The scorers of finished images, by the name of their metric; None: not used."""

    batch_size: Positive = 16  # images
    pickscore: PickScoreConfig | None = None
    hps: HpsConfig | None = None
    aesthetic: AestheticConfig | None = None
    imagereward: ImageRewardConfig | None = None
    clipscore: ClipScoreConfig | None = None

    def configured(self) -> dict[str, ScorerConfig]:
        """The sections of the scorers that are used."""
        return {name: section for name in SCORERS if (section := getattr(self, name)) is not None}


SCORERS = tuple(name for name in Scorers.model_fields if name != "batch_size")
