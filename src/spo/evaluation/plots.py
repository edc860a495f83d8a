"""The figures of the report, as PNG bytes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from spo.evaluation.efficiency import COMPUTE, QUALITIES
from spo.evaluation.verdict import name

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL import Image

WIDTH = 10.0  # inches, the same for every figure, so that all have the same font size
SMOOTHING = 15  # the running mean is over a fifteenth of a curve
METRICS = ("score", "loss", "accuracy", "implicit_accuracy", "valid_fraction", "gradient_norm")
INK = "#30343a"
STYLE = Path(__file__).with_name("templates") / "figures.mplstyle"  # in place of the user's own


@rc_context(fname=STYLE)
def by_timestep(models: DataFrame, label: str, level: float, margins: DataFrame | None = None) -> bytes:
    """Plot a measure of preference models [models, timesteps], with a line at what chance gives."""
    figure = Figure((WIDTH, 2.8))
    axes = figure.subplots()
    for title, values in models.iterrows():
        known = values.dropna()
        error = None if margins is None else margins.loc[title, known.index]
        axes.errorbar(known.index, known, error, marker="o", capsize=3, label=title)
    axes.axhline(level, color=INK, lw=0.8, ls=":")
    axes.set(xlabel="timestep (0: the clean image)", ylabel=label)
    axes.legend()
    return _png(figure)


@rc_context(fname=STYLE)
def differences(comparisons: Sequence[Mapping[str, Any]], baseline: str) -> bytes:
    """Plot each method's mean difference from a baseline with its interval, one panel per metric."""
    rows = [r for r in comparisons if r["baseline"] == baseline]
    metrics = list(dict.fromkeys(r["metric"] for r in rows))
    figure = Figure((WIDTH, 0.9 + 0.4 * len(rows) / len(metrics)))
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for row in (r for r in rows if r["metric"] == metric):
            middle = row["mean_difference"]
            low, high = (middle if row[end] is None else row[end] for end in ("ci_low", "ci_high"))
            margins = [[middle - low], [high - middle]]
            axes.errorbar(middle, name(row["method"]), xerr=margins, marker="o", capsize=3)
        axes.axvline(0, color=INK, lw=0.9)
        axes.set_title(name(metric))
        axes.locator_params(axis="x", nbins=4)
        axes.margins(x=0.15, y=0.2)
    panels[0].invert_yaxis()
    return _png(figure)


def training_metrics(table: DataFrame) -> list[str]:
    """The columns of a training curve that are shown, four at most."""
    others = (c for c in table.columns if c not in ("step", "updates"))
    columns = [c for c in METRICS if c in table.columns] or others
    known = [c for c in columns if table[c].notna().any()][:4]
    if not known:
        raise ValueError(f"a training curve has no metric; its columns: {', '.join(table.columns)}")
    return known


def validation_metrics(table: DataFrame) -> list[str]:
    """The columns of a training curve that are of validation images; none without validation."""
    return [c for c in table.columns if c.startswith("validation/") and table[c].notna().any()]


@rc_context(fname=STYLE)
def curves(table: DataFrame, columns: Sequence[str], smoothed: bool) -> bytes:
    """Plot columns of a training curve by iteration: measured values, or faintly with their running mean."""
    figure = Figure((WIDTH, 2.1))
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        known = table[["step", column]].dropna().set_index("step")[column]
        if smoothed:
            axes.plot(known, color="C0", alpha=0.25, lw=0.9)
            window = max(1, len(known) // SMOOTHING)
            axes.plot(known.rolling(window, center=True, min_periods=1).mean(), color="C0")
        else:
            axes.plot(known, color="C1", marker="o")
        axes.set(title=column.rpartition("/")[2].replace("_", " "), xlabel="iteration")
        axes.locator_params(nbins=4)
    return _png(figure)


@rc_context(fname=STYLE)
def efficiency(points: Mapping[str, DataFrame]) -> bytes:
    """Plot the quality of each method by what its training took; a star marks the selected weights."""
    figure = Figure((WIDTH, 2.8))
    quality = next(q for q in QUALITIES if all(q in table for table in points.values()))
    for axes, (column, label) in zip(figure.subplots(1, 2, sharey=True), COMPUTE.items(), strict=True):
        for title, table in points.items():
            (line,) = axes.plot(table[column], table[quality], marker="o", label=title)
            chosen = table[table["selected"]]
            axes.plot(chosen[column], chosen[quality], "*", color=line.get_color(), ms=13)
        axes.set_xlabel(f"{label}, preference model included")
    axes.legend()
    return _png(figure)


@rc_context({"axes.edgecolor": "white", "axes.grid": False}, STYLE)
def grid(prompts: Sequence[str], variants: Mapping[str, Sequence[Image.Image]]) -> bytes:
    """Draw the images of each variant in a row, one column per prompt."""
    side = WIDTH / len(prompts)
    figure = Figure((WIDTH, side * (0.95 * len(variants) + 0.4)))
    rows = figure.subplots(len(variants), len(prompts), squeeze=False)
    for row, (title, images) in zip(rows, variants.items(), strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image.convert("RGB"), interpolation="hanning")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, fontsize=9)
    for axes, prompt in zip(rows[0], prompts, strict=True):
        axes.set_title(textwrap.fill(textwrap.shorten(prompt, 90, placeholder=" …"), 24), fontsize=7.5)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
