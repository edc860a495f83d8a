"""Paired statistics of variants that generated images of the same prompts from the same seeds.

Pure functions of arrays and tables. Intervals are percentile bootstrap intervals of the mean paired
difference (Efron and Tibshirani 1993, Sec. 13.3): prompts are resampled, each with both of its images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spo.data.prompts import key

if TYPE_CHECKING:
    from pandas import DataFrame

KEYS = ("index", "prompt", "seed")  # identify a row of scores; all other columns are metrics
CONFIDENCE = 0.95
CHUNK = 1_000_000  # resampled differences in memory at a time
DECIMALS = 8  # of written results


def compare(
    method_scores: NDArray[np.floating],
    baseline_scores: NDArray[np.floating],
    n_bootstrap: int,
    seed: int,
    min_rows: int = 2,
) -> dict[str, Any]:
    """Compare two variants on one metric, row by row.

    Args:
        method_scores: [n], higher is better.
        baseline_scores: [n], of the same prompts and seeds in the same order.
        n_bootstrap: resamples of the n rows.
        seed: of the resampling; the same seed gives the same interval.
        min_rows: of an interval; with fewer rows ci_low and ci_high are None.

    Returns:
        mean_method, mean_baseline, mean_difference (method - baseline), ci_low and ci_high (95 %),
        win_rate (fraction of rows where the method is better; a tie counts half) and n.
    """
    method, baseline = np.asarray(method_scores, float), np.asarray(baseline_scores, float)
    if method.ndim != 1 or method.shape != baseline.shape or not len(method):
        raise ValueError(
            f"paired scores must be two lists of the same length, not {method.shape} and {baseline.shape}"
        )
    for name, values in (("method", method), ("baseline", baseline)):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(f"the {name}'s score in row {bad[0]} is {values[bad[0]]}: scores must be finite")
    differences = method - baseline
    enough = len(differences) >= min_rows
    low, high = _interval(differences, n_bootstrap, seed) if enough else (None, None)
    result = {
        "mean_method": method.mean(),
        "mean_baseline": baseline.mean(),
        "mean_difference": differences.mean(),
        "ci_low": low,
        "ci_high": high,
        "win_rate": (differences > 0).mean() + (differences == 0).mean() / 2,
    }
    rounded = {k: None if v is None else round(float(v), DECIMALS) for k, v in result.items()}
    return {**rounded, "n": len(method)}


def mean_interval(scores: NDArray[np.floating], n_bootstrap: int, seed: int) -> tuple[float, float, float]:
    """The mean of scores [n], and the ends of its 95 % bootstrap interval."""
    values = np.asarray(scores, float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"a mean needs a list of finite scores, not {values.shape}")
    return float(values.mean()), *_interval(values, n_bootstrap, seed)


def _interval(differences: NDArray[np.floating], n_bootstrap: int, seed: int) -> tuple[float, float]:
    """The middle 95 % of the means of `n_bootstrap` resamples of differences [n]."""
    generator = np.random.default_rng(seed)
    n = len(differences)
    means = np.empty(n_bootstrap)
    step = max(1, CHUNK // n)
    for start in range(0, n_bootstrap, step):
        part = means[start : start + step]
        part[:] = differences[generator.integers(n, size=(len(part), n))].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def comparisons(
    scores: Mapping[str, DataFrame],
    baselines: Sequence[str],
    n_bootstrap: int,
    seed: int,
    min_prompts: int = 2,
) -> list[dict[str, Any]]:
    """Compare every variant with every baseline on every metric: the rows of reports/comparisons.json.

    `baselines` are in order from the plainest: a variant that is a baseline itself is compared only with the
    baselines before it, so that no pair occurs twice.

    Args:
        scores: a table per variant, with columns index, prompt, seed, and one per metric.
        min_prompts: of an interval, as `min_rows` of `compare`.
    """
    missing = [b for b in baselines if b not in scores]
    if missing:
        raise ValueError(f"report.baselines: no scores of {missing[0]!r}; known: {', '.join(scores)}")
    rows: list[dict[str, Any]] = []
    aligned = [v for v in scores if v not in baselines]
    for method in (*aligned, *reversed(baselines)):
        against = baselines[: baselines.index(method)] if method in baselines else baselines
        for baseline in against:
            rows += _one_pair(scores, method, baseline, n_bootstrap, seed, min_prompts)
    return rows


def _one_pair(
    scores: Mapping[str, DataFrame], method: str, baseline: str, n_bootstrap: int, seed: int, min_prompts: int
) -> list[dict[str, Any]]:
    one, other = scores[method], scores[baseline]
    check_same_rows(method, one, baseline, other)
    one, other = prompt_means(one), prompt_means(other)
    rows = []
    for metric in metrics(one):
        try:
            columns = (one[metric].to_numpy(), other[metric].to_numpy())
            result = compare(*columns, n_bootstrap, seed, min_prompts)
        except ValueError as error:
            raise ValueError(f"{metric} of {method} and {baseline}: {error}") from None
        rows.append({"method": method, "baseline": baseline, "metric": metric, **result})
    return rows


def prompt_means(table: DataFrame) -> DataFrame:
    """Mean scores by prompt (its key), in the order of the prompts; the seed is that of the first image.

    The images of a prompt are no independent samples, so that intervals are of prompts.
    """
    names = table["prompt"].map(key)
    if names.is_unique:
        return table
    groups = table.groupby(names, sort=False)
    means = groups[metrics(table)].mean()
    return means.assign(prompt=groups["prompt"].first(), seed=groups["seed"].first()).reset_index(drop=True)


def metrics(table: DataFrame) -> list[str]:
    """The columns of a table that are metrics."""
    return [str(c) for c in table.columns if c not in KEYS]


def check_same_rows(method: str, one: DataFrame, baseline: str, other: DataFrame) -> None:
    """Check that two tables have the same metrics, and the same prompts and seeds in the same order."""
    if metrics(one) != metrics(other):
        raise ValueError(
            f"{method} and {baseline} have different metrics: {', '.join(metrics(one))}; "
            f"{', '.join(metrics(other))}: score both again"
        )
    if len(one) != len(other):
        raise ValueError(
            f"{method} has {len(one)} rows, {baseline} has {len(other)}; generate and score both again"
        )
    for column in ("prompt", "seed"):
        different = np.flatnonzero(one[column].to_numpy() != other[column].to_numpy())
        if len(different):
            row = int(different[0])
            a, b = one[column].tolist()[row], other[column].tolist()[row]
            raise ValueError(
                f"row {row} of the scores: {method} has {column} {a!r}, {baseline} has {b!r}; "
                "only the same prompts and seeds can be compared: generate and score both again"
            )
