"""Kept runs: settings that differ, seeds by hand, the compute to reach a quality, files of something else."""

import json
from pathlib import Path

import pytest

from spo import config
from spo.evaluation import kept_runs, kept_tables
from spo.evaluation.efficiency import Course
from spo.evaluation.kept_runs import KeptRun, changed, over_seeds, samples_to_reach

ROOT = Path(__file__).parents[2]
PARAMS = {
    "seed": 0,
    "name": "a",
    "align": {"spo": {"beta": 10}, "diffusion_dpo": {"beta": 75, "iterations": 4}},
}


def row(difference: float, method: str = "spo", metric: str = "aesthetic") -> dict:
    ends = {"ci_low": difference - 0.1, "ci_high": difference + 0.1}
    return {"method": method, "baseline": "base", "metric": metric, "mean_difference": difference, **ends}


def with_(**sections) -> dict:
    return {**PARAMS, **sections}


def kept(changes: dict, rows: list[dict], courses: dict | None = None) -> KeptRun:
    return KeptRun("other", changes, rows, courses or {})


@pytest.mark.parametrize(
    ("other", "changes"),
    [
        (with_(seed=3), {"seed": 3}),
        (with_(name="b", report={"grid_prompts": 3}), {}),
        (with_(align={"spo": {"beta": 12}}), {"align.spo.beta": 12}),  # the run has only one of the methods
        (with_(align={**PARAMS["align"], "third": {"beta": 1}}), {}),
        (with_(preference={"noised": False}), {"preference.noised": False}),
        ({"seed": 0, "align": {"spo": {"beta": None}}}, {"align.spo.beta": None}),
    ],
)
def test_what_differs_is_named_and_what_changes_no_result_is_not(other: dict, changes: dict) -> None:
    assert changed(PARAMS, other) == changes


def test_seeds_have_their_mean_and_standard_deviation() -> None:
    others = [kept({"seed": 1}, [row(0.5)]), kept({"seed": 2}, [row(0.2), row(9.0, metric="hps")])]
    others.append(kept({"seed": 3, "align.spo.beta": 1}, [row(7.0)]))  # not another seed alone
    (found,) = over_seeds(0, [row(0.2)], others)
    assert found.by_seed == {0: 0.2, 1: 0.5, 2: 0.2}
    assert found.mean == pytest.approx(0.3) and found.spread == pytest.approx(0.03**0.5)
    table = kept_tables.seeds(0, [row(0.2)], others)
    assert table.rows == [["SPO − Base: Aesthetic score", "+0.200", "+0.500", "+0.200", "+0.300", "0.173"]]
    assert kept_tables.seeds(0, [row(0.2)], others[2:]) is None


def test_other_settings_are_named_beside_what_they_gave() -> None:
    table = kept_tables.settings(
        [kept({"preference.noised": False}, [row(0.25)]), kept({"seed": 1}, [row(1.0)])]
    )
    assert table.rows == [["noised false", "SPO", "+0.250, +0.150 to +0.350"]]
    assert kept_tables.settings([kept({"seed": 1}, [row(1.0)])]) is None


OWN = Course(seconds=[1, 2, 3], unet_samples=[1000, 2000, 4000], quality=[0.5, 0.6, 0.9], selected=2)
LONGER = Course(seconds=[1, 9], unet_samples=[0, 16000], quality=[0.5, 0.7], selected=1)


@pytest.mark.parametrize(("quality", "samples"), [(0.5, 1000), (0.55, 2000), (0.9, 4000), (0.91, None)])
def test_the_first_validation_that_reaches_a_quality_counts(quality: float, samples: float | None) -> None:
    assert samples_to_reach(OWN, quality) == samples


def test_a_method_that_was_trained_longer_is_compared_by_compute() -> None:
    longer = kept({"align.diffusion_dpo.iterations": 20}, [], {"diffusion_dpo": ("gain", LONGER)})
    own = {"spo": ("gain", OWN), "diffusion_dpo": ("gain", OWN)}
    (sentence,) = kept_tables.compute_ratios(own, [longer])
    assert sentence == (
        "Diffusion-DPO, iterations 20 is best after 16 thousand UNet samples (0.700); SPO reaches that by "
        "4 thousand UNet samples, 1/4.0 of it."
    )
    weak = Course(seconds=[1], unet_samples=[1000], quality=[0.6], selected=None)
    assert kept_tables.compute_ratios({"spo": ("gain", weak)}, [longer])[0].endswith(
        "SPO does not reach that (0.600)."
    )
    assert kept_tables.compute_ratios({"spo": ("oracle", OWN)}, [longer]) == []  # another measure
    falls = Course(seconds=[0, 1], unet_samples=[0, 1000], quality=[0.5, 0.4], selected=None)
    worse = kept({"align.diffusion_dpo.iterations": 20}, [], {"diffusion_dpo": ("gain", falls)})
    assert kept_tables.compute_ratios(own, [worse]) == [
        "Diffusion-DPO, iterations 20 is never better than the base model."
    ]


def test_a_file_of_something_else_is_one_line(tmp_path) -> None:
    (tmp_path / "equal.json").write_text(json.dumps({"params": PARAMS, "comparisons": [], "courses": {}}))
    assert kept_runs.read(PARAMS, tmp_path) == []
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(ValueError, match=r"wrong.json: not a file of `spo keep` .*; remove it"):
        kept_runs.read(PARAMS, tmp_path)


def test_the_runs_of_the_repository_differ_from_the_default_in_nothing_else() -> None:
    """A key that got another meaning has to be translated in them, or they are no other seeds any more."""
    params = config.load(ROOT / "params.yaml").model_dump(mode="json")
    runs = {run.name: dict(run.changes) for run in kept_runs.read(params, ROOT / kept_runs.FOLDER)}
    assert runs == {
        "diffusion_dpo_5_times": {"align.diffusion_dpo.iterations": 6000},
        "seed_1": {"seed": 1},
        "seed_2": {"seed": 2},
        "spo_clean_only": {"preference.step_condition": False, "preference.noised": False},
        "spo_unconditioned": {"preference.step_condition": False},
    }
