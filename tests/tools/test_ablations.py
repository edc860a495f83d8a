"""The ablations of docs/results.md: they change keys that exist, and their rows are in the page."""

from pathlib import Path

from spo import config
from spo.evaluation.verdict import name
from spo.tracking.provenance import flatten
from tools import ablations

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/results.md").read_text(encoding="utf-8")


def test_every_ablation_changes_keys_of_the_default_experiment() -> None:
    flat = flatten(config.load(ROOT / "params.yaml").model_dump())
    for _, method, changes in ablations.SETTINGS.values():
        assert method in config.METHODS
        for key, _, value in (change.partition("=") for change in changes):
            assert key in flat and str(flat[key]).lower() != value


def test_the_page_has_a_row_of_each() -> None:
    assert f"| over the base | {' | '.join(map(name, ablations.METRICS))} |" in PAGE
    for title, _, _ in ablations.SETTINGS.values():
        assert PAGE.count(f"\n| {title} | ") == 1


def test_a_row_has_the_differences_from_the_base() -> None:
    rows = [
        {
            "method": "spo",
            "baseline": baseline,
            "metric": m,
            "mean_difference": d,
            "ci_low": d - 1,
            "ci_high": d + 1,
        }
        for baseline, d in (("base", 2.0), ("lpo", 0.0))
        for m in ablations.METRICS
    ]
    assert ablations.row("X", "spo", rows) == "| X |" + " +2.000, +1.000 to +3.000 |" * 5
