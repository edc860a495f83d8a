"""Time two ways to compute the same result in interleaved rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One computation, by this package and by the code it is compared with."""

    name: str
    against: str
    unit: str  # of `count`: pair, prompt, image
    count: int
    ours: Run
    other: Run
    tolerance: float = 1e-5  # of the results, absolute and relative

    def check(self) -> float:
        """Compare the results of both sides; returns the largest difference.

        Raises:
            AssertionError: they differ by more than the tolerance, or are fewer than there should be.
        """
        ours, other = self.ours().float().cpu(), self.other().float().cpu()
        least = 1 if self.unit in ("prompt", "pair", "iteration") else self.count
        assert ours.numel() >= least, f"{self.name}: {ours.numel()} results, fewer than {least}"

        def message(text: str) -> str:
            return f"{self.name}: ours differs from {self.against}: {text}"

        torch.testing.assert_close(ours, other, atol=self.tolerance, rtol=self.tolerance, msg=message)
        return float((ours - other).abs().max())


@dataclass(frozen=True)
class Result:
    """Medians over rounds: milliseconds of CPU time a unit, and the ratios ours / other of these medians."""

    name: str
    against: str
    unit: str
    rounds: int
    ours_ms: float
    other_ms: float
    ratio: float
    lowest: float  # of the ratios within a round
    highest: float
    clock_ratio: float  # of wall time
    difference: float  # the largest between the results


def compare(case: Case, rounds: int) -> Result:
    """Check a case, which also warms both sides up, then time it in interleaved rounds."""
    difference = case.check()
    ours: list[tuple[float, float]] = []
    other: list[tuple[float, float]] = []
    for number in range(rounds):
        sides = [(ours, case.ours), (other, case.other)]
        for times, run in sides if number % 2 == 0 else reversed(sides):
            times.append(timed(run))
    ratios = [a[0] / b[0] for a, b in zip(ours, other, strict=True)]
    (ours_cpu, ours_clock), (other_cpu, other_clock) = _medians(ours), _medians(other)
    return Result(
        name=case.name,
        against=case.against,
        unit=case.unit,
        rounds=rounds,
        ours_ms=ours_cpu * 1000 / case.count,
        other_ms=other_cpu * 1000 / case.count,
        ratio=ours_cpu / other_cpu,
        lowest=min(ratios),
        highest=max(ratios),
        clock_ratio=ours_clock / other_clock,
        difference=difference,
    )


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one call: CPU time of the process, and wall time."""
    _wait()
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    _wait()
    return time.process_time() - cpu, time.perf_counter() - clock


def _wait() -> None:
    """Wait until the GPU, if there is one, has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _medians(times: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)
