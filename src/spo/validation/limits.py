"""The rules of a `validation` section: the gain of a model, and the limits that stop a training."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

Scores = Mapping[str, Sequence[float]]  # by scorer, of each prompt


def standardised_gain(start: Scores, now: Scores, scorers: Sequence[str]) -> float:
    """The mean over scorers of a score's mean gain, in standard deviations of its scores at the start.

    So a scorer's units do not decide how much it counts.
    """
    gains = []
    for name in scorers:
        spread = stdev(start[name])
        gains.append((fmean(now[name]) - fmean(start[name])) / spread if spread else 0.0)
    return fmean(gains)


def divergence_passed(name: str, metrics: Mapping[str, float], limit: float | None) -> str | None:
    """The reason to stop if the divergence from the reference is above the limit, else None."""
    if limit is None or metrics.get(name, 0.0) <= limit:
        return None
    return f"{name} to the reference is {metrics[name]:.4g} (max_divergence {limit:g})"


def scores_passed(start: Scores, now: Scores, limit: float | None) -> str | None:
    """The reason to stop if a score's mean paired difference to the start is below -limit standard errors."""
    if limit is None:
        return None
    for name, before in start.items():
        differences = [b - a for a, b in zip(before, now[name], strict=True)]
        mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
        if mean < -limit * error:
            return (
                f"{name} of validation prompts fell by {-mean:.4g}, more than {limit:g} standard errors "
                f"of {error:.2g} (max_fall)"
            )
    return None


def diversity_passed(start: float, now: float, limit: float | None) -> str | None:
    """The reason to stop if the diversity is below the limit, a fraction of that at the start, else None."""
    if limit is None or now >= limit * start:
        return None
    return f"diversity fell from {start:.4g} to {now:.4g} (min_diversity {limit:g})"
