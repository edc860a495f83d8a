"""What comparisons say in words: names, numbers, the verdict, and where scores contradict each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

NAMES = {
    "base": "Base",
    "base_high_guidance": "Base, more guidance",
    "spo": "SPO",
    "diffusion_dpo": "Diffusion-DPO",
    "pickscore": "PickScore",
    "hps": "HPS ×100",
    "aesthetic": "Aesthetic score",
    "oracle_aesthetic": "Oracle: aesthetics",
    "oracle_alignment": "Oracle: alignment",
    "n_train": "training pairs",
    "preference": "Step-aware (the SPM)",
    "preference_unconditioned": "Same, not told the step",
    "preference_clean_only": "Same, clean pictures only",
}
PROSE = {
    "hps": "HPS",
    "aesthetic": "the aesthetic score",
    "oracle_aesthetic": "the oracle's aesthetics",
    "oracle_alignment": "the oracle's alignment",
}
ALIGNMENT = "oracle_alignment"  # does the picture show its caption? All other metrics measure quality


def name(key: str) -> str:
    """What the page calls a variant, metric, model or fact."""
    return NAMES.get(key, key.replace("_", " "))


def number(value: Any) -> str:
    """A short text of a fact: floats with four digits, lists joined."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(number(v) for v in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def signed(value: float, row: Mapping[str, Any]) -> str:
    """A difference or an end of its interval: three decimals, five where the interval is narrow."""
    text = f"{value:+.{3 if row['ci_high'] - row['ci_low'] >= 0.004 else 5}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def outcome(row: Mapping[str, Any]) -> str:
    """`better` or `worse` where the interval excludes 0, else `unclear`."""
    if row["ci_low"] > 0:
        return "better"
    return "worse" if row["ci_high"] < 0 else "unclear"


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The verdict on the first method: a sentence against the base, one against the other method."""
    method = rows[0]["method"]
    own = [r for r in rows if r["method"] == method]
    baselines = list(dict.fromkeys(r["baseline"] for r in own))
    return " ".join(_sentence(method, b, own) for b in dict.fromkeys((baselines[0], baselines[-1])))


def contradictions(rows: Sequence[Mapping[str, Any]], curves: Mapping[str, DataFrame]) -> str:
    """A sentence for each method some of whose scores clearly rise and others fall; or nothing.

    The score that a method was trained to raise counts as risen if it did so over its curve.
    """
    sentences = []
    for method in dict.fromkeys(r["method"] for r in rows if not r["method"].startswith("base")):
        own = [r for r in rows if r["method"] == method]
        own = [r for r in own if r["baseline"] == own[0]["baseline"]]
        up, down = (
            [
                f"{PROSE.get(r['metric'], name(r['metric']))} ({interval(r)})"
                for r in own
                if outcome(r) == kind
            ]
            for kind in ("better", "worse")
        )
        up += _trained_for(curves.get(method))
        if up and down:
            rival = name(own[0]["baseline"])
            sentences.append(
                f"Beware: with {name(method)}, {listed(up)} rose while {listed(down)} fell "
                f"(against {rival}): what rose may have been won at the cost of what fell."
            )
    return " ".join(sentences)


def _trained_for(curve: DataFrame | None) -> list[str]:
    """The preference model's own score, if its mean over the last quarter of training is above the first."""
    if curve is None or "score" not in curve or len(known := curve["score"].dropna()) < 4:
        return []
    quarter = len(known) // 4
    first, last = float(known[:quarter].mean()), float(known[-quarter:].mean())
    return [f"the preference model's own score ({first:.3g} to {last:.3g})"] if last > first else []


def _sentence(method: str, baseline: str, rows: Sequence[Mapping[str, Any]]) -> str:
    quality = [r for r in rows if r["baseline"] == baseline and r["metric"] != ALIGNMENT]
    by: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    for row in quality:
        by[outcome(row)].append(PROSE.get(row["metric"], name(row["metric"])))
    rival = "the base model" if baseline == "base" else name(baseline)
    parts = [f"beats {rival} by {listed(by['better']) or 'no measure of quality'}"]
    if by["worse"]:
        parts.append(f"is worse by {listed(by['worse'])}")
    if by["unclear"]:
        parts.append(f"does not clearly differ by {listed(by['unclear'])}")
    return f"{name(method)} {listed(parts)}; {_alignment(rows, baseline)}."


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _alignment(rows: Sequence[Mapping[str, Any]], baseline: str) -> str:
    found = [r for r in rows if r["baseline"] == baseline and r["metric"] == ALIGNMENT]
    if not found:
        return "no measure of prompt alignment alone was taken"
    change = {"better": "rises", "worse": "falls", "unclear": "does not clearly change"}[outcome(found[0])]
    return f"alignment with the prompt {change} ({interval(found[0])})"


def interval(row: Mapping[str, Any]) -> str:
    middle, low, high = (signed(row[k], row) for k in ("mean_difference", "ci_low", "ci_high"))
    return f"{middle}, {low} to {high}"


def details(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """For each baseline of the first method: what is better, worse and unclear, with intervals."""
    own = [r for r in rows if r["method"] == rows[0]["method"]]
    found = []
    for baseline in dict.fromkeys(r["baseline"] for r in own):
        parts = []
        for kind, words in (("better", "higher"), ("worse", "lower"), ("unclear", "not clearly different")):
            those = [r for r in own if r["baseline"] == baseline and outcome(r) == kind]
            if those:
                parts.append(f"{words}: " + ", ".join(f"{name(r['metric'])} ({interval(r)})" for r in those))
        found.append((f"{name(rows[0]['method'])} against {name(baseline)}", "; ".join(parts) + "."))
    return found
