"""Preference pairs in HPDv2's schema: a JSON list beside a folder of images, read one entry at a time.

An entry has `prompt`, `file_path` (two images) and `human_preference` (1 for the preferred one), as in
HPDv2's train.json (https://huggingface.co/datasets/ymhao/HPDv2).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from spo.data import values
from spo.data.pairs import Check, Rejected, Rows, check, parse
from spo.data.prompt_columns import agreed, is_caption
from spo.data.prompt_files import unique_keys

BLOCK = 1 << 16  # characters read at a time
MAX_ENTRY = 1 << 20  # characters of an entry
IMAGE_FOLDERS = (".", "train", "test", "images")  # relative to the JSON file


def count_rows(path: Path) -> int:
    """Count the entries of the list.

    Raises:
        ValueError: as `entries`.
    """
    return sum(1 for _ in entries(path))


def read_captions(path: Path) -> Iterator[str]:
    """Iterate over the prompts of all entries; a prompt that `read_rows` rejects is empty.

    Raises:
        ValueError: as `entries`; an entry whose prompt another key contradicts.
    """
    for row, entry in enumerate(entries(path)):
        prompt = _agreed(entry, f"{path}: entry {row}") if isinstance(entry, dict) else None
        try:
            yield values.read_caption("prompt", prompt)
        except ValueError:
            yield ""


def read_rows(path: Path, check: Check = check) -> Rows:
    """Iterate over all entries, each as a pair or as its rejection; like `spo.data.pairs.read_rows`."""
    for row, entry in enumerate(entries(path)):
        try:
            yield check(parse(_record(entry, path.parent), None)), None
        except ValueError as error:
            yield None, Rejected(path.name, row, str(error))


def entries(path: Path) -> Iterator[Any]:
    """Iterate over the entries of a JSON list, with one entry in memory at a time.

    Raises:
        ValueError: not a JSON list, a truncated one, or a key twice in an entry.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for entry in _entries(file):
                yield entry
                number += 1
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text after entry {number}") from None
    except RecursionError:
        raise ValueError(f"{path}: entry {number} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: entry {number}: {error}") from None


def _entries(file: TextIO) -> Iterator[Any]:
    text = file.read(BLOCK).lstrip()
    if not text.startswith("["):
        raise ValueError("must be a JSON list of entries")
    text = text[1:].lstrip()
    while not text.startswith("]"):
        entry, text = _next(file, text)
        yield entry
        if not text.startswith((",", "]")):
            raise ValueError("is followed by neither a comma nor the end of the list")
        text = text.removeprefix(",").lstrip()
    _check_end(text[1:] + file.read(BLOCK))


def _next(file: TextIO, text: str) -> tuple[Any, str]:
    """Parse the entry at the start of `text`; returns it and the text after it, reading more if needed."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    while True:
        try:
            entry, end = decoder.raw_decode(text)
            if rest := text[end:].lstrip():
                return entry, rest
        except json.JSONDecodeError:
            pass
        more = file.read(BLOCK) if len(text) < MAX_ENTRY else ""
        if not more:
            raise ValueError("invalid or truncated JSON")
        text = (text + more).lstrip()


def _check_end(text: str) -> None:
    if text.strip():
        raise ValueError("the end of the list is followed by more text")


def _record(entry: Any, folder: Path) -> dict[str, Any]:
    """Convert an entry to Pick-a-Pic's columns."""
    if not isinstance(entry, dict):
        raise ValueError(f"is a {type(entry).__name__}, not an object")
    if missing := [k for k in ("prompt", "file_path", "human_preference") if k not in entry]:
        raise ValueError(
            f"no {', '.join(missing)}; its keys: {ascii(', '.join(entry))[1:-1][:200] or 'none'}"
        )
    files, votes = entry["file_path"], entry["human_preference"]
    for name, value in (("file_path", files), ("human_preference", votes)):
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError(f"{name} is {ascii(value)[:60]}; must be a list of two values")
    caption = values.read_caption("prompt", _agreed(entry, "the entry"))
    votes = [values.read_number("human_preference", vote) for vote in votes]
    if votes == [1, 1] or votes == [0, 0]:
        votes = [0.5, 0.5]
    images = [_read_image(folder, name) for name in files]
    labels = {"label_0": votes[0], "label_1": votes[1]}
    return {"caption": caption, "jpg_0": images[0], "jpg_1": images[1], **labels}


def _agreed(entry: dict[str, Any], where: str) -> Any:
    given = {name: entry[name] for name in entry if is_caption(name)}
    return agreed(given, where) if "prompt" in entry else None


def _read_image(folder: Path, name: Any) -> bytes:
    try:
        return values.read_file(folder, name, IMAGE_FOLDERS)
    except ValueError as error:
        raise ValueError(f"file_path {error}") from None
