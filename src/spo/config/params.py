"""All sections of params.yaml together."""

from __future__ import annotations

from pydantic import model_validator

from spo.config.base import Positive, Section, Seed
from spo.config.data import Pairs, Prompts
from spo.config.device import Device
from spo.config.evaluation import Generate, Registry, Report, Score
from spo.config.models import Backbone
from spo.config.training import METHODS, Align, LatentPreference, Preference


class Params(Section):
    """An experiment."""

    name: str
    seed: Seed = 0
    processes: Positive = 1  # of each training, generation and scoring stage; one per GPU
    device: Device = Device()
    tracking: str | None = None  # MLflow's URI; None: MLFLOW_TRACKING_URI, else SQLite in the repository
    backbone: Backbone
    prompts: Prompts
    pairs: Pairs
    preference: Preference
    latent_preference: LatentPreference
    align: Align
    generate: Generate
    score: Score
    report: Report
    registry: Registry = Registry()

    @model_validator(mode="after")
    def _registered_method(self) -> Params:
        if self.registry.method not in METHODS:
            raise ValueError(f"registry.method: there are {', '.join(METHODS)}, not {self.registry.method}")
        return self

    @model_validator(mode="after")
    def _selecting_scorers(self) -> Params:
        for method in METHODS:
            validation = getattr(self.align, method).validation
            selecting = (validation.select if validation else None) or ()
            if unused := [name for name in selecting if name not in self.score.configured()]:
                raise ValueError(
                    f"align.{method}.validation.select: {unused[0]} has no section in score; add one"
                )
        return self
