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

    settings = params.registry
    metrics = (*settings.improves, *settings.holds)
    unknown = [m for m in metrics if m not in statistics.metrics(candidate)]
    if unknown:
        raise ValueError(
            f"registry: unknown score {unknown[0]!r}; known: {', '.join(statistics.metrics(candidate))}"
        )
    try:
        statistics.check_same_rows("the candidate", candidate, against, baseline)
    except ValueError as error:
        return {"rows": str(error)}
    candidate, baseline = statistics.prompt_means(candidate), statistics.prompt_means(baseline)
    if (n := len(candidate)) < settings.min_prompts:
        return {"prompts": f"scores of {n} prompts; registry.min_prompts is {settings.min_prompts}"}
    reasons = {}
    for metric in dict.fromkeys(metrics):
        bound = 0.0 if metric in settings.improves else -settings.holds[metric]
        pair = candidate[metric].to_numpy(), baseline[metric].to_numpy()
        row = statistics.compare(*pair, params.report.bootstrap_samples, params.seed)
        enough = row["ci_low"] > bound if metric in settings.improves else row["ci_low"] >= bound
        if not enough:
            interval = f"{row['mean_difference']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
            rule = "must exceed 0" if metric in settings.improves else f"must not be below {bound:g}"
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
