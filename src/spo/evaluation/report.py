"""Render the self-contained HTML report of a run."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import yaml_text
from spo.evaluation import efficiency, plots, published, seeds, verdict
from spo.evaluation.statistics import metrics
from spo.evaluation.verdict import name, number
from spo.methods import method_spec

if TYPE_CHECKING:
    from jinja2 import Environment
    from pandas import DataFrame
    from PIL import Image

IMAGE_SIDE = 192  # of images on the page, in pixels
FACTS = ("seconds", "training_seconds", "updates", "skipped_updates", "pairs", "iterations", "n_train")
Comparisons = Sequence[Mapping[str, Any]]  # rows of reports/comparisons.json


@dataclass(frozen=True)
class RunResults:
    """All results that the page shows. Names of variants and metrics are those of the score tables."""

    params: Mapping[str, Any]  # without passwords and paths of this machine
    scores: Mapping[str, DataFrame]  # in the order of the columns; the first is the base model
    comparisons: Comparisons
    prompts: Sequence[str]  # of the images
    images: Mapping[str, Sequence[Image.Image]]  # by variant, one per prompt
    preference: Mapping[str, Mapping[str, Any]]  # metrics files by name
    alignment: Mapping[str, Mapping[str, Any]]  # by method
    curves: Mapping[str, DataFrame]  # training CSVs by name
    summaries: Mapping[str, Mapping[str, Any]]  # of prompts and pairs
    versions: Mapping[str, str]
    commit: str
    samples: Mapping[str, Sequence[tuple[int, bytes]]]  # by method: (update, PNG of validation images)
    seeds: seeds.Seeds
    suites: Mapping[str, tuple[Mapping[str, DataFrame], Comparisons]] = field(default_factory=dict)
    world: Mapping[str, Any] | None = None
    outs: Sequence[tuple[str, str, str]] = ()  # (stage, path, hash) of each output in dvc.lock


def environment() -> Environment:
    """Jinja's environment for pages: values are escaped, an unknown name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,  # a prompt may contain HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(run: RunResults) -> str:
    """Render the page; the same results give the same text."""
    tables = (accuracy, candidate_ranking, html, means, pairs, scores, seed_table, times, verdicts)
    functions = {f.__name__: f for f in (*tables, data_uri, efficiency_figure, thumbnail)}
    measured = {r["metric"] for r in run.comparisons}
    page = environment().get_template("report.html.j2")
    return page.render(
        run=run,
        n=next(iter(run.scores.values()))["prompt"].nunique(),
        has_oracle=any(metric.startswith("oracle_") for metric in measured),
        has_alignment=bool(measured & {"oracle_alignment", "clipscore"}),
        plots=plots,
        verdict=verdict,
        yaml=yaml_text.dump,
        **functions,
    )


def html(frame: DataFrame) -> str:
    """A table with display names, and "–" for what is missing."""
    from markupsafe import Markup

    cells = frame.map(lambda value: "–" if value is None or value != value else number(value))
    shown = cells.rename(index=name, columns=name)
    return Markup(shown.to_html(border=0, index_names=False, justify="unset"))


def data_uri(png: bytes) -> str:
    """Encode a PNG as a data: URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def thumbnail(image: Image.Image) -> bytes:
    """A small PNG of an image."""
    from PIL import ImageOps

    buffer = io.BytesIO()
    ImageOps.contain(image.convert("RGB"), (IMAGE_SIDE, IMAGE_SIDE)).save(buffer, format="PNG")
    return buffer.getvalue()


def scores(run: RunResults) -> DataFrame:
    """The means with the guidance of each variant and, for the same prompts, what papers publish."""
    frame, known = means(run.scores), published.scores(run.params)
    if known := {variant: known[variant] for variant in run.scores if variant in known}:
        papers = _frame(known).reindex(frame.index)
        columns = {f"{name(metric)}, published": papers[metric] for metric in frame if metric in papers}
        frame = frame.assign(**columns, **{"published in": papers["in"]})
    guidance = {variant: run.params["generate"][variant]["guidance"] for variant in run.scores}
    return frame.rename(index=lambda v: f"{name(v.removesuffix(published.MORE))}, guidance {guidance[v]:g}")


def means(scores: Mapping[str, DataFrame]) -> DataFrame:
    """The mean scores by variant and metric."""
    return _fixed(_frame({v: table[metrics(table)].mean() for v, table in scores.items()}), 3)


def _frame(rows: Mapping[str, Any]) -> DataFrame:
    from pandas import DataFrame

    return DataFrame.from_dict(rows, orient="index")


def _fixed(frame: DataFrame, digits: int) -> DataFrame:
    """Numbers as text with so many decimals."""
    return frame.map(lambda value: f"{value:.{digits}f}" if value == value else None)


def pairs(rows: Comparisons) -> dict[str, list[Mapping[str, Any]]]:
    """Group comparisons by method and baseline."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{name(row['method'])} − {name(row['baseline'])}", []).append(row)
    return groups


