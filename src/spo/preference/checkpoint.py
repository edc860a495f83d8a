"""Folders of preference models."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

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
