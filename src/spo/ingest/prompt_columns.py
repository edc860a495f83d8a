"""Find the columns or keys that hold the prompts of a list: several may, if they agree."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("caption", "prompt", "text")  # case and surrounding spaces do not matter


def is_caption(name: str) -> bool:
    """Whether a column of this name holds prompts."""
    return _plain(name) in COLUMNS


def caption_columns(names: Sequence[str], where: str) -> list[str]:
    """The columns that hold prompts, at least one and each once.

    Args:
        where: the file, and the row if it has names of its own; for messages.
    """
    found = [name for name in names if is_caption(name)]
    for column in COLUMNS:
        if (count := [*map(_plain, found)].count(column)) > 1:
            raise ValueError(f"{where} has {count} columns {column}; keep one")
    if not found:
        listed = ascii(", ".join(map(str, names)))[1:-1][:300] or "nothing"
        raise ValueError(f"{where} has no {', '.join(COLUMNS)}; it has {listed}")
    return found


def agreed(given: Mapping[str, Any], where: str) -> Any:
    """The prompt of a row by the columns that hold it, which must agree; "" and null are ignored."""
    first, *others = [text for text in given.values() if text not in (None, "")] or given.values()
    if any(other != first for other in others):
        raise ValueError(f"{where}: {' and '.join(given)} differ; keep the one that is the prompt")
    return first


def _plain(name: str) -> str:
    return name.strip().casefold().lstrip("\ufeff")
