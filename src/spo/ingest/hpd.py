"""Preference pairs in HPDv2's schema: a JSON list beside a folder of images, which are read one by one.

An entry has `prompt`, `file_path` (two images) and `human_preference` (1 for the preferred one), as in
HPDv2's train.json (https://huggingface.co/datasets/ymhao/HPDv2), whose 430,000 entries take .45 GB of memory.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from spo.ingest import values
from spo.ingest.prompt_columns import agreed, is_caption
from spo.ingest.prompt_files import json_list
from spo.types import PreferencePair

IMAGE_FOLDERS = (".", "train", "test", "images")  # relative to the JSON file
KEYS = ("prompt", "file_path", "human_preference")


def count(path: Path) -> int:
    """Count the entries of the list."""
    return len(json_list(path))


def rows(path: Path) -> Iterator[tuple[str, int, Callable[[], PreferencePair]]]:
    """Iterate over the file's name, the number of each entry and a function that reads it as a pair."""
    for number, entry in enumerate(json_list(path)):
        yield path.name, number, partial(parse, entry, path.parent)


def captions(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Iterate over the place of each entry and the keys in which it may have its prompt."""
    for number, entry in enumerate(json_list(path)):
        yield f"{path}: entry {number}", _prompts(entry) if isinstance(entry, dict) else {"prompt": None}


def parse(entry: Any, folder: Path) -> PreferencePair:
    """Convert an entry to a pair, whose images are not decoded yet.

    Raises:
        ValueError: what is wrong with the entry; the caller adds its place.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"is a {type(entry).__name__}, not an object")
    if missing := [key for key in KEYS if key not in entry]:
        raise ValueError(
            f"no {', '.join(missing)}; its keys: {ascii(', '.join(entry))[1:-1][:200] or 'none'}"
        )
    files, votes = entry["file_path"], entry["human_preference"]
    for name, value in (("file_path", files), ("human_preference", votes)):
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError(f"{name} is {ascii(value)[:60]}; must be a list of two values")
    caption = values.read_caption("prompt", agreed(_prompts(entry), "the entry"))
    votes = [values.read_number("human_preference", vote) for vote in votes]
    labels = values.read_labels(*([0.5, 0.5] if votes in ([1, 1], [0, 0]) else votes))
    left, right = (_image(folder, name) for name in files)
    return PreferencePair(caption, left, right, *labels)


def _prompts(entry: dict[str, Any]) -> dict[str, Any]:
    return (
        {name: entry[name] for name in entry if is_caption(name)} if "prompt" in entry else {"prompt": None}
    )


def _image(folder: Path, name: Any) -> bytes:
    try:
        return values.read_file(folder, name, IMAGE_FOLDERS)
    except ValueError as error:
        raise ValueError(f"file_path {error}") from None
