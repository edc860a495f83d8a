"""Sections of training: the preference model and the alignment methods."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from spo.config.base import Amount, Count, Decay, Eta, Fraction, Guidance, Positive, Rate, Section, Several
from spo.config.scorers import SCORERS, Scorers


class Optimizer(Section):
    """AdamW with a linear warm-up, and linear decay of the learning rate or none."""

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Amount = 1e-4
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    # less than 1e-37 is 0 in fp32, and 0 / 0 where a gradient is 0
    epsilon: Annotated[float, Field(ge=1e-37, le=1)] = 1e-8
    warmup_steps: Count = 0
    decay: Literal["constant", "linear"] = "constant"  # linear: after the warm-up, to 0 at the end
    max_grad_norm: Rate | None = 1.0
    eight_bit: bool = False  # 8-bit optimizer state, by bitsandbytes

    @model_validator(mode="after")
    def _decays(self) -> Optimizer:
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay {self.weight_decay:g} times learning_rate {self.learning_rate:g} is not below "
                "1: an update would take the whole weight or more; lower one of them"
            )
        return self


def _decays_within(section: Any) -> Any:
    """Refuse a training that ends before its learning rate would decay."""
    optimizer, length = section.optimizer, getattr(section, "steps", 0) or section.iterations
    if optimizer.decay == "linear" and optimizer.warmup_steps >= length:
        raise ValueError(
            f"optimizer.decay: linear never begins: warmup_steps {optimizer.warmup_steps} is not below the "
            f"{length} iterations of the training; lower it, or set decay to constant"
        )
    return section


class PseudoLabels(Scorers):
    """Labels of the training pairs by one scorer, instead of the annotators' labels."""

    gap: Rate = 0.1  # in the scorer's units; a smaller difference is a tie

    @model_validator(mode="after")
    def _one(self) -> PseudoLabels:
        if len(given := self.configured()) != 1:
            raise ValueError(f"must name one scorer ({', '.join(SCORERS)}), not {len(given)}")
        return self


class Lora(Section):
    """A low-rank adapter of the UNet (arXiv 2106.09685)."""

    rank: Positive
    alpha: Positive
    target_modules: Annotated[Several[str], Field(min_length=1)] = ("to_q", "to_k", "to_v", "to_out.0")


class Preference(Section):
    """The step-aware preference model (SPM) and its training."""

    pretrained: str | None = None  # in place of training: an official file, or a folder of this stage
    init: str  # a CLIP-format model folder or hub id
    revision: str | None = None
    tokenizer: str | None = None  # folder or hub id; None: that of `init`
    step_condition: bool = True  # False: the same CLIP without adaLN
    noised: bool = True  # False: trained on clean images only
    trained: Literal["all", "heads"] = "all"  # by labels; heads: projections, last norms, step condition
    labels: PseudoLabels | None = None  # None: the annotators'
    logit_scale: Rate | None = None  # initial value; None: that of `init`
    optimizer: Optimizer
    ema: Fraction = 0.0  # how far the averaged weights reach back, as a part of the updates; 0: no average
    steps: Positive
    batch_size: Positive
    guidance: Guidance = 5.0
    num_inference_steps: Positive = 20
    eval_timesteps: Several[Count] = (0, 251, 501, 701, 951)
    local_prompts: Count = 0  # validation prompts whose candidates the oracle scores too; only scenes has one
    checkpoint_every: Positive = 100

    _decay = model_validator(mode="after")(_decays_within)


# preference models that SPO's is compared with: {name: what is changed in `preference`}
PREFERENCE_BASELINES: dict[str, dict[str, bool]] = {
    "unconditioned": {"step_condition": False},
    "clean_only": {"step_condition": False, "noised": False},
}


class LatentPreference(Section):
    """The latent reward model (arXiv 2502.01051) and its training."""

    # in place of training: an official folder or file, or a folder of this stage
    pretrained: str | None = None
    trained: Literal["all", "lora", "heads"] = "all"  # UNet and text encoders, or an adapter, and the heads
    lora: Lora | None = None  # of `trained: lora`, merged into the weights after training
    # folder or hub id of a CLIP, with whose text projection training starts; null: the identity
    text_projection: str | None = None
    revision: str | None = None  # of that hub id
    feature_guidance: Guidance = 7.5  # of the visual feature enhancement (VFE); up to 1: none
    optimizer: Optimizer
    ema: Fraction = 0.0  # how far the averaged weights reach back, as a part of the updates; 0: no average
    steps: Positive
    batch_size: Positive
    guidance: Guidance = 5.0  # of the rollouts of `local_prompts`
    num_inference_steps: Positive = 20  # pairs are noised to the timesteps of this sampler
    eval_timesteps: Several[Count] = (1, 251, 501, 701, 951)
    local_prompts: Count = 0  # validation prompts whose candidates the oracle scores too; only scenes has one
    checkpoint_every: Positive = 100

    _decay = model_validator(mode="after")(_decays_within)

    @model_validator(mode="after")
    def _adapter(self) -> LatentPreference:
        if (self.trained == "lora") != (self.lora is not None):
            raise ValueError("trained: lora and a section lora must be given together")
        return self