def verdicts(rows: Comparisons) -> DataFrame:
    """Which metrics are better, worse or unclear, by pair of variants."""
    marks = {title: {r["metric"]: verdict.mark(r) for r in own} for title, own in pairs(rows).items()}
    return _frame(marks)


def seed_table(run: RunResults) -> DataFrame | None:
    """Mean differences by training seed."""
    frame = seeds.table(run.params["seed"], run.comparisons, run.seeds)
    if frame is None:
        return None
    frame.index = [f"{name(one)} − {name(other)}: {name(metric)}" for one, other, metric in frame.index]
    shown = frame.map(lambda v: f"{v:+.3f}".replace("-", "−") if v == v else None)
    return shown.assign(**{"standard deviation": frame["std"].map("{:.3f}".format)}).drop(columns="std")


def accuracy(run: RunResults) -> tuple[DataFrame, bytes] | None:
    """The accuracy of the preference models by timestep in percent: a table and a figure."""
    measured = {k: m for k, m in run.preference.items() if m["accuracy"]}
    if not measured:
        return None
    values = 100 * _by_timestep({k: m["accuracy"] for k, m in measured.items()})
    n = min(int(m["n"]) for m in measured.values())
    figure = plots.by_timestep(values, "accuracy, %", 50, 1.96 * (values * (100 - values) / n) ** 0.5)
    titled = values.rename(columns=lambda t: f"t = {t}")
    return _fixed(titled.assign(mean=values.mean(axis=1)), 1), figure


def candidate_ranking(run: RunResults) -> tuple[DataFrame, bytes] | None:
    """The correlation with the oracle within the candidates of a step: a table of means, and a figure."""
    measured = {k: m["local"] for k, m in run.preference.items() if m.get("local")}
    if not measured:
        return None
    values = _by_timestep(measured)
    third = -max(1, values.shape[1] // 3)  # the first steps have the highest timesteps
    parts = {
        "first third of the steps": values.iloc[:, third:],
        "the other steps": values.iloc[:, :third],
        "all": values,
    }
    shown = values[[]].assign(**{title: part.mean(axis=1) for title, part in parts.items()})
    return _fixed(shown, 3), plots.by_timestep(values, "correlation", 0)


def _by_timestep(models: Mapping[str, Mapping[str, float]]) -> DataFrame:
    """A row for each model, a column for each timestep."""
    by_step = {name(k): {int(t): v for t, v in values.items()} for k, values in models.items()}
    return _frame(by_step).sort_index(axis=1)


def efficiency_figure(run: RunResults) -> bytes | None:
    """The figure of quality against compute; None where it was not measured."""
    measured = {}
    for method, trained in run.alignment.items():
        first = [run.preference.get(key, {}) for key in method_spec(method).trained_first]
        points = efficiency.points(run.curves[method], trained, first) if method in run.curves else None
        if points is not None:
            measured[name(method)] = points
    return plots.efficiency(measured) if measured else None


def times(run: RunResults) -> DataFrame:
    """Training times and counts, from the metrics files that exist."""
    facts = {**run.preference, **{f"align {k}": v for k, v in run.alignment.items()}}
    frame = _frame({name: own for name, own in facts.items() if "pretrained" not in own})
    return frame[[column for column in FACTS if column in frame]]
