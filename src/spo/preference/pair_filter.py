"""Filter of the training pairs by the gaps of their images' scores: MPCF of LPO (arXiv 2502.01051).

Departures from the published filter:
1. Any of the scorers of `spo.rewards` may be used. The published filter uses the aesthetic score, the cosine
   of a CLIP and VQAScore, of which spo has the first two.
2. Comparisons are strict, as in the released code; the paper writes >=.
3. Gaps of ties are compared without their sign, as the paper writes; the released code keeps the sign.
4. Where there is no rule for a kind of pair, all pairs of that kind are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spo import config
from spo.data.pairs import ShardWriter
from spo.preference.gaps import BUFFER, CachedGaps
from spo.preference.pseudo_labels import Labeller
from spo.training.checkpoint import CheckpointStore
from spo.types import PreferencePair, Scorer

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
    """Passes the pairs that fail no rule on to a ShardWriter, in order, and labels them.

    Memory does not grow with the number of pairs.
    """

    def __init__(
        self,
        writer: ShardWriter,
        settings: config.PairFilter | None,
        scorers: Mapping[str, Scorer],
        cache: CheckpointStore,
        on_pair: Callable[[Sequence[Any]], object] | None,
        labels: Labeller | None = None,
    ) -> None:
        """
        Args:
            settings: the rules; None: all pairs are kept.
            scorers: all that the rules and `labels` name, loaded.
            cache: of `CachedGaps`.
            on_pair: called with number, kind, gap by scorer of a rule (winner less loser; of a tie absolute)
                and failed rules of each pair; numbers count from 0.
        """
        self.writer, self.settings, self.on_pair, self.labels = writer, settings, on_pair, labels
        ruled = settings.configured() if settings else ()
        self.failed = {name: Counter[str](win_lose=0, ties=0) for name in ruled}
        self.read = 0
        self._buffer: list[PreferencePair] = []
        sized = settings or labels
        assert sized is not None, "nothing to score"
        self._gaps = CachedGaps(scorers, sized.batch_size, cache)

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
        if self.labels is not None:
            self.labels.check()
        if self.read and not self.count:
            counts = ", ".join(f"{name} {counts.total()}" for name, counts in self.failed.items())
            raise ValueError(
                f"pairs.filter: keeps none of {self.read} training pairs; pairs that fail the rule of each "
                f"scorer: {counts}; lower win_lose_above or raise tie_below"
            )

    def _flush(self) -> None:
        gaps = self._gaps.of(self._buffer)
        assert gaps is not None, "only the main process writes"
        for i, pair in enumerate(self._buffer):
            self._decide(pair, {name: column[i] for name, column in gaps.items()})
        self._buffer = []

    def _decide(self, pair: PreferencePair, gaps: Mapping[str, float]) -> None:
        failed = failed_rules(pair.label_0, gaps, self.settings) if self.settings else []
        tie = pair.label_0 == TIE
        kind, sign = ("ties", 1) if tie else ("win_lose", 1 if pair.label_0 > TIE else -1)
        if self.on_pair is not None:
            shown = [f"{abs(gaps[name]) if tie else sign * gaps[name]:.6f}" for name in self.failed]
            self.on_pair([self.read, kind, *shown, " ".join(failed)])
        self.read += 1
        for name in failed:
            self.failed[name][kind] += 1
        if not failed:
            self.writer.add(pair)
            if self.labels is not None:
                self.labels.add(pair.label_0, gaps)
