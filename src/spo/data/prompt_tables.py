"""Prompts of tables: comma-, semicolon- or tab-separated, as spreadsheets and other programs write them."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Literal

from spo.data.prompt_columns import COLUMNS, agreed, caption_columns, is_caption

DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # spreadsheets write semicolons where the decimal sign is a comma
Rows = list[tuple[int, list[str]]]  # (line, fields); the first is the header


def read_table(path: Path, text: str) -> list[str]:
    """Read the caption column of a table with the content `text`.

    Raises:
        ValueError: a row with another number of fields than the header, quotes that may or may not belong to
            a prompt, no caption column, or several that differ.
    """
    if re.fullmatch(r'"?sep=.?"?', _first_line(text).strip(), re.IGNORECASE):
        raise ValueError(
            f"{path}: line 1 is a spreadsheet's note of its separator, not the header; remove it"
        )
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
    return any(is_caption(name.strip().strip('"')) for name in _first_line(text).split(delimiter))


def _first_line(text: str) -> str:
    return re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]


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
    names = caption_columns(header, f"{path}: the header")
    return [
        agreed({name: fields[header.index(name)] for name in names}, f"{path}: line {line}")
        for line, fields in rows[1:]
    ]


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
        if '"' not in _first_line(text):
            _captions_of(_parse(text, "\t", csv.QUOTE_NONE, path), path)
        raise


def _is_written(rows: Rows, text: str) -> bool:
    """Whether a CSV writer would write the rows as exactly this text."""
    output = io.StringIO()
    csv.writer(output, delimiter="\t", lineterminator="\n").writerows(fields for _, fields in rows)
    return output.getvalue().split() == text.split()
