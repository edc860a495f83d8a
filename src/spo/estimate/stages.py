"""The peak memory of a stage: its own code runs on the meta device with the models and sizes of params.yaml.

A rollout is cut to FEW steps: each needs as much as the next, but for the pairs that it leaves, which are
counted for the true number of steps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch

from spo.config import Params, Stepwise
from spo.data.latents import EncodedPairs
from spo.diffusion.noise import SampleNoise
from spo.diffusion.rollout import sample_latents
from spo.diffusion.schedule import Schedule
from spo.estimate import meta, models
from spo.methods import method_spec
from spo.methods.lpo import LpoMethod
from spo.methods.spo import SpoMethod
from spo.preference import trainer
from spo.preference.latent import LatentPreferenceModel, LatentRewardModel
from spo.preference.latent_training import LatentTask
from spo.preference.model import ClipRewardModel
from spo.preference.step_aware import StepAwareTask
from spo.training import loop, optimizer, placement
from spo.training.alignment import Alignment
from spo.training.state import TrainingState
from spo.types import Budget, Objective

Memory = Any  # meta.Memory or _CudaMemory
FEW = 5  # steps of a rollout
PROMPT = "a prompt"


@dataclass
class Peak:
    """Bytes on the device at the peak of each phase of a stage, and of what lies there throughout."""

    weights: int = 0
    phases: dict[str, int] = field(default_factory=dict)

    @property
    def most(self) -> int:
        return max(self.phases.values())


class _Counter:
    """Runs phases one after the other."""

    def __init__(self, memory: Memory) -> None:
        gc.collect()
        self.memory, self.found = memory, Peak(memory.live)

    def phase(self, name: str, run: Callable[[], Any]) -> Any:
        gc.collect()
        self.memory.restart()
        result = run()
        self.found.phases[name] = max(self.memory.peak, self.found.phases.get(name, 0))
        return result


def peak(params: Params, stage: str, variant: str | None, budget: Budget) -> Peak:
    """Of `preference` (variant None or latent), `align` (a method), `generate` or `pairs` (its encoding).

    Raises:
        ValueError: config files that cannot be reached.
    """
    with meta.stand_in() as memory:
        base = models.backbone(params.backbone, budget)
        return STAGES[stage](params, variant, base, memory).found


def measured(params: Params, stage: str, variant: str | None, budget: Budget) -> Peak:
    """The same with random weights on a CUDA device, by torch's allocator."""
    base = models.backbone(params.backbone, budget, "cuda")
    return STAGES[stage](params, variant, base, _CudaMemory()).found


class _CudaMemory:
    """What torch has allocated, in the place of `meta.Memory`."""

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def _generate(params: Params, variant: str | None, base: Any, memory: Memory) -> _Counter:
    counter, count = _Counter(memory), params.generate.batch_size
    guidance = getattr(params.generate, variant or "base").guidance
    counter.phase("images", lambda: _images(params, base, count, guidance))
    return counter


def _images(params: Params, base: Any, count: int, guidance: float) -> torch.Tensor:
    schedule = Schedule.from_config(base.scheduler_config, FEW)
    noise = SampleNoise(0, list(range(count)), base.latent_shape, base.device)
    with base.inference():
        x_0 = sample_latents(base, schedule, [PROMPT] * count, noise, guidance, params.generate.eta)
        return base.decode(x_0)


