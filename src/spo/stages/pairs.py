"""Stage `pairs`: check every row, reject bad ones with the reason, split by caption, filter, label, write."""

import csv
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spo import config, rewards
from spo.config import Params
from spo.data.pairs import TIE, ShardWriter, chunks
from spo.ingest import gaps, sources
from spo.ingest.duplicates import CONTRADICTED, SAME_IMAGE, Duplicates
from spo.ingest.labels import ScoredWriter, labelling_scorer
from spo.ingest.selection import is_validation
from spo.runtime import processes
from spo.runtime.files import remove, write_json
from spo.runtime.fingerprint import resume_folder
from spo.stages.common import NO_METRICS, stage, write_nothing
from spo.training.distributed import device

OUTPUT = Path("outputs/pairs")
PARTS = ("train", "validation")
PINNED = ("outputs/inputs/pairs.json", "outputs/inputs/labels.json")  # what source and scorers hold
CODE = ("data", "ingest/gaps.py", "rewards")  # what scores
REPEATS = {SAME_IMAGE: "same_image", CONTRADICTED: "contradicted"}
Row = tuple[str | None, Any, Any]  # part, None for a tie that is dropped; pair; or the rejection of a bad row


def run(params: Params, variant: str | None = None) -> None:
    """Write outputs/pairs; processes besides the main one score their share of the pairs."""
    with stage("pairs", params) as tracked:
        if params.pairs.source is None:
            folders = [OUTPUT, *map(OUTPUT.joinpath, PARTS)]
            write_nothing("pairs", "pairs.source is null", folders, {OUTPUT / "summary.json": NO_METRICS})
            return
        labels = params.preference.labels
        if not processes.is_main_process():
            share(params.pairs, labels)
            return
        summary = prepare(params.pairs, OUTPUT, labels)
        counts = {name: summary[name] for name in (*PARTS, "rejected")}
        tracked.log_metrics(counts | summary.get("repeats", {}))


def prepare(section: config.Pairs, output: Path, labels: config.PseudoLabels | None = None) -> dict[str, Any]:
    """Write the shards of `train` and `validation`, rejected.csv and summary.json; returns the summary.

    A filter and `labels` write filter.csv and labels.csv too (`spo.ingest.labels`). The rows are read twice,
    first for contradictions; memory grows by a hash of 16 bytes a row.
    """
    # what can fail comes before the last outputs are deleted
    total, scored = sources.count_rows(_source(section)), _gaps(section, labels)
    found = _duplicates(_source(section), total)
    remove(output)
    writers = {name: ShardWriter(output / name, section.rows_per_shard) for name in PARTS}
    train: ShardWriter | ScoredWriter = writers["train"]
    with ExitStack() as files:
        table = partial(_table, files, output)
        reject = table("rejected.csv", "shard", "row", "reason")
        if scored is not None:
            train = ScoredWriter(writers["train"], scored, section.filter, labels, table)
        left = _write(_rows(section, found, total), {**writers, "train": train}, reject)
    counts = {name: writer.count for name, writer in writers.items()}
    filtered = {"ties": left["ties"]} if left["ties"] else {}
    facts: dict[str, Any] = {"labels": {name: dict(writer.labels) for name, writer in writers.items()}}
    if isinstance(train, ScoredWriter):
        shutil.rmtree(train.gaps.cache, ignore_errors=True)
        facts |= train.facts()
        if section.filter is not None:
            filtered["filter"] = train.read - counts["train"]
    repeats = {"repeated": found.repeated, **{kind: left[kind] for kind in REPEATS.values()}}
    rejected = left.total() - left["ties"]
    summary: dict[str, Any] = {"read": total, **counts, "rejected": rejected, "filtered": filtered}
    summary |= {"repeats": repeats} if any(repeats.values()) else {}
    count = sum(counts.values()) + rejected + sum(filtered.values())
    if count != total:
        raise ValueError(f"pairs: {total} rows announced, {count} read; is the source being written to?")
    write_json(output / "summary.json", {**summary, **facts})
    _check(summary, left["bad"], section.max_bad_fraction, output)
    return summary


