"""Which items of a data set an iteration takes: a function of the seed and the position alone."""

from __future__ import annotations

import torch

from spo.diffusion.noise import generator


def shuffled(n: int, start: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Positions start .. start + count - 1 of an endless stream that shuffles n items anew every epoch.

    Returns:
        (epoch, item) of each position; no item comes twice in an epoch.
    """
    items: list[tuple[int, int]] = []
    for epoch in range(start // n, (start + count - 1) // n + 1):
        order = torch.randperm(n, generator=generator(seed, f"order {epoch}")).tolist()
        first, end = max(start - epoch * n, 0), start + count - epoch * n
        items += [(epoch, item) for item in order[first:end]]
    return items
