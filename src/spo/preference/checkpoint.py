"""Folders and weights files of preference models, read without executing code and loaded strictly."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spo.runtime.files import atomic, write_json

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(folder: Path, state: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write a model's tensors and its config.json."""
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic(folder / WEIGHTS) as partial:
        save_file(state, partial, metadata={"format": "pt"})
    write_json(folder / CONFIG, settings, sort_keys=True)


def check_folder(folder: Path, what: str, command: str) -> None:
    """Refuse a folder that `save` did not write; `command` trains a model."""
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder}: no {what} there; run `make repro` or `{command}`")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one that torch.save wrote."""
    if not path.exists():
        raise ValueError(f"{path}: no preference model checkpoint there")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for files that are no checkpoint
        raise ValueError(f"{path}: no checkpoint of plain tensors ({type(error).__name__})") from None


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: str | Path, what: str) -> None:
    """Refuse a state in which a tensor is missing, unknown or of another shape.

    Args:
        what: the weights must fit, for the message.
    """
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise ValueError(f"{source}: does not fit {what}: {line}") from None
    if missing or unexpected:
        which = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is unknown"
        raise ValueError(f"{source}: does not fit {what}: {which}")
