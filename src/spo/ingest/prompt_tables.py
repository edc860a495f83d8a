"""Prompts of tables: comma-, semicolon- or tab-separated, as spreadsheets and other programs write them."""

import csv
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

from spo.ingest.values import COLUMNS, agreed, caption_columns, is_caption

DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # spreadsheets write semicolons where the decimal sign is a comma


class Table(NamedTuple):
    """A table as parsed with one interpretation of its quotes."""

    rows: list[list[str]]  # the first is the header
    lines: list[int]  # in which the rows after the header end
    captions: list[str]  # of these rows


def read_table(path: Path, text: str) -> list[str]:
    """Read the caption column of a table with the content `text`."""
    if re.fullmatch(r'"?sep=.?"?', _first_line(text).strip(), re.IGNORECASE):
        raise ValueError(
            f"{path}: line 1 is a spreadsheet's note of its separator, not the header; remove it"
        )
    delimiters = DELIMITERS[path.suffix.lower()]
    delimiter = next((d for d in delimiters if _names_a_column(text, d)), delimiters[0])
    read = _tab_separated if delimiter == "\t" else _separated
    return read(text, delimiter, path)


def _separated(text: str, delimiter: str, path: Path) -> list[str]:
    """Read a table whose quotes enclose fields; a quote after a space (`1, "a cat"`) may not."""
    table = _parse(text, delimiter, path)
    if not re.search(rf'{re.escape(delimiter)} +"', text):
        return table.captions
    spaced = _attempt(text, delimiter, path, skipinitialspace=True)
    if isinstance(spaced, Table) and (line := _first_difference(table, spaced)):
        raise ValueError(
            f"{path}: line {line}: a quote after a space may or may not belong to the prompt; "
            "remove the space"
        )
    return table.captions


def _tab_separated(text: str, delimiter: str, path: Path) -> list[str]:
    """Read a tab-separated table, whose quotes are either CSV quoting or part of the prompts.

    Lists such as PartiPrompts do not quote: a quote is part of the prompt. CSV writers quote a field with a
    quote, a tab or a line end, and double its quotes; writing the parsed rows again then gives the same text.
    """
    plain = _attempt(text, delimiter, path, quoting=csv.QUOTE_NONE)
    quoted = _attempt(text, delimiter, path)
    if isinstance(plain, ValueError) and isinstance(quoted, ValueError):
        raise quoted if '"' in _first_line(text) else plain
    if isinstance(plain, ValueError) or isinstance(quoted, ValueError):
        return next(table.captions for table in (plain, quoted) if isinstance(table, Table))
    same_rows = len(plain.captions) == len(quoted.captions)
    if plain.captions != quoted.captions and not (same_rows and _is_written(quoted.rows, text)):
        line = _first_difference(plain, quoted) or quoted.lines[-1]
        raise ValueError(
            f"{path}: line {line}: the quotes that end there may enclose a prompt (of one or several lines), "
            "or be part of it; save the list as .jsonl, or with every field and the header in quotes"
        )
    return quoted.captions


def _attempt(text: str, delimiter: str, path: Path, **dialect: Any) -> Table | ValueError:
    try:
        return _parse(text, delimiter, path, **dialect)
    except ValueError as error:
        return error


def _parse(text: str, delimiter: str, path: Path, **dialect: Any) -> Table:
    """Parse a table; refuses wrong quotes, rows of another length than the header, and no caption column."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, **dialect)
    try:
        rows = [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: is empty; its first line must name a column {' or '.join(COLUMNS)}")
    (_, header), *rows = rows
    for line, fields in rows:
        if len(fields) != len(header):
            raise ValueError(
                f"{path}: line {line} has {len(fields)} fields, the header has {len(header)}; "
                "put prompts that contain the separator in quotes"
            )
    stripped = [name.strip() for name in header]
    columns = {name: stripped.index(name) for name in caption_columns(stripped, f"{path}: the header")}
    captions = [
        agreed({name: fields[i] for name, i in columns.items()}, f"{path}: line {line}")
        for line, fields in rows
    ]
    return Table([header, *(fields for _, fields in rows)], [line for line, _ in rows], captions)


def _first_difference(table: Table, other: Table) -> int | None:
    """The line of `other` at which the prompts of two readings differ in more than spaces before them."""
    rows = zip(other.lines, table.captions, other.captions, strict=False)
    return next((line for line, one, two in rows if one.lstrip(" ") != two.lstrip(" ")), None)


def _is_written(rows: list[list[str]], text: str) -> bool:
    """Whether a CSV writer would write the rows as exactly this text."""
    output = io.StringIO()
    csv.writer(output, delimiter="\t", lineterminator="\n").writerows(rows)
    return output.getvalue().split() == text.split()


def _names_a_column(text: str, delimiter: str) -> bool:
    return any(is_caption(name.strip().strip('"')) for name in _first_line(text).split(delimiter))


def _first_line(text: str) -> str:
    return re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
