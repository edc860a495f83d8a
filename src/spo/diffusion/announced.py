"""The noise schedule that a scheduler_config.json announces, whatever its kind."""

from collections.abc import Mapping
from typing import Any

from spo.diffusion.flow import FLOW_SAMPLER, FlowSchedule
from spo.diffusion.schedule import Schedule
from spo.types import NoiseSchedule


def schedule_of(
    scheduler_config: Mapping[str, Any],
    num_inference_steps: int,
    image_tokens: int | None = None,
    last_sigma: float | None = None,
) -> NoiseSchedule:
    """A flow where the file names its class, else a discrete DDPM; the other arguments are those of
    `FlowSchedule.from_config`.
    """
    if scheduler_config.get("_class_name") == FLOW_SAMPLER:
        return FlowSchedule.from_config(scheduler_config, num_inference_steps, image_tokens, last_sigma)
    return Schedule.from_config(scheduler_config, num_inference_steps)