class Validation(Section):
    """Validation during training, by the scorers of `score`, and limits that stop the training.

    None as a limit: not applied.
    """

    every: Positive  # iterations
    prompts: Annotated[Positive, Field(ge=2)] = 8
    images: Annotated[Positive, Field(ge=2)] = 2  # per prompt, to measure diversity
    max_fall: Rate | None = None  # drop of a score, in standard errors of the paired difference to the start
    max_divergence: Rate | None = None  # `kl` (SPO, LPO; nats per step) or `output_distance` (Diffusion-DPO)
    min_diversity: Fraction | None = None  # as a fraction of the diversity at the start
    # the best validated weights by the mean standardised gain of these scorers are the result; None: the last
    select: Annotated[Several[str], Field(min_length=1)] | None = None
    # end at the first validation at which that gain is not above its best so far, or a scorer of `select` is
    # more than a standard error below its own best; the weights of the validation before are the result
    stop: bool = False
    # end so if CLIPScore fell by more than this since the start, in standard deviations of its scores there;
    # max_fall then leaves CLIPScore to this limit
    max_clipscore_fall: Rate | None = None

    @model_validator(mode="after")
    def _best_is_kept(self) -> Self:
        if self.select is None and (self.stop or self.max_clipscore_fall is not None):
            raise ValueError(
                "stop and max_clipscore_fall need `select`: the scorers that say which weights are best"
            )
        return self

    @field_validator("select")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if unknown := set(value or ()) - set(SCORERS):
            raise ValueError(f"unknown scorer {min(unknown)!r}; known: {', '.join(SCORERS)}")
        return value


class Method(Section):
    """What all alignment methods have."""

    pretrained: str | None = None  # in place of training: a LoRA, a UNet or a complete pipeline
    learns_from: ClassVar[str] = "pairs"  # the section whose output trains it


Threshold = Annotated[float, Field(ge=0, lt=1)]  # no two softmax values differ by 1: no pair would be valid


class Rollout(Method):
    """A stepwise method's rollout: where candidates are drawn and how two of them form a pair."""

    candidates: Annotated[Positive, Field(ge=2)] = 4  # K
    num_inference_steps: Positive = 20
    eta: Annotated[Eta, Field(gt=0)] = 1.0
    guidance: Guidance = 5.0
    divert_start_step: Count = 4
    # lowest and highest t of an x_t that gives pairs
    timestep_range: Annotated[tuple[Count, Count], Field(strict=False)] | None = None
    inner_steps: Positive = 1  # denoising steps of the K branches before they are scored (SDXL: 3)
    pair_choice: Literal["best_worst", "random"] = "best_worst"  # which two of the K candidates form a pair
    resampler: Literal["random", "win", "lose"] = "random"  # the candidate from which the rollout continues
    threshold: Threshold = 0.3  # smallest difference of a pair's softmax, first diverted step
    threshold_end: Threshold | None = None  # at the last step; linear in `threshold_by`; None: constant
    threshold_by: Literal["step", "timestep", "sigma"] = "step"  # sigma: DDIM's at eta (arXiv 2502.01051)

    @field_validator("timestep_range")
    @classmethod
    def _ordered(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("must have the lowest timestep first, as in [0, 750]")
        return value

    @model_validator(mode="after")
    def _diverts(self) -> Self:
        if self.divert_start_step >= self.num_inference_steps:
            raise ValueError(
                f"divert_start_step {self.divert_start_step} leaves none of the {self.num_inference_steps} "
                "steps of num_inference_steps (the first is 0) to draw candidates at; lower it"
            )
        return self


class Stepwise(Rollout):
    """A method that trains on pairs of candidates from its own rollouts."""

    lora: Lora | None  # null: full fine-tuning of the UNet
    optimizer: Optimizer
    iterations: Positive  # rollouts
    prompts_per_iteration: Positive
    batch_size: Positive  # pairs per optimizer update
    beta: Rate = 10.0
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.1
    checkpoint_every: Positive = 5
    validation: Validation | None = None

    _decay = model_validator(mode="after")(_decays_within)


class GradSpo(Section):
    """GradSPO: another loss on SPO's pairs, and rollouts by an average of the policy's weights."""

    scale: Rate = 0.5  # g, how far winner and loser are from the sampler's prediction
    sampler_ema: Decay = 0.9  # decay of the average; 0: the policy itself


class Spo(Stepwise):
    """Step-aware Preference Optimization (arXiv 2406.04314)."""

    gradspo: GradSpo | None = None  # None: SPO's own loss
    learns_from = "preference"

    @model_validator(mode="after")
    def _one_step(self) -> Spo:
        if self.gradspo is not None and self.inner_steps != 1:
            raise ValueError(f"gradspo needs inner_steps 1, not {self.inner_steps}")
        return self


class Lpo(Stepwise):
    """Latent Preference Optimization (arXiv 2502.01051)."""

    judged_at: Literal["candidate", "step"] = "candidate"  # the timestep at which candidates are scored
    learns_from = "latent_preference"


class DiffusionDpo(Method):
    """Diffusion-DPO (arXiv 2311.12908)."""

    lora: Lora | None  # null: full fine-tuning of the UNet
    optimizer: Optimizer
    iterations: Positive  # optimizer updates
    batch_size: Positive  # pairs per update
    beta: Rate = 2000.0
    checkpoint_every: Positive = 50
    validation: Validation | None = None

    _decay = model_validator(mode="after")(_decays_within)


class Align(Section):
    """The alignment methods; None takes one out of the experiment."""

    spo: Spo | None
    diffusion_dpo: DiffusionDpo | None
    lpo: Lpo | None

    def section(self, name: str) -> Any:
        """The section of a method that must be there."""
        if (own := getattr(self, name)) is None:
            raise ValueError(f"align.{name}: is null, so there is no such method; give it a section")
        return own

    def trained(self) -> dict[str, Any]:
        """The sections of the methods that are trained, by name."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: own for name, own in sections.items() if own is not None and own.pretrained is None}


METHODS = tuple(Align.model_fields)
