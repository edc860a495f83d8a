"""Preference pairs in Pick-a-Pic's schema: checked row by row, written as shards, read back one by one.

Memory does not grow with the number of rows: shards are read in small batches.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spo.data.images import open_image
from spo.types import PreferencePair

NEEDED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
OPTIONAL = ("has_label", "num_example_per_prompt")
READ_BATCH = 64


@dataclass(frozen=True)
class Rejected:
    """A row that was set aside."""

    shard: str
    row: int
    reason: str


def shards(source: str | Path) -> list[Path]:
    """The parquet files of a folder, in order.

    Raises:
        ValueError: there is none.
    """
    source = Path(source)
    found = sorted(source.rglob("*.parquet")) if source.is_dir() else [source] if source.exists() else []
    if not found:
        raise ValueError(f"{source}: no .parquet shards there; run `make repro` or `dvc pull data.dvc`")
    return found


def count_rows(paths: list[Path]) -> int:
    return sum(_open(path).metadata.num_rows for path in paths)


def read_rows(paths: list[Path]) -> Iterator[tuple[PreferencePair | None, Rejected | None]]:
    """Every row of the shards, as a pair or as a reason why it is none.

    Raises:
        ValueError: a file is no parquet, or lacks a column.
    """
    for path in paths:
        file, row = _open(path), 0
        names = file.schema_arrow.names
        if missing := [c for c in NEEDED if c not in names]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(names)}")
        columns = [*NEEDED, *(c for c in OPTIONAL if c in names)]
        for batch in file.iter_batches(batch_size=READ_BATCH, columns=columns):
            for record in batch.to_pylist():
                try:
                    yield check(record), None
                except ValueError as error:
                    yield None, Rejected(path.name, row, str(error))
                row += 1


def check(record: dict[str, Any]) -> PreferencePair:
    """A row of Pick-a-Pic as a pair.

    Raises:
        ValueError: what is wrong with it, without the place.
    """
    if record.get("has_label") is False:
        raise ValueError("has_label is false")
    caption = record["caption"]
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError("caption is empty")
    labels = (record["label_0"], record["label_1"])
    if labels not in ((1, 0), (0, 1), (0.5, 0.5)):
        raise ValueError(f"labels are {labels[0]} and {labels[1]}; must be 1 and 0, 0 and 1, or .5 each")
    for name in ("jpg_0", "jpg_1"):
        if not isinstance(record[name], bytes):
            raise ValueError(f"{name} is missing")
        try:
            open_image(record[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    examples = record.get("num_example_per_prompt")
    examples = 1 if examples is None else examples
    if not examples >= 1:
        raise ValueError(f"num_example_per_prompt is {examples}; must be at least 1")
    left, right = record["jpg_0"], record["jpg_1"]
    return PreferencePair(caption, left, right, float(labels[0]), float(labels[1]), 1.0 / examples)


def is_validation(caption: str, fraction: float, seed: int) -> bool:
    """Whether a caption's pairs are for validation: by its content, so that no caption is on both sides."""
    digest = hashlib.sha256(f"{seed} {caption}".encode()).digest()
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
    for path in shards(folder):
        for batch in _open(path).iter_batches(batch_size=READ_BATCH):
            yield from (PreferencePair(**record) for record in batch.to_pylist())


def _open(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a readable parquet file ({str(error).splitlines()[0][:120]})"
        ) from None
