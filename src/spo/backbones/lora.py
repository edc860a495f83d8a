"""Low-rank adapters (arXiv 2106.09685), added to a UNet, and saved in diffusers' format."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from spo import config
from spo.runtime.files import atomic

FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"


def add(unet: Any, lora: config.Lora, seed: int) -> None:
    """Add a trainable fp32 adapter: A is Gaussian by `seed` and B is zero, so the output is unchanged."""
    from peft import LoraConfig

    from spo.backbones.lora_linear import use_merged_layers

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(use_merged_layers(settings), adapter_name=ADAPTER)
    for parameter in trainable(unet):
        parameter.data = parameter.data.float()


def trainable(unet: Any) -> list[torch.nn.Parameter]:
    """The parameters that require gradients."""
    return [p for p in unet.parameters() if p.requires_grad]


def save(unet: Any, part: str, pipeline_class: Any, folder: Path) -> None:
    """Write the adapter to a folder for diffusers' `pipe.load_lora_weights(folder)`.

    Args:
        part: of the pipeline: unet or transformer.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(unet)
    if part == "unet":  # pipelines of transformers read peft's own names, and not all of the older ones
        state = convert_state_dict_to_diffusers(state)
    adapter = unet.peft_config[ADAPTER]
    with atomic(folder / FILE) as partial:
        pipeline_class.save_lora_weights(
            save_directory=folder,
            weight_name=partial.name,
            **{
                f"{part}_lora_layers": state,
                f"{part}_lora_adapter_metadata": {k: _plain(v) for k, v in adapter.to_dict().items()},
            },
        )
        _sort_header(partial)


def _sort_header(file: Path) -> None:
    """Sort the metadata of a safetensors file, so that equal adapters are equal files with equal DVC hashes.

    safetensors writes metadata in the random order of a hash table. Tensor offsets are relative to the end of
    the header, so that the header can be replaced.
    """
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def _plain(value: Any) -> Any:
    """Convert a setting to a type that JSON supports."""
    if isinstance(value, set | frozenset | tuple | list):
        items: Iterable[Any] = value
        return sorted(items, key=str)
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)