def share(section: config.Pairs, labels: config.PseudoLabels | None) -> None:
    """Score every n-th buffer of the training pairs for the main process of n; raises as `prepare`."""
    scored = _gaps(section, labels)
    if scored is not None:
        total = sources.count_rows(_source(section))
        rows = _rows(section, _duplicates(_source(section), total), total)
        for part in chunks((pair for name, pair, _ in rows if pair and name == "train"), gaps.BUFFER):
            scored.of(part)


def _source(section: config.Pairs) -> str:
    assert section.source is not None
    return section.source


def _rows(section: config.Pairs, found: Duplicates, total: int) -> Iterator[Row]:
    rows = sources.read_rows(_source(section), found.check)
    for pair, bad in tqdm(rows, "check pairs", total, unit="pair"):
        if pair is None or (section.drop_ties and pair.label_0 == TIE):
            yield None, pair, bad
        else:
            yield PARTS[is_validation(pair.caption, section.validation_fraction)], pair, None


def _write(
    rows: Iterator[Row],
    writers: Mapping[str, ShardWriter | ScoredWriter],
    reject: Callable[[Sequence[Any]], object],
) -> Counter[str]:
    """Write the pairs of each part; returns how many rows are left out, by kind."""
    left = Counter[str]()
    for part, pair, bad in rows:
        if bad is not None:
            left[REPEATS.get(bad.reason, "bad")] += 1
            reject([bad.shard, bad.row, bad.reason])
        elif part is None:
            left["ties"] += 1
        else:
            writers[part].add(pair)
    for writer in writers.values():
        writer.close()
    return left


def _duplicates(source: str, total: int) -> Duplicates:
    """The preferences of all rows, without decoding their images."""
    found = Duplicates()
    for _ in tqdm(sources.read_rows(source, found.add), "compare pairs", total, unit="pair"):
        pass
    return found


def _table(files: ExitStack, folder: Path, name: str, *columns: str) -> Callable[[Sequence[Any]], object]:
    """What writes the rows of a new CSV file, which `files` closes."""
    file = (folder / name).open("w", newline="", encoding="utf-8", errors="replace")
    rows = csv.writer(files.enter_context(file), lineterminator="\n")
    rows.writerow(columns)
    return rows.writerow


def _gaps(section: config.Pairs, labels: config.PseudoLabels | None) -> gaps.CachedGaps | None:
    """The gaps by the scorers of filter and labels, all in memory, since images are decoded only once."""
    wanted = {}
    if section.filter is not None:
        rules = section.filter
        wanted = {name: (name, own, rules.batch_size) for name, own in rules.configured().items()}
    if labels is not None and (key := labelling_scorer(section.filter, labels)) not in wanted:
        ((name, own),) = labels.configured().items()
        wanted[key] = name, own, labels.batch_size
    sized = section.filter or labels
    if sized is None:
        return None
    scorers = {key: rewards.load_scorer(name, own, device(), n) for key, (name, own, n) in wanted.items()}
    sections = [section, labels] if labels else [section]
    cache = resume_folder("pairs", sections, map(Path, PINNED), CODE)
    return gaps.CachedGaps(scorers, sized.batch_size, cache)


def _check(summary: dict[str, Any], bad: int, bound: float, output: Path) -> None:
    """Refuse too many bad rows, and a part without any; contradicted pairs are not bad rows."""
    total = summary["read"]
    if bad > bound * total:
        raise ValueError(
            f"pairs: {bad} of {total} rows are bad, more than pairs.max_bad_fraction ({bound}); "
            f"the reasons are in {output}/rejected.csv"
        )
    for name in PARTS:
        if summary[name] == 0:
            raise ValueError(f"pairs: none of {total} rows is left for {name}; see {output}/summary.json")
