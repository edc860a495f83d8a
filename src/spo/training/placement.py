"""Models between a device and host memory, and which key to lower when a device has too little."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from spo.runtime.messages import first_line


def move(module: nn.Module, place: torch.device | str) -> None:
    """Move a model's weights; all models leave and enter a device through this function."""
    module.to(place)


@contextmanager
def on_device(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Within, a model is on the device; it rests in host memory before and after."""
    move(module, device)
    try:
        yield
    finally:
        move(module, "cpu")


@contextmanager
def lower(key: str) -> Iterator[None]:
    """When memory runs out within, name the key of the section `device` that makes a call smaller."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{first_line(error, 200)}; lower device.{key} in params.yaml, which changes no result"
        ) from None
