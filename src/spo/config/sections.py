"""Every section of params.yaml as a frozen model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Guidance = Annotated[float, Field(ge=0)]  # 1 and below: the conditional prediction alone


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_silent_conversion(cls, value: Any, told: ValidationInfo) -> Any:
        """`steps: true` is no 1, and no path or name has characters that a file system refuses."""
        kind = cls.model_fields[str(told.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("must not be true or false")
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise ValueError("has a character that is none")
        return value


# what single-file checkpoints of the families are built like, unless backbone.config says otherwise
SINGLE_FILE_CONFIG = {
    "sd": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


class Scheduler(Section):
    """What the checkpoint's scheduler_config.json leaves out or says wrongly; null: as the file says."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    rescale_betas_zero_snr: bool | None = None
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None


class Backbone(Section):
    """The model to be aligned."""

    family: Literal["sd", "sdxl"]
    checkpoint: str  # a diffusers folder, a single .safetensors file or a hub id
    revision: str | None = None  # of a hub id: a commit hash
    variant: str | None = None  # of the weight files, as fp16 in model.fp16.safetensors; null: the only one
    config: str | None = None  # of a single file: the diffusers folder or hub id that says how it is built
    license: str | None = None  # of the model, for the card of what is made of it
    vae: str | None = None  # another VAE's folder or hub id (SDXL: the fp16-safe one)
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    scheduler: Scheduler = Scheduler()

    @property
    def is_single_file(self) -> bool:
        return self.checkpoint.lower().endswith(".safetensors")

    @property
    def described_by(self) -> str:
        """Where config files and tokenizers lie."""
        if self.is_single_file:
            return self.config or SINGLE_FILE_CONFIG[self.family]
        return self.checkpoint


class Prompts(Section):
    """Prompt lists and how they are cleaned and split."""

    train: str  # files of captions: .json, .jsonl, .csv, .tsv, .txt, .parquet
    evaluation: str
    pairs: str  # folder of preference shards whose captions must not meet the evaluation prompts
    vocabulary: str | None = None  # a file of allowed words, one a line
    block_list: str | None = None  # a file of words and phrases that no prompt may have, one a line
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
    eight_bit: bool = False  # AdamW with 8-bit state, by bitsandbytes


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


class PseudoLabels(Section):
    """Labels of the training pairs by a scorer in the place of people's; exactly one is given."""

    pickscore: PickScoreConfig | None = None
    hps: HpsConfig | None = None
    aesthetic: AestheticConfig | None = None
    gap: Rate = 0.1  # in the scorer's units; pictures that differ by less are a tie
    batch_size: Positive = 16

    @model_validator(mode="after")
    def _one(self) -> PseudoLabels:
        given = [n for n in ("pickscore", "hps", "aesthetic") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"name one scorer of pickscore, hps and aesthetic, not {len(given)}")
        return self


class Preference(Section):
    """The step-aware preference model (SPM) and its training."""

    init: str  # a CLIP-format model folder or hub id
    revision: str | None = None
    tokenizer: str | None = None  # where it lies, if not with `init`
    step_condition: bool = True  # False: the same CLIP without adaLN
    noised: bool = True  # False: trained on clean images only
    trained: Literal["all", "heads"] = "all"  # by labels; heads: projections, last norms, step condition
    labels: PseudoLabels | None = None  # None: people's
    logit_scale: Rate | None = None  # at the start of training; None: that of `init`
    optimizer: Optimizer
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay of an average of the weights, kept at the end
    steps: Positive
    batch_size: Positive
    guidance: Guidance = 5.0
    num_inference_steps: Positive = 20
    eval_timesteps: tuple[Count, ...] = (0, 251, 501, 701, 951)
    gradient_accumulation: Positive = 1  # parts in which an update's batch goes through the model
    gradient_checkpointing: bool = False  # less memory, one more forward
    checkpoint_every: Positive = 100


class Lora(Section):
    rank: Positive
    alpha: Positive
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


class Validation(Section):
    """Pictures of validation prompts while a method trains, judged by the scorers of `score`; when to stop.

    A limit that is left out is not applied.
    """

    every: Positive  # iterations
    prompts: Annotated[int, Field(ge=2)] = 8
    images: Annotated[int, Field(ge=2)] = 2  # of a prompt, for diversity
    max_fall: Rate | None = None  # of a scorer, in standard errors of its mean paired difference to the start
    max_divergence: Rate | None = None  # of `kl` (SPO, nats a step) or `output_distance` (Diffusion-DPO)
    min_diversity: Fraction | None = None  # as a share of that at the start


class Spo(Section):
    """Step-aware Preference Optimization (arXiv 2406.04314)."""

    lora: Lora | None  # null: full fine-tuning of the UNet
    optimizer: Optimizer
    iterations: Positive  # rollouts
    prompts_per_iteration: Positive
    batch_size: Positive  # pairs an optimizer update
    candidates: Annotated[int, Field(ge=2)] = 4  # K
    num_inference_steps: Positive = 20
    eta: Annotated[float, Field(gt=0)] = 1.0
    guidance: Guidance = 5.0
    divert_start_step: Count = 4
    timestep_range: tuple[Count, Count] | None = None  # lowest and highest t of x_t that gives pairs
    inner_steps: Positive = 1  # denoising steps of the K branches before they are judged (SDXL: 3)
    pair_choice: Literal["best_worst", "random"] = "best_worst"  # two of the K candidates
    resampler: Literal["random", "win", "lose"] = "random"  # the candidate that the rollout goes on from
    threshold: Fraction = 0.3  # at the first diverted step
    threshold_end: Fraction | None = None  # at the last; linear in `threshold_by` between. None: constant
    threshold_by: Literal["step", "timestep", "sigma"] = "step"  # sigma: DDIM's at eta (arXiv 2502.01051)
    beta: Rate = 10.0
    clip: Rate = 0.1
    gradient_accumulation: Positive = 1  # parts in which an update's batch goes through the UNet
    gradient_checkpointing: bool = False  # less memory, one more forward
    checkpoint_every: Positive = 5
    validation: Validation | None = None

    @field_validator("timestep_range")
    @classmethod
    def _ordered(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("the lowest timestep comes first, as in [0, 750]")
        return value


class DiffusionDpo(Section):
    """Diffusion-DPO (arXiv 2311.12908)."""

    lora: Lora | None  # null: full fine-tuning of the UNet
    optimizer: Optimizer
    iterations: Positive  # optimizer updates
    batch_size: Positive  # pairs an update
    beta: Rate = 2000.0
    gradient_accumulation: Positive = 1  # parts in which an update's batch goes through the UNet
    gradient_checkpointing: bool = False  # less memory, one more forward
    checkpoint_every: Positive = 50
    validation: Validation | None = None


class Align(Section):
    spo: Spo
    diffusion_dpo: DiffusionDpo


class Variant(Section):
    """One column of the comparison: an adapter (or none) and a guidance."""

    adapter: str | None = None  # a LoRA, a UNet alone, or a whole model
    guidance: Guidance


class Generate(Section):
    split: Literal["test", "validation"] = "test"  # validation: for tuning
    num_inference_steps: Positive = 20
    eta: Annotated[float, Field(ge=0)] = 1.0
    seed: Seed = 0
    batch_size: Positive = 16
    base: Variant
    base_high_guidance: Variant
    spo: Variant
    diffusion_dpo: Variant


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
    seed: Seed = 0
    processes: Positive = 1  # that share each training, generating and scoring; one a GPU
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
