"""Preference data from any source: parquet shards in Pick-a-Pic's schema, or HPDv2's JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spo.data import hpd, pairs, remote

HPD = "train.json"


def count_rows(source: str | Path) -> int:
    """Count the rows of a source.

    Raises:
        ValueError: as `read_rows`.
    """
    file = _hpd_file(source)
    return hpd.count_rows(file) if file else pairs.count_rows(pairs.shards(source))


def read_rows(source: str | Path, check: pairs.Check = pairs.check) -> pairs.Rows:
    """Iterate over all rows, each as a pair or as its rejection by `check`.

    Raises:
        ValueError: no such source, or a file that is damaged or of another schema.
    """
    file = _hpd_file(source)
    return hpd.read_rows(file, check) if file else pairs.read_rows(pairs.shards(source), check)


def read_captions(source: str | Path) -> Iterator[str]:
    """Iterate over the captions of all rows; a caption that `read_rows` rejects is empty.

    Raises:
        ValueError: as `read_rows`, for the caption column.
    """
    file = _hpd_file(source)
    return hpd.read_captions(file) if file else pairs.read_captions(pairs.shards(source))


def _hpd_file(source: str | Path) -> Path | None:
    """HPDv2's list: the source itself, or `train.json` in a folder without shards."""
    if remote.is_remote(source):
        return None
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        return path
    if (path / HPD).is_file() and not any(path.rglob("*.parquet")):
        return path / HPD
    return None
