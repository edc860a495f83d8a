"""Preference data as Pick-a-Pic's: two images of a caption, compared by one of many annotators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spo.scenes.oracle import Perception, fidelity
from tools.scenes.annotators import Annotators, blend
from tools.scenes.base_model import to_float
from tools.scenes.generation import GENERATORS, draw, draw_captions

ANNOTATORS = 60


@dataclass(frozen=True)
class Pairs:
    """N compared pairs: pixels uint8 [N,2,3,48,48], generators [N,2], perceived quality [N,2,4] and
    layout [N,2], the annotators and their labels."""

    captions: list[str]
    pixels: Tensor
    generators: Tensor
    quality: Tensor
    layout: Tensor
    who: Tensor
    label_0: Tensor


def ask(n: int, n_captions: int, without: Sequence[str], seed: int) -> tuple[list[str], Tensor]:
    """n captions, drawn from n_captions, and the two GENERATORS [n,2] that answer each."""
    generator = torch.Generator().manual_seed(seed)
    texts = draw_captions(n_captions, seed, without)
    captions = [texts[i] for i in torch.randint(len(texts), (n,), generator=generator).tolist()]
    return captions, torch.randint(len(GENERATORS), (n, 2), generator=generator)


def draw_pairs(
    base: Path, captions: Sequence[str], which: Tensor, cache: Path, seed: int, processes: int
) -> Tensor:
    """Two images uint8 [N,2,3,48,48] of each caption by the generators `which` [N,2]."""
    twice = [c for c in captions for _ in range(2)]
    return draw(base, twice, which.flatten(), cache, seed, processes).unflatten(0, (-1, 2))


def compare(captions: list[str], pixels: Tensor, which: Tensor, eyes: Perception, seed: int) -> Pairs:
    """Each pair is labelled by one annotator, from the predictions of `eyes`."""
    generator = torch.Generator().manual_seed(seed + 1)
    twice = [c for c in captions for _ in range(2)]
    n = len(captions)
    quality, log_probs = eyes.perceive(to_float(pixels.flatten(0, 1)))
    layout = fidelity(log_probs, twice, soft=True).view(n, 2)
    quality = quality.view(n, 2, -1)
    annotators = Annotators.draw(ANNOTATORS, generator)
    who = torch.randint(ANNOTATORS, (n,), generator=generator)
    values = [annotators.value(who, quality[:, i], layout[:, i]) for i in (0, 1)]
    labels = annotators.compare(who, values[0], values[1], generator)
    return Pairs(captions, pixels, which, quality, layout, who, labels)


def statistics(pairs: Pairs) -> dict[str, float | int]:
    """Statistics of the labels: ties, and how often clear labels agree with the images' values."""
    clear = pairs.label_0 != 0.5
    first_won = pairs.label_0[clear] > 0.5
    averages = blend(pairs.quality.flatten(0, 1), pairs.layout.flatten()).view(-1, 2)
    sides = {"blend": averages, "aesthetics": pairs.quality.mean(2), "layout": pairs.layout}
    report: dict[str, float | int] = {"pairs": len(clear), "captions": len(set(pairs.captions))}
    report["ties"] = round(1 - clear.float().mean().item(), 4)
    for name, value in sides.items():
        agrees = (value[clear, 0] > value[clear, 1]) == first_won
        report[f"agreement_{name}"] = round(agrees.float().mean().item(), 4)
    report["mean_aesthetics"] = round(pairs.quality.mean().item(), 4)
    report["mean_layout"] = round(pairs.layout.mean().item(), 4)
    return report
