"""Stage `pairs`: check every row, reject bad ones with the reason, split by caption, filter, label, write."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo import config
from spo.config import Params
from spo.runtime import launch
from spo.runtime.files import remove, write_json
from spo.runtime.fingerprint import fingerprint
from spo.runtime.workspace import SCRATCH
from spo.stages.common import stage

if TYPE_CHECKING:
    from spo.data.judgements import Judgements
    from spo.data.pairs import ShardWriter
    from spo.training.checkpoint import CheckpointStore
    from spo.types import Scorer

OUTPUT = Path("outputs/pairs")
PARTS = ("train", "validation")
PINNED = ("outputs/inputs/pairs.json", "outputs/inputs/labels.json")  # what source and scorers hold
GAPS_CODE = ("data", "preference/gaps.py", "rewards")
LABELS = "labels"  # key of the gaps by preference.labels where the filter has no equal scorer


def run(params: Params, variant: str | None = None) -> None:
    """Write outputs/pairs; processes besides the main one score their share of the pairs."""
    with stage("pairs", params) as tracked:
        labels = params.preference.labels
        if not launch.is_main_process():
            share(params.pairs, labels)
            return
        summary = prepare(params.pairs, OUTPUT, labels)
        counts = {name: summary[name] for name in (*PARTS, "set_aside")} | summary.get("repeats", {})
        tracked.log_metrics({name: float(count) for name, count in counts.items()})


def prepare(
    section: config.Pairs, output: Path, pseudo_labels: config.PseudoLabels | None = None
) -> dict[str, Any]:
    """Write the shards of `train` and `validation`, set_aside.csv and summary.json to `output`.

    With a filter, filter.csv has the gaps of each training pair and the scorers whose rule it fails; with
    `pseudo_labels`, labels.csv has the label of each training pair that is kept. The rows are read twice,
    first for contradictions; memory grows by a hash of 16 bytes a row.

    Returns:
        The summary.

    Raises:
        ValueError: too many bad rows, no rows for a part, a row that was not counted, or a scorer of
            filter or labels that cannot be loaded or finds no pair that counts.
    """
    from spo.data import judgements, pairs, sources

    kinds = {judgements.SAME_IMAGE: "same_image", judgements.CONTRADICTED: "contradicted"}
    total = sources.count_rows(section.source)
    # as the next line, before the last outputs are deleted
    scorers = _load_scorers(section.filter, pseudo_labels)
    found = _judgements(section.source, total)
    remove(output)
    writers = {name: pairs.ShardWriter(output / name, section.rows_per_shard) for name in PARTS}
    left_out, rejected = Counter[str](), Counter[str]()
    with (
        _table(output / "set_aside.csv") as set_aside,
        _scored(section, pseudo_labels, writers["train"], scorers) as train,
    ):
        set_aside.writerow(["shard", "row", "reason"])
        for part, pair, bad in _rows(section, found, total):
            if pair is None:
                rejected[kinds.get(bad.reason, "bad")] += 1
                set_aside.writerow([bad.shard, bad.row, bad.reason])
            elif part is None:
                left_out["ties"] += 1
            else:
                (train if part == "train" else writers[part]).add(pair)
        train.close()
        writers["validation"].close()
    facts: dict[str, Any] = {}
    if section.filter is not None:
        left_out["filter"] = train.read - train.count
        facts["fail_the_rule_of"] = {name: dict(counts) for name, counts in train.failed.items()}
    if pseudo_labels is not None:
        facts["pseudo_labels"] = train.labels.facts()
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


def share(section: config.Pairs, pseudo_labels: config.PseudoLabels | None) -> None:
    """Score every n-th buffer of the training pairs for the main process of n.

    Raises:
        ValueError: as `prepare`.
    """
    from spo.data import pairs, sources
    from spo.preference.gaps import BUFFER, CachedGaps

    sized = section.filter or pseudo_labels
    if sized is None:
        return
    total = sources.count_rows(section.source)
    cache = _cache(section, pseudo_labels)
    gaps = CachedGaps(_load_scorers(section.filter, pseudo_labels), sized.batch_size, cache)
    rows = _rows(section, _judgements(section.source, total), total)
    for part in pairs.chunks((pair for name, pair, _ in rows if pair and name == "train"), BUFFER):
        gaps.of(part)


def _rows(section: config.Pairs, found: Judgements, total: int) -> Iterator[tuple[str | None, Any, Any]]:
    """Each row: its part, None for a tie that is dropped, and the pair, or the rejection of a bad row."""
    from tqdm import tqdm

    from spo.data import pairs, sources

    rows = sources.read_rows(section.source, found.check)
    for pair, bad in tqdm(rows, "check pairs", total, unit="pair"):
        if pair is None or (section.drop_ties and pair.label_0 == 0.5):
            yield None, pair, bad
        else:
            held_out = pairs.is_validation(pair.caption, section.validation_fraction)
            yield PARTS[held_out], pair, None


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


def _load_scorers(rules: config.PairFilter | None, labels: config.PseudoLabels | None) -> dict[str, Scorer]:
    """The scorers of filter and labels, all in memory, since images are decoded only once."""
    wanted = (
        {name: (name, own, rules.batch_size) for name, own in rules.configured().items()} if rules else {}
    )
    if labels is not None and (key := _label_key(rules, labels)) not in wanted:
        ((name, own),) = labels.configured().items()
        wanted[key] = name, own, labels.batch_size
    if not wanted:
        return {}
    from spo.rewards import load_scorer
    from spo.training.distributed import device

    return {key: load_scorer(name, own, device(), size) for key, (name, own, size) in wanted.items()}


def _label_key(rules: config.PairFilter | None, labels: config.PseudoLabels) -> str:
    """The key of the labels' scorer, which may be one of the filter's."""
    ((name, own),) = labels.configured().items()
    return name if rules is not None and rules.configured().get(name) == own else LABELS


@contextmanager
def _scored(
    section: config.Pairs,
    pseudo_labels: config.PseudoLabels | None,
    writer: ShardWriter,
    scorers: dict[str, Scorer],
) -> Iterator[Any]:
    """What takes the training pairs: `writer`, or filter and labels before it; then their cache goes."""
    if not scorers:
        yield writer
        return
    from spo.preference import pseudo_labels as labelling
    from spo.preference.pair_filter import FilteredWriter

    cache, output = _cache(section, pseudo_labels), writer.folder.parent
    with ExitStack() as tables:

        def table(name: str, *columns: str) -> Callable[[Sequence[Any]], object]:
            rows = tables.enter_context(_table(output / name))
            rows.writerow(columns)
            return rows.writerow

        on_pair, labels = None, None
        if section.filter is not None:
            on_pair = table("filter.csv", "pair", "kind", *section.filter.configured(), "fails")
        if pseudo_labels is not None:
            write = table(labelling.LABELS, *labelling.COLUMNS)
            labels = labelling.Labeller(pseudo_labels, _label_key(section.filter, pseudo_labels), write)
        yield FilteredWriter(writer, section.filter, scorers, cache, on_pair, labels)
    cache.clear()


def _cache(section: config.Pairs, labels: config.PseudoLabels | None) -> CheckpointStore:
    """Of the gaps of an interrupted stage."""
    from spo.training.checkpoint import CheckpointStore

    sections = [section, labels] if labels else [section]
    name = fingerprint(sections, filter(Path.exists, map(Path, PINNED)), GAPS_CODE)
    return CheckpointStore(SCRATCH / "resume" / f"pairs-{name}", None)


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
