"""Prompt lists in the usual file formats; a file whose rows are ambiguous is refused."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from spo.data import columns
from spo.runtime.messages import first_line

COLUMNS = ("caption", "prompt", "text")  # in order of precedence; case does not matter
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # spreadsheets write semicolons where the decimal sign is a comma
Rows = list[tuple[int, list[str]]]  # (line, fields); the first is the header


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
        ".csv": _table,
        ".tsv": _table,
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
        name = _column(file.schema_arrow.names, path)
        kind = file.schema_arrow.field(name).type
        if not columns.holds_text(kind):
            raise ValueError(f"{path}: column {name} is {str(kind)[:80]}; it must hold text")
        for batch in file.iter_batches(batch_size=1024, columns=[name]):
            for record in columns.rows(batch):
                yield _decoded(record[name], f"{path}: row {row}")
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({first_line(error)})") from None


def _decoded(value: str | bytes | None, where: str) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value or ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text at byte {error.start}") from None


def _text(path: Path) -> str:
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


def _text_lines(path: Path) -> list[str]:
    """Split a text file at line feeds and carriage returns only: U+2028 and the like belong to a line."""
    lines = _text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _lines(path: Path) -> list[str]:
    return _text_lines(path)


def _json(path: Path) -> list[str]:
    try:
        content = json.loads(_text(path), object_pairs_hook=_object)
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
            captions.append(_caption(json.loads(line, object_pairs_hook=_object), path, f"line {number}"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error.msg})") from None
        except ValueError as error:
            raise ValueError(_at(path, str(error)[:300], f"line {number}: ")) from None
    return captions


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object and refuse duplicate keys, of which `json` silently takes the last."""
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
    name = _column([str(k) for k in entry], path, where)
    if not isinstance(entry[name], str):
        raise ValueError(f"{path}: {where}: {name} is a {_type(entry[name])}; it must be text")
    return entry[name]


def _type(value: Any) -> str:
    return {type(None): "null", dict: "object", bool: "boolean"}.get(type(value), type(value).__name__)


def _table(path: Path) -> list[str]:
    """Read the caption column of a table; every row must have as many fields as the header."""
    text = _text(path)
    delimiters = DELIMITERS[path.suffix.lower()]
    delimiter = next((d for d in delimiters if _names_a_column(text, d)), delimiters[0])
    if delimiter == "\t" and '"' in text:
        return _tab_separated(text, path)
    rows = _parse(text, delimiter, csv.QUOTE_MINIMAL, path)
    captions = _captions_of(rows, path)
    if re.search(rf'{re.escape(delimiter)} +"', text):
        _refuse_spaced_quotes(rows, captions, _parse_spaced(text, delimiter, path), path)
    return captions


def _parse_spaced(text: str, delimiter: str, path: Path) -> list[str] | None:
    """The captions if spaces after a separator are dropped (`1, "a cat"`); None if that gives no table."""
    try:
        rows = _parse(text, delimiter, csv.QUOTE_MINIMAL, path, skipinitialspace=True)
        return _captions_of(rows, path)
    except ValueError:
        return None


def _refuse_spaced_quotes(rows: Rows, captions: list[str], spaced: list[str] | None, path: Path) -> None:
    for (line, _), caption, other in zip(rows[1:], captions, spaced or captions, strict=False):
        if caption.lstrip(" ") != other.lstrip(" "):
            raise ValueError(
                f"{path}: line {line}: with a space before it, a quote may or may not belong to the prompt; "
                "remove the space"
            )


def _names_a_column(text: str, delimiter: str) -> bool:
    first = text.lstrip("\r\n").splitlines()[:1]
    names = {n.strip().strip('"').casefold() for line in first for n in line.split(delimiter)}
    return bool(names & set(COLUMNS))


def _parse(text: str, delimiter: str, quoting: Literal[0, 3], path: Path, **spaces: bool) -> Rows:
    """Parse a table to rows with their line numbers.

    Raises:
        ValueError: a line with wrong quotes or another number of fields than the header.
    """
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True, **spaces)  # type: ignore[arg-type]
    rows: Rows = []
    try:
        for fields in reader:
            if fields:
                rows.append((reader.line_num, fields))
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from None
    for line, fields in rows:
        if len(fields) != len(rows[0][1]):
            raise ValueError(
                f"{path}: line {line} has {len(fields)} fields, the header has {len(rows[0][1])}; "
                "put prompts that contain the separator in quotes"
            )
    return rows


def _captions_of(rows: Rows, path: Path) -> list[str]:
    if not rows:
        raise ValueError(f"{path}: is empty; its first line must name a column {' or '.join(COLUMNS)}")
    header = [name.strip() for name in rows[0][1]]
    position = header.index(_column(header, path))
    return [fields[position] for _, fields in rows[1:]]


def _tab_separated(text: str, path: Path) -> list[str]:
    """Read a tab-separated table, whose quotes are either CSV quoting or part of the prompts.

    Lists such as PartiPrompts do not quote: a quote is part of the prompt. CSV writers quote a field with a
    quote, a tab or a line end, and double its quotes; writing the parsed rows again then gives the same text.

    Raises:
        ValueError: no reading gives rows of equal length, or both readings are plausible.
    """
    try:
        plain = _captions_of(_parse(text, "\t", csv.QUOTE_NONE, path), path)
    except ValueError:
        return _quoted_captions(text, path)
    try:
        rows = _parse(text, "\t", csv.QUOTE_MINIMAL, path)
        quoted = _captions_of(rows, path)
    except ValueError:
        return plain
    if plain == quoted:
        return plain
    if len(plain) != len(quoted):
        line = next(n for n, fields in rows if any("\n" in f or "\r" in f for f in fields))
        raise ValueError(
            f"{path}: the quotes that end in line {line} may enclose one prompt of several lines, or belong "
            "to several prompts; save the list as .csv or .jsonl"
        )
    if not _is_written(rows, text):
        line = next(rows[i][0] for i, (p, q) in enumerate(zip(plain, quoted, strict=True), 1) if p != q)
        raise ValueError(
            f"{path}: line {line}: the quotes around the prompt may or may not be part of it; save the list "
            "as .jsonl, or with every field and the header in quotes"
        )
    return quoted


def _quoted_captions(text: str, path: Path) -> list[str]:
    """The captions of a table that is valid only with CSV quoting.

    Raises:
        ValueError: the first wrong line; that of the unquoted reading if the header has no quotes.
    """
    try:
        return _captions_of(_parse(text, "\t", csv.QUOTE_MINIMAL, path), path)
    except ValueError:
        if '"' not in text.partition("\n")[0]:
            _captions_of(_parse(text, "\t", csv.QUOTE_NONE, path), path)
        raise


def _is_written(rows: Rows, text: str) -> bool:
    """Whether a CSV writer would write the rows as exactly this text."""
    output = io.StringIO()
    csv.writer(output, delimiter="\t", lineterminator="\n").writerows(fields for _, fields in rows)
    return output.getvalue().split() == text.split()


def _column(names: Sequence[str], path: Path, where: str = "the header") -> str:
    for column in COLUMNS:
        matches = [n for n in names if n.strip().casefold().lstrip("\ufeff") == column]
        if len(matches) > 1:
            raise ValueError(f"{path}: {where} has {len(matches)} columns {column}; keep one")
        if matches:
            return matches[0]
    listed = ascii(", ".join(map(str, names)))[1:-1][:300] or "nothing"
    raise ValueError(f"{path}: {where} has no {', '.join(COLUMNS)}; it has {listed}")
