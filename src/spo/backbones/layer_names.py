"""Layer names of UNets and text encoders in the formats of diffusers, the original releases and kohya."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
COMPONENTS = (UNET, TEXT, TEXT_2)

_PREFIXES = {
    "base_model.model.": None,  # peft, for any component
    "unet.": UNET,
    "text_encoder.": TEXT,
    "text_encoder_2.": TEXT_2,
    "lora_unet_": UNET,
    "lycoris_": UNET,
    "lora_te_": TEXT,
    "lora_te1_": TEXT,
    "lora_te2_": TEXT_2,
    "model.diffusion_model.": UNET,
    "diffusion_model.": UNET,
}
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def split_component(stem: str) -> tuple[str, str]:
    """Split the part of a key before `.lora_down.weight` and the like into (component, layer)."""
    component = None
    while prefix := next((p for p in _PREFIXES if stem.startswith(p)), None):
        component, stem = component or _PREFIXES[prefix], stem.removeprefix(prefix)
    return component or UNET, stem


class LayerNames:
    """Finds a layer of one model by any of its names."""

    def __init__(self, component: str, model: torch.nn.Module) -> None:
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        }
        aliases = _unet_aliases if component == UNET else _text_aliases
        self._by_alias = {_flat(alias): name for alias, name in aliases(model, self.modules)}

    def find(self, layer: str) -> str | None:
        """The module name of a layer; None if the model has no such layer."""
        return self._by_alias.get(_flat(layer.replace(".processor.", ".")))


def _flat(name: str) -> str:
    """The name in kohya's form, which writes dots as underscores."""
    return name.replace(".", "_")


def _unet_aliases(unet: Any, modules: dict[str, Any]) -> Iterator[tuple[str, str]]:
    original = original_names(unet)
    for name in modules:
        for alias in filter(None, (name, original.get(name))):
            yield alias, name
            if alias.endswith("to_out.0"):  # `to_out` in keys of attention processors
                yield alias.removesuffix(".0"), name


def _text_aliases(_: Any, modules: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Aliases with and without the `text_model` wrapper of some versions of transformers."""
    for name in modules:
        bare = name.removeprefix("text_model.")
        head, _, last = bare.rpartition(".")
        for alias in (bare, f"{head}.{_PROJECTIONS.get(last, last)}" if head else bare):
            yield alias, name
            yield f"text_model.{alias}", name


def original_names(unet: Any) -> dict[str, str]:
    """Map diffusers' module names to the original names of SD 1.5 and SDXL (`input_blocks.4.1...`)."""
    layers = unet.config.layers_per_block
    if not isinstance(layers, int):
        return {}  # the original format has the same number of layers in every block
    attended = {
        name.split(".")[1] for name, _ in unet.named_modules() if "up_blocks" in name and "attentions" in name
    }
    named = ((name, _original_name(name, layers, attended)) for name, _ in unet.named_modules())
    return {name: original for name, original in named if original}


def _original_name(name: str, layers: int, attended: set[str]) -> str | None:
    if name in _TOP:
        return _TOP[name]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, j, rest = match.groups()
        return f"middle_block.{2 * int(j) if kind == 'resnets' else 1}.{_inner(kind, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if not match:
        return None
    side, i, kind, j, rest = match.groups()
    first = (layers + 1) * int(i)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if i in attended else 1}.{rest}"
    block = f"input_blocks.{first + int(j) + 1}" if side == "down" else f"output_blocks.{first + int(j)}"
    return f"{block}.{int(kind == 'attentions')}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest
