"""Counts what makes Python wait for the device. torch's meta device stands for a GPU: nothing is computed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
PACKAGE = "/src/spo/"


class Waits(TorchDispatchMode):
    """Notes every wait by the function of this package that caused it, as `training/loop.py update`.

    A wait is: a number or a tensor read from the device (`item`, `bool`, `tolist`, `cpu`, `numpy`), a result
    whose shape depends on values (`nonzero`, a boolean index), and a copy to the device that is not
    `non_blocking`. What is read is all ones, so that finite checks pass; all rows of a mask are true.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.device == DEVICE for x in given)
        if name == "_local_scalar_dense" and on_device:
            return self._noted(torch.ones((), dtype=args[0].dtype).item())
        if name == "nonzero" and on_device:
            return self._noted(args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64))
        if name == "index" and on_device and _masks(args[1]):
            every = [i if i is None or i.dtype != torch.bool else _all_rows(i) for i in args[1]]
            return self._noted(func(args[0], every))
        if name == "masked_select" and on_device:
            return self._noted(args[0].new_empty(args[0].numel()))
        if name == "_to_copy":
            target = torch.device(kwargs.get("device") or args[0].device)
            if on_device and target != DEVICE:
                kind = kwargs.get("dtype") or args[0].dtype
                return self._noted(torch.ones(args[0].shape, dtype=kind))
            if not on_device and target == DEVICE and not kwargs.get("non_blocking"):
                self._noted(None)
        if name == "copy_" and args[0].device != args[1].device:
            self._noted(None)
        return func(*args, **kwargs)

    def _noted(self, result: Any) -> Any:
        frame = sys._getframe()
        while frame is not None and PACKAGE not in frame.f_code.co_filename:
            frame = frame.f_back  # type: ignore[assignment]
        place = "elsewhere"
        if frame is not None:
            file = frame.f_code.co_filename.partition(PACKAGE)[2]
            place = f"{file} {frame.f_code.co_name}"
        self.found[place] += 1
        return result


def _masks(indices: Any) -> bool:
    return any(i is not None and i.dtype == torch.bool for i in indices)


def _all_rows(mask: Tensor) -> Tensor:
    assert mask.ndim == 1
    return mask.new_empty(len(mask), dtype=torch.int64)


@contextmanager
def counted(monkeypatch: Any) -> Iterator[Counter[str]]:
    """What waits within it. Autocast, which meta does not know, is off."""
    with monkeypatch.context() as patch, Waits() as waits:
        patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
        patch.setattr(torch, "is_autocast_enabled", lambda *args: False)
        yield waits.found
