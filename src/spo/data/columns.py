"""Columns of preference shards: the Arrow types that are supported, and rows as Python values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE = "encoded images: binary, a struct of bytes and path, lists of bytes, or text in base64"
EXPECTED = {
    "caption": "text, or its UTF-8 bytes",
    **dict.fromkeys(("jpg_0", "jpg_1"), IMAGE),
    **dict.fromkeys(("label_0", "label_1"), "numbers, booleans, or text that is a number"),
    "has_label": "booleans, 0 and 1, or text",
    "num_example_per_prompt": "numbers, or text that is a number",
}
OPTIONAL = ("has_label", "num_example_per_prompt")


def check_columns(file: pq.ParquetFile, needed: Sequence[str], where: str) -> None:
    """Check that a shard has its columns, each once and of a supported type.

    Raises:
        ValueError: a column is missing, duplicated, or of another type.
    """
    import pyarrow as pa

    schema, empty = file.schema_arrow, file.metadata.num_rows == 0
    names = schema.names
    if missing := [c for c in needed if c not in names]:
        raise ValueError(
            f"{where}: no column {', '.join(missing)}; its columns: {', '.join(names)[:300] or 'none'}"
        )
    for name in (*needed, *(c for c in OPTIONAL if c in names)):
        if names.count(name) > 1:
            raise ValueError(f"{where}: {names.count(name)} columns are named {name}; keep one")
        kind = _decoded_type(schema.field(name).type)
        if pa.types.is_null(kind) and name not in OPTIONAL and not empty:
            raise ValueError(f"{where}: column {name} is null in every row; it must hold {EXPECTED[name]}")
        if not pa.types.is_null(kind) and not _is_supported(name, kind):
            raise ValueError(f"{where}: column {name} is {str(kind)[:80]}; it must hold {EXPECTED[name]}")


def rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a batch. Text that is not UTF-8 stays bytes; lists become arrays."""
    columns = [_values(column) for column in batch.columns]
    names = batch.schema.names
    return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def holds_text(kind: pa.DataType) -> bool:
    """Whether a column's values are text or bytes, dictionary-encoded or not."""
    import pyarrow as pa

    kind = _decoded_type(kind)
    return _is_text(kind) or _is_bytes(kind) or pa.types.is_null(kind)


def _is_supported(name: str, kind: pa.DataType) -> bool:
    if name == "caption":
        return _is_text(kind) or _is_bytes(kind)
    if name.startswith("jpg_"):
        return _is_image(kind)
    return _is_text(kind) or _is_number(kind, boolean=name != "num_example_per_prompt")


def _is_image(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        fields = {field.name: _decoded_type(field.type) for field in kind}
        data, path = fields.get("bytes", pa.null()), fields.get("path", pa.null())
        known = fields.keys() & {"bytes", "path"}
        of_bytes = pa.types.is_null(data) or _is_bytes(data) or _is_bytes_list(data)
        return bool(known) and of_bytes and (pa.types.is_null(path) or _is_text(path))
    return _is_bytes(kind) or _is_text(kind) or _is_bytes_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    of_any_length = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return of_any_length or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    of_any_length = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return of_any_length or pa.types.is_fixed_size_list(kind)


def _is_bytes_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return _is_list(kind) and pa.types.is_integer(kind.value_type)


def _is_number(kind: pa.DataType, *, boolean: bool) -> bool:
    import pyarrow as pa

    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return number or boolean and pa.types.is_boolean(kind)


def _decoded_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values, dictionary-encoded or not."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _values(column: pa.Array) -> Iterator[Any]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):  # one text that is not UTF-8 must not cost the whole batch
        return map(_text, column.cast(pa.large_binary()).to_pylist())
    if pa.types.is_struct(column.type):
        return _structs(column)
    if _is_list(column.type):
        return (_numbers(element) for element in column)
    return iter(column.to_pylist())


def _text(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _structs(column: pa.StructArray) -> Iterator[dict[str, Any] | None]:
    names = [field.name for field in column.type]
    fields = zip(*(_values(child) for child in column.flatten()), strict=True)
    valid = column.is_valid().to_pylist()
    return (dict(zip(names, row, strict=True)) if v else None for v, row in zip(valid, fields, strict=True))


def _numbers(element: Any) -> Any:
    """Convert a list to an array; a null in it gives floats, which are later refused as an image."""
    return None if not element.is_valid else element.values.to_numpy(zero_copy_only=False)
