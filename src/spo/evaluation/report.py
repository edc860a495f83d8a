"""Render the self-contained HTML report of a run."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spo.config import yaml_text
from spo.evaluation import kept_tables, plots
from spo.evaluation.efficiency import Course, course
from spo.evaluation.kept_runs import KeptRun
from spo.evaluation.pages import environment
from spo.evaluation.tables import Table
from spo.evaluation.verdict import (
    NAMES,
    contradictions,
    details,
    headline,
    listed,
    name,
    number,
    outcome,
    signed,
)
from spo.methods import method_spec
from spo.runtime.messages import public

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL import Image

IMAGE_SIDE = 192  # of images on the page, in pixels


@dataclass(frozen=True)
class RunResults:
    """All results that the page shows. Names of variants and metrics are those of the score tables."""

    params: Mapping[str, Any]
    scores: Mapping[str, DataFrame]  # in the order of the columns; the first is the base model
    comparisons: Sequence[Mapping[str, Any]]  # rows of reports/comparisons.json
    prompts: Sequence[str]  # of the images
    images: Mapping[str, Sequence[Image.Image]]  # by variant, one per prompt
    preference: Mapping[str, Mapping[str, Any]]  # metrics files by name
    alignment: Mapping[str, Mapping[str, Any]]  # by method
    curves: Mapping[str, DataFrame]  # training CSVs by name
    summaries: Mapping[str, Mapping[str, Any]]  # of prompts and pairs
    versions: Mapping[str, str]
    commit: str
    samples: Mapping[
        str, Sequence[tuple[int, Image.Image]]
    ]  # by method: (update, a row of validation images)
    kept: Sequence[KeptRun] = ()  # results of other runs
    # by suite of prompts: score tables and comparisons, as above
    suites: Mapping[str, tuple[Mapping[str, DataFrame], Sequence[Mapping[str, Any]]]] = field(
        default_factory=dict
    )
    world: Mapping[str, Any] | None = None
    outs: Sequence[tuple[str, str, str]] = ()  # (stage, path, hash) of each output in dvc.lock


def render(run: RunResults) -> str:
    """Render the page; the same results give the same text."""
    shown = {k: v for k, v in run.params.items() if k != "tracking"}  # its URI may contain a password
    page = environment().get_template("report.html.j2")
    return page.render(
        run=run,
        n=_count(run.scores),
        per_prompt=len(next(iter(run.scores.values()))) // _count(run.scores),
        suites=[(k, _count(s), means(s, rows), _pairs(rows)) for k, (s, rows) in run.suites.items()],
        headline=headline(run.comparisons),
        details=details(run.comparisons),
        contradictions=contradictions(run.comparisons, run.curves),
        grid=_grid(run),
        means=means(run.scores, run.comparisons),
        pairs=_pairs(run.comparisons),
        differences=_differences(run),
        accuracy=_accuracy(run),
        local=_local_judgement(run),
        efficiency=_efficiency(run),
        seeds=kept_tables.seeds(run.params["seed"], run.comparisons, run.kept),
        settings=kept_tables.settings(run.kept),
        reached=kept_tables.compute_ratios(_courses(run), run.kept),
        curves={k: data_uri(plots.curves(v)) for k, v in run.curves.items()},
        validation={k: data_uri(png) for k, v in run.curves.items() if (png := plots.validation(v))},
        samples={
            k: [(update, data_uri(plots.as_png(row))) for update, row in rows]
            for k, rows in run.samples.items()
        },
        times=times(run),
        compute=" ".join(compute(run)),
        outs=run.outs,
        params_yaml=yaml_text.dump(public(shown)),
        summaries=[t for k, v in run.summaries.items() for t in tables(k, v)],
        world={k: list(tables("", v)) for k, v in (run.world or {}).items()},
        has_oracle=any(r["metric"].startswith("oracle_") for r in run.comparisons),
        name=name,
        number=number,
        signed=signed,
    )


def data_uri(png: bytes) -> str:
    """Encode a PNG as a data: URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _grid(run: RunResults) -> list[tuple[str, list[tuple[str, str]]]]:
    """The rows of the image grid: (prompt, [(variant, data: URI)])."""
    rows = []
    for i, prompt in enumerate(run.prompts):
        cells = [(v, plots.resized(images[i], IMAGE_SIDE)) for v, images in run.images.items()]
        rows.append((prompt, [(v, data_uri(plots.as_png(image))) for v, image in cells]))
    return rows


def _count(scores: Mapping[str, DataFrame]) -> int:
    """The number of prompts, of which each may have several images."""
    return int(next(iter(scores.values()))["prompt"].nunique())


