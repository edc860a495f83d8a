"""Stage `pairs`: check every row, reject bad rows with the reason, split by caption, write shards."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from spo import config
from spo.config import Params
from spo.runtime.files import write_json
from spo.stages.common import stage

OUTPUT = Path("outputs/pairs")
PARTS = ("train", "validation")


def run(params: Params, variant: str | None = None) -> None:
    """Write outputs/pairs."""
    with stage("pairs", params) as tracked:
        summary = prepare(params.pairs, OUTPUT)
        tracked.log_metrics({name: float(summary[name]) for name in (*PARTS, "set_aside")}, step=0)


def prepare(section: config.Pairs, output: Path) -> dict[str, Any]:
    """Write the shards of `train` and `validation`, set_aside.csv and summary.json to `output`.

    Memory does not grow with the number of rows.

    Returns:
        The summary.

    Raises:
        ValueError: too many bad rows, no rows for a part, or a row that was not counted.
    """
    from tqdm import tqdm

    from spo.data import pairs, sources

    total = sources.count_rows(section.source)
    shutil.rmtree(output, ignore_errors=True)
    parts = {name: pairs.ShardWriter(output / name, section.rows_per_shard) for name in PARTS}
    filtered, rejected = Counter[str](), 0
    with (output / "set_aside.csv").open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["shard", "row", "reason"])
        for pair, reason in tqdm(sources.read_rows(section.source), "check pairs", total, unit="pair"):
            if pair is None:
                rejected += 1
                writer.writerow([reason.shard, reason.row, reason.reason] if reason else ["", "", ""])
            elif section.drop_ties and pair.label_0 == 0.5:
                filtered["ties"] += 1
            else:
                validation = pairs.is_validation(pair.caption, section.validation_fraction)
                parts["validation" if validation else "train"].add(pair)
    for part in parts.values():
        part.close()
    counts = {name: part.count for name, part in parts.items()}
    summary = {"read": total, **counts, "set_aside": rejected, "left_out": dict(filtered)}
    count = sum(counts.values()) + rejected + filtered.total()
    if count != total:
        raise ValueError(f"pairs: {total} rows announced, {count} read; is the source being written to?")
    labels = {name: dict(part.labels) for name, part in parts.items()}
    write_json(output / "summary.json", {**summary, "labels": labels})
    _check(summary, section.max_bad_fraction, output)
    return summary


def _check(summary: dict[str, Any], bound: float, output: Path) -> None:
    total, rejected = summary["read"], summary["set_aside"]
    if rejected > bound * total:
        raise ValueError(
            f"pairs: {rejected} of {total} rows are bad, more than pairs.max_bad_fraction ({bound}); "
            f"the reasons are in {output}/set_aside.csv"
        )
    for name in PARTS:
        if summary[name] == 0:
            raise ValueError(f"pairs: none of {total} rows is left for {name}; see {output}/summary.json")
