"""Prompt lists in any of the usual formats: every row is read as it is meant, or the file is refused."""

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

COLUMNS = ("caption", "prompt", "text")  # looked for in this order, whatever their case
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # spreadsheets write semicolons where the comma is decimal
Rows = list[tuple[int, list[str]]]  # (line, fields); the first is the header


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a .txt (one a line), .json, .jsonl, .csv, .tsv or .parquet file, in order.

    Raises:
        ValueError: no such file, another ending, a row that cannot be read, or no caption column.
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
        raise ValueError(f"{path}: no prompts there; run `make repro` or `dvc pull data.dvc`")
    ending = path.suffix.lower()
    if path.is_dir() or ending not in readers:
        kind = "a folder" if path.is_dir() else ending or "this"
        raise ValueError(f"{path}: prompts are read from {', '.join(readers)}, not {kind}")
    try:
        return readers[ending](path)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def parquet_captions(path: Path) -> Iterator[str]:
    """The caption column of a parquet file, a batch in memory at a time; null is empty.

    Raises:
        ValueError: no such column, one of another type than text, or a row that is not UTF-8.
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
    """UTF-8, or UTF-16 that begins with its mark, as spreadsheets write it."""
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
    """U+2028 and the like are within a line, not its end."""
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
    return [_caption(item, path, f"item {i}") for i, item in enumerate(content)]


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
    """An object whose keys differ; json itself takes the last of two without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {ascii(twice)[:80]} twice; keep one")
    return content


def _at(path: Path, message: str, place: str = "") -> str:
    return message if str(path) in message else f"{path}: {place}{message}"


def _caption(item: Any, path: Path, where: str) -> str:
    if isinstance(item, str):
        return item
    if not isinstance(item, dict):
        raise ValueError(f"{path}: {where} is neither a caption nor an object with one (a {_type(item)})")
    name = _column([str(k) for k in item], path, where)
    if not isinstance(item[name], str):
        raise ValueError(f"{path}: {where}: {name} is a {_type(item[name])}; it must be text")
    return item[name]


def _type(value: Any) -> str:
    return {type(None): "null", dict: "object", bool: "boolean"}.get(type(value), type(value).__name__)


def _table(path: Path) -> list[str]:
    """The caption column of a table, all of whose rows have as many fields as its header."""
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
    """The captions if spaces after a separator are no part of a field: 1, "a cat". None: no table then."""
    try:
        rows = _parse(text, delimiter, csv.QUOTE_MINIMAL, path, skipinitialspace=True)
        return _captions_of(rows, path)
    except ValueError:
        return None


def _refuse_spaced_quotes(rows: Rows, captions: list[str], spaced: list[str] | None, path: Path) -> None:
    for (line, _), caption, other in zip(rows[1:], captions, spaced or captions, strict=False):
        if caption.lstrip(" ") != other.lstrip(" "):
            raise ValueError(
                f"{path}: line {line}: a space before a quote leaves open whether the prompt has quotes; "
                "remove the space"
            )


def _names_a_column(text: str, delimiter: str) -> bool:
    first = text.lstrip("\r\n").splitlines()[:1]
    names = {n.strip().strip('"').casefold() for line in first for n in line.split(delimiter)}
    return bool(names & set(COLUMNS))


def _parse(text: str, delimiter: str, quoting: Literal[0, 3], path: Path, **spaces: bool) -> Rows:
    """
    Raises:
        ValueError: the line whose quotes or number of fields is wrong.
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
                f"{path}: line {line} has {len(fields)} fields, the header {len(rows[0][1])}; "
                "put prompts that contain the separator in quotes"
            )
    return rows


def _captions_of(rows: Rows, path: Path) -> list[str]:
    if not rows:
        raise ValueError(f"{path}: is empty; the first line must name a column {', '.join(COLUMNS)}")
    header = [name.strip() for name in rows[0][1]]
    place = header.index(_column(header, path))
    return [fields[place] for _, fields in rows[1:]]


def _tab_separated(text: str, path: Path) -> list[str]:
    """A table with tabs, whose quotes are either a writer's or part of the prompts.

    Lists such as PartiPrompts have no quoting: a quote is part of the prompt. Writers quote what holds a
    quote, a tab or the end of a line, and double its quotes; then writing the rows again gives the same text.

    Raises:
        ValueError: neither reading has rows of one length, or a quoted field may be several rows.
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
            f"{path}: line {line}: the quotes around the prompt may be part of it or not; save the list as "
            ".jsonl, or with every field and the header in quotes"
        )
    return quoted


def _quoted_captions(text: str, path: Path) -> list[str]:
    """Those of a table that is no table without quotes; its fault is told as of such where quotes fail too.

    Raises:
        ValueError: the line that is wrong.
    """
    try:
        return _captions_of(_parse(text, "\t", csv.QUOTE_MINIMAL, path), path)
    except ValueError:
        if '"' not in text.partition("\n")[0]:
            _captions_of(_parse(text, "\t", csv.QUOTE_NONE, path), path)
        raise


def _is_written(rows: Rows, text: str) -> bool:
    """Whether a writer of quoted tables would write just this text."""
    output = io.StringIO()
    csv.writer(output, delimiter="\t", lineterminator="\n").writerows(fields for _, fields in rows)
    return output.getvalue().split() == text.split()


def _column(names: Sequence[str], path: Path, where: str = "the header") -> str:
    for wanted in COLUMNS:
        matches = [n for n in names if n.strip().casefold().lstrip("\ufeff") == wanted]
        if len(matches) > 1:
            raise ValueError(f"{path}: {where} has {len(matches)} columns {wanted}; keep one")
        if matches:
            return matches[0]
    listed = ascii(", ".join(map(str, names)))[1:-1][:300] or "nothing"
    raise ValueError(f"{path}: {where} has no {', '.join(COLUMNS)}; it has {listed}")
