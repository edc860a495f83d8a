"""Filter of the training pairs by the gaps of their images' scores: MPCF of LPO (arXiv 2502.01051).

Departures from the published filter:
1. Any of the scorers of `spo.rewards` may be used. The published filter uses the aesthetic score, the cosine
   of a CLIP and VQAScore, of which spo has the first two.
2. Comparisons are strict, as in the released code; the paper writes >=.
3. Gaps of ties are compared without their sign, as the paper writes; the released code keeps the sign.
4. Where there is no rule for a kind of pair, all pairs of that kind are kept.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from spo import config
from spo.data.pairs import ShardWriter
from spo.preference.gaps import chunks, score_gaps
from spo.training.checkpoint import CheckpointStore
from spo.types import PreferencePair, Scorer

BUFFER = 256  # pairs whose encoded images are in memory, and whose gaps are cached together
TIE = 0.5


def failed_rules(label_0: float, gaps: Mapping[str, float], settings: config.PairFilter) -> list[str]:
    """The scorers whose rule a pair fails.

    Args:
        label_0: 1 if the first image won, 0 if it lost, .5 for a tie.
        gaps: by scorer, the score of the first image less that of the second.
    """
    if label_0 == TIE:
        return [name for name, bound in settings.tie_below.items() if not abs(gaps[name]) < bound]
    sign = 1 if label_0 > TIE else -1
    return [name for name, bound in settings.win_lose_above.items() if not sign * gaps[name] > bound]


class FilteredWriter:
    """Passes the pairs that fail no rule on to a ShardWriter, in order.

    Memory does not grow with the number of pairs. Gaps are cached as they are computed, so that a filter that
    was interrupted goes on after them.
    """

    def __init__(
        self,
        writer: ShardWriter,
        settings: config.PairFilter,
        scorers: Mapping[str, Scorer],
        cache: CheckpointStore,
        on_pair: Callable[[Sequence[Any]], object],
    ) -> None:
        """
        Args:
            scorers: all that the rules name, loaded.
            cache: named by all on which the gaps depend.
            on_pair: called with number, kind, gap by scorer (winner less loser; of a tie absolute) and failed
                rules of each pair; numbers count from 0.
        """
        self.writer, self.settings, self.scorers, self.cache = writer, settings, scorers, cache
        self.on_pair = on_pair
        self.failed = {name: Counter[str](win_lose=0, ties=0) for name in scorers}
        self.read = 0
        self._buffer: list[PreferencePair] = []
        self._cached, self._chunk = cache.states(), 0

    @property
    def count(self) -> int:
        """How many pairs were kept so far."""
        return self.writer.count

    def add(self, pair: PreferencePair) -> None:
        self._buffer.append(pair)
        if len(self._buffer) == BUFFER:
            self._flush()

    def close(self) -> None:
        """Filter the last pairs.

        Raises:
            ValueError: no pair was kept.
        """
        if self._buffer:
            self._flush()
        self.writer.close()
        if self.read and not self.count:
            counts = ", ".join(f"{name} {counts.total()}" for name, counts in self.failed.items())
            raise ValueError(
                f"pairs.filter: keeps none of {self.read} training pairs; pairs that fail the rule of each "
                f"scorer: {counts}; lower win_lose_above or raise tie_below"
            )

    def _flush(self) -> None:
        state, read = next(self._cached, None), _digest(self._buffer)
        if state is None or state["pairs"] != read:  # of other pairs: the source has changed meanwhile
            gaps = {name: list(self._gaps(scorer)) for name, scorer in self.scorers.items()}
            state = {"pairs": read, "gaps": gaps}
            self.cache.save(self._chunk, state)
        self._chunk += 1
        for i, pair in enumerate(self._buffer):
            self._decide(pair, {name: gaps[i] for name, gaps in state["gaps"].items()})
        self._buffer = []

    def _gaps(self, scorer: Scorer) -> Iterator[float]:
        for part in chunks(self._buffer, self.settings.batch_size):
            yield from score_gaps(scorer, part)

    def _decide(self, pair: PreferencePair, gaps: Mapping[str, float]) -> None:
        failed = failed_rules(pair.label_0, gaps, self.settings)
        tie = pair.label_0 == TIE
        kind, sign = ("ties", 1) if tie else ("win_lose", 1 if pair.label_0 > TIE else -1)
        shown = [f"{abs(gap) if tie else sign * gap:.6f}" for gap in gaps.values()]
        self.on_pair([self.read, kind, *shown, " ".join(failed)])
        self.read += 1
        for name in failed:
            self.failed[name][kind] += 1
        if not failed:
            self.writer.add(pair)


def _digest(pairs: Sequence[PreferencePair]) -> str:
    """SHA-256 of captions and images."""
    digest = hashlib.sha256()
    for pair in pairs:
        for part in (pair.caption.encode(), pair.image_0, pair.image_1):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
