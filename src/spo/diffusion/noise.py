"""Random numbers that belong to a sample or a position: batch size, order and process never change them."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from spo.runtime.transfer import send


class SampleNoise:
    """One CPU generator a sample, seeded by a stable hash of (seed, key).

    Draws go to the device without waiting for what it computes.
    """

    def __init__(
        self,
        seed: int,
        keys: Sequence[int | str],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`keys` [B] name the samples; `shape` is that of one draw of one sample."""
        self.shape, self.device, self.dtype = tuple(shape), device, dtype
        self._generators = [generator(seed, key) for key in keys]

    def __len__(self) -> int:
        return len(self._generators)

    def draw(self) -> Tensor:
        """The next standard normal [B,*shape] of every sample."""
        rows = [torch.randn(self.shape, generator=g) for g in self._generators]
        return send(torch.stack(rows), self.device, self.dtype)

    def draw_many(self, k: int) -> Tensor:
        """The next k draws, [k,B,*shape]."""
        return torch.stack([self.draw() for _ in range(k)])

    def integers(self, high: int) -> Tensor:
        """A uniform integer in [0, high) of every sample, int64 [B]."""
        rows = [torch.randint(high, (), generator=g) for g in self._generators]
        return send(torch.stack(rows), self.device)


def generator(seed: int, key: int | str) -> torch.Generator:
    """A CPU generator of its own for every (seed, key); 1 and "1" are different keys."""
    digest = hashlib.blake2b(f"{seed} {key!r}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


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
