"""The gate to the alias `champion`: the bounds of `registry`, and a check that scores are comparable."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import Params
from spo.runtime.files import read_json
from spo.stages import score
from spo.tracking import dvc_lock

if TYPE_CHECKING:
    from pandas import DataFrame


def gate(params: Params, candidate: DataFrame, baseline: DataFrame, against: str) -> dict[str, str]:
    """Apply the gate to scores paired by prompt and seed; returns the reason of each failure by metric."""
    from spo.evaluation import statistics

    settings, known = params.registry, statistics.metrics(candidate)
    metrics = dict.fromkeys([*settings.improves, *settings.holds])
    if unknown := [metric for metric in metrics if metric not in known]:
        raise ValueError(f"registry: unknown score {unknown[0]!r}; known: {', '.join(known)}")
    scores, drawing = {"the candidate": candidate, against: baseline}, params.report.bootstrap_samples
    try:
        compared = statistics.comparisons(scores, [against], drawing, params.seed)
    except ValueError as error:
        return {"rows": str(error)}
    rows = {row["metric"]: row for row in compared}
    if (n := compared[0]["n"]) < settings.min_prompts:
        return {"prompts": f"scores of {n} prompts; registry.min_prompts is {settings.min_prompts}"}
    reasons = {}
    for metric in metrics:
        row, improves = rows[metric], metric in settings.improves
        bound = 0.0 if improves else -settings.holds[metric]
        passed = row["ci_low"] > bound if improves else row["ci_low"] >= bound
        if not passed:
            interval = f"{row['mean_difference']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
            rule = "must exceed 0" if improves else f"must not be below {bound:g}"
            reasons[metric] = f"{metric} over {against} is {interval}: its lower bound {rule}"
    return reasons


def scored_by(variant: str = "spo") -> str:
    """SHA-256 of all that a variant's scores depend on: weights, parameters, code and libraries.

    As `spo score` and dvc.lock recorded it; scores with the same value are comparable.
    """
    recorded = _recorded(variant) or repr(score.libraries())
    entry = dvc_lock.read().get(f"score@{variant}")
    used = {k: v for k, v in entry.deps.items() if not k.startswith("outputs/images/")} if entry else {}
    content = [recorded, sorted(used.items()), entry.params if entry else {}]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _recorded(variant: str) -> str | None:
    """The hash that `spo score` recorded; None for scores of another program."""
    file = score.metrics_file(variant)
    return read_json(file, "metrics").get(score.SCORED_BY) if file.exists() else None


def scored_again(params: Params, images: Path) -> DataFrame:
    """Score images as the candidate was scored; its weights, code and libraries must be those here."""
    method = params.registry.method
    recorded = _recorded(method)
    if recorded not in (None, score.scored_by(params)):
        raise ValueError(
            f"outputs/scores/{method}.csv: made with other weights, code or libraries than are here; "
            f"run `spo score {method}` again"
        )
    return score.table(params, images).round(6)
