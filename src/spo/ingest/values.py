"""Read captions, labels and images from the columns and types in which data sets store them.

Names of columns or keys, and `where`, are for messages, which are ValueErrors.
"""

import base64
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from spo.data.prompts import clean, flaw
from spo.runtime.messages import first_line
from spo.types import PreferencePair

COLUMNS = ("caption", "prompt", "text")  # case and surrounding spaces do not matter
MAX_FILE = 1 << 28  # bytes of an image file
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


class Row(NamedTuple):
    """A row of a shard or an entry of a list."""

    file: str | Path
    kind: str  # what a row is called in this file
    number: int
    given: Mapping[str, Any]  # its columns, of which several may hold the caption
    read: Callable[[], PreferencePair]


def is_caption(name: str) -> bool:
    """Whether a column of this name holds prompts."""
    return _plain(name) in COLUMNS


def caption_columns(names: Sequence[str], where: str) -> list[str]:
    """The columns that hold prompts, at least one and each once."""
    found = [name for name in names if is_caption(name)]
    for column in COLUMNS:
        if (count := [*map(_plain, found)].count(column)) > 1:
            raise ValueError(f"{where} has {count} columns {column}; keep one")
    if not found:
        listed = ascii(", ".join(map(str, names)))[1:-1][:300] or "nothing"
        raise ValueError(f"{where} has no {', '.join(COLUMNS)}; it has {listed}")
    return found


def agreed(row: Mapping[str, Any], where: str) -> Any:
    """The prompt of a row by the columns that hold it, which must agree; "" and null are ignored."""
    given = {name: text for name, text in row.items() if is_caption(name)}
    stated = [text for text in given.values() if text not in (None, "")]
    if any(text != stated[0] for text in stated):
        raise ValueError(f"{where}: {' and '.join(given)} differ; keep the one that is the prompt")
    return stated[0] if stated else next(iter(given.values()), None)


def _plain(name: str) -> str:
    return name.strip().casefold().lstrip("\ufeff")


def read_caption(name: str, value: Any) -> str:
    """Read a caption from text or UTF-8 bytes, neither empty nor with what cannot be encoded."""
    if value is None:
        raise ValueError(f"{name} is missing")
    value = as_text(name, value)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_shown(value)}; must be text")
    if not clean(value):
        raise ValueError(f"{name} is empty")
    if reason := flaw(value):
        raise ValueError(f"{name} has {reason}")
    return value


def as_text(name: str, value: Any) -> Any:
    """Decode UTF-8 bytes; other values stay."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text at byte {error.start}") from None


def read_number(name: str, value: Any) -> float:
    """Read a finite number from any numeric type or from text."""
    if value is None:
        raise ValueError(f"{name} is missing")
    is_number = isinstance(value, bool | int | float | Decimal)
    if not is_number and not (isinstance(value, str) and _NUMBER.fullmatch(value.strip())):
        raise ValueError(f"{name} is {_shown(value)}; must be a number")
    try:
        number = float(value)
    except (OverflowError, ValueError):
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {'NaN' if math.isnan(number) else 'infinite'}; must be a finite number")
    return number


def read_labels(first: Any, second: Any) -> tuple[float, float]:
    """Read the labels of a pair: 1 and 0, 0 and 1, or .5 each."""
    labels = read_number("label_0", first), read_number("label_1", second)
    if labels not in ((1, 0), (0, 1), (0.5, 0.5)):
        raise ValueError(f"labels are {labels[0]:g} and {labels[1]:g}; must be 1 and 0, 0 and 1, or .5 each")
    return labels


def read_flag(name: str, value: Any) -> bool:
    """Read a boolean, also from 1, 0 or text."""
    flag = _FLAGS.get(str(value).strip().lower())
    if flag is None:
        raise ValueError(f"{name} is {_shown(value)}; must be true or false")
    return flag


def read_image(name: str, value: Any, folder: Path | None) -> bytes:
    """Read an encoded image from bytes, {bytes, path}, a list of bytes, or base64 text (also a data: URL).

    Images by path are in `folder`, and refused without one.
    """
    if isinstance(value, dict):  # as Hugging Face's `datasets` stores it: bytes, or null and a file's path
        if value.get("bytes") is None:
            return _by_path(name, value.get("path"), folder)
        value = value["bytes"]
    elif isinstance(value, str):
        return _of_text(name, value)
    if isinstance(value, list):
        return _of_numbers(name, value)
    if value is None:
        raise ValueError(f"{name} is missing")
    if not isinstance(value, bytes):
        raise ValueError(f"{name} is {_shown(value)}; must be an encoded image")
    return value


def read_file(folder: Path, name: Any, subfolders: Sequence[str] = (".",)) -> bytes:
    """Read the file `name` in the first of the `subfolders` of a folder that has it, never one outside."""
    shown = ascii(name)[:80]
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"{shown} is not a file name")
    try:
        for spelling in dict.fromkeys((name, name.replace("\\", "/"))):  # the latter: written on Windows
            for subfolder in subfolders:
                path = (folder / subfolder / spelling).resolve()
                if not path.is_relative_to(folder.resolve()):
                    raise ValueError(f"{shown} leads out of the data set")
                if path.is_file():
                    if path.stat().st_size > MAX_FILE:
                        raise ValueError(f"{shown} has more than {MAX_FILE} bytes")
                    return path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        reason = getattr(error, "strerror", None) or "a loop of symbolic links"
        raise ValueError(f"{shown} cannot be read ({reason})") from None
    raise ValueError(f"{shown}: no such image")


def _by_path(name: str, path: Any, folder: Path | None) -> bytes:
    if path is None:
        raise ValueError(f"{name} is missing: it has neither bytes nor a path")
    if folder is None:
        raise ValueError(f"{name} has a path without bytes; images by path need shards in a local folder")
    try:
        return read_file(folder, path)
    except ValueError as error:
        raise ValueError(f"{name} has no bytes, and path {error}") from None


def _of_numbers(name: str, values: list[Any]) -> bytes:
    try:
        return bytes(values)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is a list whose values are not integers from 0 to 255") from None


def _of_text(name: str, text: str) -> bytes:
    head, comma, content = text.partition(",")
    if head[:5].lower() == "data:":
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError(f"{name} is a data: URL without base64")
        text = content
    packed = re.sub(r"\s", "", text).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except ValueError as error:
        reason = f"{ascii(text[:40])} ({first_line(error)})"
        raise ValueError(f"{name} is text, but not a base64-encoded image: {reason}") from None


def _shown(value: Any) -> str:
    return f"{ascii(value)[:60]} ({type(value).__name__})"
