"""Comparisons in words: names, numbers, the verdict, and scores that contradict each other."""

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
    "oracle_alignment": "the oracle's alignment",
}
KINDS = (
    ("better", "higher"),
    ("worse", "lower"),
    ("unclear", "not clearly different"),
    ("few", "too few prompts for an interval"),
)
# whether an image shows its caption, the first that was measured; all other metrics measure quality
ALIGNMENT = ("oracle_alignment", "clipscore")


def name(key: str) -> str:
    """The display name of a variant, metric, model or fact."""
    return NAMES.get(key, key.replace("_", " "))


def number(value: Any) -> str:
    """Format a fact: floats with four digits, lists joined."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(number(v) for v in value)
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


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The verdict on the first method: a sentence each on the first baseline and on the other methods."""
    method = rows[0]["method"]
    own = [r for r in rows if r["method"] == method]
    baselines = list(dict.fromkeys(r["baseline"] for r in own))
    rivals = (b for b in baselines if b in METHODS)
    return " ".join(_sentence(method, b, own) for b in dict.fromkeys((baselines[0], *rivals)))


def contradictions(rows: Sequence[Mapping[str, Any]], curves: Mapping[str, DataFrame]) -> str:
    """A sentence for each method of which some scores clearly rise and others fall; else empty.

    The preference model's own score, which a method is trained to raise, is judged by its training curve.
    """
    sentences = []
    for method in dict.fromkeys(r["method"] for r in rows if not r["method"].startswith("base")):
        own = [r for r in rows if r["method"] == method]
        own = [r for r in own if r["baseline"] == own[0]["baseline"]]
        up, down = (
            [PROSE.get(r["metric"], name(r["metric"])) for r in own if outcome(r) == kind]
            for kind in ("better", "worse")
        )
        up += _training_score(curves.get(method))
        if up and down:
            rival = name(own[0]["baseline"])
            sentences.append(
                f"Beware: with {name(method)}, {listed(up)} rose while {listed(down)} fell (against {rival})."
            )
    return " ".join(sentences)


def _training_score(curve: DataFrame | None) -> list[str]:
    """The preference model's own score, if it is higher in the last quarter of training than in the first."""
    if curve is None or "score" not in curve or len(known := curve["score"].dropna()) < 4:
        return []
    quarter = len(known) // 4
    first, last = float(known[:quarter].mean()), float(known[-quarter:].mean())
    return ["the preference model's own score"] if last > first else []


def _sentence(method: str, baseline: str, rows: Sequence[Mapping[str, Any]]) -> str:
    rival = "the base model" if baseline == "base" else name(baseline)
    own = [r for r in rows if r["baseline"] == baseline]
    if not all(map(has_interval, own)):
        return f"{name(method)} and {rival}: {own[0]['n']} prompts are too few to tell them apart."
    quality = [r for r in own if r["metric"] not in ALIGNMENT]
    by: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    for row in quality:
        by[outcome(row)].append(PROSE.get(row["metric"], name(row["metric"])))
    parts = [f"beats {rival} by {listed(by['better']) or 'no measure of quality'}"]
    if by["worse"]:
        parts.append(f"is worse by {listed(by['worse'])}")
    if by["unclear"]:
        parts.append(f"does not clearly differ by {listed(by['unclear'])}")
    return f"{name(method)} {listed(parts)}; {_alignment(rows, baseline)}."


def listed(words: Sequence[str]) -> str:
    """Join words to "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _alignment(rows: Sequence[Mapping[str, Any]], baseline: str) -> str:
    measured = {r["metric"]: r for r in rows if r["baseline"] == baseline and r["metric"] in ALIGNMENT}
    row = next((measured[metric] for metric in ALIGNMENT if metric in measured), None)
    if row is None:
        return "prompt alignment was not measured separately"
    change = {"better": "rises", "worse": "falls", "unclear": "does not clearly change"}[outcome(row)]
    return f"alignment with the prompt {change} ({interval(row)})"


def interval(row: Mapping[str, Any]) -> str:
    """Format a mean difference with its interval, if it has one."""
    if not has_interval(row):
        return signed(row["mean_difference"], row)
    middle, low, high = (signed(row[k], row) for k in ("mean_difference", "ci_low", "ci_high"))
    return f"{middle}, {low} to {high}"


def _kind(row: Mapping[str, Any]) -> str:
    return outcome(row) if has_interval(row) else "few"


def details(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """List the metrics of the first method that are better, worse and unclear, for each baseline."""
    own = [r for r in rows if r["method"] == rows[0]["method"]]
    entries = []
    for baseline in dict.fromkeys(r["baseline"] for r in own):
        parts = []
        for kind, words in KINDS:
            those = [r for r in own if r["baseline"] == baseline and _kind(r) == kind]
            if those:
                parts.append(f"{words}: " + ", ".join(f"{name(r['metric'])} ({interval(r)})" for r in those))
        entries.append((f"{name(rows[0]['method'])} against {name(baseline)}", "; ".join(parts) + "."))
    return entries
