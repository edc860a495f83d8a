"""The counted bytes and FLOPs of a stage."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple


class Phase(NamedTuple):
    """The cost of one run of a phase."""

    peak: int  # bytes on the device
    flops: int
    times: float  # that it runs in the stage
    needs_valid_pairs: bool


class Base(NamedTuple):
    """Sizes of the base."""

    unet_parameters: int
    vae_parameters: int
    latent_shape: tuple[int, int, int]
    unet_flops: int  # of one sample's forward pass


class Count:
    """Bytes and FLOPs of a stage, phase by phase."""

    def __init__(self, base: Base, counter: Any) -> None:
        self.base, self._counter = base, counter
        self.text = ""  # what the stage runs
        self.weights = 0  # bytes of its models
        self.phases: dict[str, Phase] = {}

    def run(
        self, name: str, phase: Callable[[], Any], times: float = 0.0, needs_valid_pairs: bool = False
    ) -> Any:
        """Run a phase once and count it; returns what it does."""
        gc.collect()
        self.weights = self.weights or self._counter.live
        self._counter.restart()
        result = phase()
        self.phases[name] = Phase(self._counter.peak, self._counter.flops, times, needs_valid_pairs)
        return result

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return max(phase.peak for phase in self.phases.values())

    def flops(self, valid: bool = True) -> float:
        """FLOPs of the whole stage, if every pair of a rollout is valid, or none."""
        phases = [phase for phase in self.phases.values() if valid or not phase.needs_valid_pairs]
        return sum(phase.flops * phase.times for phase in phases)