def means(scores: Mapping[str, DataFrame], rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of mean scores by variant and metric."""
    metrics = list(dict.fromkeys(r["metric"] for r in rows))
    cells = [[name(v), *(f"{t[m].mean():.3f}" for m in metrics)] for v, t in scores.items()]
    return Table("Means", ["", *map(name, metrics)], cells)


def _pairs(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """Group comparisons by method and baseline, each row with its outcome."""
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for row in rows:
        title = f"{name(row['method'])} − {name(row['baseline'])}"
        groups.setdefault(title, []).append((outcome(row), row))
    return list(groups.items())


def _differences(run: RunResults) -> str:
    base = next(iter(run.scores))
    return data_uri(plots.differences([r for r in run.comparisons if r["baseline"] == base], NAMES))


def _accuracy(run: RunResults) -> tuple[Table, str] | None:
    """The accuracy of the preference models by timestep: a table and a figure."""
    if not run.preference:
        return None
    models = {name(k): v["accuracy"] for k, v in run.preference.items()}
    steps = sorted({int(t) for by_step in models.values() for t in by_step})
    rows = []
    for title, by_step in models.items():
        cells = [f"{100 * by_step[str(t)]:.1f}" if str(t) in by_step else "–" for t in steps]
        rows.append([title, *cells, f"{100 * sum(by_step.values()) / len(by_step):.1f}"])
    n = min(int(v["n"]) for v in run.preference.values())
    table = Table("", ["accuracy, %", *(f"t = {t}" for t in steps), "mean"], rows)
    return table, data_uri(plots.accuracy(models, n))


def _local_judgement(run: RunResults) -> tuple[Table, str] | None:
    """The correlation with the oracle within the candidates of a step: a table of means, and a figure."""
    models = {name(k): v["local"] for k, v in run.preference.items() if v.get("local")}
    if not models:
        return None
    rows = []
    for title, by_step in models.items():
        values = [by_step[t] for t in sorted(by_step, key=int, reverse=True)]
        third = max(1, len(values) // 3)
        parts = (values[:third], values[third:], values)
        rows.append([title, *(f"{sum(p) / max(len(p), 1):.3f}" for p in parts)])
    table = Table("", ["correlation", "first third of the steps", "the other steps", "all"], rows)
    return table, data_uri(plots.local_judgement(models))


def _courses(run: RunResults) -> dict[str, tuple[str, Course]]:
    """By method: the column of the quality, and its course over compute; only what was measured."""
    courses = {}
    for method, trained in run.alignment.items():
        first = [run.preference.get(key, {}) for key in method_spec(method).trained_first]
        measured = course(run.curves[method], trained, first) if method in run.curves else None
        if measured is not None:
            courses[method] = measured
    return courses


def _efficiency(run: RunResults) -> str | None:
    """The figure of quality against compute; None where it was not measured."""
    courses = _courses(run)
    if not courses:
        return None
    quality = next(iter(courses.values()))[0]
    shown = {name(method): measured for method, (_, measured) in courses.items()}
    kept = kept_tables.longer_courses(quality, run.kept)
    return data_uri(plots.efficiency(shown, name(quality.removeprefix("validation/")), kept))


def times(run: RunResults) -> Table:
    """The table of training times and counts, from the metrics files that exist."""
    stages = {**run.preference, **{f"align_{k}": v for k, v in run.alignment.items()}}
    known = ("seconds", "training_seconds", "updates", "skipped_updates", "pairs", "iterations", "n_train")
    columns = [c for c in known if any(c in v for v in stages.values())]
    rows = [[k, *(number(v[c]) if c in v else "–" for c in columns)] for k, v in stages.items()]
    return Table("", ["stage", *map(name, columns)], rows)


def compute(run: RunResults) -> list[str]:
    """Say what each method's training took, with that of the models trained for it; nothing if unknown."""
    lines = []
    for method, own in run.alignment.items():
        parts = {key: run.preference.get(key, {}) for key in method_spec(method).trained_first}
        seconds = {name(key): float(m["seconds"]) for key, m in parts.items() if "seconds" in m}
        if "seconds" not in own or len(seconds) < len(parts):
            continue
        seconds["alignment"] = float(own["seconds"])
        each = listed([f"{s:,.0f} s for {key}" for key, s in seconds.items()])
        total = f"{sum(seconds.values()):,.0f} s"
        lines.append(f"{name(method)} took {total}{f' ({each})' if len(seconds) > 1 else ''}.")
    return lines


def tables(title: str, facts: Mapping[str, Any]) -> Iterator[Table]:
    """Turn nested facts into tables; groups of plain values become the rows of one table."""
    plain = {k: v for k, v in facts.items() if not isinstance(v, Mapping)}
    groups = {k: v for k, v in facts.items() if isinstance(v, Mapping)}
    flat = {k: v for k, v in groups.items() if not any(isinstance(x, Mapping) for x in v.values())}
    if len(flat) == 1:  # a single row is more readable as a column, below
        flat = {}
    note = ""
    if plain and flat and len(plain) <= 3:
        note = ", ".join(f"{name(k)} {number(v)}" for k, v in plain.items())
    elif plain:
        yield Table(title, ["", ""], [[name(k), number(v)] for k, v in plain.items()])
    if flat:
        columns = list(dict.fromkeys(k for v in flat.values() for k in v))
        rows = [[name(k), *(number(v[c]) if c in v else "–" for c in columns)] for k, v in flat.items()]
        yield Table(title, ["", *map(name, columns)], rows, note)
    for key, group in groups.items():
        if key not in flat:
            yield from tables(f"{title}: {name(key)}" if title else name(key), group)
