"""Weights files of preference models, read without executing code and loaded strictly."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def read_tensors(path: Path) -> dict[str, Tensor]:
    """
    Raises:
        ValueError: no such file, or not one of plain tensors.
    """
    if not path.exists():
        raise ValueError(f"{path}: no preference model checkpoint there")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for files that are no checkpoint
        raise ValueError(f"{path}: no checkpoint of plain tensors ({type(error).__name__})") from None


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: str | Path, what: str) -> None:
    """
    Args:
        what: the weights must fit, for the message.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise ValueError(f"{source}: does not fit {what}: {line}") from None
    if missing or unexpected:
        which = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is unknown"
        raise ValueError(f"{source}: does not fit {what}: {which}")
