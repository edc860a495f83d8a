"""Low-rank adapters (arXiv 2106.09685): saved in diffusers' format, loaded in any format of lora_file.py."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from spo import config
from spo.backbones import lora_file
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


def save(unet: Any, pipeline_class: Any, folder: Path) -> None:
    """Write the adapter to a folder for diffusers' `pipe.load_lora_weights(folder)`."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    adapter = unet.peft_config[ADAPTER]
    with atomic(folder / FILE) as partial:
        pipeline_class.save_lora_weights(
            save_directory=folder,
            unet_lora_layers=state,
            weight_name=partial.name,
            unet_lora_adapter_metadata={k: _plain(v) for k, v in adapter.to_dict().items()},
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


def load(models: Mapping[str, Any], file: Path) -> dict[str, int]:
    """Load a LoRA file of any supported format into the UNet and the text encoders.

    Args:
        models: modules by component: unet, text_encoder, text_encoder_2.

    Returns:
        The number of changed layers by component.

    Raises:
        ValueError: a key that is not supported or does not fit the models.
    """
    updates = lora_file.read(file, models)
    if not any(update.changes() for layers in updates.values() for update in layers.values()):
        raise ValueError(f"{file}: changes no layer: all of its weights are 0, or it has none")
    for component, layers in updates.items():
        _inject(models[component], layers)
    return {component: sum(u.changes() for u in layers.values()) for component, layers in updates.items()}


def _inject(model: Any, layers: Mapping[str, lora_file.Update]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    from spo.backbones.lora_linear import use_merged_layers

    common = Counter(update.rank for update in layers.values()).most_common(1)[0][0]
    settings = LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=_rank_pattern(layers, common),
        target_modules=list(layers),
        use_dora=any(update.magnitude is not None for update in layers.values()),
    )
    names = dict.fromkeys((f"{name}.lora_A.weight" for name in layers), torch.empty(0))
    with torch.random.fork_rng(devices=[]):  # peft draws initial weights, which _fill replaces
        inject_adapter_in_model(use_merged_layers(settings), model, adapter_name=ADAPTER, state_dict=names)
    model._hf_peft_config_loaded = True
    for name, update in layers.items():
        _fill(model.get_submodule(name), update)


@torch.no_grad()
def _fill(layer: Any, update: lora_file.Update) -> None:
    """Set the weights and the strength of one layer: peft's config has one alpha for many layers."""
    layer.lora_A[ADAPTER].weight.copy_(update.down)
    layer.lora_B[ADAPTER].weight.copy_(update.up)
    if update.magnitude is not None:
        layer.lora_magnitude_vector[ADAPTER].weight.copy_(update.magnitude)
    layer.lora_alpha[ADAPTER] = update.scale * update.rank
    layer.scaling[ADAPTER] = update.scale


def _rank_pattern(layers: Mapping[str, lora_file.Update], common: int) -> dict[str, int]:
    """One pattern per rank, not per layer: peft tries every pattern for every layer."""
    by_rank: dict[int, list[str]] = {}
    for name, update in layers.items():
        if update.rank != common:
            by_rank.setdefault(update.rank, []).append(re.escape(name))
    return {f"^({'|'.join(names)})": rank for rank, names in by_rank.items()}


def _plain(value: Any) -> Any:
    """Convert a setting to a type that JSON supports."""
    if isinstance(value, set | frozenset | tuple | list):
        items: Iterable[Any] = value
        return sorted(items, key=str)
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)
