"""Step-aware Preference Optimization (arXiv 2406.04314, Sec. 4).

A step-aware preference model scores the image predicted from each candidate. With a section `gradspo` the
loss is that of GradSPO (stepwise/gradspo.py).

Departures from the official code (C) in training; those of the loss are in stepwise/loss.py, of the rollout
in stepwise/rollout.py, of the preference model in preference/model.py and preference/step_aware.py:
1. C hands an exhausted iterator to `clip_grad_norm_` and clips nothing; here `max_grad_norm: null` does not.
2. C copies the whole UNet as the reference; here the adapter is disabled. Same numbers.
3. C resumes at whole epochs, with the random state of one process; here at any iteration.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from spo.config import Params, Spo
from spo.methods.spec import Cost, MethodSpec
from spo.methods.stepwise.cost import cost_by_images
from spo.methods.stepwise.method import PROMPTS, StepwiseMethod, sampler_schedule, training_prompts
from spo.types import Backbone, NoiseSchedule

PREFERENCE_MODEL = "outputs/preference"


class SpoMethod(StepwiseMethod):
    """SPO: the stepwise method with the step-aware preference model, otherwise unchanged."""

    name = "align.spo"


def build(params: Params, backbone: Backbone, folder: Path, prompts: Sequence[str]) -> StepwiseMethod:
    """SPO, or GradSPO if the section has `gradspo`, with the preference model in `folder`."""
    from spo.methods.stepwise.gradspo import GradSpoMethod
    from spo.preference.model import load_reward_model

    section = params.align.section("spo")
    reward_model = load_reward_model(folder, backbone.device)
    schedule = sampler_schedule(section, backbone)
    backbone.remember_prompts(prompts)
    method = SpoMethod if section.gradspo is None else GradSpoMethod
    return method(section, schedule, reward_model, prompts, params.seed)


def _build(params: Params, backbone: Backbone) -> StepwiseMethod:
    from spo.runtime.files import require

    folder = require(PREFERENCE_MODEL, "preference model")
    return build(params, backbone, folder, training_prompts())


def _cost(params: Params, schedule: Callable[[int], NoiseSchedule]) -> Cost:
    return cost_by_images("align.spo", params.backbone.classifier_free(params.align.section("spo")), schedule)


def _sampler_ema(section: Spo) -> float:
    return 0.0 if section.gradspo is None else section.gradspo.sampler_ema


SPEC = MethodSpec(
    name="spo",
    title="SPO",
    paper="Step-aware Preference Optimization (arXiv 2406.04314)",
    reads=(PREFERENCE_MODEL, PROMPTS),
    trained_first=("preference",),
    divergence="kl",
    build=_build,
    cost=_cost,
    sampler_ema=_sampler_ema,
)
