"""Load a UNet that was released without its pipeline; it must have the base's architecture."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spo.adapters.names import original_names
from spo.backbones import same_unet
from spo.data.weights import Weights

_ORIGINAL = ("model.diffusion_model.", "diffusion_model.", "")


@torch.no_grad()
def load(unet: Any, parts: Sequence[Weights]) -> tuple[int, int]:
    """Replace the weights of `unet`, in its own precision, by those of one file or several shards.

    Returns how many tensors differ from the base's, and the number of all.
    """
    file = parts[0].file
    if (file.parent / "config.json").exists():
        same_unet.check(unet, file.parent / "config.json")
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
