"""Stage `report`: compare the variants, and put all that the run measured on one page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import METHODS, VARIANTS, Params
from spo.runtime.files import atomic, require, write_json
from spo.runtime.workspace import METRICS, TRAINING
from spo.stages.common import stage
from spo.tracking.provenance import git, versions

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL import Image

SCORES, IMAGES, REPORTS = Path("outputs/scores"), Path("outputs/images"), Path("reports")
SHEET_PROMPTS = 6  # on the picture for the README
SPM_BASELINES = ("preference_unconditioned", "preference_clean_only")
CODE = ("src", "flows", "dvc.yaml", "params.yaml")  # a change here is a change of the experiment


def run(params: Params, item: str | None = None) -> None:
    from spo.evaluation import plots, report, statistics, verdict

    settings = params.report
    with stage("report", params) as tracked:
        scores = read_scores(settings.baselines)
        rows = statistics.comparisons(scores, settings.baselines, settings.bootstrap_samples, params.seed)
        if not rows:
            raise ValueError(
                f"nothing to compare: {SCORES} and report.baselines hold {', '.join(scores)} alone"
            )
        prompts, pictures = read_pictures(scores, max(settings.grid_prompts, SHEET_PROMPTS))
        shown = {v: pictures[v][: settings.grid_prompts] for v in scores}
        page = report.render(
            report.RunResults(
                params=params.model_dump(mode="json", exclude={"processes", "tracking", "registry"}),
                scores=scores,
                comparisons=rows,
                prompts=prompts[: settings.grid_prompts],
                images=shown,
                **_measured(),
                versions=versions(),
                commit=commit(),
            )
        )
        compared = [v for v in pictures if v == "base" or v in METHODS]
        columns = {verdict.name(v): pictures[v][:SHEET_PROMPTS] for v in compared}
        write_json(REPORTS / "comparisons.json", rows)
        write_json(METRICS / "comparisons.json", summary(rows))
        _write(REPORTS / "report.html", page.encode())
        _write(REPORTS / "grid.png", plots.grid(prompts[:SHEET_PROMPTS], columns))
        tracked.log_metrics(_flat(rows), step=0)
        for name in ("report.html", "comparisons.json", "grid.png"):
            tracked.log_artifact(REPORTS / name, "report")


def read_scores(baselines: tuple[str, ...]) -> dict[str, DataFrame]:
    """Each variant's table, baselines first in their order, then the others.

    Raises:
        ValueError: no tables, or a table without a column that it must have.
    """
    from pandas import read_csv

    files = {p.stem: p for p in sorted(require(SCORES, "scores").glob("*.csv"))}
    if not files:
        raise ValueError(f"{SCORES}: no scores there; run `make repro`")
    tables = {}
    for name in dict.fromkeys(n for n in (*baselines, *VARIANTS, *files) if n in files):
        try:  # a prompt may be "NA"
            tables[name] = read_csv(files[name], keep_default_na=False, dtype={"prompt": str})
        except ValueError as error:  # pandas's own are ValueErrors
            raise ValueError(f"{files[name]}: not a whole table ({error}); run `spo score {name}`") from None
        missing = {"prompt", "seed"} - set(tables[name].columns)
        if missing:
            raise ValueError(f"{files[name]}: no column {min(missing)!r}; run `spo score {name}` again")
    return tables


def read_pictures(scores: dict[str, DataFrame], n: int) -> tuple[list[str], dict[str, list[Image.Image]]]:
    """The first n prompts and their pictures by each variant.

    Raises:
        ValueError: the pictures are not those that were scored.
    """
    from spo.data.images import load_images

    prompts: list[str] = []
    pictures: dict[str, list[Image.Image]] = {}
    for variant, table in scores.items():
        found = list(islice(load_images(require(IMAGES / variant, f"pictures of {variant}")), n))
        scored = list(zip(table["prompt"][:n], table["seed"][:n], strict=True))
        if [(prompt, seed) for _, prompt, seed in found] != scored:
            raise ValueError(
                f"{IMAGES / variant}: not the pictures scored in {SCORES / variant}.csv; "
                f"run `spo score {variant}` again"
            )
        pictures[variant] = [picture for picture, _, _ in found]
        prompts = [prompt for prompt, _ in scored]
    return prompts, pictures


def _measured() -> dict[str, Any]:
    """What earlier stages wrote about themselves; each is there or told to be missing on the page."""
    import pandas as pd
    import yaml

    preference = _in_order(METRICS.glob("preference*.json"), ["preference", *SPM_BASELINES])
    align = _in_order(METRICS.glob("align_*.json"), [f"align_{m}" for m in METHODS])
    curves = _in_order(TRAINING.glob("*.csv"), ["preference", *METHODS])
    summaries = {k: Path(f"outputs/{k}/summary.json") for k in ("prompts", "pairs")}
    world, lock = Path("data/world.json"), Path("dvc.lock")
    samples = {m: sorted(Path(f"outputs/align/{m}/samples").glob("*.png")) for m in METHODS}
    return {
        "preference": {p.stem: json.loads(p.read_text()) for p in preference},
        "alignment": {p.stem.removeprefix("align_"): json.loads(p.read_text()) for p in align},
        "curves": {p.stem: pd.read_csv(p) for p in curves},
        "summaries": {k: json.loads(p.read_text()) for k, p in summaries.items() if p.exists()},
        "samples": {m: [(int(p.stem), _picture(p)) for p in rows] for m, rows in samples.items()},
        "world": json.loads(world.read_text()) if world.exists() else None,
        "lock": yaml.safe_load(lock.read_text()) if lock.exists() else None,
    }


def _picture(path: Path) -> Image.Image:
    from spo.data.decoding import open_image

    try:
        return open_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; run `spo align` again") from None


def _in_order(files: Iterable[Path], first: list[str]) -> list[Path]:
    """Those named in `first` in its order, then the others by name."""
    return sorted(files, key=lambda p: (first.index(p.stem) if p.stem in first else len(first), p.stem))


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """method -> baseline -> metric -> difference and win rate: for `dvc metrics show`."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for row in rows:
        cell = {"difference": round(row["mean_difference"], 4), "win_rate": round(row["win_rate"], 4)}
        found.setdefault(row["method"], {}).setdefault(row["baseline"], {})[row["metric"]] = cell
    return found


def _flat(rows: list[dict[str, Any]]) -> dict[str, float]:
    """For MLflow: spo_vs_base/oracle_aesthetic/difference and the like."""
    kinds = {
        "difference": "mean_difference",
        "ci_low": "ci_low",
        "ci_high": "ci_high",
        "win_rate": "win_rate",
    }
    return {
        f"{r['method']}_vs_{r['baseline']}/{r['metric']}/{name}": r[key]
        for r in rows
        for name, key in kinds.items()
    }


def commit() -> str:
    """Name the git commit, and say whether code or parameters differ from it."""
    head = git("rev-parse", "HEAD")
    if not head:
        return "not in a git repository"
    changed = git("status", "--porcelain", "--", *CODE)
    return f"{head} (with changes in {', '.join(CODE)})" if changed else head


def _write(path: Path, content: bytes) -> None:
    with atomic(path) as partial:
        partial.write_bytes(content)
