"""Preference pairs in Pick-a-Pic's schema: checked row by row, written as shards, read back one by one.

Memory does not grow with the number of rows: shards are read in small batches from a local folder or from
the hub's cache (`hf://datasets/OWNER/NAME@REVISION/data`), or streamed through fsspec (s3://...).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from spo.data import columns, remote, values
from spo.data.prompt_columns import agreed, is_caption
from spo.data.prompts import key
from spo.runtime import hub
from spo.runtime.messages import first_line
from spo.types import PreferencePair

REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
READ_BATCH = 64  # rows
SHARD_BYTES = 1 << 26  # of a shard's images: about four times as much is in memory while it is written
BUFFER = 1 << 20  # bytes of a column that are read ahead; the default is a row group's complete column


@dataclass(frozen=True)
class Rejected:
    """A rejected row of a shard, and the reason."""

    shard: str
    row: int
    reason: str


Check = Callable[[PreferencePair], PreferencePair]
Rows = Iterator[tuple[PreferencePair, None] | tuple[None, Rejected]]


def shards(source: str | Path) -> list[str | Path]:
    """List the parquet files of a folder or of a URL, in order.

    Raises:
        ValueError: no such file, or a URL that cannot be reached.
    """
    if hub.is_hub_url(source):
        return _parquet(str(source), hub.download(str(source)).values())
    if remote.is_remote(source):
        return list(_remote_shards(str(source)))
    source = Path(source)
    paths = sorted(source.rglob("*.parquet")) if source.is_dir() else [source] if source.exists() else []
    if not paths:
        raise ValueError(f"{source}: no .parquet shards; run `make repro` or `dvc pull data.dvc`")
    return list(paths)


def _remote_shards(source: str) -> list[str]:
    files, _, entries = remote.find(source)
    return [str(files.unstrip_protocol(p)) for p in _parquet(source, entries)]


def _parquet(source: str, paths: Iterable[Any]) -> list[Any]:
    shards = [path for path in paths if str(path).endswith(".parquet")]
    if not shards:
        raise ValueError(f"{source}: no .parquet shards; check pairs.source in params.yaml")
    return shards


def count_rows(paths: Sequence[str | Path]) -> int:
    """Count the rows of the shards by their metadata."""
    return sum(_open(path).metadata.num_rows for path in paths)


def decoded(pair: PreferencePair) -> tuple[Image.Image, Image.Image]:
    """Decode the images of a pair.

    Raises:
        ValueError: an image that cannot be decoded, by the name of its column.
    """
    return values.decoded("jpg_0", pair.image_0), values.decoded("jpg_1", pair.image_1)


def check(pair: PreferencePair) -> PreferencePair:
    """Check that the images of a pair can be decoded; raises as `decoded`."""
    decoded(pair)
    return pair


def read_rows(paths: Sequence[str | Path], check: Check = check) -> Rows:
    """Iterate over all rows of the shards, each as a pair or as its rejection by `check`.

    Raises:
        ValueError: a file that is not parquet or is damaged, or a column that is missing or of another type.
    """
    for path in paths:
        file = _open(path)
        columns.check_columns(file, REQUIRED, str(path))
        optional = [c for c in columns.OPTIONAL if c in file.schema_arrow.names]
        names = [*REQUIRED, *optional, *_other_captions(file)]
        shard = str(path).rsplit("/", 1)[-1]
        folder = None if remote.is_remote(path) else Path(path).parent
        for row, record in enumerate(records(path, names)):
            try:
                yield check(parse(record, folder)), None
            except ValueError as error:
                yield None, Rejected(shard, row, str(error))


def _other_captions(file: Any) -> list[str]:
    """The columns besides `caption` that may hold a row's prompt."""
    schema = file.schema_arrow
    return [
        n
        for n in schema.names
        if is_caption(n) and n != "caption" and columns.holds_text(schema.field(n).type)
    ]


def read_captions(paths: Sequence[str | Path]) -> Iterator[str]:
    """Iterate over the captions of all rows; a caption that `read_rows` rejects is empty.

    Raises:
        ValueError: as `read_rows`, for the caption column; a row whose caption another column contradicts.
    """
    for path in paths:
        file = _open(path)
        columns.check_columns(file, ["caption"], str(path))
        for row, record in enumerate(records(path, ["caption", *_other_captions(file)])):
            caption = agreed(record, f"{path}: row {row}")
            try:
                yield values.read_caption("caption", caption)
            except ValueError:
                yield ""


def records(path: str | Path, names: list[str]) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a parquet file, with READ_BATCH rows in memory at a time.

    Raises:
        ValueError: a file that is not parquet, or is damaged.
    """
    import pyarrow

    row = 0
    try:
        for batch in _open(path).iter_batches(batch_size=READ_BATCH, columns=names):
            yield from columns.rows(batch)
            row += batch.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged after row {row} ({first_line(error)}); fetch it again") from None


def parse(record: dict[str, Any], folder: Path | None) -> PreferencePair:
    """Convert a row in Pick-a-Pic's columns to a pair, whose images are not decoded yet.

    Args:
        folder: of images that the row stores by path; None: such images are rejected.

    Raises:
        ValueError: what is wrong with the row; the caller adds shard and row.
    """
    labelled = record.get("has_label")
    if labelled is not None and not values.read_flag("has_label", labelled):
        raise ValueError("has_label is false")
    given = {name: record[name] for name in record if is_caption(name)}
    caption = values.read_caption("caption", agreed(given, "the row"))
    labels = values.read_labels((record["label_0"], record["label_1"]))
    left, right = (values.read_image(name, record[name], folder) for name in ("jpg_0", "jpg_1"))
    examples = record.get("num_example_per_prompt")
    number = 1.0 if examples is None else values.read_number("num_example_per_prompt", examples)
    if number < 1:
        raise ValueError(f"num_example_per_prompt is {number:g}; must be a number of at least 1")
    return PreferencePair(caption, left, right, *labels, 1.0 / number)


def is_validation(caption: str, fraction: float) -> bool:
    """Whether a caption's pairs are for validation, by the hash of its key: no prompt is in both parts.

    The same for every seed, so that a scorer trained on the training part never sees the other.
    """
    digest = hashlib.sha256(key(caption).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


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
        self.labels["ties" if pair.label_0 == 0.5 else "decided"] += 1
        self.count += 1
        self._bytes += len(pair.image_0) + len(pair.image_1)
        if len(self._rows) == self.rows_per_shard or self._bytes >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Write the last, partly filled shard."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._rows:
            path = self.folder / f"{self._shards:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(self._rows), path, compression="none")
            self._rows, self._bytes, self._shards = [], 0, self._shards + 1


def read_pairs(folder: str | Path) -> Iterator[PreferencePair]:
    """Iterate over the pairs that a ShardWriter wrote to `folder`, in order."""
    names = [f.name for f in fields(PreferencePair)]
    for path in shards(folder):
        yield from (PreferencePair(**record) for record in records(path, names))


def chunks(pairs: Iterable[PreferencePair], size: int) -> Iterator[list[PreferencePair]]:
    """Lists of `size` pairs in order; the last may be shorter."""
    rest = iter(pairs)
    while chunk := list(islice(rest, size)):
        yield chunk


def _open(path: str | Path) -> Any:
    import pyarrow.parquet as pq

    try:
        if remote.is_remote(path):
            import fsspec

            return pq.ParquetFile(fsspec.open(str(path), "rb").open(), buffer_size=BUFFER, pre_buffer=False)
        return pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except Exception as error:  # pyarrow's types, and those of each store
        raise ValueError(f"{path}: not a readable parquet file ({first_line(error)})") from None
