"""Results of other runs, kept in git to be compared with this one: other training seeds, other settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from spo.config.reading import WITHOUT_EFFECT_ON_OUTPUTS
from spo.evaluation.efficiency import Course
from spo.runtime.files import read_json
from spo.tracking.provenance import flatten

FOLDER = Path("reports/runs")
WITHOUT_EFFECT = (*WITHOUT_EFFECT_ON_OUTPUTS, "report")  # sections that change no result
PER_METHOD = ("align", "generate")  # sections with a part for each method


@dataclass(frozen=True)
class KeptRun:
    """What `spo keep` wrote of one run."""

    name: str
    changes: Mapping[str, Any]  # keys of params.yaml that differ from this run's, with the kept run's values
    comparisons: Sequence[Mapping[str, Any]]
    courses: Mapping[str, tuple[str, Course]]  # by method: the column of the quality, and its course

    @property
    def is_another_seed(self) -> bool:
        return set(self.changes) == {"seed"}


@dataclass(frozen=True)
class SeedRow:
    """One difference between two variants by training seed."""

    method: str
    baseline: str
    metric: str
    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        return fmean(self.by_seed.values())

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds."""
        return stdev(self.by_seed.values())


def read(params: Mapping[str, Any], folder: Path = FOLDER) -> list[KeptRun]:
    """Read the kept runs that differ from `params`, by name; a run equal to this one is left out.

    Raises:
        ValueError: a file that `spo keep` did not write.
    """
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = read_json(path, "saved run", then="remove it")
            changes = changed(params, content["params"])
            courses = {m: (c.pop("column"), Course(**c)) for m, c in content["courses"].items()}
            run = KeptRun(path.stem, changes, content["comparisons"], courses)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a file of `spo keep` ({type(error).__name__}: {error}); remove it"
            ) from None
        if changes:
            runs.append(run)
    return runs


def changed(params: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """The keys whose values differ, with the kept run's value; None for one that it does not have.

    A method that only one of the two runs has changes nothing for the others and does not count.
    """
    ours, theirs = ({k: v for k, v in p.items() if k not in WITHOUT_EFFECT} for p in (params, kept))
    for section in PER_METHOD:
        common = ours.get(section, {}).keys() & theirs.get(section, {}).keys()
        for side in (ours, theirs):
            side[section] = {k: v for k, v in side.get(section, {}).items() if k in common}
    flat, other = flatten(ours), flatten(theirs)
    return {k: other.get(k) for k in {**flat, **other} if flat.get(k) != other.get(k)}


def over_seeds(seed: int, rows: Sequence[Mapping[str, Any]], kept: Sequence[KeptRun]) -> list[SeedRow]:
    """Each difference of `rows` that was also measured with other training seeds.

    Args:
        seed: of this run, whose comparisons are `rows`.
    """
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    others = [(int(k.changes["seed"]), k.comparisons) for k in kept if k.is_another_seed]
    for number, comparisons in [(seed, rows), *others]:
        for row in comparisons:
            key = (row["method"], row["baseline"], row["metric"])
            found.setdefault(key, {})[number] = row["mean_difference"]
    return [SeedRow(*key, values) for key, values in found.items() if seed in values and len(values) > 1]


def samples_to_reach(course: Course, quality: float) -> float | None:
    """UNet samples up to the first validation that reaches the quality; None: it never does."""
    reached = zip(course.unet_samples, course.quality, strict=True)
    return next((samples for samples, value in reached if value >= quality), None)
