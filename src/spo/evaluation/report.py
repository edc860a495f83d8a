"""Render the self-contained HTML report of a run."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from spo.evaluation import plots
from spo.evaluation.verdict import NAMES, contradictions, details, headline, name, number, outcome, signed
from spo.runtime.messages import redact

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
    world: Mapping[str, Any] | None = None
    lock: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]  # the first cell is the row's header
    note: str = ""


def render(run: RunResults) -> str:
    """Render the page; the same results give the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).with_name("templates")
    pages = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,  # a prompt may contain HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = {k: v for k, v in run.params.items() if k != "tracking"}  # its URI may contain a password
    return pages.get_template("report.html.j2").render(
        run=run,
        n=len(next(iter(run.scores.values()))),
        headline=headline(run.comparisons),
        details=details(run.comparisons),
        contradictions=contradictions(run.comparisons, run.curves),
        grid=_grid(run),
        means=means(run),
        pairs=_pairs(run.comparisons),
        differences=_differences(run),
        accuracy=_accuracy(run),
        curves={k: data_uri(plots.curves(v)) for k, v in run.curves.items()},
        validation={k: data_uri(png) for k, v in run.curves.items() if (png := plots.validation(v))},
        samples={
            k: [(update, data_uri(plots.as_png(row))) for update, row in rows]
            for k, rows in run.samples.items()
        },
        times=times(run),
        compute=equal_compute(run),
        outs=_outs(run.lock),
        params_yaml=yaml.safe_dump(redact(shown), sort_keys=False, allow_unicode=True),
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


def means(run: RunResults) -> Table:
    """The table of mean scores by variant and metric."""
    metrics = list(dict.fromkeys(r["metric"] for r in run.comparisons))
    rows = [[name(v), *(f"{t[m].mean():.3f}" for m in metrics)] for v, t in run.scores.items()]
    return Table("Means", ["", *map(name, metrics)], rows)


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


def times(run: RunResults) -> Table:
    """The table of training times and counts, from the metrics files that exist."""
    stages = {**run.preference, **{f"align_{k}": v for k, v in run.alignment.items()}}
    known = ("seconds", "training_seconds", "updates", "pairs", "iterations", "n_train")
    columns = [c for c in known if any(c in v for v in stages.values())]
    rows = [[k, *(number(v[c]) if c in v else "–" for c in columns)] for k, v in stages.items()]
    return Table("", ["stage", *map(name, columns)], rows)


def equal_compute(run: RunResults) -> str:
    """Compare the time of SPO and its preference model with Diffusion-DPO's; empty if one is unknown."""
    stages = {**run.alignment, "preference": run.preference.get("preference", {})}
    spm, spo, dpo = (
        float(stages.get(k, {}).get("seconds", 0)) for k in ("preference", "spo", "diffusion_dpo")
    )
    if not (spm and spo and dpo):
        return ""
    return (
        f"SPO took {spm + spo:,.0f} s: {spm:,.0f} s for its preference model and {spo:,.0f} s for the "
        f"alignment. Diffusion-DPO took {dpo:,.0f} s, {dpo / (spm + spo):.2f} times as long."
    )


def _outs(lock: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """(stage, path, hash) of each output in dvc.lock."""
    stages = (lock or {}).get("stages", {})
    return [
        (stage, out["path"], str(out.get("md5", out.get("hash", "")))[:12])
        for stage, entry in stages.items()
        for out in entry.get("outs", [])
    ]


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
