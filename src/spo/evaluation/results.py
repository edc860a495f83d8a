"""Read the outputs of `score`, `generate` and `report`: tables of scores, scored images, comparisons."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import VARIANTS
from spo.runtime.files import read_csv, read_json, require

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL import Image

SCORES, IMAGES = Path("outputs/scores"), Path("outputs/images")
COMPARISONS = Path("reports/comparisons.json")
COLUMNS = ("method", "baseline", "metric", "mean_difference", "ci_low", "ci_high", "win_rate", "n")


def read_comparisons(path: Path = COMPARISONS) -> list[dict[str, Any]]:
    """The rows of a comparisons.json, as `statistics.comparisons` gives them."""
    rows: list[dict[str, Any]] = read_json(path, "comparisons", list)
    check_comparisons(path, rows, (*COLUMNS, "mean_method"), then="run `spo report` again")
    return rows


def check_comparisons(path: Path, rows: list[Any], columns: Collection[str], then: str) -> None:
    """Refuse rows of comparisons without some column."""
    for number, row in enumerate(rows):
        if lacking := [key for key in columns if not isinstance(row, dict) or key not in row]:
            raise ValueError(f"{path}: row {number} has no {lacking[0]!r}; {then}")


def read_scores(path: Path) -> DataFrame:
    """A table of scores: prompt, seed, and a column per metric."""
    table = read_csv(path, "scores", keep_default_na=False, dtype={"prompt": str})  # a prompt may be "NA"
    missing = {"prompt", "seed"} - set(table.columns)
    if missing:
        raise ValueError(f"{path}: no column {min(missing)!r}; run `spo score {path.stem}` again")
    return table


def all_scores(baselines: tuple[str, ...], folder: Path = SCORES) -> dict[str, DataFrame]:
    """Read the table of each variant: the baselines in their order, then the others."""
    files = {p.stem: p for p in sorted(require(folder, "scores").glob("*.csv"))}
    if not files:
        raise ValueError(f"{folder}: no scores in this folder; run `make repro`")
    names = dict.fromkeys(n for n in (*baselines, *VARIANTS, *files) if n in files)
    tables = {name: read_scores(files[name]) for name in names}
    return {name: table for name, table in tables.items() if len(table)}  # without variants set to null


def first_images(scores: dict[str, DataFrame], n: int) -> tuple[list[str], dict[str, list[Image.Image]]]:
    """Read the first n prompts, and the first image of each by each variant."""
    first = next(iter(scores.values()))["prompt"]
    step = len(first) // first.nunique()  # images of a prompt
    images = {v: list(islice(scored_images(v, table), 0, n * step, step)) for v, table in scores.items()}
    return first[::step][:n].tolist(), images


def scored_images(variant: str, table: DataFrame) -> Iterator[Image.Image]:
    """Iterate over the images of a variant in the order of its scores; other images are refused."""
    from spo.data.images import load_images

    generated = load_images(require(IMAGES / variant, f"images of {variant}"))
    scored = zip(table["prompt"], table["seed"], strict=True)
    for drawn, row in zip_longest(generated, scored):
        if drawn is None or drawn[1:] != row:
            raise ValueError(
                f"{IMAGES / variant}: not the images scored in {SCORES / variant}.csv; "
                f"run `spo score {variant}` again"
            )
        yield drawn[0]
