"""Pseudo-labels: a scorer labels preference pairs in place of annotators, as in the published SDXL recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo import config
from spo.runtime.files import read_csv, read_json

if TYPE_CHECKING:
    from spo.data.latents import EncodedPairs

LABELS = "labels.csv"  # beside the pairs: a row for each training pair, in the order of the shards
COLUMNS = ("gap", "label_0")
FACTS = "pseudo_labels"  # key of the pairs' summary
TIE = 0.5


class Labeller:
    """Labels pairs by the gaps of one scorer, and compares them with the annotators' labels."""

    def __init__(
        self, settings: config.PseudoLabels, scorer: str, write: Callable[[Sequence[Any]], object]
    ) -> None:
        """
        Args:
            scorer: its key in the gaps.
            write: called with each row of COLUMNS.
        """
        self.gap, self.batch_size, self.scorer, self.write = settings.gap, settings.batch_size, scorer, write
        self.counts = Counter[str]()
        self.largest = 0.0

    def add(self, label_0: float, gaps: Mapping[str, float]) -> None:
        """Label a pair.

        Args:
            label_0: the annotators'; .5 for a tie.
            gaps: by scorer, the score of the first image less that of the second.
        """
        gap = gaps[self.scorer]
        label = TIE if abs(gap) < self.gap else float(gap > 0)
        self.write([f"{gap:.6g}", f"{label:g}"])
        self.largest = max(self.largest, abs(gap))
        self.counts["ties" if label == TIE else "decided"] += 1
        if TIE not in (label, label_0):
            self.counts["both"] += 1
            self.counts["agree"] += label == label_0

    def check(self) -> None:
        """
        Raises:
            ValueError: every pair is a tie.
        """
        if self.counts["ties"] and not self.counts["decided"]:
            raise ValueError(
                f"preference.labels.gap: no pair's scores differ by {self.gap}; they differ by "
                f"{self.largest:.3g} at most; lower it"
            )

    def facts(self) -> dict[str, float]:
        """How many pairs are decided or ties, and the share of decided pairs on which annotators agree."""
        agree = self.counts["agree"] / max(self.counts["both"], 1)
        counts = {name: self.counts[name] for name in ("decided", "ties")}
        return counts | {"agree_with_people": round(agree, 4)}


def labelled(pairs: EncodedPairs, folder: Path) -> tuple[EncodedPairs, dict[str, Any]]:
    """The training pairs with the labels that the stage `pairs` has written to `folder`, and facts on these.

    Raises:
        ValueError: labels that are missing, damaged, or of another number of pairs.
    """
    import torch

    path = folder / LABELS
    labels = read_csv(path, "labels of preference.labels", usecols=["label_0"])["label_0"]
    if len(labels) != len(pairs) or not labels.isin((0, TIE, 1)).all():
        raise ValueError(
            f"{path}: {len(labels)} labels for {len(pairs)} training pairs, or one that is not 0, 0.5 or 1; "
            "run `make repro`"
        )
    summary = read_json(folder / "summary.json", "summary of the pairs", keys=[FACTS])
    return replace(pairs, label_0=torch.tensor(labels.to_numpy(), dtype=torch.float32)), summary[FACTS]
