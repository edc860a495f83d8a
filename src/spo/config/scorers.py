"""Sections of the scorers of finished images."""

from typing import ClassVar

from spo.config.base import Positive, Rate, Section

Source = tuple[str | None, str | None]  # a path, URL or hub id, and the revision of a hub id


class ScorerConfig(Section):
    """The files of a scorer."""

    # keys that name a path, URL or hub id, each with the key of the hub id's revision, if there is one
    reads: ClassVar[dict[str, str | None]]

    def sources(self) -> dict[str, Source]:
        """The files that it reads, by the key that names them; a path is None if the section has none."""
        return {
            key: (getattr(self, key), getattr(self, revision) if revision else None)
            for key, revision in self.reads.items()
        }


class PickScoreConfig(ScorerConfig):
    """PickScore: a folder or hub id of its CLIP."""

    model: str
    processor: str | None = None  # folder or hub id of the tokenizer; None: that of the model
    revision: str | None = None
    image_size: Positive = 224
    reads = {"model": "revision", "processor": None}


class HpsConfig(ScorerConfig):
    """Human Preference Score v2 or v2.1: an open_clip model."""

    architecture: str  # an open_clip model name, or a model config file (.json)
    checkpoint: str
    tokenizer: str | None = None  # a folder; None: open_clip's default for the architecture
    image_size: Positive = 224
    reads = {"checkpoint": None, "tokenizer": None}

    def sources(self) -> dict[str, Source]:
        own = self.architecture if self.architecture.endswith(".json") else None
        return {**super().sources(), "architecture": (own, None)}


class AestheticConfig(ScorerConfig):
    """LAION's aesthetic predictor: a CLIP (folder or hub id) and the weights of its head."""

    clip: str
    head: str
    revision: str | None = None
    image_size: Positive = 224
    reads = {"clip": "revision", "head": None}


class ImageRewardConfig(ScorerConfig):
    """ImageReward: a BLIP with a reward head, in the released files."""

    checkpoint: str  # ImageReward.pt
    med_config: str  # med_config.json, of the text encoder
    tokenizer: str = "google-bert/bert-base-uncased"  # folder or hub id
    image_size: Positive = 224
    reads = {"checkpoint": None, "med_config": None, "tokenizer": None}


class ClipScoreConfig(ScorerConfig):
    """CLIPScore: weight * max(cos, 0) of any CLIP, a folder or hub id."""

    model: str
    processor: str | None = None  # folder or hub id of the tokenizer; None: that of the model
    revision: str | None = None
    image_size: Positive = 224
    weight: Rate = 2.5  # w of the paper; 1: the cosine itself; 100: torchmetrics
    prefix: str | None = None  # before each prompt; the paper's is "A photo depicts"
    reads = {"model": "revision", "processor": None}


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
