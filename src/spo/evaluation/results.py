"""Read what `score` and `report` wrote: tables of scores, and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.runtime.files import read_csv, read_json

if TYPE_CHECKING:
    from pandas import DataFrame

COMPARISONS = Path("reports/comparisons.json")
SHOWN = ("method", "baseline", "metric", "mean_difference", "ci_low", "ci_high", "win_rate", "n")


def read_comparisons(path: Path = COMPARISONS) -> list[dict[str, Any]]:
    """The rows of a comparisons.json, as `statistics.comparisons` gives them.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    rows: list[dict[str, Any]] = read_json(path, "comparisons", list)
    for number, row in enumerate(rows):
        lacking = [key for key in (*SHOWN, "mean_method") if not isinstance(row, dict) or key not in row]
        if lacking:
            raise ValueError(f"{path}: row {number} has no {lacking[0]!r}; run `spo report` again")
    return rows


def read_scores(path: Path) -> DataFrame:
    """A table of scores: prompt, seed, and a column per metric.

    Raises:
        ValueError: no such file, a damaged one, or one without a required column.
    """
    table = read_csv(path, "scores", keep_default_na=False, dtype={"prompt": str})  # a prompt may be "NA"
    missing = {"prompt", "seed"} - set(table.columns)
    if missing:
        raise ValueError(f"{path}: no column {min(missing)!r}; run `spo score {path.stem}` again")
    return table
