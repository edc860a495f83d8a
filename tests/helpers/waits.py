"""Counts what makes Python wait for the device. torch's meta device stands for a GPU: nothing is computed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from spo.estimate.meta import DEVICE, Reads

__all__ = ["DEVICE", "Waits", "counted"]
PACKAGE = "/src/spo/"


class Waits(Reads):
    """Notes every wait by the function of this package that caused it, as `training/loop.py update`.

    A wait is: a number or a tensor read from the device (`item`, `bool`, `tolist`, `cpu`, `numpy`), a result
    whose shape depends on values (`nonzero`, a boolean index), and a copy to the device that is not
    `non_blocking`. What is read is all ones, so that finite checks pass; all rows of a mask are true.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def waited(self, result: Any) -> Any:
        frame = sys._getframe()
        while frame is not None and not _computes(frame.f_code.co_filename):
            frame = frame.f_back  # type: ignore[assignment]
        place = "elsewhere"
        if frame is not None:
            file = frame.f_code.co_filename.partition(PACKAGE)[2]
            place = f"{file} {frame.f_code.co_name}"
        self.found[place] += 1
        return result


def _computes(file: str) -> bool:
    """Whether a file is of this package, and not the stand-in for a device."""
    return PACKAGE in file and f"{PACKAGE}estimate/" not in file


@contextmanager
def counted(monkeypatch: Any) -> Iterator[Counter[str]]:
    """What waits within it. Autocast, which meta does not know, is off."""
    with monkeypatch.context() as patch, Waits() as waits:
        patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
        patch.setattr(torch, "is_autocast_enabled", lambda *args: False)
        yield waits.found
