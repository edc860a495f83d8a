"""Read weights files without executing code from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.runtime.messages import first_line

PICKLED = (".bin", ".pt", ".pth")
ENDINGS = (".safetensors", *PICKLED)


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by key."""
    if file.suffix in PICKLED:
        return _pickled(file)
    with _opened(file) as weights:
        return {key: weights.get_tensor(key) for key in weights.keys()}


def header(file: Path) -> tuple[list[str], Mapping[str, str]]:
    """The keys of a file, and the metadata of a .safetensors file; of that no tensor is read."""
    if file.suffix in PICKLED:
        return list(_pickled(file)), {}
    with _opened(file) as weights:
        return list(weights.keys()), weights.metadata() or {}


def check_numbers(file: Path, key: str, value: Tensor) -> None:
    """Refuse the integers of a quantised model, NaN and infinity."""
    if not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{file}: {key} is {kind}, not floating point; save the weights in fp16 or fp32")
    if not torch.isfinite(value.float()).all():
        raise ValueError(
            f"{file}: {key} has NaN or infinite values; the file is damaged or its training diverged"
        )


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises several types
        raise ValueError(f"{file}: cannot be read as weights ({first_line(error, 200)})") from None


def _pickled(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle raise several types
        reason = first_line(error, 200)
        raise ValueError(
            f"{file}: not a pickle of tensors only ({reason}); save it as .safetensors"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{file}: must be tensors by name, not a {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(
                f"{file}: {key} is a {kind}, not a tensor; save the tensors alone as .safetensors"
            )
    return {str(key): value for key, value in state.items()}
