"""Count the memory and time of each stage of the presets sd15 and sdxl on cards of four sizes.

`python -m benchmarks.cards` writes tests/estimate/peaks.csv and the table of docs/gpu.md, in half an hour.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from spo import estimate
from spo.config import Params
from spo.training import budget
from spo.types import Budget
from tests.helpers import real_sizes

CARDS = {24: ("RTX 4090", 165e12), 48: ("L40S", 362e12), 80: ("A100", 312e12), 141: ("H200", 989e12)}  # bf16
USED = 0.4  # of that rate
PRESETS = ("sd15", "sdxl", "sd35", "flux")
ON = {"sd35": (24,), "flux": (80,)}  # cards; the others on all
STAGES = (
    *(("pairs", None), ("preference", None), ("preference", "latent")),
    *(("align", "spo"), ("align", "lpo"), ("align", "diffusion_dpo"), ("generate", "base")),
)
PEAKS, PAGE = Path("tests/estimate/peaks.csv"), Path("docs/gpu.md")
BEGIN, END = "<!-- cards: begin -->\n", "<!-- cards: end -->\n"


def stages(params: Params) -> list[tuple[str, str | None]]:
    """Those of STAGES that an experiment has."""
    return [
        (stage, variant)
        for stage, variant in STAGES
        if not (stage == "align" and getattr(params.align, str(variant)) is None)
        and not (stage == "preference" and not params.wants(budget.kind(stage, variant)))
    ]


def name(stage: str, variant: str | None) -> str:
    return f"{stage} {variant}" if variant and stage != "generate" else stage


def cut(params: Params, stage: str, variant: str | None, card: int) -> Budget:
    """The budget of a stage on a card; the pairs are encoded by the stage that first trains on them."""
    kind = "preference" if stage == "pairs" else budget.kind(stage, variant)
    return budget.automatic(params.backbone.family, kind, card * 2**30, params.backbone.image_size)


def count(preset: str, folder: Path) -> list[dict[str, object]]:
    """A row for each stage and card; a budget that several cards share is counted once."""
    rows: list[dict[str, object]] = []
    params = real_sizes.described(preset, folder)
    for stage, variant in stages(params):
        known: dict[Budget, estimate.Count] = {}
        for card in ON.get(preset, CARDS):
            own = cut(params, stage, variant, card)
            if own not in known:
                known[own] = estimate.count(params, stage, variant, own)
            row = {"preset": preset, "stage": name(stage, variant), "card": card, **own._asdict()}
            found = known[own]
            rows.append({**row, "gb": f"{found.peak / 1e9:.1f}", "pflop": f"{found.flops() / 1e15:.4g}"})
            print(rows[-1], file=sys.stderr)
    return rows


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """In Markdown, a row for each stage and card."""
    head = "| preset | stage | card | images, samples, pairs | checkpointing | offload | GB | PFLOP | hours |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        _, rate = CARDS[int(str(row["card"]))]
        work = float(str(row["pflop"]))
        hours = work * 1e15 / (USED * rate) / 3600
        switches = " | ".join("yes" if str(row[k]) == "True" else "" for k in ("checkpointing", "offload"))
        sizes = ", ".join(str(row[k]) for k in ("images", "samples", "pairs"))
        shown = f"{work:.0f} | {hours:.{0 if hours >= 10 else 1}f}" if hours else "|"
        what = f"{row['preset']} | {row['stage']} | {row['card']}"
        lines.append(f"| {what} | {sizes} | {switches} | {row['gb']} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.cards", description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2) as pool:
        folders = [Path(folder) / preset for preset in PRESETS]
        rows = [row for rows in pool.map(count, PRESETS, folders) for row in rows]
    with PEAKS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write(rows)


def write(rows: Sequence[Mapping[str, object]]) -> None:
    """Replace the table in the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
