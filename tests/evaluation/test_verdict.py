"""Comparisons in words, facts as tables, and what figures do with their text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import ImageFont

from spo.evaluation import plots, report, statistics, verdict


def row(metric: str, low: float, high: float, baseline: str = "base") -> dict[str, Any]:
    ends = {"mean_difference": (low + high) / 2, "ci_low": low, "ci_high": high}
    return {"method": "spo", "baseline": baseline, "metric": metric, **ends}


def test_the_verdict_follows_the_intervals() -> None:
    better, worse, unclear = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.2)
    assert verdict.headline([row("hps", *worse), row("oracle_alignment", *unclear)]) == (
        "SPO beats the base model by no measure of quality and is worse by HPS; "
        "alignment with the prompt does not clearly change (+0.050, −0.100 to +0.200)."
    )
    rows = [row("hps", *better), row("aesthetic", *unclear), row("pickscore", *worse)]
    rows += [row("oracle_alignment", *better), row("hps", *better, "base_high_guidance")]
    assert verdict.headline([*rows, row("hps", *unclear, "diffusion_dpo")]) == (
        "SPO beats the base model by HPS, is worse by PickScore and does not clearly differ by the aesthetic "
        "score; alignment with the prompt rises (+0.200, +0.100 to +0.300). SPO beats Diffusion-DPO by no "
        "measure of quality and does not clearly differ by HPS; "
        "prompt alignment was not measured separately."
    )


def test_a_score_that_rises_while_another_falls_is_shown() -> None:
    better, worse, unclear = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.2)
    rising = pd.DataFrame({"step": range(8), "score": [1.0, 1, 2, 2, 3, 3, 4, 4]})
    falls = [row("oracle_alignment", *worse)]
    text = verdict.contradictions([row("hps", *better), *falls], {})
    assert text == ("Beware: with SPO, HPS rose while the oracle's alignment fell (against Base).")
    text = verdict.contradictions([row("hps", *unclear), *falls], {"spo": rising})
    assert "the preference model's own score rose while the oracle's alignment" in text
    assert not verdict.contradictions([row("hps", *unclear), *falls], {"spo": rising[::-1]})
    assert not verdict.contradictions([row("hps", *better), row("aesthetic", *unclear)], {"spo": rising})
    # the first method's baseline alone: what is worse against another method is not said twice
    assert not verdict.contradictions([row("hps", *better), row("hps", *worse, "diffusion_dpo")], {})


@pytest.mark.parametrize(("low", "high", "shown"), [(0.0, 0.2, "unclear"), (1e-9, 0.2, "better")])
def test_zero_inside_the_interval_decides_nothing(low: float, high: float, shown: str) -> None:
    assert verdict.outcome(row("hps", low, high)) == shown


def test_small_differences_keep_their_digits_and_zero_has_no_sign() -> None:
    narrow = row("hps", 0.0001, 0.0003)
    assert verdict.signed(0.0002, narrow) == "+0.00020"
    assert verdict.signed(-0.0000001, narrow) == "0.00000"
    assert verdict.signed(-0.0123, row("hps", -1, 1)) == "−0.012"


def test_nested_facts_become_tables() -> None:
    facts = {"n": 5, "sharp": {"correlation": 0.9}, "layout": {"accuracy": 0.5}}
    (found,) = report.tables("rendered", facts)
    assert (found.title, found.note) == ("rendered", "n 5")
    assert found.columns == ["", "correlation", "accuracy"]
    assert found.rows == [["sharp", "0.9", "–"], ["layout", "–", "0.5"]]
    deep = list(report.tables("", {"one": facts, "two_b": {"x": {"y": {"z": 1}}}, "k": 12345}))
    assert [t.title for t in deep] == ["", "one", "two b: x: y"]
    assert deep[0].rows == [["k", "12,345"]]


def test_long_prompts_are_wrapped_and_cut() -> None:
    font = ImageFont.load_default(14)
    lines = plots.wrap("a large red circle above a small blue star on sand " * 3, font, 200, lines=2)
    assert len(lines) == 2 and lines[1].endswith("…")
    assert all(font.getlength(line) <= 200 for line in lines)
    assert plots.wrap("two words", font, 200, lines=2) == ["two words"]
    (word,) = plots.wrap("w" * 100, font, 200, lines=1)
    assert word.endswith("…") and font.getlength(word) <= 200


def test_a_curve_without_a_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="has no metric"):
        plots.curves(pd.DataFrame({"step": [1, 2], "loss": [np.nan, np.nan]}))


def test_few_prompts_say_nothing_is_better() -> None:
    few = {"ci_low": None, "ci_high": None, "n": 3}
    rows = [{**row("hps", 0.1, 0.3), **few}, {**row("oracle_alignment", 0.1, 0.3), **few}]
    assert verdict.headline(rows) == "SPO and the base model: 3 prompts are too few to tell them apart."
    assert verdict.contradictions(rows, {}) == ""
    ((_, text),) = verdict.details(rows)
    assert text.startswith("too few prompts for an interval: HPS ×100 (+0.200)")
    assert [verdict.outcome(r) for r in rows] == ["unclear", "unclear"]
    assert plots.differences(rows, verdict.NAMES).startswith(b"\x89PNG")


@pytest.mark.parametrize(("fewest", "has"), [(3, True), (4, False)])
def test_an_interval_needs_so_many_prompts(fewest: int, has: bool) -> None:
    table = pd.DataFrame({"prompt": ["a", "b", "c"], "seed": [0, 1, 2], "hps": [1.0, 2.0, 3.0]})
    tables = {"base": table, "spo": table.assign(hps=[2.0, 3.0, 4.0])}
    (found,) = statistics.comparisons(tables, ["base"], 10, 0, fewest)
    assert (found["mean_difference"], found["win_rate"], found["n"]) == (1.0, 1.0, 3)
    assert (found["ci_low"], found["ci_high"]) == ((1.0, 1.0) if has else (None, None))
