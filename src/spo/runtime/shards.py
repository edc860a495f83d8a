"""Shards of a data set, whose names hold their number and count: train-00000-of-00002.parquet."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")


def missing(found: Collection[str], selects: Callable[[str], bool]) -> int:
    """Count the shards that `selects` takes and that are not there, by the count in the names found."""
    families: dict[tuple[str, str], set[int]] = {}
    rest: dict[tuple[str, str], str] = {}
    for name in found:
        if parts := NAME.fullmatch(name):
            family = (parts[1], parts[3])
            families.setdefault(family, set()).add(int(parts[2]))
            rest[family] = parts[4]
    lost = 0
    for (start, count), numbers in families.items():
        for number in set(range(int(count))) - numbers:
            name = f"{start}-{number:05}-of-{count}{rest[start, count]}"
            lost += selects(name)
    return lost
