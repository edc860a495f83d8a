"""What a checkpoint announces of its noise schedule, and what params.yaml says instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spo import config
from spo.backbones.parts import reach
from spo.diffusion.schedule import Schedule, check_process

# What a model was trained with: keys that a file leaves out have the defaults of the file's own class.
TRAINED_WITH = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr", "variance_type", "timestep_type", "use_flow_sigmas"),
)
# What diffusers' Stable Diffusion pipeline sets in a file's place, whatever it says.
SET_BY_PIPELINE = ("steps_offset", "clip_sample")


def load(name: str, revision: str | None, where: str) -> Any:
    """The scheduler of a diffusers folder or hub id, by the class that its own file names.

    Raises:
        ValueError: none there, or one of a model that is no discrete-time DDPM.
    """
    import diffusers

    base = diffusers.DDIMScheduler
    announced = reach(where, name, lambda: base.load_config(name, subfolder="scheduler", revision=revision))
    try:
        check_process(announced)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    kind = getattr(diffusers, announced.get("_class_name", base.__name__))
    if hasattr(kind, "_backends"):  # a stand-in for a sampler that needs a library which is not installed
        kind = base
    return reach(where, name, lambda: kind.from_config(announced))


def effective(
    scheduler: Any, family: str, marks: Mapping[str, Any], override: config.Scheduler, where: str
) -> dict[str, Any]:
    """The scheduler_config that a checkpoint is used with.

    Keys that say how the saved sampler steps, and that the file leaves out, are left out here too: DDIM has
    its own defaults for them.

    Args:
        scheduler: the one of the diffusers pipeline.
        marks: of a single file, see `single_file.marks`; they go before the file's description.
        override: `backbone.scheduler` of params.yaml, which goes before both.
        where: names the checkpoint in errors.

    Raises:
        ValueError: no discrete-time DDPM, or settings that are not supported.
    """
    announced = dict(scheduler.config)
    assumed = set(announced.pop("_use_default_values", ())) - set(TRAINED_WITH)
    if family == "sd":
        assumed -= set(SET_BY_PIPELINE)
    used = {k: v for k, v in announced.items() if k not in assumed}
    used["_class_name"] = type(scheduler).__name__
    used |= {**marks, **overridden(override)}
    try:
        Schedule.from_config(used, 1)
    except ValueError as error:
        raise ValueError(
            f"backbone.checkpoint: {where}: {error}; what the file says wrongly, backbone.scheduler can set"
        ) from None
    return used


def overridden(override: config.Scheduler) -> dict[str, Any]:
    """The keys that params.yaml sets."""
    return {k: v for k, v in override.model_dump().items() if v is not None}
