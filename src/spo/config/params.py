"""All sections of params.yaml together."""

from typing import Self

from pydantic import model_validator

from spo.config.base import Positive, Section, Seed
from spo.config.data import Pairs, Prompts
from spo.config.device import Device
from spo.config.evaluation import VARIANTS, Generate, Registry, Report, Score
from spo.config.models import Backbone
from spo.config.training import METHODS, Align, LatentPreference, Preference, Stepwise, Validation

PREFERENCE_MODELS = ("preference", "latent_preference")


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
    def _known_names(self) -> Self:
        """Keys that name a method, a variant or a scorer of another section."""
        if self.registry.method not in METHODS:
            raise ValueError(f"registry.method: {self.registry.method!r} is not one of {', '.join(METHODS)}")
        if unknown := [name for name in self.report.baselines if name not in VARIANTS]:
            raise ValueError(
                f"report.baselines: unknown variant {unknown[0]!r}; known: {', '.join(VARIANTS)}"
            )
        for method, validation in self._validations().items():
            used = dict.fromkeys(validation.select or (), "select")
            if validation.max_clipscore_fall is not None:
                used.setdefault("clipscore", "max_clipscore_fall")
            if unused := [name for name in used if name not in self.score.configured()]:
                key = f"align.{method}.validation.{used[unused[0]]}"
                raise ValueError(f"{key}: {unused[0]} has no section in score; add one")
        return self

    def _validations(self) -> dict[str, Validation]:
        sections = {method: getattr(self.align, method).validation for method in METHODS}
        return {method: section for method, section in sections.items() if section is not None}

    @model_validator(mode="after")
    def _enough_validation_prompts(self) -> Self:
        used = {f"{name}.local_prompts": getattr(self, name).local_prompts for name in PREFERENCE_MODELS}
        used |= {f"align.{name}.validation.prompts": v.prompts for name, v in self._validations().items()}
        for key, count in used.items():
            if count > self.prompts.n_validation:
                raise ValueError(
                    f"{key}: {count} is more than the {self.prompts.n_validation} of prompts.n_validation; "
                    "lower it, or raise prompts.n_validation"
                )
        return self

    @model_validator(mode="after")
    def _work_for_every_process(self) -> Self:
        """Check that each process gets a share of every update and every rollout."""
        shared = {f"{name}.batch_size": getattr(self, name).batch_size for name in PREFERENCE_MODELS}
        for method in METHODS:
            section = getattr(self.align, method)
            name = "prompts_per_iteration" if isinstance(section, Stepwise) else "batch_size"
            shared[f"align.{method}.{name}"] = getattr(section, name, self.processes)
        for key, size in shared.items():
            if size < self.processes:
                raise ValueError(
                    f"{key}: {size} is less than the {self.processes} of processes; raise it, or use fewer"
                )
        return self
