"""Pseudo-labels: a scorer labels preference pairs in place of annotators, as in the published SDXL recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import Preference, PseudoLabels
from spo.runtime.files import locked, read_json, require, write_json
from spo.runtime.fingerprint import fingerprint
from spo.runtime.workspace import SCRATCH

if TYPE_CHECKING:
    from spo.data.latents import EncodedPairs

PINNED = Path("outputs/inputs/clip.json")  # what the scorer's files hold
CODE = (
    "data",
    "preference/gaps.py",
    "preference/pseudo_labels.py",
    "rewards",
)  # that scores the images of the pairs


def pseudo_label(
    pairs: EncodedPairs, settings: Preference, device: str
) -> tuple[EncodedPairs, dict[str, Any]]:
    """Replace the labels of the training pairs by those of settings.labels; also returns facts about them.

    Raises:
        ValueError: the scorer cannot be loaded, or finds every pair a tie.
    """
    import torch

    from spo.training import distributed

    labels = settings.labels
    assert labels is not None
    folder = require(Path("outputs/pairs/train"), "preference pairs")
    inputs = [folder, *filter(Path.exists, [PINNED])]
    cached = SCRATCH / "labels" / f"{fingerprint(('labels', labels), inputs, CODE)}.json"
    with distributed.main_process_first():
        if not distributed.is_main_process():
            distributed.wait_for(cached)
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            message = f"waits for another stage, which scores the same pairs into {cached}"
            with locked(cached.with_suffix(".lock"), message):
                if not cached.exists():
                    write_json(cached, list(_differences(labels, folder, len(pairs), device)))
    difference = torch.tensor(read_json(cached, "scores of the pairs", list, then="delete it"))
    label_0 = torch.where(difference.abs() < labels.gap, 0.5, (difference > 0).float())
    decided = label_0 != 0.5
    if not decided.any():
        raise ValueError(
            f"preference.labels.gap: no pair's scores differ by {labels.gap}; they differ by "
            f"{float(difference.abs().max()):.3g} at most; lower it"
        )
    both = decided & (pairs.label_0 != 0.5)
    agree = float((label_0 == pairs.label_0)[both].float().mean()) if both.any() else 0.0
    facts = {"decided": int(decided.sum()), "ties": int((~decided).sum()), "agree_with_people": agree}
    return replace(pairs, label_0=label_0), {k: round(v, 4) for k, v in facts.items()}


def _differences(settings: PseudoLabels, folder: Path, total: int, device: str) -> Iterator[float]:
    """Yield the score of the first image less that of the second, in the order of the shards."""
    from tqdm import tqdm

    from spo.data.pairs import read_pairs
    from spo.preference.gaps import chunks, score_gaps
    from spo.rewards import load_scorer

    ((name, section),) = settings.configured().items()
    scorer = load_scorer(name, section, device, settings.batch_size)
    with tqdm(total=total, desc="pseudo-labels", unit="pair") as bar:
        for part in chunks(read_pairs(folder), settings.batch_size):
            yield from score_gaps(scorer, part)
            bar.update(len(part))
