"""Prompt lists in the usual file formats; a file whose rows are ambiguous is refused."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spo.data import columns
from spo.data.prompt_columns import agreed, caption_columns
from spo.data.prompt_tables import read_table
from spo.runtime.messages import first_line


def read_prompts(path: str | Path) -> list[str]:
    """Read the prompts of a .txt (one per line), .json, .jsonl, .csv, .tsv or .parquet file, in order.

    Raises:
        ValueError: no such file, another ending, an unreadable row, or no caption column.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], list[str]]] = {
        ".txt": _lines,
        ".json": _json,
        ".jsonl": _jsonl,
        ".csv": lambda p: read_table(p, read_text(p)),
        ".tsv": lambda p: read_table(p, read_text(p)),
        ".parquet": lambda p: list(parquet_captions(p)),
    }
    if not path.exists():
        raise ValueError(f"{path}: no such file of prompts; run `make repro` or `dvc pull data.dvc`")
    ending = path.suffix.lower()
    if path.is_dir() or ending not in readers:
        kind = "a folder" if path.is_dir() else ending or "a file without an ending"
        raise ValueError(f"{path}: prompts are read from {', '.join(readers)}, not {kind}")
    try:
        return readers[ending](path)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def parquet_captions(path: Path) -> Iterator[str]:
    """Iterate over the caption column of a parquet file, with a batch in memory at a time; null becomes "".

    Raises:
        ValueError: no such column, a column that is not text, or a row that is not UTF-8.
    """
    import pyarrow
    import pyarrow.parquet as pq

    row = 0
    try:
        file = pq.ParquetFile(path)
        kinds = {
            n: file.schema_arrow.field(n).type for n in caption_columns(file.schema_arrow.names, str(path))
        }
        names = [name for name, kind in kinds.items() if columns.holds_text(kind)]
        if not names:
            name, kind = kinds.popitem()
            raise ValueError(f"{path}: column {name} is {str(kind)[:80]}; it must hold text")
        for batch in file.iter_batches(batch_size=1024, columns=names):
            for record in columns.rows(batch):
                where = f"{path}: row {row}"
                yield agreed({n: _decoded(record[n], where) for n in names}, where)
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({first_line(error)})") from None


def _decoded(value: str | bytes | None, where: str) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value or ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text at byte {error.start}") from None


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark, as spreadsheets write it.

    Raises:
        ValueError: text in another encoding, or with a NUL character.
    """
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16" if wide else "UTF-8"
        raise ValueError(f"{path}: not {kind} text at byte {error.start}; save it as UTF-8") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{path}: line {line} has a NUL character; save it as UTF-8 text")
    return text


def _text_lines(path: Path) -> list[str]:
    """Split a text file at line feeds and carriage returns only: U+2028 and the like belong to a line."""
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _lines(path: Path) -> list[str]:
    return _text_lines(path)


def _json(path: Path) -> list[str]:
    try:
        content = json.loads(read_text(path), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON at line {error.lineno} ({error.msg})") from None
    except ValueError as error:  # a key twice, a number of thousands of digits
        raise ValueError(_at(path, str(error)[:300])) from None
    if not isinstance(content, list):
        raise ValueError(f"{path}: must be a list of captions, is a {type(content).__name__}")
    return [_caption(entry, path, f"entry {i}") for i, entry in enumerate(content)]


def _jsonl(path: Path) -> list[str]:
    captions = []
    for number, line in enumerate(_text_lines(path), 1):
        if not line.strip():
            continue
        try:
            captions.append(_caption(json.loads(line, object_pairs_hook=unique_keys), path, f"line {number}"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error.msg})") from None
        except ValueError as error:
            raise ValueError(_at(path, str(error)[:300], f"line {number}: ")) from None
    return captions


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object and refuse duplicate keys, of which `json` silently takes the last.

    Raises:
        ValueError: the first key that occurs twice.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {ascii(duplicate)[:80]} twice; keep one")
    return content


def _at(path: Path, message: str, place: str = "") -> str:
    return message if str(path) in message else f"{path}: {place}{message}"


def _caption(entry: Any, path: Path, where: str) -> str:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: {where} is a {_type(entry)}; it must be a caption or an object with one")
    where = f"{path}: {where}"
    named = {name: entry[name] for name in caption_columns([str(k) for k in entry], where)}
    given = {name: value for name, value in named.items() if value is not None} or named
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} is a {_type(value)}; it must be text")
    return agreed(given, where)


def _type(value: Any) -> str:
    return {type(None): "null", dict: "object", bool: "boolean"}.get(type(value), type(value).__name__)
