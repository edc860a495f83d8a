"""Adapters as their makers write them, and the same changes merged into the weights by hand."""

import json
from dataclasses import dataclass
from pathlib import Path

import single_file
import torch
from safetensors.torch import save_file
from torch import nn

from spo.adapters import add_lora, files


@dataclass
class Change:
    """What an adapter adds to one layer: alpha / rank * up @ down."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def difference(self) -> torch.Tensor:
        return (self.up.flatten(1) @ self.down.flatten(1)).reshape(self.up.shape[0], *self.down.shape[1:])


def changes(model: nn.Module, names: list[str]) -> dict[str, Change]:
    """Ranks 1 to 3 and alphas from 1/4 to 4 times the rank, in turn; large enough to be seen."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    made = {}
    for number, name in enumerate(names):
        weight = model.get_submodule(name).weight
        rank = 1 + number % 3
        ones = (1,) * (weight.ndim - 2)
        down, up = normal(rank, *weight.shape[1:]), normal(weight.shape[0], rank, *ones)
        made[name] = Change(down, up, rank * (0.25, 1.0, 2.0, 4.0)[number % 4])
    return made


def layers(model: nn.Module, *endings: str) -> list[str]:
    """Linear and convolution layers, those with these endings or all."""
    kinds = nn.Linear | nn.Conv2d
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and n.endswith(endings or ("",))]


def merge(
    model: nn.Module, adapter: dict[str, Change], scale=lambda change: change.alpha / change.rank
) -> None:
    with torch.no_grad():
        for name, change in adapter.items():
            model.get_submodule(name).weight += scale(change) * change.difference


def kohya(prefix: str, adapter: dict[str, Change], rename=lambda name: name) -> dict[str, torch.Tensor]:
    state = {}
    for name, change in adapter.items():
        key = prefix + rename(name).replace(".", "_")
        state[f"{key}.lora_down.weight"] = change.down
        state[f"{key}.lora_up.weight"] = change.up
        state[f"{key}.alpha"] = torch.tensor(change.alpha)
    return state


def original_name(name: str) -> str:
    """SDXL's names in kohya's files (`input_blocks.4.1...`), of the tests' UNet with one layer a block."""
    return single_file.unet_name(1)(f"{name}.weight").removesuffix(".weight")


def write(file: Path, state: dict[str, torch.Tensor], **metadata: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.clone().contiguous() for key, value in state.items()}, file, metadata=metadata or None
    )
    return file


def settings(adapter: dict[str, Change], **more) -> dict:
    """peft's: the first layer's rank and alpha for all, and patterns for the others."""
    first = next(iter(adapter.values()))
    return {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {name: c.rank for name, c in adapter.items() if c.rank != first.rank},
        "alpha_pattern": {name: c.alpha for name, c in adapter.items() if c.alpha != first.alpha},
        "use_rslora": False,
        **more,
    }


def diffusers_metadata(adapter: dict[str, Change], **more) -> dict[str, str]:
    said = {f"unet.{key}": value for key, value in settings(adapter, **more).items()}
    return {"lora_adapter_metadata": json.dumps(said)}


def load_lora(backbone, path: Path) -> str:
    """Load a LoRA file or folder into a base."""
    source = files.find(path)
    assert source.kind == "lora", source.kind
    return add_lora(backbone, source.weights[0])
