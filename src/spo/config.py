"""Every section of params.yaml as a frozen model; unknown keys are errors with a suggestion."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]


class ConfigError(ValueError):
    """A mistake in params.yaml, told in one line."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Backbone(Section):
    """The model to be aligned."""

    family: Literal["sd", "sdxl"]
    checkpoint: str  # a diffusers folder or a hub id
    revision: str | None = None  # of a hub id: a commit hash
    vae: str | None = None  # another VAE's folder or hub id (SDXL: the fp16-safe one)
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False


class Prompts(Section):
    """Prompt lists and how they are cleaned and split."""

    train: str  # files of captions: .json, .jsonl, .csv, .tsv, .txt, .parquet
    evaluation: str
    pairs: str  # folder of preference shards whose captions must not meet the evaluation prompts
    vocabulary: str | None = None  # a file of allowed words, one a line
    max_tokens: Positive = 77
    n_train: Positive
    n_validation: Count
    n_test: Positive


class Pairs(Section):
    """Preference pairs in Pick-a-Pic's schema."""

    source: str  # folder of parquet shards
    validation_fraction: Fraction = 0.1
    rows_per_shard: Positive = 1000
    max_bad_fraction: Fraction = 0.01
    drop_ties: bool = False


class Optimizer(Section):
    learning_rate: Rate
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Rate = 1e-8
    warmup_steps: Count = 0
    max_grad_norm: Rate | None = 1.0


class Preference(Section):
    """The step-aware preference model (SPM) and its training."""

    init: str  # a CLIP-format model folder or hub id
    revision: str | None = None
    tokenizer: str | None = None  # where it lies, if not with `init`
    step_condition: bool = True  # False: the same CLIP without adaLN
    noised: bool = True  # False: trained on clean images only
    logit_scale: Rate | None = None  # at the start of training; None: that of `init`
    optimizer: Optimizer
    steps: Positive
    batch_size: Positive
    guidance: float = 5.0
    num_inference_steps: Positive = 20
    eval_timesteps: tuple[Count, ...] = (0, 251, 501, 701, 951)
    checkpoint_every: Positive = 100


class Lora(Section):
    rank: Positive
    alpha: Positive
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


class Spo(Section):
    """Step-aware Preference Optimization (arXiv 2406.04314)."""

    lora: Lora
    optimizer: Optimizer
    iterations: Positive  # rollouts
    prompts_per_iteration: Positive
    batch_size: Positive  # pairs an optimizer update
    candidates: Annotated[int, Field(ge=2)] = 4  # K
    num_inference_steps: Positive = 20
    eta: Annotated[float, Field(gt=0)] = 1.0
    guidance: float = 5.0
    divert_start_step: Count = 4
    threshold: Fraction = 0.3  # at the first diverted step
    threshold_end: Fraction | None = None  # at the last; linear in the step between. None: constant
    beta: Rate = 10.0
    clip: Rate = 0.1
    checkpoint_every: Positive = 5


class DiffusionDpo(Section):
    """Diffusion-DPO (arXiv 2311.12908)."""

    lora: Lora
    optimizer: Optimizer
    iterations: Positive  # optimizer updates
    batch_size: Positive  # pairs an update
    beta: Rate = 2000.0
    checkpoint_every: Positive = 50


class Align(Section):
    spo: Spo
    diffusion_dpo: DiffusionDpo


class Variant(Section):
    """One column of the comparison: an adapter (or none) and a guidance."""

    adapter: str | None = None
    guidance: float


class Generate(Section):
    split: Literal["test", "validation"] = "test"  # validation: for tuning
    num_inference_steps: Positive = 20
    eta: Annotated[float, Field(ge=0)] = 1.0
    seed: int = 0
    batch_size: Positive = 16
    base: Variant
    base_high_guidance: Variant
    spo: Variant
    diffusion_dpo: Variant


class PickScoreConfig(Section):
    model: str
    processor: str | None = None  # where the tokenizer lies, if not with the model
    revision: str | None = None
    image_size: Positive = 224


class HpsConfig(Section):
    architecture: str  # an open_clip name, or the file of a model config
    checkpoint: str
    tokenizer: str | None = None  # a folder; None: open_clip's own for the architecture
    image_size: Positive = 224


class AestheticConfig(Section):
    clip: str
    head: str
    revision: str | None = None
    image_size: Positive = 224


class Score(Section):
    batch_size: Positive = 32
    pickscore: PickScoreConfig
    hps: HpsConfig
    aesthetic: AestheticConfig
    oracle: str | None = None  # only scenes has the truth


class Report(Section):
    baselines: tuple[str, ...] = ("base", "base_high_guidance", "diffusion_dpo")
    bootstrap_samples: Positive = 10_000
    grid_prompts: Positive = 8


class Registry(Section):
    """What is registered in MLflow, and the gate to its alias `champion`.

    Bounds are of the 95 % interval of the mean paired difference to the champion (the baseline while there
    is none), in the units of the score.
    """

    name: str | None = None  # of the registered model; None: the experiment's
    method: Literal["spo", "diffusion_dpo"] = "spo"
    baseline: str = "base"
    improves: tuple[str, ...] = ("pickscore",)  # the lower bound must exceed 0
    holds: dict[str, Annotated[float, Field(ge=0)]] = {
        "hps": 0.5,
        "aesthetic": 0.05,
    }  # and must not be below -x


class Params(Section):
    """The experiment."""

    name: str
    seed: int = 0
    tracking: str | None = None  # MLflow's URI; None: MLFLOW_TRACKING_URI, else sqlite in the repository
    backbone: Backbone
    prompts: Prompts
    pairs: Pairs
    preference: Preference
    align: Align
    generate: Generate
    score: Score
    report: Report
    registry: Registry = Registry()


METHODS = tuple(Align.model_fields)
VARIANTS = tuple(n for n, f in Generate.model_fields.items() if f.annotation is Variant)


def load(path: str | Path = "params.yaml") -> Params:
    """Read and check an experiment.

    Raises:
        ConfigError: one line naming file, key, what is wrong and, for a mistyped key, the nearest one.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; run in the repository root, or `spo preset scenes`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return validate(raw, source=str(path))


def validate(raw: Any, source: str = "params.yaml") -> Params:
    """Check a mapping as `load` does."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: must be a mapping of sections, is {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("; ".join(_line(e, source) for e in error.errors()[:3])) from None


def preset_names() -> list[str]:
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files("spo.presets").iterdir()
        if p.name.endswith(".yaml")
    )


def preset(name: str) -> str:
    """The text of a ready-made params.yaml."""
    if name not in preset_names():
        raise ConfigError(f"no preset {name!r}; there are: {', '.join(preset_names())}")
    return resources.files("spo.presets").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _line(error: Any, source: str) -> str:
    key = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"{source}: unknown key {key!r}; {hint}"
    if error["type"] == "missing":
        return f"{source}: key {key!r} is missing"
    return f"{source}: {key}: {error['msg']} (got {error['input']!r})"


def _fields(location: tuple[Any, ...]) -> list[str]:
    model: Any = Params
    for part in location:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
