"""The rules of a `validation` section: the gain of a model, and what ends or stops a training."""

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


def no_better(validations: Sequence[Scores], scorers: Sequence[str]) -> str | None:
    """The reason to end a training at the last of its validations, else None; the first is the start.

    The gain must exceed all before, and no scorer's mean paired difference to its own best validation may be
    below minus one standard error.
    """
    *earlier, now = validations
    gains = [standardised_gain(validations[0], scores, scorers) for scores in validations]
    if gains[-1] <= max(gains[:-1]):
        return f"the gain, {gains[-1]:.3f}, is not above the best before, {max(gains[:-1]):.3f} (stop)"
    for name in scorers:
        best = max((scores[name] for scores in earlier), key=fmean)
        mean, error = _change(best, now[name])
        if mean < -error:
            return f"{name} is {-mean:.4g} below its best, more than a standard error of {error:.2g} (stop)"
    return None


def clipscore_fell(start: Scores, now: Scores, limit: float | None) -> str | None:
    """The reason to end if CLIPScore fell by more than `limit` standard deviations at the start."""
    if limit is None or (change := standardised_gain(start, now, ["clipscore"])) >= -limit:
        return None
    return f"clipscore fell by {-change:.2f} standard deviations (max_clipscore_fall {limit:g})"


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
        mean, error = _change(before, now[name])
        if mean < -limit * error:
            return (
                f"{name} of validation prompts fell by {-mean:.4g}, more than {limit:g} standard errors "
                f"of {error:.2g} (max_fall)"
            )
    return None


def _change(before: Sequence[float], now: Sequence[float]) -> tuple[float, float]:
    """The mean difference of paired scores, and its standard error."""
    differences = [b - a for a, b in zip(before, now, strict=True)]
    return fmean(differences), stdev(differences) / math.sqrt(len(differences))


def diversity_passed(start: float, now: float, limit: float | None) -> str | None:
    """The reason to stop if the diversity is below the limit, a fraction of that at the start, else None."""
    if limit is None or now >= limit * start:
        return None
    return f"diversity fell from {start:.4g} to {now:.4g} (min_diversity {limit:g})"
