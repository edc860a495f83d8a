"""Count a stage: its own code runs on the meta device with the models and sizes of params.yaml.

Each phase of the stage runs once, and its FLOPs are multiplied by how often it runs in the stage. A sampler
or rollout has FEW steps: all need the same memory, except for the pairs that they store. The scorers of
validation are not counted: with them the device holds less than in an update.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from spo.backbones.families import FAMILIES
from spo.config import PREFERENCE_BASELINES, Params, Stepwise
from spo.data.latents import EncodedPairs
from spo.diffusion.denoiser import is_guided
from spo.diffusion.noise import SampleNoise
from spo.diffusion.rollout import sample_latents
from spo.estimate import meta, models
from spo.estimate.count import Base, Count
from spo.evaluation import candidate_ranking as local
from spo.methods import method_spec
from spo.methods.lpo import LpoMethod
from spo.methods.spo import SpoMethod
from spo.methods.stepwise import pairs as step_pairs
from spo.preference import trainer
from spo.preference.latent import LatentPreferenceModel, LatentRewardModel
from spo.preference.latent_training import LatentTask
from spo.preference.model import ClipRewardModel
from spo.preference.step_aware import StepAwareTask
from spo.runtime.files import read_json
from spo.training import loop, optimizer, placement
from spo.training.alignment import Alignment, make_trainable
from spo.training.compute import TRAINED
from spo.training.state import TrainingState
from spo.types import Budget

PAIRS = Path("outputs/pairs/summary.json")
FEW = 5  # steps of a rollout
PROMPT = "a prompt"


def count(params: Params, stage: str, variant: str | None, budget: Budget) -> Count:
    """Count `preference` (variant: None or latent), `align` (a method), `generate` or `pairs` (encoding)."""
    with meta.stand_in() as counter:
        base = models.backbone(params.backbone, budget)
        with mock.patch.object(base, "_run", models.once_per_shape(base, counter)):
            return run(params, stage, variant, base, counter)


def run(params: Params, stage: str, variant: str | None, base: Any, counter: Any) -> Count:
    """As `count`, with a base on the device that `counter` counts."""
    found = Count(_sizes(base, counter), counter)
    if FAMILIES[
        params.backbone.family
    ].encodes_once:  # as every stage does, before its other models are there
        found.run("text", lambda: base.remember_prompts([PROMPT]))
        found.weights = 0  # those of the next phase
    STAGES[stage](params, variant, base, found)
    return found


def _sizes(base: Any, counter: Any) -> Base:
    one = torch.zeros(1, *base.latent_shape, device=base.device)
    with base.inference():
        text, _ = base.guided(base.encode_prompts([PROMPT]), 1.0)
        counter.restart()
        base.predict(one, one.new_ones(1), text)
    unet, vae = (sum(p.numel() for p in module.parameters()) for module in (base.unet, base.vae))
    return Base(unet, vae, base.latent_shape, counter.flops)


def _generate(params: Params, variant: str | None, base: Any, found: Count) -> None:
    settings = params.generate
    prompts = params.prompts.n_test if settings.split == "test" else params.prompts.n_validation
    images, guidance = prompts * settings.images_per_prompt, getattr(settings, variant or "base").guidance
    found.text = f"{images} images of {settings.num_inference_steps} steps, guidance {guidance:g}"
    _images(found, params, base, images, guidance)


def _images(found: Count, params: Params, base: Any, images: int, guidance: float, title: str = "") -> None:
    settings, schedule = params.generate, base.schedule(FEW)
    size = min(images, settings.batch_size)
    noise = SampleNoise(0, list(range(size)), base.latent_shape, base.device)

    def sample() -> torch.Tensor:
        return sample_latents(base, schedule, [PROMPT] * size, noise, guidance, settings.eta)

    with base.inference():
        x_0 = found.run(f"{title}sampling", sample, images / size * settings.num_inference_steps / FEW)
        found.run(f"{title}decoding", lambda: base.decode(x_0), images / size)


def _encode(params: Params, variant: str | None, base: Any, found: Count) -> None:
    pixels = torch.zeros(2 * max(1, base.budget.images // 2), 3, *base.image_size, device=base.device)
    found.run("encoding", lambda: base.encode(pixels))


def _pairs(base: Any, count: int) -> EncodedPairs:
    labels = torch.arange(count).remainder(2).float()
    latents = np.zeros((count, 2, *base.latent_shape), np.float16)
    return EncodedPairs(latents, [PROMPT] * count, labels, torch.ones(count))


def _preference(params: Params, variant: str | None, base: Any, found: Count) -> None:
    settings: Any = params.latent_preference
    if variant != "latent":
        settings = params.preference.model_copy(update=PREFERENCE_BASELINES.get(variant or "", {}))
    schedule = base.schedule(settings.num_inference_steps).to(base.device)
    trained: Any
    if variant == "latent":
        model = LatentPreferenceModel(base.feature_model(), settings.feature_guidance).to(base.device)
        trained = LatentTask(model, base, schedule, settings)
    else:
        clip = models.preference_model(settings, base.device)
        trained = StepAwareTask(clip, models.Words(), base, schedule, settings)
    trained.prepare()
    trained.model.train()
    found.text = f"{settings.steps} updates of {settings.batch_size} pairs"
    pairs = _pairs(base, max(2, settings.batch_size))
    objective = trainer.LabelObjective(trained, pairs, 0)
    _updates(found, objective, settings, settings.ema, settings.steps * settings.batch_size)
    if settings.local_prompts:
        _local(found, trained, settings)
    pairs, seen = _pairs(base, max(2, base.budget.samples // 2)), 0
    if PAIRS.exists() and (summary := read_json(PAIRS, "summary of the pairs")):  # empty: there were none
        seen = int(summary["labels"]["validation"]["decided"])
        found.text += f", {seen} validation pairs at {len(settings.eval_timesteps)} timesteps"
    times = seen * len(settings.eval_timesteps) / len(pairs)
    found.run("evaluation", lambda: trainer.evaluate(trained, pairs, [501], seed=0), times)


def _local(found: Count, trained: Any, settings: Any) -> None:
    """The rollouts of `local_prompts`; the oracle is on the CPU and not counted."""
    oracle: Any = SimpleNamespace()
    oracle.model = SimpleNamespace(perceive=lambda images: (images.new_ones(len(images), 1), None))
    prompts = [PROMPT] * min(settings.local_prompts, local.PROMPTS_AT_ONCE)
    how: Any = {"steps": FEW, "guidance": settings.guidance, "seed": 0}
    found.run(
        "candidate ranking",
        lambda: local.candidate_ranking(trained.backbone, trained.reward_model(), oracle, prompts, **how),
        settings.local_prompts / len(prompts) * settings.num_inference_steps / FEW,
    )


def _align(params: Params, variant: str | None, base: Any, found: Count) -> None:
    name = variant or "spo"
    section, spec, short = params.align.section(name), method_spec(name), _short(params, name)
    cost, run = (spec.cost(p, base.schedule) for p in (params, short))
    found.text = cost.text
    method = _method(short, name, base)
    make_trainable(base, section.lora, 0)
    _, guidance = base.guided(base.empty_prompt(), method.guidance)
    samples = cost.updates / (1 + TRAINED) / (1 + is_guided(guidance))
    rollouts = 1.0
    if isinstance(section, Stepwise):  # half of a rollout grows as the UNet's samples, half as what is scored
        scored = [_scored(getattr(p.align, name), base) for p in (params, short)]
        rollouts = (cost.rollouts / run.rollouts + scored[0] / scored[1]) / 2
    _updates(found, Alignment(f"align.{name}", base, method), section, 0.0, samples, rollouts)
    validation = getattr(section, "validation", None)
    if validation is not None:
        times = 1 + -(-section.iterations // validation.every)  # before training, and after the last
        guidance = getattr(params.generate, name).guidance
        _images(found, params, base, validation.prompts * validation.images * times, guidance, "validation ")


def _short(params: Params, name: str) -> Params:
    """With rollouts of FEW steps, the last three with candidates."""
    section = params.align.section(name)
    if not isinstance(section, Stepwise):
        return params
    few: dict[str, Any] = {"num_inference_steps": FEW, "divert_start_step": 2, "timestep_range": None}
    section = section.model_copy(update={**few, "threshold": 0.0, "threshold_end": None})
    return params.model_copy(update={"align": params.align.model_copy(update={name: section})})


def _scored(section: Stepwise, base: Any) -> int:
    """Steps of a rollout whose candidates are scored."""
    schedule = base.schedule(section.num_inference_steps)
    return len(step_pairs.blocks(section, schedule))


def _method(params: Params, name: str, base: Any) -> Any:
    section = params.align.section(name)
    if not isinstance(section, Stepwise):
        pairs = _pairs(base, getattr(section, "batch_size", 1))
        with mock.patch("spo.data.latents.latent_pairs", lambda *given: pairs):
            return method_spec(name).build(params, base)
    schedule = base.schedule(FEW)
    prompts = [PROMPT] * section.prompts_per_iteration
    reward_model: Any
    if name == "lpo":
        latent = LatentPreferenceModel(base.feature_model(), params.latent_preference.feature_guidance)
        judged_at = params.align.section(name).judged_at
        reward_model = LatentRewardModel(latent.to(base.device), judged_at)
        method: Any = LpoMethod(section, schedule, reward_model, prompts, 0)
    else:
        model = models.preference_model(params.preference, base.device)
        reward_model = ClipRewardModel(model, models.Words())
        method = SpoMethod(section, schedule, reward_model, prompts, 0)
    if base.budget.offload:
        placement.move(reward_model.model, "cpu")
    method.schedule = method.rollout.schedule = schedule.to(base.device)  # the steps were chosen on the CPU
    return method


def _updates(
    found: Count,
    objective: loop.Objective,
    settings: Any,
    ema: float,
    samples: float,
    rollouts: float = 1.0,
) -> None:
    """An iteration after the first, when AdamW has its moments.

    Args:
        samples: of the whole training, as batches have timesteps.
        rollouts: work of a true rollout over that of the one that runs.
    """
    with mock.patch.object(optimizer, "_eight_bit", lambda: _EightBit):
        state = TrainingState(objective.parameters(), settings.optimizer, ema, False)
        for parameter in state.parameters:
            parameter.grad = torch.zeros_like(parameter)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        made, _ = found.run("collecting", lambda: objective.collect(0), objective.iterations * rollouts)
        # two parts: the second has the gradients of the first beside it, as all others do
        two = max(made, key=lambda parts: len(parts[0].timesteps))[:2]
        times = samples / sum(len(part.timesteps) for part in two)
        stepwise = isinstance(settings, Stepwise)
        found.run("update", lambda: loop.update(objective, two, state), times, needs_valid_pairs=stepwise)


class _EightBit(torch.optim.Optimizer):
    """bitsandbytes' AdamW8bit by its memory: two moments of a byte each."""

    def __init__(self, parameters: Any, *rest: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = {n: torch.zeros_like(p, dtype=torch.uint8) for n in ("m", "v")}


STAGES: dict[str, Callable[[Params, str | None, Any, Count], None]] = {
    "preference": _preference,
    "align": _align,
    "generate": _generate,
    "pairs": _encode,
}
