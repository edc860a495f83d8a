"""Files of weights, read without running code of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.runtime.messages import first_line

PICKLED = (".bin", ".pt", ".pth")
ENDINGS = (".safetensors", *PICKLED)


def read(file: Path) -> dict[str, Tensor]:
    """Tensors by their keys.

    Raises:
        ValueError: a file that is not there, torn, of another kind, or with something else than tensors.
    """
    if file.suffix not in ENDINGS:
        raise ValueError(f"{file}: takes weights as {', '.join(ENDINGS)} only; save it as .safetensors")
    if file.suffix != ".safetensors":
        state = _pickled(file)
    else:
        with _opened(file) as weights:
            state = {key: weights.get_tensor(key) for key in list(weights.keys())}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(
                f"{file}: {key} is a {kind}, not a tensor; save the tensors alone as .safetensors"
            )
    return state


def check_numbers(file: Path, key: str, value: Tensor) -> None:
    """
    Raises:
        ValueError: integers of a quantised model, or a NaN or infinity, which spoils every image.
    """
    if not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{file}: {key} is {kind}, not floating point; save the weights in fp16 or fp32")
    if not torch.isfinite(value.float()).all():
        raise ValueError(f"{file}: {key} holds NaN or infinity; the file is damaged or its training diverged")


def keys(file: Path) -> list[str]:
    """The names of the tensors; of a .safetensors file no tensor is read.

    Raises:
        ValueError: as `read`.
    """
    if file.suffix != ".safetensors":
        return list(read(file))
    with _opened(file) as weights:
        return list(weights.keys())


def metadata(file: Path) -> dict[str, str]:
    """The header's; pickled files have none."""
    if file.suffix != ".safetensors":
        return {}
    with _opened(file) as weights:
        return dict(weights.metadata() or {})


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises several kinds
        raise ValueError(f"{file}: cannot be read as weights ({first_line(error, 200)})") from None


def _pickled(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle raise several kinds
        reason = first_line(error, 200)
        raise ValueError(f"{file}: no pickle of tensors alone ({reason}); save it as .safetensors") from None
    if not isinstance(state, dict):
        raise ValueError(f"{file}: holds a {type(state).__name__}, not tensors by name")
    return {str(key): value for key, value in state.items()}