def _encode(params: Params, variant: str | None, base: Any, memory: Memory) -> _Counter:
    counter, size = _Counter(memory), base.image_size
    count = 2 * max(1, base.budget.images // 2)
    counter.phase("encoding", lambda: base.encode(torch.zeros(count, 3, *size, device=base.device)))
    return counter


def _pairs(base: Any, count: int) -> EncodedPairs:
    labels = torch.arange(count).remainder(2).float()
    latents = np.zeros((count, 2, *base.latent_shape), np.float16)
    return EncodedPairs(latents, [PROMPT] * count, labels, torch.ones(count))


def _preference(params: Params, variant: str | None, base: Any, memory: Memory) -> _Counter:
    settings: Any = params.latent_preference if variant == "latent" else params.preference
    schedule = Schedule.from_config(base.scheduler_config, settings.num_inference_steps)
    trained: Any
    if variant == "latent":
        model = LatentPreferenceModel(base.feature_model(), settings.feature_guidance).to(base.device)
        trained = LatentTask(model, base, schedule.to(base.device), settings)
    else:
        judge = models.preference_model(settings, base.device)
        trained = StepAwareTask(judge, models.Words(), base, schedule, settings)
    trained.prepare()
    trained.model.train()
    counter, pairs = _Counter(memory), _pairs(base, max(2, settings.batch_size))
    _updates(counter, trainer.LabelObjective(trained, pairs, 0), settings, settings.ema)
    validated = _pairs(base, max(2, base.budget.samples // 2))
    counter.phase("evaluation", lambda: trainer.evaluate(trained, validated, [501], seed=0))
    return counter


def _align(params: Params, variant: str | None, base: Any, memory: Memory) -> _Counter:
    name = variant or "spo"
    section = getattr(params.align, name)
    method = _method(params, name, section, base)
    if section.lora is None:
        base.train_fully()
    else:
        base.add_lora(section.lora, 0)
    if base.budget.checkpointing:
        base.checkpoint_gradients()
    counter = _Counter(memory)
    _updates(counter, Alignment(f"align.{name}", base, method), section, 0.0)
    if section.validation is not None:
        count = min(section.validation.prompts * section.validation.images, params.generate.batch_size)
        guidance = getattr(params.generate, name).guidance
        counter.phase("validation", lambda: _images(params, base, count, guidance))
        counter.phase("scoring", partial(_score, params, base.device))
    return counter


def _score(params: Params, device: torch.device) -> None:
    """One scorer at a time is on the device; PickScore's CLIP is as large as any of the published ones."""
    settings = params.score.pickscore
    scorer = models.clip(settings.model, settings.revision, device)
    size: Any = scorer.config.vision_config.image_size
    with torch.no_grad():
        scorer.get_image_features(torch.zeros(params.score.batch_size, 3, size, size, device=device))


def _method(params: Params, name: str, section: Any, base: Any) -> Any:
    if not isinstance(section, Stepwise):
        pairs = _pairs(base, getattr(section, "batch_size", 1))
        with mock.patch("spo.data.latents.latent_pairs", lambda *given: pairs):
            return method_spec(name).build(params, base)
    few = {"num_inference_steps": FEW, "divert_start_step": 2, "timestep_range": None, "threshold": 0.0}
    section = section.model_copy(update={**few, "threshold_end": None})
    schedule = Schedule.from_config(base.scheduler_config, FEW)
    prompts = [PROMPT] * section.prompts_per_iteration
    judge: Any
    if name == "lpo":
        latent = LatentPreferenceModel(base.feature_model(), params.latent_preference.feature_guidance)
        judge = LatentRewardModel(latent.to(base.device), section.judged_at)
        method: Any = LpoMethod(section, schedule, judge, prompts, 0)
    else:
        judge = ClipRewardModel(models.preference_model(params.preference, base.device), models.Words())
        method = SpoMethod(section, schedule, judge, prompts, 0)
    if base.budget.offload:
        placement.move(judge.model, "cpu")
    method.schedule = method.rollout.schedule = schedule.to(base.device)  # the steps were chosen on the CPU
    return method


def _updates(counter: _Counter, objective: Objective, settings: Any, ema: float) -> None:
    """An iteration after the first, when AdamW has its moments."""
    with mock.patch.object(optimizer, "_eight_bit", lambda: _EightBit):
        state = TrainingState(objective.parameters(), settings.optimizer, ema, False)
        for parameter in state.parameters:
            parameter.grad = torch.zeros_like(parameter)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        updates, _ = counter.phase("collecting", lambda: objective.collect(0))
        largest = max(updates, key=lambda parts: len(parts[0].timesteps))
        # two parts: the second has the gradients of the first beside it, as all others do
        counter.phase("update", partial(loop.update, objective, largest[:2], state))


class _EightBit(torch.optim.Optimizer):
    """bitsandbytes' AdamW8bit by its memory: two moments of a byte each."""

    def __init__(self, parameters: Any, *rest: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = {n: torch.zeros_like(p, dtype=torch.uint8) for n in ("m", "v")}


STAGES: dict[str, Callable[[Params, str | None, Any, Memory], _Counter]] = {
    "preference": _preference,
    "align": _align,
    "generate": _generate,
    "pairs": _encode,
}
