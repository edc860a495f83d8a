"""Describe comparisons in words: names, numbers, winners and margins, and scores that contradict another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spo.config import METHODS
from spo.methods import method_spec

if TYPE_CHECKING:
    from pandas import DataFrame

NAMES = {
    "base": "Base",
    "base_high_guidance": "Base, more guidance",
    **{method: method_spec(method).title for method in METHODS},
    "diffusion_dpo_high_guidance": "Diffusion-DPO, more guidance",
    "pickscore": "PickScore",
    "hps": "HPS ×100",
    "aesthetic": "Aesthetic score",
    "imagereward": "ImageReward",
    "clipscore": "CLIPScore",
    "oracle_aesthetic": "Oracle: aesthetics",
    "oracle_alignment": "Oracle: alignment",
    "n_train": "training pairs",
    "preference": "Step-aware (the SPM)",
    "preference_latent": "Latent reward model",
    "preference_unconditioned": "Without step conditioning",
    "preference_clean_only": "Trained on clean images only",
}
PROSE = {
    "hps": "HPS",
    "aesthetic": "the aesthetic score",
    "oracle_aesthetic": "the oracle's aesthetics",
    "oracle_alignment": "alignment with the prompt",
    "base": "the base model",
}
MARKS = {"better": "▲ better", "worse": "▼ worse", "unclear": "· unclear"}
VERBS = {"better": "beats", "worse": "is worse than", "unclear": "does not clearly differ from"}
CHANGES = {"better": "raises", "worse": "lowers", "unclear": "does not clearly change"}


def name(key: str) -> str:
    """The display name of a variant, metric, model or fact."""
    return NAMES.get(key, key.replace("_", " "))


def number(value: Any) -> str:
    """Format a fact: floats with four digits."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def signed(value: float, row: Mapping[str, Any]) -> str:
    """Format a difference or an end of its interval: three decimals, five for a narrow interval."""
    narrow = has_interval(row) and row["ci_high"] - row["ci_low"] < 0.004
    text = f"{value:+.{5 if narrow else 3}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def has_interval(row: Mapping[str, Any]) -> bool:
    """Whether there are enough prompts for an interval."""
    return row["ci_low"] is not None


def outcome(row: Mapping[str, Any]) -> str:
    """`better` or `worse` where the interval excludes 0, else `unclear`, as without an interval."""
    if not has_interval(row):
        return "unclear"
    if row["ci_low"] > 0:
        return "better"
    return "worse" if row["ci_high"] < 0 else "unclear"


def mark(row: Mapping[str, Any]) -> str:
    """The outcome as the page's tables show it."""
    return MARKS[outcome(row)] if has_interval(row) else "too few prompts"


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the first method won and by how much: by one score over its rivals, by the others over the base.

    The score is the oracle's where there is one, else the first; the rivals are the first baseline and the
    other methods.
    """
    own = [r for r in rows if r["method"] == rows[0]["method"]]
    method, first = _in_text(own[0]["method"]), own[0]["baseline"]
    if not all(map(has_interval, own)):
        return f"{own[0]['n']} prompts are too few to tell {method} from {_in_text(first)}."
    metric = _first(own, "oracle_aesthetic") or own[0]["metric"]
    rivals: dict[str, list[str]] = {}
    for row in own:
        if row["metric"] == metric and (row["baseline"] == first or row["baseline"] in METHODS):
            rival = f"{_in_text(row['baseline'])} ({interval(row)})"
            rivals.setdefault(VERBS[outcome(row)], []).append(rival)
    clauses = [f"{verb} {listed(names)}" for verb, names in rivals.items()]
    found = _by_outcome([r for r in own if r["baseline"] == first and r["metric"] != metric])
    others = [f"{CHANGES[kind]} {listed(names)}" for kind, names in found.items()]
    sentence = f"By {_in_text(metric)}, {method} {listed(clauses)}."
    return f"{sentence} Against {_in_text(first)}, it {listed(others)}." if others else sentence


def _first(rows: Sequence[Mapping[str, Any]], *metrics: str) -> str | None:
    """The first of some metrics that was measured."""
    return next((metric for metric in metrics if any(r["metric"] == metric for r in rows)), None)


def numbers(
    rows: Sequence[Mapping[str, Any]],
    alignment: Mapping[str, Mapping[str, Any]],
    preference: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The numbers to compare between experiments, with four decimals.

    By method: `gain` over the first baseline by the headline's score, `low` and `high` of its interval,
    `win_rate`, the difference in `alignment` (by the oracle, else by CLIPScore) and `seconds` of training.
    Beside them `accuracy`, the mean of the step-aware preference model over timesteps.

    Args:
        rows: of reports/comparisons.json.
        alignment: metrics files by method.
        preference: metrics files by model.
    """
    by_gain = _first(rows, "oracle_aesthetic") or rows[0]["metric"]
    by_alignment = _first(rows, "oracle_alignment", "clipscore")
    found: dict[str, Any] = {}
    for row in rows:
        if row["baseline"] != rows[0]["baseline"] or row["method"].startswith("base"):
            continue
        own = found.setdefault(row["method"], {})
        if row["metric"] == by_gain:
            keys = {"gain": "mean_difference", "low": "ci_low", "high": "ci_high", "win_rate": "win_rate"}
            own |= {name: round(row[key], 4) for name, key in keys.items() if row[key] is not None}
        if row["metric"] == by_alignment:
            own["alignment"] = round(row["mean_difference"], 4)
    for method, taken in seconds(alignment, preference).items():
        found.setdefault(method, {})["seconds"] = round(taken, 1)
    if accuracy := preference.get("preference", {}).get("accuracy"):
        found["accuracy"] = round(sum(accuracy.values()) / len(accuracy), 4)
    return found


