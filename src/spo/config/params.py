"""All sections of params.yaml together."""

from pathlib import Path
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

    def trains(self, section: str) -> bool:
        """Whether a method is trained with the output of a section: `pairs`, or a preference model."""
        return section in {own.learns_from for own in self.align.trained().values()}

    def wants(self, model: str) -> bool:
        """Whether a preference model (the name of its section) is used, or can be measured on pairs."""
        measured = getattr(self, model).pretrained is not None and self.pairs.source is not None
        return measured or self.trains(model)

    def trains_model(self, model: str) -> bool:
        """Whether a preference model is trained: a method needs it, and no released one is there."""
        return getattr(self, model).pretrained is None and self.trains(model)

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
            if self.score.aesthetic is None:
                raise ValueError(
                    f"align.{method}.validation: needs score.aesthetic, whose CLIP measures diversity; add "
                    "that section, or set validation to null"
                )
        return self

    @model_validator(mode="after")
    def _nothing_null_is_used(self) -> Self:
        """Check that what is set to null is named nowhere."""
        variants = self.generate.variants()
        for name in METHODS:
            sections = {"align": getattr(self.align, name), "generate": variants.get(name)}
            null = [f"{key}.{name}" for key, section in sections.items() if section is None]
            if len(null) == 1:
                raise ValueError(
                    f"{null[0]}: is null, but {'generate' if null[0][0] == 'a' else 'align'}.{name} is not; "
                    f"set both to null to take {name} out, or neither"
                )
        for key, names in (
            ("report.baselines", self.report.baselines),
            ("registry.method", [self.registry.method]),
            ("registry.baseline", [self.registry.baseline]),
        ):
            if null := [name for name in names if name in VARIANTS and name not in variants]:
                raise ValueError(f"{key}: {null[0]!r} is null in generate; take it out, or name another")
        for name, variant in variants.items():
            *folders, last = Path(variant.adapter or "").parts[:3] or [""]
            if folders == ["outputs", "align"] and last in METHODS and last not in variants:
                raise ValueError(
                    f"generate.{name}.adapter: align.{last} is null; set generate.{name} to null"
                )
        return self

    @model_validator(mode="after")
    def _data_for_what_is_trained(self) -> Self:
        """Check that pairs and prompts are null only where nothing is trained on them."""
        trained = {f"align.{name}": own.learns_from for name, own in self.align.trained().items()}
        models = {name: "pairs" for name in PREFERENCE_MODELS if self.trains_model(name)}
        if self.pairs.source is None:
            for user, source in {**models, **trained}.items():
                if source == "pairs":
                    raise ValueError(
                        f"pairs.source: is null, but {user} is trained on pairs; name a source, or set "
                        f"{user}.pretrained to a released model"
                    )
        if self.prompts.train is None or self.prompts.n_train == 0:
            if users := [user for user, source in trained.items() if source != "pairs"]:
                raise ValueError(
                    f"prompts.train, prompts.n_train: {users[0]} is trained on prompts; name a file of them, "
                    "and how many"
                )
        return self

    def _validations(self) -> dict[str, Validation]:
        sections = {name: own.validation for name, own in self.align.trained().items()}
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
        models = {name: getattr(self, name) for name in PREFERENCE_MODELS if self.trains_model(name)}
        shared = {f"{name}.batch_size": own.batch_size for name, own in models.items()}
        for method, section in self.align.trained().items():
            name = "prompts_per_iteration" if isinstance(section, Stepwise) else "batch_size"
            shared[f"align.{method}.{name}"] = getattr(section, name, self.processes)
        for key, size in shared.items():
            if size < self.processes:
                raise ValueError(
                    f"{key}: {size} is less than the {self.processes} of processes; raise it, or use fewer"
                )
        return self
