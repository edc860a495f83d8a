"""The noise schedule that a checkpoint announces, with the overrides of params.yaml."""

from collections.abc import Mapping
from typing import Any

from spo import config
from spo.backbones.families import FAMILIES
from spo.diffusion.schedule import Schedule, check_process
from spo.runtime.messages import first_line

# Settings of training: keys that a file omits have the defaults of the scheduler class that it names.
TRAINED_WITH = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr", "variance_type", "timestep_type", "use_flow_sigmas"),
)


def load(announced: Mapping[str, Any], where: str) -> Any:
    """Build the scheduler of the class that scheduler_config.json names; refuse other processes than DDPM."""
    import diffusers

    try:
        check_process(announced)
        kind = getattr(diffusers, announced.get("_class_name", "DDIMScheduler"))
        if hasattr(kind, "_backends"):  # diffusers' placeholder for a sampler whose library is not installed
            kind = diffusers.DDIMScheduler
        return kind.from_config(announced)
    except Exception as error:  # diffusers' classes raise several types for values that they do not take
        raise ValueError(f"{where}: scheduler/scheduler_config.json: {first_line(error, 300)}") from None


def effective(
    scheduler: Any, settings: config.Backbone, marks: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The scheduler config with which a checkpoint is used.

    Sampler settings that the file omits are omitted here too: DDIM has its own defaults for them.

    Args:
        scheduler: as `load` builds it. Values that override its file are written to it, so that a saved full
            fine-tune announces them.
        marks: of a single file, see `single_file.marks`; they take precedence over the scheduler's config,
            and `backbone.scheduler` of params.yaml over both.
    """
    over = {**marks, **{k: v for k, v in settings.scheduler.model_dump().items() if v is not None}}
    used = dict(scheduler.config)
    for key in set(used.pop("_use_default_values", ())) - set(TRAINED_WITH):
        del used[key]
    by_pipeline = FAMILIES[settings.family].scheduler
    used |= {key: value for key, value in by_pipeline.items() if key in scheduler.config}
    used |= {"_class_name": type(scheduler).__name__, **over}
    scheduler.register_to_config(**over)
    try:
        Schedule.from_config(used, 1)
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}; if the file is wrong, override it by backbone.scheduler"
        ) from None
    return used
