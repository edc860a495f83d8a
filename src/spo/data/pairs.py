"""Write and read the outputs of the stage `pairs`: shards of preference pairs, and labels by a scorer."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from spo.runtime.files import read_csv, read_json
from spo.runtime.messages import first_line
from spo.types import PreferencePair

READ_BATCH = 64  # rows
SHARD_BYTES = 1 << 26  # of a shard's images: about four times as much is in memory while it is written
BUFFER = 1 << 20  # bytes of a column that are read ahead; the default is a row group's complete column
LABELS = "labels.csv"  # beside the shards: a row for each training pair, in the order of the shards
FACTS = "pseudo_labels"  # key of the summary: what these labels are
TIE = 0.5


class ShardWriter:
    """Writes pairs to 00000.parquet, ... of at most `rows_per_shard` rows and about SHARD_BYTES each."""

    def __init__(self, folder: Path, rows_per_shard: int) -> None:
        self.folder, self.rows_per_shard, self.count = folder, rows_per_shard, 0
        self.labels = Counter[str]()
        self._rows: list[dict[str, Any]] = []
        self._bytes, self._shards = 0, 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, pair: PreferencePair) -> None:
        """Append a pair; a full shard is written."""
        self._rows.append(asdict(pair))
        self.labels["ties" if pair.label_0 == TIE else "decided"] += 1
        self.count += 1
        self._bytes += len(pair.image_0) + len(pair.image_1)
        if len(self._rows) == self.rows_per_shard or self._bytes >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Write the last, partly filled shard."""
        if self._rows:
            path = self.folder / f"{self._shards:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(self._rows), path, compression="none")
            self._rows, self._bytes, self._shards = [], 0, self._shards + 1


def shards(folder: Path) -> list[Path]:
    """The shards that a ShardWriter wrote to `folder`, in order."""
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise ValueError(f"{folder}: no .parquet shards; run `make repro`")
    return paths


def read_pairs(path: str | Path) -> Iterator[PreferencePair]:
    """Iterate over the pairs of a shard, or of all shards of a folder, in order."""
    path, names = Path(path), [f.name for f in fields(PreferencePair)]
    for shard in [path] if path.is_file() else shards(path):
        for batch in batches(open_parquet(shard, shard), shard, names):
            yield from (PreferencePair(**record) for record in batch.to_pylist())


def open_parquet(source: Any, name: object) -> pq.ParquetFile:
    """Open a path or a binary file so that memory does not grow with its rows; `name` is for messages."""
    try:
        return pq.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False)
    except Exception as error:  # pyarrow's types, and those of each store
        raise ValueError(f"{name}: not a readable parquet file ({first_line(error)})") from None


def batches(file: pq.ParquetFile, name: object, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Iterate over READ_BATCH rows of some columns at a time."""
    row = 0
    try:
        for batch in file.iter_batches(batch_size=READ_BATCH, columns=columns):
            yield batch
            row += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: damaged after row {row} ({first_line(error)}); fetch it again") from None


def chunks(pairs: Iterable[PreferencePair], size: int) -> Iterator[list[PreferencePair]]:
    """Lists of `size` pairs in order; the last may be shorter."""
    rest = iter(pairs)
    while chunk := list(islice(rest, size)):
        yield chunk


def read_labels(folder: Path, count: int) -> tuple[Tensor, dict[str, Any]]:
    """The labels by a scorer [count] of the training pairs' first images, and the facts on these labels."""
    path = folder / LABELS
    labels = read_csv(path, "labels of preference.labels", usecols=["label_0"])["label_0"]
    if len(labels) != count or not labels.isin((0, TIE, 1)).all():
        raise ValueError(
            f"{path}: {len(labels)} labels for {count} training pairs, or one that is not 0, 0.5 or 1; "
            "run `make repro`"
        )
    summary = read_json(folder / "summary.json", "summary of the pairs", keys=[FACTS])
    return torch.tensor(labels.to_numpy(), dtype=torch.float32), summary[FACTS]
