"""Stage `pairs`: check every row, reject bad rows with the reason, split by caption, filter, write shards."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo import config
from spo.config import Params
from spo.runtime.files import remove, write_json
from spo.runtime.fingerprint import fingerprint
from spo.runtime.workspace import SCRATCH
from spo.stages.common import stage

if TYPE_CHECKING:
    from spo.data.judgements import Judgements
    from spo.data.pairs import ShardWriter
    from spo.types import Scorer

OUTPUT = Path("outputs/pairs")
PARTS = ("train", "validation")
FILTER_CODE = ("data", "preference/gaps.py", "preference/pair_filter.py", "rewards")  # that computes gaps


def run(params: Params, variant: str | None = None) -> None:
    """Write outputs/pairs."""
    with stage("pairs", params) as tracked:
        summary = prepare(params.pairs, OUTPUT)
        counts = {name: summary[name] for name in (*PARTS, "set_aside")} | summary.get("repeats", {})
        tracked.log_metrics({name: float(count) for name, count in counts.items()}, step=0)


def prepare(section: config.Pairs, output: Path) -> dict[str, Any]:
    """Write the shards of `train` and `validation`, set_aside.csv and summary.json to `output`.

    With a filter, filter.csv has the gaps of each training pair and the scorers whose rule it fails. The rows
    are read twice, first for contradictions; memory grows by a hash of 16 bytes a row.

    Returns:
        The summary.

    Raises:
        ValueError: too many bad rows, no rows for a part, a row that was not counted, or a scorer of the
            filter that cannot be loaded.
    """
    from tqdm import tqdm

    from spo.data import judgements, pairs, sources

    kinds = {judgements.SAME_IMAGE: "same_image", judgements.CONTRADICTED: "contradicted"}
    total = sources.count_rows(section.source)
    scorers = _load_scorers(section.filter)  # as the next line, before the last outputs are deleted
    found = _judgements(section.source, total)
    remove(output)
    writers = {name: pairs.ShardWriter(output / name, section.rows_per_shard) for name in PARTS}
    left_out, rejected = Counter[str](), Counter[str]()
    with (
        _table(output / "set_aside.csv") as set_aside,
        _filtered(section, writers["train"], scorers) as train,
    ):
        set_aside.writerow(["shard", "row", "reason"])
        rows = tqdm(sources.read_rows(section.source, found.check), "check pairs", total, unit="pair")
        for pair, bad in rows:
            if pair is None:
                rejected[kinds.get(bad.reason, "bad")] += 1
                set_aside.writerow([bad.shard, bad.row, bad.reason])
            elif section.drop_ties and pair.label_0 == 0.5:
                left_out["ties"] += 1
            elif pairs.is_validation(pair.caption, section.validation_fraction):
                writers["validation"].add(pair)
            else:
                train.add(pair)
        train.close()
        writers["validation"].close()
    facts: dict[str, Any] = {}
    if section.filter is not None:
        left_out["filter"] = train.read - train.count
        facts["fail_the_rule_of"] = {name: dict(counts) for name, counts in train.failed.items()}
    counts = {name: writer.count for name, writer in writers.items()}
    summary = {"read": total, **counts, "set_aside": rejected.total(), "left_out": dict(left_out)}
    repeats = {"repeated": found.repeated, **{kind: rejected[kind] for kind in kinds.values()}}
    if any(repeats.values()):
        summary["repeats"] = repeats
    count = sum(counts.values()) + rejected.total() + left_out.total()
    if count != total:
        raise ValueError(f"pairs: {total} rows announced, {count} read; is the source being written to?")
    labels = {name: dict(writer.labels) for name, writer in writers.items()}
    write_json(output / "summary.json", {**summary, "labels": labels, **facts})
    _check(summary, rejected["bad"], section.max_bad_fraction, output)
    return summary


def _judgements(source: str, total: int) -> Judgements:
    """The judgements of all rows, whose images are not decoded for it."""
    from tqdm import tqdm

    from spo.data import judgements, sources

    found = judgements.Judgements()
    for _ in tqdm(sources.read_rows(source, found.add), "compare pairs", total, unit="pair"):
        pass
    return found


@contextmanager
def _table(path: Path) -> Iterator[Any]:
    """A CSV writer of a new file."""
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        yield csv.writer(file, lineterminator="\n")


def _load_scorers(settings: config.PairFilter | None) -> dict[str, Scorer]:
    """The filter's scorers, all in memory, since images are decoded only once."""
    if settings is None:
        return {}
    from spo.rewards import load_scorer
    from spo.training.distributed import device

    return {
        name: load_scorer(name, section, device(), settings.batch_size)
        for name, section in settings.configured().items()
    }


@contextmanager
def _filtered(section: config.Pairs, writer: ShardWriter, scorers: dict[str, Scorer]) -> Iterator[Any]:
    """What takes the training pairs: `writer`, or the filter before it, whose cache is deleted at the end."""
    if section.filter is None:
        yield writer
        return
    from spo.preference.pair_filter import FilteredWriter
    from spo.training.checkpoint import CheckpointStore

    inputs = filter(Path.exists, [Path("outputs/inputs/pairs.json")])
    cache = CheckpointStore(SCRATCH / "resume" / f"pairs-{fingerprint([section], inputs, FILTER_CODE)}", None)
    with _table(writer.folder.parent / "filter.csv") as table:
        table.writerow(["pair", "kind", *scorers, "fails"])
        yield FilteredWriter(writer, section.filter, scorers, cache, table.writerow)
    cache.clear()


def _check(summary: dict[str, Any], bad: int, bound: float, output: Path) -> None:
    """
    Raises:
        ValueError: too many bad rows, or none left. Annotators who disagree do not make a source a bad one.
    """
    total = summary["read"]
    if bad > bound * total:
        raise ValueError(
            f"pairs: {bad} of {total} rows are bad, more than pairs.max_bad_fraction ({bound}); "
            f"the reasons are in {output}/set_aside.csv"
        )
    for name in PARTS:
        if summary[name] == 0:
            raise ValueError(f"pairs: none of {total} rows is left for {name}; see {output}/summary.json")
