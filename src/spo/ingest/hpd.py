"""Preference pairs in HPDv2's schema: a JSON list beside a folder of images, which are read one by one.

An entry has `prompt`, `file_path` (two images) and `human_preference` (1 for the preferred one), as in
HPDv2's train.json (https://huggingface.co/datasets/ymhao/HPDv2), whose 430,000 entries take .45 GB of memory.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from spo.ingest import values
from spo.ingest.prompt_files import json_list
from spo.types import PreferencePair

IMAGE_FOLDERS = (".", "train", "test", "images")  # relative to the JSON file
KEYS = ("prompt", "file_path", "human_preference")


def count(path: Path) -> int:
    """Count the entries of the list."""
    return len(json_list(path))


def rows(path: Path, with_images: bool = True) -> Iterator[values.Row]:
    """Iterate over the entries; an image's file is read only when its entry is."""
    for number, entry in enumerate(json_list(path)):
        given = entry if isinstance(entry, dict) and "prompt" in entry else {}
        yield values.Row(path, "entry", number, given, partial(parse, entry, path.parent))


def parse(entry: Any, folder: Path) -> PreferencePair:
    """Convert an entry to a pair; a ValueError says what is wrong with it, and the caller adds its place."""
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
    caption = values.read_caption("prompt", values.agreed(entry, "the entry"))
    votes = [values.read_number("human_preference", vote) for vote in votes]
    labels = values.read_labels(*([0.5, 0.5] if votes in ([1, 1], [0, 0]) else votes))
    try:
        left, right = (values.read_file(folder, name, IMAGE_FOLDERS) for name in files)
    except ValueError as error:
        raise ValueError(f"file_path {error}") from None
    return PreferencePair(caption, left, right, *labels)
