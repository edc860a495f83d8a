"""The noise schedule that a checkpoint announces, with the overrides of params.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spo import config
from spo.backbones.parts import reach, settings_of
from spo.diffusion.schedule import Schedule, check_process

# Settings of training: keys that a file omits have the defaults of the scheduler class that it names.
TRAINED_WITH = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr", "variance_type", "timestep_type", "use_flow_sigmas"),
)
# Keys that diffusers' Stable Diffusion pipeline overwrites, whatever the file says.
SET_BY_PIPELINE = ("steps_offset", "clip_sample")


def load(name: str, revision: str | None, where: str) -> Any:
    """Load the scheduler of a diffusers folder or hub id, with the class that its config names.

    Raises:
        ValueError: no scheduler, or one of a model that is not a discrete-time DDPM.
    """
    import diffusers

    base = diffusers.DDIMScheduler
    announced = reach(where, name, lambda: base.load_config(name, subfolder="scheduler", revision=revision))
    announced = settings_of(announced, f"{where}: scheduler/scheduler_config.json")
    try:
        check_process(announced)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    kind = getattr(diffusers, announced.get("_class_name", base.__name__))
    if hasattr(kind, "_backends"):  # diffusers' placeholder for a sampler whose library is not installed
        kind = base
    return reach(where, name, lambda: kind.from_config(announced))


def effective(
    scheduler: Any, family: str, marks: Mapping[str, Any], override: config.Scheduler, where: str
) -> dict[str, Any]:
    """The scheduler config with which a checkpoint is used.

    Sampler settings that the file omits are omitted here too: DDIM has its own defaults for them.

    Args:
        scheduler: of the diffusers pipeline.
        marks: of a single file, see `single_file.marks`; they take precedence over the scheduler's config.
        override: `backbone.scheduler` of params.yaml, which takes precedence over both.
        where: the checkpoint's name in errors.

    Raises:
        ValueError: a model that is not a discrete-time DDPM, or unsupported settings.
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
            f"{where}: {error}; if the file is wrong, override it by backbone.scheduler"
        ) from None
    return used


def overridden(override: config.Scheduler) -> dict[str, Any]:
    """The scheduler keys that params.yaml overrides."""
    return {k: v for k, v in override.model_dump().items() if v is not None}
