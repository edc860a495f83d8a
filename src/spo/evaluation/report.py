"""Render the self-contained HTML report of a run."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import yaml_text
from spo.evaluation import efficiency, plots, seeds, verdict
from spo.evaluation.verdict import MARKS, NAMES, name, number, outcome, signed
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
    images = {v: [_thumbnail(image) for image in images] for v, images in run.images.items()}
    metrics = {r["metric"] for r in run.comparisons}
    base = next(iter(run.scores))
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            n=_count(run.scores),
            per_prompt=len(run.scores[base]) // _count(run.scores),
            suites=[(k, _count(s), means(s), _pairs(rows)) for k, (s, rows) in run.suites.items()],
            headline=verdict.headline(run.comparisons),
            cost=cost(run),
            contradictions=verdict.contradictions(run.comparisons, run.curves),
            verdicts=verdicts(run.comparisons),
            grid=list(zip(run.prompts, zip(*images.values(), strict=True), strict=True)),
            means=means(run.scores),
            pairs=_pairs(run.comparisons),
            differences=plots.differences([r for r in run.comparisons if r["baseline"] == base], NAMES),
            accuracy=_accuracy(run),
            local=_local_judgement(run),
            efficiency=_efficiency(run),
            seeds=_seeds(run),
            curves={k: plots.curves(v, plots.training_metrics(v), True) for k, v in run.curves.items()},
            validation={
                k: plots.curves(v, shown_metrics, False)
                for k, v in run.curves.items()
                if (shown_metrics := plots.validation_metrics(v))
            },
            times=_times(run),
            params_yaml=yaml_text.dump(run.params),
            summaries=[t for k, v in run.summaries.items() for t in tables(k, v)],
            world={k: list(tables("", v)) for k, v in (run.world or {}).items()},
            has_oracle=any(metric.startswith("oracle_") for metric in metrics),
            has_alignment=bool(metrics & {"oracle_alignment", "clipscore"}),
            name=name,
            signed=signed,
            html=html,
            data_uri=lambda png: "data:image/png;base64," + base64.b64encode(png).decode(),
            marks=MARKS,
        )
    )


def html(frame: DataFrame) -> str:
    """A table of facts, with display names and "–" for what is missing."""
    from markupsafe import Markup

    cells = frame.map(lambda value: "–" if value is None or value != value else number(value))
    shown = cells.rename(index=name, columns=name)
    return Markup(shown.to_html(border=0, index_names=False, justify="unset"))


def _thumbnail(image: Image.Image) -> bytes:
    from PIL import ImageOps

    buffer = io.BytesIO()
    ImageOps.contain(image.convert("RGB"), (IMAGE_SIDE, IMAGE_SIDE)).save(buffer, format="PNG")
    return buffer.getvalue()


def _count(scores: Mapping[str, DataFrame]) -> int:
    """The number of prompts, of which each may have several images."""
    return int(next(iter(scores.values()))["prompt"].nunique())


def means(scores: Mapping[str, DataFrame]) -> DataFrame:
    """The mean scores by variant and metric."""
    from pandas import DataFrame

    from spo.evaluation.statistics import metrics

    shown = {v: table[metrics(table)].mean() for v, table in scores.items()}
    return _fixed(DataFrame.from_dict(shown, orient="index"), 3)


def _fixed(frame: DataFrame, digits: int) -> DataFrame:
    """Numbers as text with so many decimals."""
    return frame.map(lambda value: f"{value:.{digits}f}" if value == value else None)


def verdicts(rows: Comparisons) -> DataFrame:
    """Which metrics are better, worse or unclear, by pair of variants."""
    from pandas import DataFrame

    marks = {
        title: {r["metric"]: MARKS[kind] if verdict.has_interval(r) else "too few prompts" for kind, r in own}
        for title, own in _pairs(rows)
    }
    return DataFrame.from_dict(marks, orient="index")


def _pairs(rows: Comparisons) -> list[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """Group comparisons by method and baseline, each row with its outcome."""
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for row in rows:
        title = f"{name(row['method'])} − {name(row['baseline'])}"
        groups.setdefault(title, []).append((outcome(row), row))
    return list(groups.items())


def _seeds(run: RunResults) -> DataFrame | None:
    """Mean differences by training seed."""
    frame = seeds.table(run.params["seed"], run.comparisons, run.seeds)
    if frame is None:
        return None
    frame.index = [f"{name(one)} − {name(other)}: {name(metric)}" for one, other, metric in frame.index]
    shown = frame.map(lambda v: f"{v:+.3f}".replace("-", "−") if v == v else None)
    return shown.assign(**{"standard deviation": frame["std"].map("{:.3f}".format)}).drop(columns="std")


def _accuracy(run: RunResults) -> tuple[DataFrame, bytes] | None:
    """The accuracy of the preference models by timestep in percent: a table and a figure."""
    if not run.preference:
        return None
    values = 100 * _by_timestep({k: m["accuracy"] for k, m in run.preference.items()})
    n = min(int(m["n"]) for m in run.preference.values())
    figure = plots.by_timestep(values, "accuracy, %", 50, 1.96 * (values * (100 - values) / n) ** 0.5)
    titled = values.rename(columns=lambda t: f"t = {t}")
    return _fixed(titled.assign(mean=values.mean(axis=1)), 1), figure


def _local_judgement(run: RunResults) -> tuple[DataFrame, bytes] | None:
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
    from pandas import DataFrame

    by_step = {name(k): {int(t): v for t, v in values.items()} for k, values in models.items()}
    return DataFrame.from_dict(by_step, orient="index").sort_index(axis=1)


def _efficiency(run: RunResults) -> bytes | None:
    """The figure of quality against compute; None where it was not measured."""
    measured = {}
    for method, trained in run.alignment.items():
        first = [run.preference.get(key, {}) for key in method_spec(method).trained_first]
        points = efficiency.points(run.curves[method], trained, first) if method in run.curves else None
        if points is not None:
            measured[name(method)] = points
    return plots.efficiency(measured) if measured else None


def _times(run: RunResults) -> DataFrame:
    """Training times and counts, from the metrics files that exist."""
    from pandas import DataFrame

    stages = {**run.preference, **{f"align {k}": v for k, v in run.alignment.items()}}
    frame = DataFrame.from_dict(stages, orient="index")
    return frame[[column for column in FACTS if column in frame]]


def cost(run: RunResults) -> str:
    """What each method's training took, with that of the models trained for it; empty if unknown."""
    times = []
    for method, own in run.alignment.items():
        parts = [own, *(run.preference.get(key, {}) for key in method_spec(method).trained_first)]
        if all("seconds" in part for part in parts):
            times.append(f"{sum(float(p['seconds']) for p in parts):,.0f} s for {name(method)}")
    return f"Training took {verdict.listed(times)}, preference models included." if times else ""


def tables(title: str, facts: Mapping[str, Any]) -> Iterator[tuple[str, DataFrame]]:
    """Turn nested facts into tables with titles; groups of plain values become the rows of one table."""
    from pandas import DataFrame

    groups = {k: v for k, v in facts.items() if isinstance(v, Mapping)}
    plain = {k: v for k, v in facts.items() if k not in groups}
    rows = {k: v for k, v in groups.items() if not any(isinstance(x, Mapping) for x in v.values())}
    if len(rows) == 1:  # a single row is more readable as a column, below
        rows = {}
    if plain:
        yield title, DataFrame({"": plain.values()}, index=list(plain), dtype=object)
    if rows:
        yield title, DataFrame.from_dict(rows, orient="index")
    for key, group in groups.items():
        if key not in rows:
            yield from tables(f"{title}: {name(key)}" if title else name(key), group)
