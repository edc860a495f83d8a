"""Results of the same experiment with other training seeds, saved in git: one file a seed, by `spo keep`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import Params
from spo.config.reading import WITHOUT_EFFECT_ON_OUTPUTS
from spo.evaluation.results import COLUMNS, check_comparisons, read_comparisons
from spo.runtime.files import read_json, write_json
from spo.runtime.messages import public
from spo.tracking import dvc_lock
from spo.tracking.provenance import flatten

if TYPE_CHECKING:
    from pandas import DataFrame

FOLDER = Path("reports/seeds")
NOT_COMPARED = (*WITHOUT_EFFECT_ON_OUTPUTS, "report", "seed")  # the other sections have to be the same
PER_METHOD = ("align", "generate")  # sections with a part for each method


@dataclass(frozen=True)
class Seeds:
    """What FOLDER has beside the run that is shown."""

    comparisons: Mapping[int, Sequence[Mapping[str, Any]]]  # by seed
    others: Mapping[str, str]  # files of other experiments, and the first key that differs


def settings(params: Params) -> dict[str, Any]:
    """All that two runs must have in common to differ in their seed alone."""
    dumped: dict[str, Any] = params.model_dump(mode="json", exclude=set(NOT_COMPARED))
    return {name: public(section) for name, section in dumped.items()}


def read(params: Params, folder: Path = FOLDER) -> Seeds:
    """Read the results of other seeds."""
    comparisons, others = {}, {}
    for path in sorted(folder.glob("*.json")):
        keys, then = ("seed", "settings", "comparisons"), "remove it and run `spo keep` again"
        content = read_json(path, "results of a seed", keys=keys, then=then)
        try:
            check_comparisons(path, content["comparisons"], COLUMNS, then)
            differs = _first_difference(settings(params), content["settings"])
        except (AttributeError, TypeError):  # other types than those of `spo keep`
            raise ValueError(f"{path}: not a file of `spo keep`; {then}") from None
        if differs:
            others[path.name] = differs
        elif content["seed"] != params.seed:
            comparisons[content["seed"]] = content["comparisons"]
    return Seeds(comparisons, others)


def save(params: Params) -> Path:
    """Write FOLDER/SEED.json from the report of these parameters; one of other parameters is refused."""
    entry = dvc_lock.read().get("report")
    if entry is None:
        raise ValueError("keep: dvc.lock has no report; run `spo repro` first")
    shown = params.model_dump(mode="json", exclude=set(NOT_COMPARED) - {"seed"})
    made, now = flatten(entry.params.get("params.yaml", {})), flatten(shown)
    for key in now:
        if key in made and made[key] != now[key]:
            raise ValueError(
                f"keep: the report is of a run with {key} = {json.dumps(made[key])}, params.yaml has "
                f"{json.dumps(now[key])}; run `spo repro` first"
            )
    path = FOLDER / f"{params.seed}.json"
    rows = [{key: row[key] for key in COLUMNS} for row in read_comparisons()]
    write_json(path, {"seed": params.seed, "settings": settings(params), "comparisons": rows})
    return path


def _first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """A key whose values differ; a method that only one of the runs has makes no difference to the others."""
    sides = [dict(ours), dict(theirs)]
    for section in PER_METHOD:
        parts = [side.get(section, {}) for side in sides]
        for side, part in zip(sides, parts, strict=True):
            side[section] = {k: v for k, v in part.items() if all(p.get(k) is not None for p in parts)}
    one, other = map(flatten, sides)
    return next((key for key in {**one, **other} if one.get(key) != other.get(key)), None)


def table(seed: int, rows: Sequence[Mapping[str, Any]], seeds: Seeds) -> DataFrame | None:
    """The mean differences of `rows` by training seed, their mean and their standard deviation.

    Args:
        seed: of this run, whose comparisons are `rows`.

    Returns:
        A row for each comparison (method, baseline, metric) of two seeds or more; None without one.
    """
    from pandas import DataFrame

    found: dict[str, dict[tuple[str, str, str], float]] = {}
    for number, comparisons in sorted({**seeds.comparisons, seed: rows}.items()):
        values = {(r["method"], r["baseline"], r["metric"]): r["mean_difference"] for r in comparisons}
        found[f"seed {number}"] = values
    frame = DataFrame(found).reindex(list(found[f"seed {seed}"]))
    frame = frame[frame.notna().sum(axis=1) > 1]
    return None if frame.empty else frame.assign(mean=frame.mean(axis=1), std=frame.std(axis=1))
