"""Plain, graded words for an image's quality, as in captions of the web.

They are in captions that CLIPs learn from, and nowhere else: no prompt, no caption of a preference
pair and no evaluation names quality.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spo.scenes.world import QUALITY

GRADES = 4  # quartiles
WORDS = {
    "sharp": ("blurry", "soft", "crisp", "sharp"),
    "clean": ("noisy", "grainy", "smooth", "clean"),
    "saturated": ("pale", "muted", "colourful", "vivid"),
    "lit": ("dark", "dim", "bright", "radiant"),
}
OFTEN = torch.tensor([2.0, 1.0, 1.0, 1.0])  # sharp, the hardest to see, is named more often
MOST = 3  # factors that a caption names at most


def all_words() -> list[str]:
    return [word for name in QUALITY for word in WORDS[name]]


def quartiles(seen: Tensor) -> Tensor:
    """The grade [N,4] from 0 to 3 of each image's factors [N,4] among those of all."""
    bounds = torch.quantile(seen, torch.tensor([0.25, 0.5, 0.75]), dim=0)
    return (seen.unsqueeze(0) > bounds.unsqueeze(1)).sum(0)


def choose(n: int, least: int, generator: torch.Generator) -> Tensor:
    """Which factors each of n captions names: a mask [n,4], `least` to MOST of them."""
    order = torch.multinomial(OFTEN.expand(n, -1), MOST, generator=generator)
    count = torch.randint(least, MOST + 1, (n, 1), generator=generator)
    named = torch.zeros(n, len(QUALITY), dtype=torch.bool)
    return named.scatter(1, order, torch.arange(MOST) < count)


def another_grade(grades: Tensor, named: Tensor, generator: torch.Generator) -> Tensor:
    """The grades [N,4] with the grade of one named factor changed."""
    column = torch.multinomial(named.float(), 1, generator=generator)
    step = torch.randint(1, GRADES, (len(grades), 1), generator=generator)
    return grades.scatter(1, column, (grades.gather(1, column) + step) % GRADES)


def say(captions: Sequence[str], grades: Tensor, named: Tensor) -> list[str]:
    """Captions with a word for each named factor before them."""
    rows = zip(captions, grades.tolist(), named.tolist(), strict=True)
    return [
        " ".join([*(WORDS[q][g] for q, g, n in zip(QUALITY, grade, name, strict=True) if n), caption])
        for caption, grade, name in rows
    ]
