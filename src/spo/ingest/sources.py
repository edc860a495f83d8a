"""Preference data from any source: parquet shards in Pick-a-Pic's schema, or HPDv2's JSON."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from spo.data.decoding import open_image
from spo.ingest import hpd, remote, shards, values
from spo.types import PreferencePair

HPD = "train.json"


class Rejected(NamedTuple):
    """A rejected row of a shard or entry of a list, and the reason."""

    shard: str
    row: int
    reason: str


Rows = Iterator[tuple[PreferencePair, None] | tuple[None, Rejected]]


def decoded(pair: PreferencePair) -> tuple[Image.Image, Image.Image]:
    """Decode the images of a pair; an error names the column."""
    images = []
    for name, data in (("jpg_0", pair.image_0), ("jpg_1", pair.image_1)):
        try:
            images.append(open_image(data))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return images[0], images[1]


def count_rows(source: str | Path) -> int:
    """Count the rows of a source."""
    schema, files = _opened(source)
    return int(schema.count(files))


def read_rows(source: str | Path, check: Callable[[PreferencePair], object] = decoded) -> Rows:
    """Iterate over all rows, each as a pair or as its rejection, which `check` raises."""
    schema, files = _opened(source)
    for row in schema.rows(files):
        try:
            pair = row.read()
            check(pair)
        except ValueError as error:
            yield None, Rejected(str(row.file).rsplit("/", 1)[-1], row.number, str(error))
        else:
            yield pair, None


def read_captions(source: str | Path) -> Iterator[str]:
    """Iterate over the captions of all rows; a caption that `read_rows` rejects is empty.

    A row whose caption another column contradicts is an error.
    """
    schema, files = _opened(source)
    for row in schema.rows(files, with_images=False):
        caption = values.agreed(row.given, f"{row.file}: {row.kind} {row.number}")
        try:
            yield values.read_caption("caption", caption)
        except ValueError:
            yield ""


def _opened(source: str | Path) -> tuple[Any, Any]:
    """The module that reads the source's schema, and the files that it reads.

    HPDv2's list is the source itself, or `train.json` in a folder without shards.
    """
    path = Path(source)
    if not remote.is_remote(source):
        if path.suffix == ".json" and path.is_file():
            return hpd, path
        if (path / HPD).is_file() and not any(path.rglob("*.parquet")):
            return hpd, path / HPD
    return shards, shards.find(source)
