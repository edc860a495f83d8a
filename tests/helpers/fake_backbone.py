"""What every stand-in for a `types.Backbone` shares."""

from collections.abc import Mapping
from typing import Any

from spo.diffusion.announced import schedule_of
from spo.types import Budget, Conditioning, NoiseSchedule


class Whole:
    """Everything fits in one call."""

    budget = Budget()
    scheduler_config: Mapping[str, Any] = {}

    def encode_prompts(self, prompts) -> Conditioning:
        raise AssertionError

    def schedule(self, num_inference_steps: int) -> NoiseSchedule:
        return schedule_of(self.scheduler_config, num_inference_steps)

    def empty_prompt(self) -> Conditioning:
        return self.encode_prompts([""])

    def remember_prompts(self, prompts) -> None:
        """Encoders are small."""

    def guided(self, conditioning, guidance: float) -> tuple[Conditioning, float]:
        return conditioning, guidance

    def rest(self) -> None:
        """The UNet stays where it is."""
