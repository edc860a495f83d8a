"""The gap of a pair: the score of its first image less that of its second."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from spo.data.decoding import open_image
from spo.runtime.files import write_json
from spo.training import distributed
from spo.types import PreferencePair, Scorer

BUFFER = 256  # pairs whose encoded images are in memory, and whose gaps are cached together
Gaps = dict[str, list[float]]  # by scorer


class CachedGaps:
    """Computes gaps buffer by buffer; all processes ask for the same buffers of pairs.

    Each of n processes scores every n-th buffer, and the main one gets all. Gaps are cached as they are
    computed, so that interrupted work resumes after them, with any number of processes. `cache` is a folder
    named by a fingerprint of everything on which the gaps depend; `batch_size` pairs are decoded at once.
    """

    def __init__(self, scorers: Mapping[str, Scorer], batch_size: int, cache: Path) -> None:
        self.scorers, self.batch_size, self.cache = scorers, batch_size, cache
        self._rank, self._next = distributed.state().process_index, 0

    def of(self, pairs: Sequence[PreferencePair]) -> Gaps | None:
        """The gaps of the next buffer; None in all processes but the main one."""
        number, read = self._next, _digest(pairs)
        path = self.cache / f"{number:08d}.json"
        self._next += 1
        if number % distributed.count() == self._rank and _cached(path, read) is None:
            gaps = {name: self._scored(scorer, pairs) for name, scorer in self.scorers.items()}
            write_json(path, {"pairs": read, "gaps": gaps})
        if self._rank:
            return None
        distributed.wait_for(lambda: _cached(path, read) is not None, self.cache, "the others score pairs")
        return _cached(path, read)

    def _scored(self, scorer: Scorer, pairs: Sequence[PreferencePair]) -> list[float]:
        gaps: list[float] = []
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            captions = [pair.caption for pair in batch]
            first = scorer.score([open_image(pair.image_0) for pair in batch], captions)
            second = scorer.score([open_image(pair.image_1) for pair in batch], captions)
            gaps += [a - b for a, b in zip(first, second, strict=True)]
        return gaps


def _cached(path: Path, read: str) -> Gaps | None:
    """The gaps in a file if they belong to these pairs; otherwise the source has changed since."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: torn by a power cut
        return None
    gaps: Gaps = state["gaps"]
    return gaps if state["pairs"] == read else None


def _digest(pairs: Sequence[PreferencePair]) -> str:
    """SHA-256 of captions and images."""
    digest = hashlib.sha256()
    for pair in pairs:
        for part in (pair.caption.encode(), pair.image_0, pair.image_1):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
