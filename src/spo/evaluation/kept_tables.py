"""What the report says of kept runs: other seeds, other settings, and the compute to reach their quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spo.evaluation.efficiency import Course
from spo.evaluation.kept_runs import KeptRun, over_seeds, samples_to_reach
from spo.evaluation.tables import Table
from spo.evaluation.verdict import interval, name, number


def seeds(seed: int, rows: Sequence[Mapping[str, Any]], kept: Sequence[KeptRun]) -> Table | None:
    """Mean differences by training seed, their mean and standard deviation; None without other seeds."""
    found = over_seeds(seed, rows, kept)
    if not found:
        return None
    columns = sorted({number for row in found for number in row.by_seed})
    cells = [
        [
            f"{name(row.method)} − {name(row.baseline)}: {name(row.metric)}",
            *(_signed(row.by_seed[c]) if c in row.by_seed else "–" for c in columns),
            _signed(row.mean),
            f"{row.spread:.3f}",
        ]
        for row in found
    ]
    return Table("", ["", *(f"seed {c}" for c in columns), "mean", "standard deviation"], cells)


def settings(kept: Sequence[KeptRun]) -> Table | None:
    """Differences from the base of runs with other settings than the seed; None without such runs."""
    cells = []
    for run in (k for k in kept if not k.is_another_seed):
        rows = [r for r in run.comparisons if r["baseline"] == "base"]
        for method in dict.fromkeys(r["method"] for r in rows if not r["method"].startswith("base")):
            own = {r["metric"]: r for r in rows if r["method"] == method}
            cells.append((_changes(run), name(method), own))
    if not cells:
        return None
    metrics = list(dict.fromkeys(m for *_, own in cells for m in own))
    table = [
        [changes, method, *(interval(own[m]) if m in own else "–" for m in metrics)]
        for changes, method, own in cells
    ]
    return Table("", ["settings", "method", *map(name, metrics)], table)


def longer_courses(quality: str, kept: Sequence[KeptRun]) -> dict[str, Course]:
    """The courses of runs with other settings for a method alone, by title."""
    return {
        f"{name(method)}, {_changes(run)}": course
        for run in kept
        for method, (column, course) in run.courses.items()
        if column == quality and all(key.startswith(f"align.{method}.") for key in run.changes)
    }


def compute_ratios(own: Mapping[str, tuple[str, Course]], kept: Sequence[KeptRun]) -> list[str]:
    """Sentences: when the methods of this run reach the best quality of a method trained otherwise."""
    sentences = []
    for method, (quality, course) in own.items():
        for title, other in longer_courses(quality, kept).items():
            if title.startswith(f"{name(method)}, "):
                continue
            best = max(other.quality)
            at = other.quality.index(best)
            if at == 0:  # it never was better than the base
                sentences.append(f"{title} is never better than the base model.")
                continue
            start = f"{title} is best after {_samples(other.unet_samples[at])} ({best:.3f})"
            reached = samples_to_reach(course, best)
            if reached is None:
                sentences.append(f"{start}; {name(method)} does not reach that ({max(course.quality):.3f}).")
                continue
            ratio = other.unet_samples[at] / reached
            sentences.append(
                f"{start}; {name(method)} reaches that by {_samples(reached)}, 1/{ratio:.1f} of it."
            )
    return sentences


def _samples(count: float) -> str:
    return f"{count / 1e3:,.0f} thousand UNet samples"


def _changes(run: KeptRun) -> str:
    """The settings that differ, by the shortest name: the last part of each key."""
    return ", ".join(f"{key.rpartition('.')[2]} {_value(value)}" for key, value in run.changes.items())


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else number(value)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
