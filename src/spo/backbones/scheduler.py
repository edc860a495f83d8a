"""The noise schedule that a checkpoint announces, with the overrides of params.yaml."""

from collections.abc import Mapping
from typing import Any

from spo import config
from spo.backbones.families import FAMILIES
from spo.diffusion.flow import FLOW_SAMPLER, check_flow
from spo.diffusion.schedule import Schedule, check_process
from spo.runtime.messages import first_line

# Settings of training: keys that a file omits have the defaults of the scheduler class that it names.
TRAINED_WITH = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr", "variance_type", "timestep_type", "use_flow_sigmas"),
)


def load(announced: Mapping[str, Any], flow: bool, where: str) -> Any:
    """Build the scheduler of the class that scheduler_config.json names.

    Refused are other processes than discrete-time DDPM, or with `flow` than rectified flow.
    """
    import diffusers

    try:
        (check_flow if flow else check_process)(announced)
        default = FLOW_SAMPLER if flow else "DDIMScheduler"
        kind = getattr(diffusers, announced.get("_class_name", default))
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
    family, given = FAMILIES[settings.family], settings.scheduler.model_dump(exclude_none=True)
    if family.flow and given:
        raise ValueError(
            f"backbone.scheduler.{min(given)} is for DDPM, but {where} is a flow; set it to null"
        )
    over = {**marks, **given}
    used = dict(scheduler.config)
    for key in set(used.pop("_use_default_values", ())) - set(TRAINED_WITH):
        del used[key]
    used |= {key: value for key, value in family.scheduler.items() if key in scheduler.config}
    used |= {"_class_name": type(scheduler).__name__, **over}
    if family.flow:  # `load` has checked its file
        return used
    scheduler.register_to_config(**over)
    try:
        Schedule.from_config(used, 1)
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}; if the file is wrong, override it by backbone.scheduler"
        ) from None
    return used
