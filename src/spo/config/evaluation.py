"""Sections of evaluation: generated images, scores, the report and the registry."""

from typing import Annotated, Literal

from pydantic import Field

from spo.config.base import Amount, Eta, Guidance, Positive, Section, Seed, Several
from spo.config.scorers import AestheticConfig, HpsConfig, PickScoreConfig, Scorers


class Variant(Section):
    """One model of the comparison: an adapter (or none) and a guidance scale."""

    adapter: str | None = None  # a LoRA, a UNet, or a complete pipeline
    guidance: Guidance


class Generate(Section):
    """Images of the evaluation prompts, and the variants that generate them."""

    split: Literal["test", "validation"] = "test"  # validation: for tuning
    num_inference_steps: Positive = 20
    eta: Eta = 1.0
    seed: Seed = 0
    batch_size: Positive = 16
    images_per_prompt: Positive = 1  # each from a seed of its own; scores are compared by their mean
    # more lists of prompts by name, as `prompts.evaluation`; each has its own images, scores and comparisons
    suites: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], str] = {}
    base: Variant
    # None: not in the experiment
    base_high_guidance: Variant | None
    spo: Variant | None
    diffusion_dpo: Variant | None
    diffusion_dpo_high_guidance: Variant | None
    lpo: Variant | None

    def variants(self) -> dict[str, Variant]:
        """The variants of the experiment by name."""
        return {name: own for name in VARIANTS if (own := getattr(self, name)) is not None}

    def variant(self, name: str) -> Variant:
        """A variant that must be there."""
        own: Variant | None = getattr(self, name)
        if own is None:
            raise ValueError(f"generate.{name}: is null, so there is no such variant; give it a section")
        return own

    def check_suite(self, name: str) -> None:
        if name not in self.suites:
            known = ", ".join(self.suites) or "none"
            raise ValueError(f"generate.suites: no suite {name!r}; known: {known}; add it to params.yaml")


class Score(Scorers):
    """The scorers of generated images; PickScore and HPS are required."""

    batch_size: Positive = 32
    pickscore: PickScoreConfig
    hps: HpsConfig
    aesthetic: AestheticConfig | None
    oracle: str | None = None  # folder of the oracle; only the scenes world has ground truth


class Report(Section):
    """The statistics and the image grid of the report."""

    baselines: Annotated[Several[str], Field(min_length=1)] = (
        "base",
        "base_high_guidance",
        "diffusion_dpo",
        "lpo",
    )
    bootstrap_samples: Annotated[int, Field(ge=40, le=1_000_000)] = 10_000  # 40: for the quantile .025
    grid_prompts: Positive = 8


class Registry(Section):
    """The model registered in MLflow, and the gate to its alias `champion`.

    Bounds are of the 95 % interval of the mean paired difference to the champion (to the baseline while
    there is no champion), in the units of the score.
    """

    name: str | None = None  # of the registered model; None: the experiment's name
    method: str = "spo"  # one of `align`
    baseline: str = "base"
    min_prompts: Annotated[Positive, Field(ge=2)] = 20  # fewer give no interval, no `better` and no champion
    improves: Several[str] = ("pickscore",)  # superiority: the lower bound must exceed 0
    holds: dict[str, Amount] = {  # non-inferiority: it must not be below -x
        "hps": 0.5,
        "aesthetic": 0.05,
    }


VARIANTS = tuple(n for n, f in Generate.model_fields.items() if f.annotation in (Variant, Variant | None))
