"""Prompt lists in the usual file formats; a file whose rows are ambiguous is refused."""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spo.data.pairs import open_parquet
from spo.ingest import shards
from spo.ingest.prompt_tables import read_table
from spo.ingest.values import agreed, as_text, caption_columns


def read_prompts(path: str | Path) -> list[str]:
    """Read the prompts of a .txt (one per line), .json, .jsonl, .csv, .tsv or .parquet file, in order."""
    path = Path(path)
    readers: dict[str, Callable[[Path], list[str]]] = {
        ".txt": _lines,
        ".json": lambda p: [_caption(e, f"{p}: entry {i}") for i, e in enumerate(json_list(p))],
        ".jsonl": _jsonl,
        ".csv": lambda p: read_table(p, read_text(p)),
        ".tsv": lambda p: read_table(p, read_text(p)),
        ".parquet": lambda p: list(_parquet(p)),
    }
    if not path.exists():
        raise ValueError(f"{path}: no such file of prompts; run `make repro` or `dvc pull data.dvc`")
    ending = path.suffix.lower()
    if path.is_dir() or ending not in readers:
        kind = "a folder" if path.is_dir() else ending or "a file without an ending"
        raise ValueError(f"{path}: prompts are read from {', '.join(readers)}, not {kind}")
    return readers[ending](path)


def _parquet(path: Path) -> Iterator[str]:
    """Iterate over the caption columns, with a batch in memory at a time; null becomes ""."""
    file = open_parquet(path, path)
    schema = file.schema_arrow
    kinds = {name: schema.field(name).type for name in caption_columns(schema.names, str(path))}
    names = [name for name, kind in kinds.items() if shards.holds_text(kind)]
    if not names:
        name, kind = kinds.popitem()
        raise ValueError(f"{path}: column {name} is {str(kind)[:80]}; it must hold text")
    for row, record in enumerate(shards.records(file, path, names)):
        where = f"{path}: row {row}"
        yield agreed({name: as_text(where, record[name]) or "" for name in names}, where)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark, as spreadsheets write it."""
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


def _lines(path: Path) -> list[str]:
    """Split a text file at line feeds and carriage returns only: U+2028 and the like belong to a line."""
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def json_list(path: Path) -> list[Any]:
    """The entries of a file that holds a JSON list."""
    content = _parsed(read_text(path), path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: must be a list of entries, is a {type(content).__name__}")
    return content


def _jsonl(path: Path) -> list[str]:
    lines = [(number, line) for number, line in enumerate(_lines(path), 1) if line.strip()]
    return [_caption(_parsed(line, path, number), f"{path}: line {number}") for number, line in lines]


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """The content of a JSON text, which is one line of a file or all of it."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: not JSON at {place} ({error.msg})") from None
    except ValueError as error:  # a key twice, a number of thousands of digits
        place = f"line {line}: " if line else ""
        raise ValueError(f"{path}: {place}{str(error)[:300]}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object and refuse duplicate keys, of which `json` silently takes the last."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            both = " and ".join(ascii(each)[:60] for each in (content[key], value))
            raise ValueError(f"an object has the key {ascii(key)[:80]} twice, with {both}; keep one")
        content[key] = value
    return content


def _caption(entry: Any, where: str) -> str:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is a {_type(entry)}; it must be a caption or an object with one")
    named = {name: entry[name] for name in caption_columns(list(entry), where)}
    given = {name: value for name, value in named.items() if value is not None} or named
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} is a {_type(value)}; it must be text")
    return agreed(given, where)


def _type(value: Any) -> str:
    return {type(None): "null", dict: "object", bool: "boolean"}.get(type(value), type(value).__name__)
