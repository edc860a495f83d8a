"""Low-rank adapters (arXiv 2106.09685) in diffusers' own file format."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from spo import config

FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"


def add(unet: Any, lora: config.Lora, seed: int) -> None:
    """Add a trainable fp32 adapter; A is Gaussian by `seed`, B is zero, so it starts as the base."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                target_modules=list(lora.target_modules),
                init_lora_weights="gaussian",
            ),
            adapter_name=ADAPTER,
        )
    for parameter in trainable(unet):
        parameter.data = parameter.data.float()


def trainable(unet: Any) -> list[torch.nn.Parameter]:
    return [p for p in unet.parameters() if p.requires_grad]


def save(unet: Any, pipeline_class: Any, folder: Path) -> None:
    """A folder for `pipe.load_lora_weights(folder)` of diffusers."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    folder.mkdir(parents=True, exist_ok=True)
    adapter = unet.peft_config[ADAPTER]
    pipeline_class.save_lora_weights(
        save_directory=folder,
        unet_lora_layers=state,
        weight_name=FILE,
        unet_lora_adapter_metadata={k: _plain(v) for k, v in adapter.to_dict().items()},
    )
    _sort_header(folder / FILE)


def _sort_header(file: Path) -> None:
    """safetensors writes metadata in the random order of a hash table: equal adapters would differ as files,
    and in their DVC hashes. Offsets of tensors count from the header's end, so the header can be replaced."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def load(unet: Any, pipeline_class: Any, path: Path) -> None:
    """Load a LoRA file or a folder with one, made here or elsewhere.

    Raises:
        ValueError: no file there, or weights that do not fit this UNet.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{file}: no LoRA weights there")
    try:
        state, alphas, metadata = pipeline_class.lora_state_dict(
            str(file.parent), weight_name=file.name, unet_config=unet.config, return_lora_metadata=True
        )
    except Exception as error:  # safetensors and diffusers raise several kinds
        raise ValueError(f"{file}: not a LoRA file: {_first_line(error)}") from None
    mine = {k: v for k, v in state.items() if k.startswith("unet.")}
    if len(mine) < len(state) or not mine:
        other = next((k for k in state if k not in mine), "nothing at all")
        raise ValueError(f"{file}: holds weights that are not the UNet's ({other})")
    try:  # the metadata holds alpha, without which it would be taken for the rank
        unet.load_lora_adapter(
            mine, prefix="unet", network_alphas=alphas, metadata=metadata, adapter_name=ADAPTER
        )
    except Exception as error:  # peft and diffusers raise several kinds
        raise ValueError(f"{file}: does not fit this UNet: {_first_line(error)}") from None
    _check_all_loaded(unet, mine, file)


def _check_all_loaded(unet: Any, state: dict[str, torch.Tensor], file: Path) -> None:
    """Every tensor of the file has a place: diffusers only warns about those that have none."""
    here = sum(1 for name, _ in unet.named_parameters() if "lora_" in name)
    told = sum(1 for name in state if "lora" in name and not name.endswith("alpha"))
    if here != told:
        raise ValueError(f"{file}: {told} LoRA tensors in the file, {here} places for them in this UNet")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, set | frozenset | tuple | list):
        items: Iterable[Any] = value
        return sorted(items, key=str)
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)
