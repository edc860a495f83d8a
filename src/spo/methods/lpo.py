"""Latent Preference Optimization (arXiv 2502.01051): SPO's rollout and loss, with scores of noisy latents.

They come from a latent reward model (preference/latent.py): the base's own denoiser on the candidates.
Nothing is predicted or decoded, so all steps are diverted, and a step costs K passes of the denoiser's first
part.

Departures from the paper (P) or the official code (C), beside those of the files in stepwise/:
1. C scores a candidate x_{t-1} with the timestep t of the step that drew it, one step noisier than it is,
   though the model learned from latents with the noise of the timestep it is given. `judged_at` decides:
   `candidate` is the timestep of its own noise (0 after the last step), `step` is C, as in the presets sd15
   and sdxl.
2. The smallest gap of a valid pair grows with DDIM's sigma_t: from threshold_end at the smallest sigma_t to
   threshold at the largest (threshold_by: sigma). P takes both over all steps of the sampler, this code over
   the diverted ones: the same values if all steps are diverted.
3. P gives a learning rate of 5e-5 for SD 1.5, C has 6e-5; the preset has P's.
"""

from collections.abc import Callable

from spo.config import Params
from spo.methods.spec import Cost, MethodSpec
from spo.methods.stepwise.cost import cost_by_latents
from spo.methods.stepwise.method import PROMPTS, StepwiseMethod, sampler_schedule, training_prompts
from spo.types import Backbone, NoiseSchedule

REWARD_MODEL = "outputs/preference_latent"


class LpoMethod(StepwiseMethod):
    """LPO: the stepwise method with the latent reward model, otherwise unchanged."""

    name = "align.lpo"


def _build(params: Params, backbone: Backbone) -> LpoMethod:
    from spo.preference.latent import LatentPreferenceModel, LatentRewardModel
    from spo.runtime.files import require

    section, prompts = params.align.section("lpo"), training_prompts()
    backbone.remember_prompts(prompts)  # before the model is on the device
    model = LatentPreferenceModel.from_pretrained(require(REWARD_MODEL, "latent reward model"), backbone)
    schedule = sampler_schedule(section, backbone)
    reward_model = LatentRewardModel(model, section.judged_at)
    return LpoMethod(section, schedule, reward_model, prompts, params.seed)


def _cost(params: Params, schedule: Callable[[int], NoiseSchedule]) -> Cost:
    guidance = params.latent_preference.feature_guidance
    section = params.backbone.classifier_free(params.align.section("lpo"))
    return cost_by_latents("align.lpo", section, schedule, guidance)


SPEC = MethodSpec(
    name="lpo",
    title="LPO",
    paper="Latent Preference Optimization (arXiv 2502.01051)",
    reads=(REWARD_MODEL, PROMPTS),
    trained_first=("preference_latent",),
    divergence="kl",
    build=_build,
    cost=_cost,
)
