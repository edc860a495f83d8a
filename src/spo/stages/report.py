"""Stage `report`: compare the variants, and show all results on one page and all images in a gallery."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import METHODS, Params
from spo.runtime.files import atomic, read_csv, read_json, write_json, write_text
from spo.runtime.messages import public
from spo.runtime.workspace import METRICS, TRAINING
from spo.stages.common import of_suite, stage
from spo.tracking import dvc_lock
from spo.tracking.provenance import flatten, git, git_refusal, versions

if TYPE_CHECKING:
    from pandas import DataFrame

REPORTS = Path("reports")
GALLERY = REPORTS / "gallery.html"
LOGGED_BYTES = 20_000_000  # a larger gallery is not logged to MLflow; the page alone shows thumbnails
GRID_PROMPTS = 6  # of the image grid for the README
# in their order on the page
PREFERENCE_MODELS = ("preference", "preference_latent", "preference_unconditioned", "preference_clean_only")
Suites = dict[str, tuple[dict[str, "DataFrame"], list[dict[str, Any]]]]
CODE = ("src", "flows", "dvc.yaml", "params.yaml")  # uncommitted changes here are shown on the page


def run(params: Params, variant: str | None = None) -> None:
    """Write the page, the comparisons, the image grid and the gallery to reports/."""
    from spo.evaluation import gallery, plots, report, results, seeds, verdict

    settings = params.report
    with stage("report", params) as tracked:
        scores = results.all_scores(settings.baselines)
        rows = _comparisons(params, scores)
        if not rows:
            raise ValueError(
                f"nothing to compare: {results.SCORES} has only {', '.join(scores)}; add another variant's "
                "scores or another one of report.baselines"
            )
        suites = read_suites(params)
        prompts, images = results.first_images(scores, max(settings.grid_prompts, GRID_PROMPTS))
        measured = _measured()
        page = report.render(
            report.RunResults(
                params=public(params.model_dump(mode="json", exclude={"processes", "tracking", "registry"})),
                seeds=seeds.read(params),
                scores=scores,
                comparisons=rows,
                suites=suites,
                prompts=prompts[: settings.grid_prompts],
                images={v: images[v][: settings.grid_prompts] for v in scores},
                **measured,
                versions=versions(),
                commit=commit(),
            )
        )
        compared = [v for v in images if v == "base" or v in METHODS]
        columns = {verdict.name(v): images[v][:GRID_PROMPTS] for v in compared}
        write_json(REPORTS / "comparisons.json", rows)
        write_json(REPORTS / "suites.json", {name: suite_rows for name, (_, suite_rows) in suites.items()})
        numbers = verdict.numbers(rows, measured["alignment"], measured["preference"])
        write_json(METRICS / "report.json", numbers)
        write_text(REPORTS / "report.html", page)
        with atomic(REPORTS / "grid.png") as partial:
            partial.write_bytes(plots.grid(prompts[:GRID_PROMPTS], columns))
        drawn = {v: results.scored_images(v, table) for v, table in scores.items()}
        gallery.write(GALLERY, params.name, scores, drawn, (rows[0]["method"], rows[0]["baseline"]))
        _log(tracked, rows, suites)
        if tracked.parent.exists():
            tracked.parent.log_metrics(flatten(numbers, separator="/"))


def _log(tracked: Any, rows: list[dict[str, Any]], suites: Suites) -> None:
    tracked.log_metrics(_flat(rows))
    for name, (_, suite_rows) in suites.items():
        tracked.log_metrics({f"{name}/{k}": v for k, v in _flat(suite_rows).items()})
    extra = ["suites.json"] if suites else []
    extra += [GALLERY.name] if GALLERY.stat().st_size <= LOGGED_BYTES else []
    for name in ("report.html", "comparisons.json", "grid.png", *extra):
        tracked.log_artifact(REPORTS / name, "report")


def _comparisons(params: Params, scores: Mapping[str, DataFrame]) -> list[dict[str, Any]]:
    from spo.evaluation import statistics

    settings = params.report
    return statistics.comparisons(
        scores, settings.baselines, settings.bootstrap_samples, params.seed, params.registry.min_prompts
    )


def read_suites(params: Params) -> Suites:
    """By suite of prompts: the table of each variant, and the rows of their comparisons."""
    from spo.evaluation import results

    suites = {}
    for name in params.generate.suites:
        try:
            scores = results.all_scores(params.report.baselines, of_suite(results.SCORES, name))
            suites[name] = (scores, _comparisons(params, scores))
        except ValueError as error:
            raise ValueError(f"generate.suites.{name}: {error}") from None
    return suites


def _measured() -> dict[str, Any]:
    """Read the metrics, curves and summaries of earlier stages; the page says which are missing."""
    preference = _in_order(METRICS.glob("preference*.json"), PREFERENCE_MODELS)
    align = _in_order(METRICS.glob("align_*.json"), [f"align_{m}" for m in METHODS])
    curves = _in_order(TRAINING.glob("*.csv"), (*PREFERENCE_MODELS, *METHODS))
    summaries = {k: Path(f"outputs/{k}/summary.json") for k in ("prompts", "pairs")}
    world = Path("data/world.json")
    samples = {m: sorted(Path(f"outputs/align/{m}/samples").glob("*.png")) for m in METHODS}
    models = {p.stem: read_json(p, "metrics", keys=("accuracy", "n")) for p in preference}
    return {
        "preference": {k: m for k, m in models.items() if m["accuracy"] or "pretrained" in m},
        "alignment": _done((p.stem.removeprefix("align_"), read_json(p, "metrics")) for p in align),
        "curves": _done((p.stem, read_csv(p, "training curve")) for p in curves),
        "summaries": _done((k, public(read_json(p, "summary"))) for k, p in summaries.items() if p.exists()),
        "samples": {m: [(int(p.stem), p.read_bytes()) for p in rows] for m, rows in samples.items()},
        "world": read_json(world, "facts") if world.exists() else None,
        "outs": [(e.stage, path, md5[:12]) for e in dvc_lock.read().values() for path, md5 in e.outs.items()],
    }


def _done(results: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Leave out what is empty: its stage had nothing to do."""
    return {name: result for name, result in results if len(result)}


def _in_order(files: Iterable[Path], first: Sequence[str]) -> list[Path]:
    """Sort files: those named in `first` in its order, then the others by name."""
    return sorted(files, key=lambda p: (first.index(p.stem) if p.stem in first else len(first), p.stem))


def _flat(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Flatten comparisons to metrics for MLflow, such as spo_vs_base/oracle_aesthetic/difference."""
    return {
        f"{r['method']}_vs_{r['baseline']}/{r['metric']}/{key.removeprefix('mean_')}": r[key]
        for r in rows
        for key in ("mean_difference", "ci_low", "ci_high", "win_rate")
        if r[key] is not None
    }


def commit() -> str:
    """The git commit, and whether code or parameters have uncommitted changes."""
    if refused := git_refusal(Path.cwd()):
        return refused
    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", *CODE)
    return f"{head} (with changes in {', '.join(CODE)})" if changed else head
