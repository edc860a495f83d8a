"""Load a UNet that was released without its pipeline; it must have the base's architecture."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.adapters import weights
from spo.adapters.names import original_names
from spo.runtime.messages import first_line

_ORIGINAL = ("model.diffusion_model.", "diffusion_model.", "")


@torch.no_grad()
def load(unet: Any, files: Sequence[Path], config: Path | None) -> tuple[int, int]:
    """Replace the weights of `unet`, in its own precision.

    Args:
        config: the config.json of the new weights, if any.

    Returns:
        The number of tensors that differ from the base's, and the number of all tensors.
    """
    if config is not None:
        _check_config(unet, config)
    state: dict[str, Tensor] = {}
    for file in files:
        state |= weights.read(file)
    state = _diffusers_names(unet, state)
    base = unet.state_dict()
    _check_tensors(files[0], state, base)
    changed = 0
    for key, parameter in base.items():
        value = state[key].to(parameter)
        changed += not torch.equal(value, parameter)
        parameter.copy_(value)
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


def _check_tensors(file: Path, state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Compare the tensors of a file with the base's."""
    for problem, keys in (
        ("no tensor", [key for key in base if key not in state]),
        ("unknown tensor", [key for key in state if key not in base]),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{file}: not the backbone's UNet: {problem} {keys[0]}{more}")
    for key, value in state.items():
        if value.shape != base[key].shape:
            raise ValueError(
                f"{file}: not the backbone's UNet: {key} is {list(value.shape)}, but the base's is "
                f"{list(base[key].shape)}"
            )
        weights.check_numbers(file, key, value)


def _check_config(unet: Any, file: Path) -> None:
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not a JSON object ({first_line(error, 200)})") from None
    name = config.get("_class_name", "UNet2DConditionModel")
    if name != "UNet2DConditionModel":
        raise ValueError(f"{file}: _class_name is {name}, but the backbone has a UNet2DConditionModel")
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
