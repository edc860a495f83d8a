"""Filter and labels of the training pairs by the gaps of their images' scores.

The filter is MPCF of LPO (arXiv 2502.01051). Departures from the published filter:
1. Any of the scorers of `spo.rewards` may be used. The published filter uses the aesthetic score, the cosine
   of a CLIP and VQAScore, of which spo has the first two.
2. Comparisons are strict, as in the released code; the paper writes >=.
3. Gaps of ties are compared by their absolute value, as the paper writes; the released code uses the sign.
4. Where there is no rule for a kind of pair, all pairs of that kind pass.

Pseudo-labels are labels by a scorer instead of the annotators, as in the published SDXL recipe.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spo import config
from spo.data.pairs import FACTS, LABELS, TIE, ShardWriter
from spo.ingest.gaps import BUFFER, CachedGaps
from spo.types import PreferencePair

Table = Callable[..., Callable[[Sequence[Any]], object]]  # a file's name and columns to a writer of its rows


def compared(label_0: float, gap: float) -> float:
    """The gap that rules compare, winner less loser, from that of the first image; of a tie without sign."""
    if label_0 == TIE:
        return abs(gap)
    return gap if label_0 > TIE else -gap


def failed_rules(label_0: float, gaps: Mapping[str, float], rules: config.PairFilter) -> list[str]:
    """The scorers whose rule a pair fails, by the `gaps` of all scorers."""
    own = {name: compared(label_0, gap) for name, gap in gaps.items()}
    if label_0 == TIE:
        return [name for name, bound in rules.tie_below.items() if not own[name] < bound]
    return [name for name, bound in rules.win_lose_above.items() if not own[name] > bound]


def labelling_scorer(rules: config.PairFilter | None, labels: config.PseudoLabels) -> str:
    """The key of the labels' scorer: its name if the filter has the same scorer, whose scores serve both."""
    ((name, own),) = labels.configured().items()
    return name if rules is not None and rules.configured().get(name) == own else "labels"


class ScoredWriter:
    """Passes the pairs that fail no rule on to a ShardWriter, in order, and labels them.

    With rules, filter.csv has a row for each pair: its number from 0, its kind, its gaps (winner less loser;
    of a tie the absolute value) and the scorers whose rule it fails. With `labels`, labels.csv has the label
    of each pair that passes.
    Memory does not grow with the number of pairs.
    """

    def __init__(
        self,
        writer: ShardWriter,
        gaps: CachedGaps,
        rules: config.PairFilter | None,
        labels: config.PseudoLabels | None,
        table: Table,
    ) -> None:
        self.writer, self.gaps, self.rules, self.labels = writer, gaps, rules, labels
        self.read = 0
        self.failed = {n: Counter[str](win_lose=0, ties=0) for n in (rules.configured() if rules else ())}
        self.counts, self.largest = Counter[str](), 0.0  # of the labels, and their largest gap
        self._buffer: list[PreferencePair] = []
        if rules is not None:
            self._on_pair = table("filter.csv", "pair", "kind", *self.failed, "fails")
        if labels is not None:
            self._on_label = table(LABELS, "gap", "label_0")
            self._scorer = labelling_scorer(rules, labels)

    def add(self, pair: PreferencePair) -> None:
        self._buffer.append(pair)
        if len(self._buffer) == BUFFER:
            self._flush()

    def close(self) -> None:
        """Score and write the last pairs."""
        if self._buffer:
            self._flush()
        self.writer.close()
        if self.labels is not None and self.counts["ties"] and not self.counts["decided"]:
            raise ValueError(
                f"preference.labels.gap: no pair's scores differ by {self.labels.gap}; they differ by "
                f"{self.largest:.3g} at most; lower it"
            )
        if self.read and not self.writer.count:
            counts = ", ".join(f"{name} {counts.total()}" for name, counts in self.failed.items())
            raise ValueError(
                f"pairs.filter: keeps none of {self.read} training pairs; pairs that fail the rule of each "
                f"scorer: {counts}; lower win_lose_above or raise tie_below"
            )

    def facts(self) -> dict[str, Any]:
        """Facts for the summary: how many pairs fail each rule, and where the labels come from."""
        facts: dict[str, Any] = {}
        if self.rules is not None:
            facts["fail_the_rule_of"] = {name: dict(counts) for name, counts in self.failed.items()}
        if self.labels is not None:
            agree = self.counts["agree"] / max(self.counts["both"], 1)
            facts[FACTS] = {name: self.counts[name] for name in ("decided", "ties")}
            facts[FACTS]["agreement_with_annotators"] = round(agree, 4)
        return facts

    def _flush(self) -> None:
        gaps = self.gaps.of(self._buffer)
        assert gaps is not None, "only the main process writes"
        for i, pair in enumerate(self._buffer):
            own = {name: column[i] for name, column in gaps.items()}
            if self.rules is None or self._passes(pair, own, self.rules):
                self.writer.add(pair)
                if self.labels is not None:
                    self._label(pair, own[self._scorer], self.labels.gap)
            self.read += 1
        self._buffer = []

    def _passes(self, pair: PreferencePair, gaps: Mapping[str, float], rules: config.PairFilter) -> bool:
        failed = failed_rules(pair.label_0, gaps, rules)
        kind = "ties" if pair.label_0 == TIE else "win_lose"
        shown = [f"{compared(pair.label_0, gaps[name]):.6f}" for name in self.failed]
        self._on_pair([self.read, kind, *shown, " ".join(failed)])
        for name in failed:
            self.failed[name][kind] += 1
        return not failed

    def _label(self, pair: PreferencePair, gap: float, bound: float) -> None:
        label = TIE if abs(gap) < bound else float(gap > 0)
        self._on_label([f"{gap:.6g}", f"{label:g}"])
        self.largest = max(self.largest, abs(gap))
        self.counts["ties" if label == TIE else "decided"] += 1
        if TIE not in (label, pair.label_0):
            self.counts["both"] += 1
            self.counts["agree"] += label == pair.label_0
