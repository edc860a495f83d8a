"""Write docs/benchmarks-gpu.md from measurements on a GPU."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from benchmarks.measure import Result
from benchmarks.page import LIBRARIES, table

TITLES = {"sd15": "SD 1.5, 512 pixels", "sdxl": "SDXL, 1024 pixels"}


@dataclass(frozen=True)
class Measured:
    """One family on one device. Seconds are of one sample."""

    name: str
    results: list[Result]
    peak: Mapping[str, float]  # GiB by case, of both sides one after the other; empty on a CPU
    seconds: Mapping[str, float]  # by kind of work
    flops: Mapping[str, int]  # by kind of work
    matmul: float  # FLOP/s of a large bf16 product
    hours: Mapping[str, float]  # of each method's recipe, every pair valid


def render(found: Sequence[Measured], tiny: bool) -> str:
    """The page in Markdown."""
    where = "a CPU, in tiny shapes and fp32: no figures of a GPU" if tiny else _card()
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    head = f"""# Benchmarks on a GPU

Written by `python -m benchmarks.gpu{" --tiny" if tiny else ""}` on {datetime.now(UTC):%Y-%m-%d}, on {where}.
Python {platform.python_version()}, {libraries}.
Weights are random, in the shapes of the released checkpoints.

Both sides have the same weights and inputs, and their results are compared before they are timed; rounds are
interleaved, after one that warms up. Times are wall time, with the device idle before and after.
Ratio: our median over the other median.
"""
    return "\n".join([head, *(_family(one) for one in found)])


def _card() -> str:
    return f"one {torch.cuda.get_device_name()}, bf16, CUDA {torch.version.cuda}"


def _family(one: Measured) -> str:
    rows = [
        [
            r.name,
            r.against,
            f"**{r.clock_ratio:.2f}**",
            str(r.rounds),
            f"{r.difference:.1g}",
            f"{one.peak[r.name]:.1f}" if r.name in one.peak else "-",
        ]
        for r in one.results
    ]
    header = ["what", "compared with", "ratio", "rounds", "difference", "peak of both sides, GiB"]
    used = [
        [kind, f"{1000 * s:.3g}", f"{one.flops[kind] / 1e9:.1f}", f"{_utilisation(one, kind):.2f}"]
        for kind, s in one.seconds.items()
    ]
    known = ["one sample of", "ms", "GFLOP", "fraction of the rate of a matrix product"]
    recipes = [[name, f"{hours:.0f}"] for name, hours in one.hours.items()]
    return "\n".join(
        [
            f"## {TITLES[one.name]}\n",
            table(header, rows),
            f"A large matrix product runs at {one.matmul / 1e12:.3g} TFLOP/s.\n",
            table(known, used),
            "Hours of the published recipes (presets) on one such device at the UNet's rate:\n",
            table(["method", "hours"], recipes),
        ]
    )


def _utilisation(one: Measured, kind: str) -> float:
    """FLOP/s of a kind of work over those of a large matrix product."""
    return one.flops[kind] / one.seconds[kind] / one.matmul
