"""Write docs/benchmarks.md from the measurements."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.growth import Curve
from benchmarks.measure import Result

TEXT = Path(__file__).with_name("text.md")
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "open_clip_torch")
# largest ratios; for scoring, the smallest speed-up over one by one
TARGETS = {"training step": 0.45, "iteration": 0.70, "generation": 1.0}
MEMORY_TARGET, SCORING_TARGET = 0.6, 5.0


@dataclass(frozen=True)
class Measured:
    """The measurements on a page. `memory`: MB by ours and official, as `memory.measure` gives them."""

    results: Sequence[Result]
    memory: Mapping[str, Mapping[str, float]]
    growth: Sequence[Curve]
    sizes: str  # of the SPO cases, in words

    @property
    def memory_ratio(self) -> float:
        return self.memory["ours"]["beyond"] / self.memory["official"]["beyond"]


def render(measured: Measured) -> str:
    """The page in Markdown."""
    head = f"""# Benchmarks

Written by `make bench` on {datetime.now(UTC):%Y-%m-%d}; the texts are in `benchmarks/text.md`.
{_machine()}

{measured.sizes}

Both sides have the same weights and inputs, and their results are compared before they are timed; rounds are
interleaved. Times are CPU time, which other work on the machine disturbs least. Ratio: our median over the
other median, with the lowest and highest ratio within a round.
"""
    parts = [head, _times(measured.results), _memory(measured), _targets(measured), _growth(measured.growth)]
    return "\n".join([*parts, TEXT.read_text(encoding="utf-8")])


def _machine() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"{_processor()}, one thread, fp32, no GPU. Python {platform.python_version()}, {libraries}."


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _times(results: Sequence[Result]) -> str:
    header = [
        "what",
        "compared with",
        "ours",
        "other",
        "ratio",
        "ratio of wall time",
        "rounds",
        "difference",
    ]
    rows = [
        [
            r.name,
            r.against,
            f"{_ms(r.ours_ms)} per {r.unit}",
            _ms(r.other_ms),
            f"**{r.ratio:.2f}** ({r.lowest:.2f} to {r.highest:.2f})",
            f"{r.clock_ratio:.2f}",
            str(r.rounds),
            f"{r.difference:.1g}",
        ]
        for r in results
    ]
    difference = "Difference: the largest one between the two results (for generation in steps of 1/255).\n"
    return "## Time\n\n" + table(header, rows) + "\n" + difference


def _ms(milliseconds: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{milliseconds:.3g}'):,g} ms"


def _memory(measured: Measured) -> str:
    header = ["resident memory, MB", "models loaded", "peak of an iteration", "beyond the loaded models"]
    rows = [
        [side, *(f"{measured.memory[side][key]:.0f}" for key in ("loaded", "peak", "beyond"))]
        for side in ("ours", "official")
    ]
    ratio = f"Ratio of the memory beyond the loaded models: **{measured.memory_ratio:.2f}**.\n"
    return "## Memory\n\n" + table(header, rows) + "\n" + ratio


def _targets(measured: Measured) -> str:
    rows = []
    for r in measured.results:
        for start, target in TARGETS.items():
            if r.name.startswith(start):
                rows.append([r.name, f"at most {target:.2f}", f"{r.ratio:.2f}", _met(r.ratio <= target)])
        if r.name.startswith("scoring"):
            faster = 1 / r.ratio
            rows.append(
                [r.name, f"{SCORING_TARGET:.0f} times", f"{faster:.1f}", _met(faster >= SCORING_TARGET)]
            )
    ratio = measured.memory_ratio
    rows.append(["memory", f"at most {MEMORY_TARGET:.2f}", f"{ratio:.2f}", _met(ratio <= MEMORY_TARGET)])
    return "## Targets\n\n" + table(["what", "target", "measured", ""], rows)


def _met(reached: bool) -> str:
    return "met" if reached else "missed"


def _growth(found: Sequence[Curve]) -> str:
    header = ["against", "of", "sizes", "CPU seconds", "exponent", "MB of tensors", "exponent"]
    rows = [
        [
            curve.name,
            curve.what,
            ", ".join(map(str, curve.sizes)),
            ", ".join(f"{s:.2f}" for s in curve.seconds),
            f"{curve.exponent:.2f}",
            ", ".join(f"{m:.0f}" for m in curve.megabytes),
            f"{curve.memory_exponent:.2f}",
        ]
        for curve in found
    ]
    image = "\n![Time and memory over sizes](benchmarks/growth.png)\n"
    return "## Growth\n\n" + table(header, rows) + image
