"""Paired statistics, against values derived by hand and against simulated data of known truth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from spo.evaluation import statistics


def table(**metrics: list[float]) -> pd.DataFrame:
    n = len(next(iter(metrics.values())))
    return pd.DataFrame(
        {"index": range(n), "prompt": [f"p{i}" for i in range(n)], "seed": range(n), **metrics}
    )


def compare(method: list[float], baseline: list[float], seed: int = 0) -> dict[str, float | int]:
    return statistics.compare(np.array(method), np.array(baseline), 1000, seed)


def test_small_arrays_by_hand() -> None:
    found = compare([3.0, 1.0, 2.0, 4.0], [1.0, 2.0, 2.0, 1.0])  # differences 2, -1, 0, 3
    assert found["mean_method"] == 2.5
    assert found["mean_baseline"] == 1.5
    assert found["mean_difference"] == 1.0
    assert found["win_rate"] == (2 + 0.5) / 4  # two wins, one tie, one loss
    assert found["n"] == 4
    assert list(found) == "mean_method mean_baseline mean_difference ci_low ci_high win_rate n".split()


def test_a_constant_difference_has_an_interval_of_no_width() -> None:
    baseline = [0.5, -3.25, 8.0, 1.75]
    found = compare([b + 0.25 for b in baseline], baseline)
    assert found["ci_low"] == found["mean_difference"] == found["ci_high"] == 0.25
    assert found["win_rate"] == 1


def test_equal_scores_are_ties() -> None:
    found = compare([1.0, 2.0], [1.0, 2.0])
    assert (found["mean_difference"], found["win_rate"]) == (0, 0.5)


def test_two_rows_give_the_quantiles_of_three_known_means() -> None:
    """Resamples of differences 0 and 1 have means 0, .5, 1 with chances 1/4, 1/2, 1/4."""
    found = compare([1.0, 2.0], [1.0, 1.0])
    assert (found["ci_low"], found["ci_high"]) == (0, 1)


def test_pairing_counts() -> None:
    """Prompts differ much more than methods do; only paired differences see the method."""
    prompts = np.random.default_rng(0).normal(size=100) * 10
    noise = np.random.default_rng(1).normal(size=100) * 0.1
    found = statistics.compare(prompts + 0.1 + noise, prompts, 1000, 0)
    assert 0.05 < found["ci_low"] < 0.1 + noise.mean() < found["ci_high"] < 0.15


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        differences = generator.normal(loc=0.3, size=60)
        found = statistics.compare(differences, np.zeros(60), 400, seed)
        hits += found["ci_low"] <= 0.3 <= found["ci_high"]
    assert 180 <= hits <= 198


def test_the_seed_decides_and_chunks_do_not_change_the_kind_of_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = np.random.default_rng(0).normal(size=50).tolist()
    whole = compare(method, [0.0] * 50)
    assert compare(method, [0.0] * 50) == whole
    assert compare(method, [0.0] * 50, seed=1)["ci_low"] != whole["ci_low"]
    monkeypatch.setattr(statistics, "CHUNK", 70)  # one resample at a time
    assert compare(method, [0.0] * 50) == whole


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="baseline's score in row 1"):
        compare([1.0, 2.0], [1.0, bad])


@pytest.mark.parametrize(("method", "baseline"), [([1.0, 2.0], [1.0]), ([], []), ([[1.0]], [[1.0]])])
def test_other_shapes_are_refused(method: list, baseline: list) -> None:
    with pytest.raises(ValueError, match="the same length"):
        compare(method, baseline)


def test_every_pair_comes_once_and_none_with_itself() -> None:
    names = ("base", "base_high_guidance", "diffusion_dpo", "spo")
    scores = {v: table(pickscore=[float(i), 2.0], hps=[1.0, 2.0]) for i, v in enumerate(names)}
    rows = statistics.comparisons(scores, names[:3], 50, 0)
    assert [(r["method"], r["baseline"]) for r in rows[::2]] == [
        ("spo", "base"),
        ("spo", "base_high_guidance"),
        ("spo", "diffusion_dpo"),
        ("diffusion_dpo", "base"),
        ("diffusion_dpo", "base_high_guidance"),
        ("base_high_guidance", "base"),
    ]
    assert [r["metric"] for r in rows] == ["pickscore", "hps"] * 6
    keys = "method baseline metric mean_method mean_baseline mean_difference ci_low ci_high win_rate n"
    assert list(rows[0]) == keys.split()
    assert rows[0]["mean_difference"] == 1.5  # 3 - 0 and 2 - 2


def test_other_prompts_seeds_rows_or_metrics_are_refused() -> None:
    base = table(hps=[1.0, 2.0, 3.0])
    other_prompt = base.assign(prompt=["p0", "x", "p2"])
    other_seed = base.assign(seed=[0, 1, 7])
    for spo, message in (
        (other_prompt, r"row 1 of the scores: spo has prompt 'x', base has 'p1'"),
        (other_seed, r"row 2 of the scores: spo has seed 7, base has 2"),
        (base[:2], "spo has 2 rows, base has 3"),
        (base.rename(columns={"hps": "pickscore"}), "different metrics: pickscore; hps"),
        (
            base.assign(hps=[1.0, 2.0, float("nan")]),
            "hps of spo and base: the method's score in row 2 is nan",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            statistics.comparisons({"base": base, "spo": spo}, ("base",), 10, 0)


def test_a_baseline_without_scores_is_named() -> None:
    with pytest.raises(ValueError, match="no scores of 'dpo'; known: base"):
        statistics.comparisons({"base": table(hps=[1.0])}, ("base", "dpo"), 10, 0)
