"""Preference pairs in Pick-a-Pic's schema: checked row by row, written as shards, read back one by one.

Memory does not grow with the number of rows: shards are read in small batches, from a local folder or
through fsspec from a hub (`hf://datasets/OWNER/NAME@REVISION/data`) or another store, nothing being kept.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from spo.data import columns, remote, values
from spo.data.reasons import first_line
from spo.types import PreferencePair

NEEDED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
READ_BATCH = 64  # rows
BUFFER = 1 << 20  # bytes of a column that are read ahead; without it, a whole row group's column is


@dataclass(frozen=True)
class Rejected:
    """A row that was set aside."""

    shard: str
    row: int
    reason: str


def shards(source: str | Path) -> list[str | Path]:
    """The parquet files of a folder or of a URL, in order.

    Raises:
        ValueError: there is none, or it cannot be reached.
    """
    if remote.is_remote(source):
        return list(_remote_shards(str(source)))
    source = Path(source)
    found = sorted(source.rglob("*.parquet")) if source.is_dir() else [source] if source.exists() else []
    if not found:
        raise ValueError(f"{source}: no .parquet shards there; run `make repro` or `dvc pull data.dvc`")
    return list(found)


def _remote_shards(source: str) -> list[str]:
    files, _, everything = remote.find(source)
    found = [p for p in everything if p.endswith(".parquet")]
    if not found:
        raise ValueError(f"{source}: no .parquet shards there; look at pairs.source in params.yaml")
    return [str(files.unstrip_protocol(p)) for p in found]


def count_rows(paths: Sequence[str | Path]) -> int:
    return sum(_open(path).metadata.num_rows for path in paths)


def read_rows(paths: Sequence[str | Path]) -> Iterator[tuple[PreferencePair | None, Rejected | None]]:
    """Every row of the shards, as a pair or as a reason why it is none.

    Raises:
        ValueError: a file is no parquet, is damaged, or lacks a column of a type that is read.
    """
    for path in paths:
        file = _open(path)
        columns.check_columns(file, NEEDED, str(path))
        wanted = [*NEEDED, *(c for c in columns.OPTIONAL if c in file.schema_arrow.names)]
        name = str(path).rsplit("/", 1)[-1]
        folder = None if remote.is_remote(path) else Path(path).parent
        for row, record in enumerate(records(path, wanted)):
            try:
                yield check(record, folder), None
            except ValueError as error:
                yield None, Rejected(name, row, str(error))


def read_captions(paths: Sequence[str | Path]) -> Iterator[str]:
    """The caption of every row; empty where `read_rows` rejects it.

    Raises:
        ValueError: as `read_rows`, of the column of captions.
    """
    for path in paths:
        columns.check_columns(_open(path), ["caption"], str(path))
        for record in records(path, ["caption"]):
            try:
                yield values.read_caption("caption", record["caption"])
            except ValueError:
                yield ""


def records(path: str | Path, names: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, a few in memory at a time."""
    import pyarrow

    row = 0
    try:
        for batch in _open(path).iter_batches(batch_size=READ_BATCH, columns=names):
            yield from columns.rows(batch)
            row += batch.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged after row {row} ({first_line(error)}); fetch it again") from None


def check(record: dict[str, Any], folder: Path | None) -> PreferencePair:
    """A row of Pick-a-Pic as a pair.

    Args:
        folder: where images are that the row has by path; None: such are not read.

    Raises:
        ValueError: what is wrong with it, without the place.
    """
    labelled = record.get("has_label")
    if labelled is not None and not values.read_flag("has_label", labelled):
        raise ValueError("has_label is false")
    caption = values.read_caption("caption", record["caption"])
    labels = values.read_labels((record["label_0"], record["label_1"]))
    left, right = (values.read_image(name, record[name], folder) for name in ("jpg_0", "jpg_1"))
    examples = record.get("num_example_per_prompt")
    number = 1.0 if examples is None else values.read_number("num_example_per_prompt", examples)
    if number < 1:
        raise ValueError(f"num_example_per_prompt is {number:g}; must be a number of at least 1")
    return PreferencePair(caption, left, right, *labels, 1.0 / number)


def is_validation(caption: str, fraction: float) -> bool:
    """Whether a caption's pairs are for validation: by its content, so that no caption is on both sides.

    The same for every seed: a scorer that learned from the training part never meets the other.
    """
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class ShardWriter:
    """Writes pairs to train-00000.parquet ... of at most `rows_per_shard` rows."""

    def __init__(self, folder: Path, rows_per_shard: int) -> None:
        self.folder, self.rows_per_shard, self.count = folder, rows_per_shard, 0
        self.labels = Counter[str]()
        self._rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, pair: PreferencePair) -> None:
        self._rows.append(asdict(pair))
        self.labels["ties" if pair.label_0 == 0.5 else "decided"] += 1
        self.count += 1
        if len(self._rows) == self.rows_per_shard:
            self.close()

    def close(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._rows:
            number = (self.count - 1) // self.rows_per_shard
            path = self.folder / f"{number:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(self._rows), path, compression="none")
            self._rows = []


def read_pairs(folder: str | Path) -> Iterator[PreferencePair]:
    """The pairs of a folder that ShardWriter wrote, in order."""
    names = [f.name for f in fields(PreferencePair)]
    for path in shards(folder):
        yield from (PreferencePair(**record) for record in records(path, names))


def _open(path: str | Path) -> Any:
    import pyarrow.parquet as pq

    try:
        if remote.is_remote(path):
            import fsspec

            return pq.ParquetFile(fsspec.open(str(path), "rb").open(), buffer_size=BUFFER, pre_buffer=False)
        return pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except Exception as error:  # pyarrow's kinds, and those of each store
        raise ValueError(f"{path}: not a readable parquet file ({first_line(error)})") from None
