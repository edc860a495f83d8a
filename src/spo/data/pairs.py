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

from spo.data import remote
from spo.data.images import open_image
from spo.types import PreferencePair

NEEDED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
OPTIONAL = ("has_label", "num_example_per_prompt")
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
        ValueError: a file is no parquet, is damaged, or lacks a column.
    """
    for path in paths:
        names = _open(path).schema_arrow.names
        if missing := [c for c in NEEDED if c not in names]:
            told = ", ".join(names)[:300] or "nothing"
            raise ValueError(f"{path}: no column {', '.join(missing)}; it has {told}")
        columns = [*NEEDED, *(c for c in OPTIONAL if c in names)]
        name = str(path).rsplit("/", 1)[-1]
        for row, record in enumerate(records(path, columns)):
            try:
                yield check(record), None
            except ValueError as error:
                yield None, Rejected(name, row, str(error))


def read_captions(paths: Sequence[str | Path]) -> Iterator[str]:
    for path in paths:
        yield from (str(r["caption"] or "") for r in records(path, ["caption"]))


def records(path: str | Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, a few in memory at a time."""
    import pyarrow

    row = 0
    try:
        for batch in _open(path).iter_batches(batch_size=READ_BATCH, columns=columns):
            told = batch.to_pylist()
            yield from told
            row += len(told)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or ["torn"])[0][:120]
        raise ValueError(f"{path}: damaged after row {row} ({reason}); fetch it again") from None


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
    if any(not isinstance(v, int | float) for v in labels) or labels not in ((1, 0), (0, 1), (0.5, 0.5)):
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
    if not isinstance(examples, int | float) or not 1 <= examples < float("inf"):
        raise ValueError(f"num_example_per_prompt is {examples!r}; must be a number of at least 1")
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
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"{path}: not a readable parquet file ({reason})") from None
