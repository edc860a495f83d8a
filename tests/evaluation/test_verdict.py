"""Comparisons in words, facts as tables, and what figures do with their text."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from spo.evaluation import plots, report, statistics, verdict


def row(metric: str, low: float, high: float, baseline: str = "base") -> dict[str, Any]:
    ends = {"mean_difference": (low + high) / 2, "ci_low": low, "ci_high": high}
    return {"method": "spo", "baseline": baseline, "metric": metric, **ends}


def test_the_headline_follows_the_intervals() -> None:
    better, worse, unclear = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.2)
    assert verdict.headline([row("hps", *worse), row("oracle_alignment", *unclear)]) == (
        "By HPS, SPO is worse than the base model (−0.200, −0.300 to −0.100). Against the base model, it "
        "does not clearly change alignment with the prompt."
    )
    rows = [row("hps", *better), row("oracle_aesthetic", *better), row("pickscore", *worse)]
    rows += [row("oracle_alignment", *unclear), row("oracle_aesthetic", *better, "base_high_guidance")]
    rows += [row("oracle_aesthetic", *better, "diffusion_dpo"), row("oracle_aesthetic", *unclear, "lpo")]
    assert verdict.headline(rows) == (
        "By the oracle's aesthetics, SPO beats the base model (+0.200, +0.100 to +0.300) and Diffusion-DPO "
        "(+0.200, +0.100 to +0.300) and does not clearly differ from LPO (+0.050, −0.100 to +0.200). Against "
        "the base model, it raises HPS, lowers PickScore and does not clearly change alignment with the "
        "prompt."
    )


def test_a_score_that_rises_while_another_falls_is_shown() -> None:
    better, worse, unclear = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.2)
    rising = pd.DataFrame({"step": range(8), "score": [1.0, 1, 2, 2, 3, 3, 4, 4]})
    falls = [row("oracle_alignment", *worse)]
    text = verdict.contradictions([row("hps", *better), *falls], {})
    assert text == "Beware: with SPO, other scores rose while alignment with the prompt fell (against Base)."
    text = verdict.contradictions([row("hps", *unclear), *falls], {"spo": rising})
    assert "SPO, the preference model's own score rose while alignment with the prompt fell" in text
    lpo = [{**r, "method": "lpo"} for r in (row("hps", *better), *falls)]
    assert "Beware: with SPO and LPO, other" in verdict.contradictions(
        [row("hps", *better), *falls, *lpo], {}
    )
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


def test_a_table_names_what_it_shows_and_escapes_it() -> None:
    table = pd.DataFrame(
        {"hps": [1.0, 12345.0], "two_b": [0.12345, None], "n": [5, 12345]}, index=["spo", "<b>"]
    )
    shown = report.html(table)
    assert re.findall("<th>(.*?)</th>", shown) == ["", "HPS ×100", "two b", "n", "SPO", "&lt;b&gt;"]
    assert re.findall("<td>(.*?)</td>", shown) == ["1", "0.1235", "5", "12,345", "–", "12,345"]
    assert "&lt;b&gt;" in report.html(pd.DataFrame({"<b>": ["<i>"]}, index=["x"])) and "<i>" not in shown


def test_long_prompts_are_cut_in_the_grid_and_dollars_are_no_formula() -> None:
    image = Image.new("RGB", (8, 8))
    prompts = ["a large red circle above a small blue star on sand " * 3, "w" * 100, r"$\frac{1$ and $"]
    assert plots.grid(prompts, {"Base": [image] * 3}).startswith(b"\x89PNG")


def test_a_curve_without_a_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="has no metric"):
        plots.training_metrics(pd.DataFrame({"step": [1, 2], "loss": [np.nan, np.nan]}))


def test_few_prompts_say_nothing_is_better() -> None:
    few = {"ci_low": None, "ci_high": None, "n": 3}
    rows = [{**row("hps", 0.1, 0.3), **few}, {**row("oracle_alignment", 0.1, 0.3), **few}]
    assert verdict.headline(rows) == "3 prompts are too few to tell SPO from the base model."
    assert verdict.contradictions(rows, {}) == ""
    assert report.verdicts(rows).to_numpy().tolist() == [["too few prompts"] * 2]
    assert [verdict.outcome(r) for r in rows] == ["unclear", "unclear"]
    assert plots.differences(rows, "base").startswith(b"\x89PNG")


@pytest.mark.parametrize(("fewest", "has"), [(3, True), (4, False)])
def test_an_interval_needs_so_many_prompts(fewest: int, has: bool) -> None:
    table = pd.DataFrame({"prompt": ["a", "b", "c"], "seed": [0, 1, 2], "hps": [1.0, 2.0, 3.0]})
    tables = {"base": table, "spo": table.assign(hps=[2.0, 3.0, 4.0])}
    (found,) = statistics.comparisons(tables, ["base"], 10, 0, fewest)
    assert (found["mean_difference"], found["win_rate"], found["n"]) == (1.0, 1.0, 3)
    assert (found["ci_low"], found["ci_high"]) == ((1.0, 1.0) if has else (None, None))


def test_the_numbers_to_compare_are_those_of_each_method_over_the_first_baseline() -> None:
    more = {"win_rate": 0.9, "n": 30}
    rows = [{**row("hps", 1.0, 3.0), **more}, {**row("oracle_aesthetic", 0.1, 0.3), **more}]
    rows += [
        {**row("oracle_alignment", -0.2, 0.0), **more},
        {**row("oracle_aesthetic", 7.0, 9.0, "lpo"), **more},
    ]
    rows += [{**rows[1], "method": "base_high_guidance"}]
    trained = {"spo": {"seconds": 90.0}, "lpo": {"seconds": 20.0}}
    models = {"preference": {"accuracy": {"0": 0.5, "501": 0.75}, "seconds": 30.0}}
    assert verdict.numbers(rows, trained, models) == {
        "spo": {"gain": 0.2, "low": 0.1, "high": 0.3, "win_rate": 0.9, "alignment": -0.1, "seconds": 120.0},
        "accuracy": 0.625,
    }, "what LPO's reward model took is not known here"
    few = [{**r, "ci_low": None, "ci_high": None} for r in rows[:1]]
    assert verdict.numbers(few, {}, {}) == {"spo": {"gain": 2.0, "win_rate": 0.9}}
    assert verdict.cost({"spo": 120.0}) == "Training took 120 s for SPO, preference models included."
    assert verdict.cost({}) == ""
