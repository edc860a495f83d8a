"""Read weights files without executing code from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from spo.runtime.messages import first_line

PICKLED = (".bin", ".pt", ".pth")
ENDINGS = (".safetensors", *PICKLED)


@dataclass(frozen=True)
class Weights:
    """The tensors of a file by key; those of a .safetensors file are mapped, so only what is used is read."""

    file: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]  # of a .safetensors file

    def checked(self, key: str, integers: bool = False) -> Tensor:
        """Return a tensor; refuse NaN, infinity and, unless allowed, integers (a quantised model)."""
        value = self.tensors[key]
        kind = str(value.dtype).removeprefix("torch.")
        if not value.is_floating_point() and not integers:
            reason = f"is {kind}, not floating point; save the weights in fp16 or fp32"
            raise ValueError(f"{self.file}: {key} {reason}")
        if not torch.isfinite(value.float()).all():
            reason = "has NaN or infinite values; the file is damaged or its training diverged"
            raise ValueError(f"{self.file}: {key} {reason}")
        return value


def read(file: Path) -> Weights:
    """Read a file; a pickle may hold nothing but tensors by name."""
    state: Any
    metadata: Mapping[str, str] = {}
    try:
        if file.suffix in PICKLED:
            state = torch.load(file, map_location="cpu", weights_only=True)
        else:
            with safe_open(file, framework="pt") as opened:
                state = {key: opened.get_tensor(key) for key in opened.keys()}
                metadata = opened.metadata() or {}
    except Exception as error:  # safetensors, zip and pickle raise several types
        reason = "not tensors alone" if file.suffix in PICKLED else first_line(error, 200)
        raise ValueError(f"{file}: cannot be read as weights ({reason}); save it as .safetensors") from None
    if not isinstance(state, dict):
        raise ValueError(f"{file}: must be tensors by name, not a {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{file}: {key} is a {kind}, not a tensor; save the tensors as .safetensors")
    return Weights(file, {str(key): value for key, value in state.items()}, metadata)
