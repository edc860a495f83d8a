"""The figures of the report as PNG bytes: curves by matplotlib, grids of generated images by PIL."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series
    from PIL import Image, ImageFont

    from spo.evaluation.efficiency import Course

COLOURS = ("#1f6fd1", "#d1701f", "#5a8f3c", "#8a5ab5", "#7d838c")
WIDTH = 10.0  # inches, the same for every figure, so that all have the same font size
INK, FAINT = "#30343a", "#dfe3e8"
SMOOTHING = 15  # the running mean is over a fifteenth of a curve
METRICS = ("score", "loss", "accuracy", "implicit_accuracy", "valid_fraction", "gradient_norm")

CELL, GAP, MARGIN = 144, 4, 12  # pixels, of the grid for the README
TEXT, LINE, HEADER = 14, 19, 26
BLOCKS = 2  # prompts per row


def accuracy(models: Mapping[str, Mapping[str, float]], n: int) -> bytes:
    """Plot the accuracy of preference models by timestep, with the 95 % binomial interval of n pairs."""
    figure, (axes,) = _figure(1, height=3.0)
    for (name, by_step), colour in zip(models.items(), _colours(), strict=False):
        steps = sorted(int(t) for t in by_step)
        values = [100 * by_step[str(t)] for t in steps]
        margins = [1.96 * math.sqrt(v * (100 - v) / max(n, 1)) for v in values]
        axes.errorbar(steps, values, margins, color=colour, marker="o", ms=4, capsize=3, lw=1.6, label=name)
    axes.axhline(50, color=INK, lw=0.8, ls=":")
    axes.set(xlabel="timestep (0: the clean image)", ylabel="accuracy, %")
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def differences(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> bytes:
    """Plot each method's mean difference from one baseline with its interval, one panel per metric."""
    metrics = list(dict.fromkeys(r["metric"] for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    figure, panels = _figure(len(metrics), height=0.9 + 0.4 * len(methods))
    for axes, metric in zip(panels, metrics, strict=True):
        for place, method in enumerate(reversed(methods)):
            row = next(r for r in rows if r["metric"] == metric and r["method"] == method)
            middle = row["mean_difference"]
            low, high = (middle if row[end] is None else row[end] for end in ("ci_low", "ci_high"))
            margins = [[middle - low], [high - middle]]
            colour = COLOURS[methods.index(method) % len(COLOURS)]
            axes.errorbar(middle, place, xerr=margins, color=colour, marker="o", ms=5, capsize=3, lw=1.8)
        axes.axvline(0, color=INK, lw=0.9)
        axes.set_title(names.get(metric, metric), fontsize=9)
        axes.set(ylim=(-0.6, len(methods) - 0.4), yticks=range(len(methods)), yticklabels=[])
        axes.locator_params(axis="x", nbins=4)
        axes.margins(x=0.15)
    panels[0].set_yticklabels([names.get(m, m) for m in reversed(methods)])
    return _png(figure)


def curves(table: DataFrame, colour: str = COLOURS[0]) -> bytes:
    """Plot training metrics over iterations: measured values (faint) and their running mean.

    Raises:
        ValueError: a table without a metric.
    """
    columns = [c for c in METRICS if c in table.columns] or [
        c for c in table.columns if c not in ("step", "updates")
    ]
    columns = [c for c in columns if table[c].notna().any()][:4]
    if not columns:
        raise ValueError(f"a training curve has no metric; its columns: {', '.join(table.columns)}")
    figure, panels = _figure(len(columns), height=2.2)
    for axes, column in zip(panels, columns, strict=True):
        known = table[["step", column]].dropna()
        axes.plot(known["step"], known[column], color=colour, alpha=0.25, lw=0.9)
        axes.plot(known["step"], _smooth(known[column]), color=colour, lw=1.7)
        axes.set_title(column.replace("_", " "), fontsize=9)
        axes.locator_params(nbins=4)
        axes.set_xlabel("iteration")
    return _png(figure)


def validation(table: DataFrame, colour: str = COLOURS[1]) -> bytes | None:
    """Plot scores and diversity of the validation images over iterations; None without validation."""
    shown = (c for c in table.columns if c.startswith("validation/"))
    columns = [c for c in shown if table[c].notna().any()]
    if not columns:
        return None
    figure, panels = _figure(len(columns), height=2.0)
    for axes, column in zip(panels, columns, strict=True):
        known = table[["step", column]].dropna()
        axes.plot(known["step"], known[column], color=colour, marker="o", ms=4, lw=1.4)
        axes.set_title(column.removeprefix("validation/"), fontsize=9)
        axes.locator_params(nbins=4)
        axes.set_xlabel("iteration")
    return _png(figure)


def efficiency(courses: Mapping[str, Course], quality: str, kept: Mapping[str, Course]) -> bytes:
    """Plot quality against seconds of training and UNet samples; a star marks the selected weights.

    Args:
        kept: courses of other runs, whose seconds are not comparable.
    """
    figure, panels = _figure(2, height=2.8)
    for axes, attribute in zip(panels, ("seconds", "unet_samples"), strict=True):
        shown = courses if attribute == "seconds" else {**courses, **kept}
        for (name, course), colour in zip(shown.items(), _colours(), strict=False):
            x = [v / (1 if attribute == "seconds" else 1e3) for v in getattr(course, attribute)]
            axes.plot(x, course.quality, color=colour, marker="o", ms=4, lw=1.6, label=name)
            if course.selected is not None:
                at = course.selected
                axes.plot(x[at], course.quality[at], color=colour, marker="*", ms=13)
        axes.set_ylabel(quality)
    panels[0].set_xlabel("seconds of training, preference model included")
    panels[1].set_xlabel("thousand UNet samples, preference model included")
    panels[1].legend(frameon=False, fontsize=8)
    return _png(figure)


def local_judgement(models: Mapping[str, Mapping[str, float]]) -> bytes:
    """Plot the correlation with the oracle within the candidates of a step, by timestep."""
    figure, (axes,) = _figure(1, height=2.6)
    for (name, by_step), colour in zip(models.items(), _colours(), strict=False):
        steps = sorted(int(t) for t in by_step)
        axes.plot(steps, [by_step[str(t)] for t in steps], color=colour, marker="o", ms=4, lw=1.6, label=name)
    axes.axhline(0, color=INK, lw=0.8, ls=":")
    axes.set(xlabel="timestep of the step's start", ylabel="correlation")
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _smooth(values: Series) -> Series:
    return values.rolling(max(1, len(values) // SMOOTHING), center=True, min_periods=1).mean()


def _colours() -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(50)]


def _figure(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    all_axes = figure.subplots(1, panels, squeeze=False)[0].tolist()
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(labelsize=8, colors=INK)
        axes.grid(color=FAINT, lw=0.7)
        axes.set_axisbelow(True)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
    return figure, all_axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def row(images: Sequence[Image.Image]) -> Image.Image:
    """Place images side by side, CELL pixels each."""
    from PIL import Image

    page = Image.new("RGB", (len(images) * (CELL + GAP) - GAP, CELL), "white")
    for i, image in enumerate(images):
        page.paste(resized(image, CELL), (i * (CELL + GAP), 0))
    return page


def resized(image: Image.Image, side: int) -> Image.Image:
    """Resize to RGB with a longer side of `side` pixels: bicubic to enlarge, Lanczos to shrink."""
    from PIL import Image

    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    kind = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, kind)


def as_png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def grid(prompts: Sequence[str], columns: Mapping[str, Sequence[Image.Image]]) -> bytes:
    """Draw the grid for the README: two prompts per row, below each its images, one per variant.

    Args:
        columns: images by title of a variant, one per prompt.
    """
    from PIL import Image, ImageDraw

    block = len(columns) * (CELL + GAP) - GAP
    width = 2 * MARGIN + BLOCKS * block + (BLOCKS - 1) * 2 * MARGIN
    font, bold = _font("DejaVuSans.ttf"), _font("DejaVuSans-Bold.ttf")
    texts = [wrap(p, font, block, lines=2) for p in prompts]
    row_height = max(len(t) for t in texts) * LINE + 6 + CELL + 2 * GAP + MARGIN
    rows = math.ceil(len(prompts) / BLOCKS)
    page = Image.new("RGB", (width, HEADER + MARGIN + rows * row_height), "white")
    draw = ImageDraw.Draw(page)
    for b in range(min(BLOCKS, len(prompts))):
        for c, title in enumerate(columns):
            x = MARGIN + b * (block + 2 * MARGIN) + c * (CELL + GAP) + CELL // 2
            draw.text((x, MARGIN // 2), title, font=bold, fill=INK, anchor="ma")
    for i, text in enumerate(texts):
        x, y = MARGIN + i % BLOCKS * (block + 2 * MARGIN), HEADER + MARGIN // 2 + i // BLOCKS * row_height
        for number, line in enumerate(text):
            draw.text((x, y + number * LINE), line, font=font, fill=INK)
        y += row_height - CELL - 2 * GAP - MARGIN
        for c, images in enumerate(columns.values()):
            page.paste(resized(images[i], CELL), (x + c * (CELL + GAP), y))
    return as_png(page)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Wrap `text` at spaces into at most `lines` of `width` pixels; the rest becomes '…'."""
    wrapped: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            wrapped.append(line)
        line = word
    wrapped.append(line)
    return [
        _shortened(x, font, width, i == lines - 1 and len(wrapped) > lines)
        for i, x in enumerate(wrapped[:lines])
    ]


def _shortened(line: str, font: ImageFont.FreeTypeFont, width: int, more: bool) -> str:
    if font.getlength(line) <= width and not more:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"


def _font(name: str) -> Any:
    """Load a font that matplotlib ships, so that the grid is the same on every machine."""
    from pathlib import Path

    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / name, TEXT)
