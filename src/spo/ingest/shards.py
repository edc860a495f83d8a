"""Preference pairs in Pick-a-Pic's schema: parquet shards in a folder, on the hub or in a remote store.

Memory does not grow with the number of rows: shards are read in small batches from a local folder or from
the hub's cache (`hf://datasets/OWNER/NAME@REVISION/data`), or streamed through fsspec (s3://...). A column
may have any of its types in `COLUMNS`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from spo.data.pairs import batches, open_parquet
from spo.ingest import remote, values
from spo.runtime import hub
from spo.types import PreferencePair

IMAGE = (
    ("bytes", "text", "bytes by number", "file"),
    "encoded images: binary, a struct of bytes and path, lists of bytes, or text in base64",
)
LABEL = ("text", "number", "boolean"), "numbers, booleans, or text that is a number"
# the kinds of types that a column may have, and their description in messages
COLUMNS = {
    "caption": (("text", "bytes"), "text, or its UTF-8 bytes"),
    **{"jpg_0": IMAGE, "jpg_1": IMAGE, "label_0": LABEL, "label_1": LABEL},
    "has_label": (("text", "number", "boolean"), "booleans, 0 and 1, or text"),
    "num_example_per_prompt": (("text", "number"), "numbers, or text that is a number"),
}
OPTIONAL = ("has_label", "num_example_per_prompt")
REQUIRED = tuple(name for name in COLUMNS if name not in OPTIONAL)
# kinds of Arrow types by pyarrow's names
KINDS: dict[str, tuple[Callable[[pa.DataType], bool], ...]] = {
    "null": (types.is_null,),
    "text": (types.is_string, types.is_large_string, types.is_string_view),
    "bytes": (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary),
    "number": (types.is_integer, types.is_floating, types.is_decimal),
    "boolean": (types.is_boolean,),
    "list": (types.is_list, types.is_large_list, types.is_fixed_size_list),
    "struct": (types.is_struct,),
}


def find(source: str | Path) -> list[str | Path]:
    """List the parquet files of a folder or of a URL, in order."""
    paths: list[str | Path]
    then = "check pairs.source in params.yaml"
    if hub.is_hub_url(source):
        paths = [*hub.download(str(source)).values()]
    elif remote.is_remote(source):
        store, _, entries = remote.find(str(source))
        paths = [*map(store.unstrip_protocol, entries)]
    else:
        paths, then = sorted(Path(source).rglob("*.parquet")), "run `make repro` or `dvc pull data.dvc`"
        if Path(source).is_file():
            return [Path(source)]
    if shards := [path for path in paths if str(path).endswith(".parquet")]:
        return shards
    raise ValueError(f"{source}: no .parquet shards; {then}")


def count(paths: Sequence[str | Path]) -> int:
    """Count the rows of the shards by their metadata."""
    return sum(_open(path).metadata.num_rows for path in paths)


def rows(paths: Sequence[str | Path], with_images: bool = True) -> Iterator[values.Row]:
    """Iterate over the rows of the shards, whose images are not decoded yet."""
    needed, more = (REQUIRED, OPTIONAL) if with_images else (("caption",), ())
    for path in paths:
        folder = None if remote.is_remote(path) else Path(path).parent
        for number, record in enumerate(_records(path, needed, more)):
            yield values.Row(path, "row", number, record, partial(parse, record, folder))


def _records(path: str | Path, needed: Sequence[str], more: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The `needed` columns of each row, `more` where the shard has them, and others that hold prompts."""
    file = _open(path)
    schema = file.schema_arrow
    _check_columns(file, needed, str(path))
    prompts = [n for n in schema.names if values.is_caption(n) and holds_text(schema.field(n).type)]
    named = dict.fromkeys([*needed, *(name for name in more if name in schema.names), *prompts])
    return records(file, path, list(named))


def _open(path: str | Path) -> pq.ParquetFile:
    return open_parquet(remote.open_file(str(path)) if remote.is_remote(path) else path, path)


def _check_columns(file: pq.ParquetFile, needed: Sequence[str], where: str) -> None:
    """Check that a shard has its columns, each once and of a supported type."""
    schema, empty = file.schema_arrow, file.metadata.num_rows == 0
    names = schema.names
    if missing := [c for c in needed if c not in names]:
        raise ValueError(
            f"{where}: no column {', '.join(missing)}; its columns: {', '.join(names)[:300] or 'none'}"
        )
    for name in (*needed, *(c for c in OPTIONAL if c in names)):
        if names.count(name) > 1:
            raise ValueError(f"{where}: {names.count(name)} columns are named {name}; keep one")
        allowed, expected = COLUMNS[name]
        kind = _kind(schema.field(name).type)
        if kind == "null" and name not in OPTIONAL and not empty:
            raise ValueError(f"{where}: column {name} is null in every row; it must hold {expected}")
        if kind not in (*allowed, "null"):
            shown = str(_plain(schema.field(name).type))[:80]
            raise ValueError(f"{where}: column {name} is {shown}; it must hold {expected}")


def holds_text(column: pa.DataType) -> bool:
    """Whether a column's values are text or bytes, dictionary-encoded or not."""
    return _kind(column) in ("text", "bytes", "null")


def _kind(column: pa.DataType) -> str:
    """The kind of a column's values; "file" and "bytes by number" are the structs and lists of images."""
    column = _plain(column)
    kind = next((kind for kind, tests in KINDS.items() if any(test(column) for test in tests)), "other")
    if kind == "list" and types.is_integer(column.value_type):
        return "bytes by number"
    if kind == "struct":
        fields = {field.name: _kind(field.type) for field in column}
        data, path = fields.get("bytes", "null"), fields.get("path", "null")
        known = fields.keys() & {"bytes", "path"}
        if known and data in ("null", "bytes", "bytes by number") and path in ("null", "text"):
            return "file"
    return kind


def _plain(column: pa.DataType) -> pa.DataType:
    """The type of the values, dictionary-encoded or not."""
    return column.value_type if types.is_dictionary(column) else column


def records(file: pq.ParquetFile, path: str | Path, names: list[str]) -> Iterator[dict[str, Any]]:
    """Iterate over some columns of the rows. Text that is not UTF-8 stays bytes."""
    for batch in batches(file, path, names):
        for row in zip(*batch.columns, strict=True):
            yield dict(zip(batch.schema.names, map(_value, row), strict=True))


def _value(scalar: Any) -> Any:
    """A value in Python's types; one text that is not UTF-8 would otherwise fail the whole batch."""
    if isinstance(scalar, pa.DictionaryScalar):
        return _value(scalar.value)
    if isinstance(scalar, pa.StructScalar) and scalar.is_valid:
        return {name: _value(field) for name, field in scalar.items()}
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


def parse(record: dict[str, Any], folder: Path | None) -> PreferencePair:
    """Convert a row in Pick-a-Pic's columns to a pair; images by path are in `folder`, if there is one.

    A ValueError says what is wrong with the row; the caller adds shard and row.
    """
    labelled = record.get("has_label")
    if labelled is not None and not values.read_flag("has_label", labelled):
        raise ValueError("has_label is false")
    caption = values.read_caption("caption", values.agreed(record, "the row"))
    labels = values.read_labels(record["label_0"], record["label_1"])
    left, right = (values.read_image(name, record[name], folder) for name in ("jpg_0", "jpg_1"))
    examples = record.get("num_example_per_prompt")
    number = 1.0 if examples is None else values.read_number("num_example_per_prompt", examples)
    if number < 1:
        raise ValueError(f"num_example_per_prompt is {number:g}; must be a number of at least 1")
    return PreferencePair(caption, left, right, *labels, 1.0 / number)
