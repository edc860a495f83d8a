"""Read weights files without executing code from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.runtime.messages import first_line

PICKLED = (".bin", ".pt", ".pth")
ENDINGS = (".safetensors", *PICKLED)


def read(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by key.

    Raises:
        ValueError: a file that is missing, truncated or of another format, or a value that is not a tensor.
    """
    if file.suffix not in ENDINGS:
        raise ValueError(f"{file}: not a weights file ({', '.join(ENDINGS)}); save it as .safetensors")
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
    """Check that a tensor has finite floating-point numbers.

    Raises:
        ValueError: integers (of a quantised model), or a NaN or infinity.
    """
    if not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{file}: {key} is {kind}, not floating point; save the weights in fp16 or fp32")
    if not torch.isfinite(value.float()).all():
        raise ValueError(
            f"{file}: {key} has NaN or infinite values; the file is damaged or its training diverged"
        )


def keys(file: Path) -> list[str]:
    """The names of the tensors; from a .safetensors file no tensor is read.

    Raises:
        ValueError: as `read`.
    """
    if file.suffix != ".safetensors":
        return list(read(file))
    with _opened(file) as weights:
        return list(weights.keys())


def metadata(file: Path) -> dict[str, str]:
    """The metadata in a .safetensors header; empty for pickles."""
    if file.suffix != ".safetensors":
        return {}
    with _opened(file) as weights:
        return dict(weights.metadata() or {})


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
    return {str(key): value for key, value in state.items()}


def forget_source(folder: Path) -> None:
    """Remove from the configs of a saved pipeline where it was loaded from, which may be a path."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.keys() & {"_name_or_path", "name_or_path"}:
            kept = {k: v for k, v in content.items() if k not in ("_name_or_path", "name_or_path")}
            file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
