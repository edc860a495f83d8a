"""What the stages, the report and the dry run need to know of an alignment method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spo.config import Params
from spo.types import Backbone, Method, NoiseSchedule


@dataclass(frozen=True)
class MethodSpec:
    """One alignment method."""

    name: str  # its section in `align` of params.yaml
    title: str  # in tables and figures
    paper: str  # full name and arXiv number, for the model card
    reads: tuple[str, ...]  # outputs of earlier stages that it learns from
    trained_first: tuple[str, ...]  # stages whose training counts in its cost, as `preference`
    divergence: str  # the metric of its loss that measures the distance to the reference model
    build: Callable[[Params, Backbone], Method]
    cost: Callable[[Params, Callable[[int], NoiseSchedule]], Cost]  # by the backbone's `schedule`
    # from its section: decay in [0,1) of the weight average that collects batches; 0: no average
    sampler_ema: Callable[[Any], float] = lambda section: 0.0


@dataclass(frozen=True)
class Cost:
    """The most that a training computes (all pairs are valid), in forward passes of one sample of the UNet.

    Guidance counts twice, a backward pass as two forwards, a down path as a part of one.
    """

    text: str  # one line for the dry run
    updates: float
    rollouts: float = 0

    @property
    def unet_samples(self) -> int:
        return round(self.rollouts + self.updates)