def seconds(
    alignment: Mapping[str, Mapping[str, Any]], preference: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """The seconds of each method's training and of the models trained for it, where all are known."""
    found = {}
    for method, own in alignment.items():
        parts = [own, *(preference.get(key, {}) for key in method_spec(method).trained_first)]
        if all("seconds" in part for part in parts):
            found[method] = sum(float(part["seconds"]) for part in parts)
    return found


def cost(taken: Mapping[str, float]) -> str:
    """What the trainings took, from the seconds by method; empty without any."""
    each = [f"{value:,.0f} s for {name(method)}" for method, value in taken.items()]
    return f"Training took {listed(each)}, preference models included." if each else ""


def _by_outcome(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The names of metrics by outcome."""
    found: dict[str, list[str]] = {}
    for kind in MARKS:
        if names := [_in_text(r["metric"]) for r in rows if outcome(r) == kind]:
            found[kind] = names
    return found


def contradictions(rows: Sequence[Mapping[str, Any]], curves: Mapping[str, DataFrame]) -> str:
    """Name the methods of which some scores clearly rise and others fall; else empty.

    The preference model's own score, which a method is trained to raise, is that of its training curve.
    """
    first = rows[0]["baseline"]
    groups: dict[tuple[str, str], list[str]] = {}
    for method in dict.fromkeys(r["method"] for r in rows if not r["method"].startswith("base")):
        found = _by_outcome([r for r in rows if (r["method"], r["baseline"]) == (method, first)])
        up = "other scores" if "better" in found else "the preference model's own score"
        if "worse" in found and ("better" in found or _rises(curves.get(method))):
            groups.setdefault((up, listed(found["worse"])), []).append(name(method))
    return " ".join(
        f"Beware: with {listed(methods)}, {up} rose while {down} fell (against {name(first)})."
        for (up, down), methods in groups.items()
    )


def _rises(curve: DataFrame | None) -> bool:
    """Whether the preference model's score is higher in the last quarter of training than in the first."""
    if curve is None or "score" not in curve or len(known := curve["score"].dropna()) < 4:
        return False
    quarter = len(known) // 4
    return float(known[-quarter:].mean()) > float(known[:quarter].mean())


def listed(words: Sequence[str]) -> str:
    """Join words to "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def interval(row: Mapping[str, Any]) -> str:
    """Format a mean difference with its interval, if it has one."""
    if not has_interval(row):
        return signed(row["mean_difference"], row)
    middle, low, high = (signed(row[k], row) for k in ("mean_difference", "ci_low", "ci_high"))
    return f"{middle}, {low} to {high}"


def _in_text(key: str) -> str:
    """The name of a metric or variant within a sentence."""
    return PROSE.get(key, name(key))
