"""Load a UNet that was released without its pipeline; it must have the base's architecture."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.adapters.names import original_names
from spo.backbones.description import config_file
from spo.backbones.weights import Weights

_ORIGINAL = ("model.diffusion_model.", "diffusion_model.", "")


@torch.no_grad()
def load(unet: Any, parts: Sequence[Weights]) -> tuple[int, int]:
    """Replace the weights of `unet`, in its own precision, by those of one file or several shards.

    Returns:
        The number of tensors that differ from the base's, and the number of all tensors.
    """
    file = parts[0].file
    if (file.parent / "config.json").exists():
        _check_config(unet, file.parent / "config.json")
    state = {key: part.checked(key) for part in parts for key in part.tensors}
    state, base = _diffusers_names(unet, state), unet.state_dict()
    changed = sum(not torch.equal(state[key].to(base[key]), base[key]) for key in base if key in state)
    try:
        unet.load_state_dict(state)
    except RuntimeError as error:  # lines of missing and unexpected tensors and other shapes
        _, _, reason = " ".join(str(error).split()).partition(": ")
        raise ValueError(f"{file}: not the backbone's UNet: {reason[:300]}") from None
    return changed, len(base)


def _diffusers_names(unet: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from the original release's names to diffusers' names."""
    prefix = next((p for p in _ORIGINAL if f"{p}input_blocks.0.0.weight" in state), None)
    if prefix is None:
        return state
    names = original_names(unet)

    def renamed(key: str) -> str:
        module, _, parameter = key.removeprefix(prefix).rpartition(".")
        return f"{names[module]}.{parameter}" if module in names else key

    return {renamed(key): value for key, value in state.items()}


def _check_config(unet: Any, file: Path) -> None:
    config = config_file(str(file.parent), None, file.name, str(file.parent))
    own = type(unet).__name__
    name = config.get("_class_name", own)
    if name != own:
        raise ValueError(f"{file}: _class_name is {name}, but the backbone has a {own}")
    for key, default in inspect.signature(type(unet).__init__).parameters.items():
        announced = config.get(key, default.default)
        if key in unet.config and _plain(announced) != _plain(unet.config[key]):
            raise ValueError(
                f"{file}: {key} is {announced!r}, but the backbone's UNet has {unet.config[key]!r}"
            )


def _plain(value: Any) -> Any:
    """Unify spellings of different versions of diffusers: [8, 8] is 8 for every block, null is false."""
    if isinstance(value, list | tuple):
        elements = [_plain(element) for element in value]
        return elements[0] if elements and all(e == elements[0] for e in elements) else elements
    return value or None
