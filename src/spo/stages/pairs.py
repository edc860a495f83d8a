"""Stage `pairs`: check every row, set bad ones aside with their reason, split by caption, write shards."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path

from spo.config import Params
from spo.stages.common import require, stage, write_json

OUTPUT = Path("outputs/pairs")


def run(params: Params, item: str | None = None) -> None:
    from tqdm import tqdm

    from spo.data import pairs

    section = params.pairs
    with stage("pairs", params) as tracked:
        paths = pairs.shards(require(section.source, "preference pairs"))
        total = pairs.count_rows(paths)
        shutil.rmtree(OUTPUT, ignore_errors=True)
        parts = {n: pairs.ShardWriter(OUTPUT / n, section.rows_per_shard) for n in ("train", "validation")}
        rejected: list[pairs.Rejected] = []
        left_out = Counter[str]()
        for pair, reason in tqdm(pairs.read_rows(paths), "check pairs", total, unit="pair"):
            if reason is not None:
                rejected.append(reason)
            elif section.drop_ties and pair.label_0 == 0.5:
                left_out["ties"] += 1
            else:
                validation = pairs.is_validation(pair.caption, section.validation_fraction, params.seed)
                parts["validation" if validation else "train"].add(pair)
        for writer in parts.values():
            writer.close()
        _write_rejected(rejected)
        counts = {name: writer.count for name, writer in parts.items()}
        labels = {name: dict(writer.labels) for name, writer in parts.items()}
        summary = {"read": total, **counts, "set_aside": len(rejected), "left_out": dict(left_out)}
        write_json(OUTPUT / "summary.json", {**summary, "labels": labels})
        tracked.log_metrics({**counts, "set_aside": float(len(rejected))}, step=0)
        _check(len(rejected), total, section.max_bad_fraction, counts)


def _check(bad: int, total: int, bound: float, counts: dict[str, int]) -> None:
    if bad > bound * total:
        raise ValueError(
            f"pairs: {bad} of {total} rows are bad, more than pairs.max_bad_fraction ({bound}); "
            f"the reasons are in {OUTPUT}/set_aside.csv"
        )
    for name, count in counts.items():
        if count == 0:
            raise ValueError(f"pairs: none of {total} rows is left for {name}; see {OUTPUT}/summary.json")


def _write_rejected(rejected: list) -> None:
    """Shard, row and reason of each; nothing is dropped without a word."""
    with (OUTPUT / "set_aside.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["shard", "row", "reason"])
        writer.writerows([r.shard, r.row, r.reason] for r in rejected)
