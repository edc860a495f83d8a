"""The gap of a pair: the score of its first image less that of its second."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial

from spo.data.decoding import open_image
from spo.training import distributed
from spo.training.checkpoint import CheckpointStore
from spo.types import PreferencePair, Scorer

BUFFER = 256  # pairs whose encoded images are in memory, and whose gaps are cached together


class CachedGaps:
    """Gaps of one buffer of pairs after the other; all processes ask for the same buffers.

    Each of n processes scores every n-th buffer, and the main one gets all. Gaps are cached as they are
    computed, so that interrupted work resumes after them, with any number of processes.
    """

    def __init__(self, scorers: Mapping[str, Scorer], batch_size: int, cache: CheckpointStore) -> None:
        """
        Args:
            batch_size: pairs whose images are decoded at once.
            cache: named by all on which the gaps depend.
        """
        self.scorers, self.batch_size, self.cache = scorers, batch_size, cache
        self._rank, self._number = distributed.state().process_index, -1
        # one process at a time writes to a folder
        own = cache.folder / f"process-{self._rank}"
        self._own = CheckpointStore(own, None) if self._rank else cache

    def of(self, pairs: Sequence[PreferencePair]) -> dict[str, list[float]] | None:
        """The gaps of the next buffer by scorer; None in all processes but the main one.

        Raises:
            ValueError: a score that is not finite.
            TransientError: as `distributed.wait_for`, of the other processes.
        """
        self._number += 1
        number, read = self._number, _digest(pairs)
        cached = partial(self._cached, number, read)
        if number % distributed.count() == self._rank and cached() is None:
            gaps = {name: self._scored(scorer, pairs) for name, scorer in self.scorers.items()}
            self._own.save(number, {"pairs": read, "gaps": gaps})
        if self._rank:
            return None
        distributed.wait_for(lambda: cached() is not None, self.cache.folder, "the others score pairs")
        return cached()

    def _scored(self, scorer: Scorer, pairs: Sequence[PreferencePair]) -> list[float]:
        gaps: list[float] = []
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            captions = [pair.caption for pair in batch]
            first = scorer.score([open_image(pair.image_0) for pair in batch], captions)
            second = scorer.score([open_image(pair.image_1) for pair in batch], captions)
            gaps += [a - b for a, b in zip(first, second, strict=True)]
        return gaps

    def _cached(self, number: int, read: str) -> dict[str, list[float]] | None:
        """What any process has cached of these pairs; of others, the source has changed meanwhile."""
        for folder in (self.cache.folder, *self.cache.folder.glob("process-*")):
            state = CheckpointStore(folder).read(number)
            if state is not None and state["pairs"] == read:
                gaps: dict[str, list[float]] = state["gaps"]
                return gaps
        return None


def _digest(pairs: Sequence[PreferencePair]) -> str:
    """SHA-256 of captions and images."""
    digest = hashlib.sha256()
    for pair in pairs:
        for part in (pair.caption.encode(), pair.image_0, pair.image_1):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
