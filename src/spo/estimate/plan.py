"""What a stage will run, counted from its parameters: samples through each model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.config import Params
from spo.diffusion.denoiser import is_guided
from spo.runtime.files import read_json
from spo.training.compute import Work

PAIRS = Path("outputs/pairs/summary.json")


@dataclass(frozen=True)
class Plan:
    """`most`: every pair of a rollout is valid; `least`: none is. Equal where pairs are stored."""

    text: str
    most: Work
    least: Work


def plan(params: Params, stage: str, variant: str | None, scheduler_config: Mapping[str, Any]) -> Plan:
    """Of the stage preference, align or generate."""
    if stage == "generate":
        return _generate(params, variant or "base")
    if stage == "preference":
        return _preference(params, variant)
    return _align(params, variant or "spo", scheduler_config)


def images(count: int, steps: int, guidance: float) -> Work:
    """Generated images."""
    return Work(unet=count * steps * (1 + is_guided(guidance)), decoded=count)


def _generate(params: Params, variant: str) -> Plan:
    settings, guidance = params.generate, getattr(params.generate, variant).guidance
    count = params.prompts.n_test if settings.split == "test" else params.prompts.n_validation
    count *= settings.images_per_prompt
    work = images(count, settings.num_inference_steps, guidance)
    text = f"{count} images of {settings.num_inference_steps} steps, guidance {guidance:g}"
    return Plan(text, work, work)


def _align(params: Params, method: str, scheduler_config: Mapping[str, Any]) -> Plan:
    from spo.methods import method_spec

    cost = method_spec(method).cost(params, scheduler_config)
    validation = _validation_images(params, method)
    most = cost.rollouts + cost.updates + validation
    return Plan(cost.text, most, cost.rollouts + validation if cost.rollouts.unet else most)


def _validation_images(params: Params, method: str) -> Work:
    """The images of the validations: before training, every so many iterations, and after the last."""
    section = getattr(params.align, method)
    validation = getattr(section, "validation", None)
    if validation is None:
        return Work()
    times = 1 + -(-section.iterations // validation.every)
    guidance = getattr(params.generate, method).guidance
    count = validation.prompts * validation.images * times
    return images(count, params.generate.num_inference_steps, guidance)


def _preference(params: Params, variant: str | None) -> Plan:
    from spo.preference import compute

    settings: Any = params.latent_preference if variant == "latent" else params.preference
    work, text = compute.work(settings), f"{settings.steps} updates of {settings.batch_size} pairs"
    pairs = _validation_pairs()
    seen = 2 * pairs * len(settings.eval_timesteps)
    text += f", {pairs} validation pairs at {len(settings.eval_timesteps)} timesteps" if pairs else ""
    work += _local(settings, variant == "latent")
    if variant == "latent":
        work += Work(down=seen * (1 + is_guided(settings.feature_guidance)))
    else:
        work += Work(unet=seen * (1 + is_guided(settings.guidance)), decoded=seen, judged=seen)
    return Plan(text, work, work)


def _local(settings: Any, latent: bool) -> Work:
    """The rollouts of `local_prompts`: 4 candidates at every step; the oracle sees all their images."""
    steps, judged = settings.num_inference_steps, 4 * settings.num_inference_steps
    sampled = (1 + 4 * (steps - 1)) * (1 + is_guided(settings.guidance))
    if latent:
        down = judged * (1 + is_guided(settings.feature_guidance))
        return Work(unet=sampled, decoded=judged, down=down).times(settings.local_prompts)
    return Work(unet=sampled, decoded=judged, judged=judged).times(settings.local_prompts)


def _validation_pairs() -> int:
    """Those with a winner; 0 where the stage pairs has not run."""
    if not PAIRS.exists():
        return 0
    counted = read_json(PAIRS, "summary of the pairs")
    return int(counted["labels"]["validation"]["decided"])
