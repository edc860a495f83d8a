"""Speed switches of CUDA for the time that a model is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

SWITCHES: tuple[tuple[Any, str], ...] = (
    (torch.backends.cuda.matmul, "allow_tf32"),  # as `allow_tf32` of SPO's official code
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cudnn, "benchmark"),  # the fastest kernel of a shape by trial: a training has few shapes
)


@contextmanager
def fast(device: torch.device) -> Iterator[None]:
    """Within, products and convolutions of fp32 tensors use TF32 (10 bits of mantissa) on CUDA.

    On other devices nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    before = [getattr(module, name) for module, name in SWITCHES]
    try:
        for module, name in SWITCHES:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(SWITCHES, before, strict=True):
            setattr(module, name, value)
