"""Load LoRA files of any trainer: low-rank updates of layers, each at the strength that its file announces.

Supported are the keys of kohya (`lora_unet_..._to_q.lora_down.weight`), three formats of diffusers
(`unet....to_q.lora_A.weight`, `unet....to_q.lora.down.weight`, `...attn1.processor.to_q_lora.down.weight`)
and peft (`base_model.model....`), with LoCon's convolutions and DoRA's magnitudes.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from spo.adapters.names import layer_names, spelling, split_component
from spo.adapters.strength import Strengths
from spo.backbones.lora import ADAPTER
from spo.backbones.lora_linear import use_merged_layers
from spo.data.weights import Weights

_PARTS = {
    "down": r"(\.lora_down|\.lora_A(\.\w+)?|\.lora\.down|\.lora_linear_layer\.down|_lora\.down)\.weight",
    "up": r"(\.lora_up|\.lora_B(\.\w+)?|\.lora\.up|\.lora_linear_layer\.up|_lora\.up)\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(_lora|\.lora)?\.alpha",
    "magnitude": r"(\.dora_scale|\.lora_magnitude_vector(\.\w+)?)(\.weight)?",
}
_OTHER_KINDS = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"oft_|\.oft|vec_params": "OFT",
    r"\.[ab][12]\.weight$|\.glora": "GLoRA",
    r"\.on_input$|ia3": "(IA)3",
    r"vera_|randlora_|lora_ga|\.hra_|\.fourierft": "another peft method",
    r"\.diff(_b|_m|_t)?$|\.set_weight$": "a full weight difference",
    r"\.bias(_indices|_values|_size)?$": "a bias",
    r"\.[wb]_norm$": "a norm's difference",
    r"\.scalar$": "LyCORIS' scalar",
    r"emb_params|bundle_emb|^clip_[lg]$": "a textual inversion",
}


@dataclass
class _Layer:
    """The update of a layer of the model: `scale * up @ down`; with DoRA, also the norms of its rows.

    The scale is stored separately: folded into `up`, the 1/128 of kohya's rank 128 and alpha 1 would make
    subnormal numbers in fp16.
    """

    component: str
    name: str
    weight: Tensor  # the model's
    keys: dict[str, str] = field(default_factory=dict)  # the file's, by part
    values: dict[str, Tensor] = field(default_factory=dict)  # by part, in the layer's shapes
    scale: float = 1.0

    def changes(self) -> bool:
        """Whether the update is not zero."""
        return "magnitude" in self.keys or bool(self.values["up"].any() and self.values["down"].any())


def is_adapter(keys: list[str]) -> bool:
    """Whether keys belong to a LoRA or a related adapter rather than to a complete model."""
    parts = [f"({pattern})$" for part, pattern in _PARTS.items() if part != "alpha"]
    kinds = [kind for kind, name in _OTHER_KINDS.items() if name != "a bias"]
    return any(re.search(pattern, key) for key in keys for pattern in (*parts, *kinds))


def load(models: Mapping[str, Any], weights: Weights) -> Counter[str]:
    """Load a LoRA file into the UNet and text encoders, frozen; returns how many layers change in each."""
    layers = read(models, weights)
    changed = Counter(layer.component for layer in layers if layer.changes())
    if not changed:
        raise ValueError(f"{weights.file}: changes no layer: all of its weights are 0, or it has none")
    for component in changed:
        _load(models[component], [layer for layer in layers if layer.component == component])
    return changed


def read(models: Mapping[str, torch.nn.Module], weights: Weights) -> list[_Layer]:
    """Read the updates of layers; every key of the file must fit a layer of `models`."""
    layers = _by_layer(models, weights)
    strengths = Strengths(weights, has_alphas=any("alpha" in layer.keys for layer in layers))
    for layer in layers:
        _fill(layer, weights, strengths)
    with_magnitude = {layer.component for layer in layers if "magnitude" in layer.keys}
    for layer in layers:
        announced = layer.component in with_magnitude or strengths.announces_dora(layer.component)
        if announced and "magnitude" not in layer.keys:
            key = layer.keys["down"]
            raise ValueError(f"{weights.file}: {key} has no DoRA magnitude, though the file announces DoRA")
    return layers


def _by_layer(models: Mapping[str, torch.nn.Module], weights: Weights) -> list[_Layer]:
    file = weights.file
    names = {component: layer_names(model) for component, model in models.items()}
    layers: dict[tuple[str, str], _Layer] = {}
    for key in weights.tensors:
        part, stem = _part(file, key)
        component, alias = split_component(stem)
        if component not in names:
            raise ValueError(f"{file}: {key} is for {component}, which this backbone lacks")
        name = names[component].get(spelling(alias))
        if name is None:
            raise ValueError(f"{file}: does not fit the {component}, which has no layer for {key}")
        weight: Any = models[component].get_submodule(name).weight
        layer = layers.setdefault((component, name), _Layer(component, name, weight))
        if other := layer.keys.get(part):
            raise ValueError(f"{file}: {key} and {other} are for the same layer; keep one adapter in a file")
        layer.keys[part] = key
    return list(layers.values())


def _part(file: Path, key: str) -> tuple[str, str]:
    """Split a key into (part, the key without it)."""
    for part, pattern in _PARTS.items():
        if match := re.search(f"({pattern})$", key):
            return part, key[: match.start()]
    kinds = (name for pattern, name in _OTHER_KINDS.items() if re.search(pattern, key))
    raise ValueError(
        f"{file}: {key} is {next(kinds, 'not part of a LoRA')}; only LoRA, LoCon and DoRA are supported: "
        "merge other adapters into the UNet, and give the UNet"
    )


def _fill(layer: _Layer, weights: Weights, strengths: Strengths) -> None:
    """Read a layer's tensors and its strength."""
    file, keys = weights.file, layer.keys
    for part in ("down", "up"):
        if part not in keys:
            key = next(iter(keys.values()))
            raise ValueError(f"{file}: {key} has no {part} matrix beside it; the file is incomplete")
    values = {part: weights.checked(key, integers=part == "alpha") for part, key in keys.items()}
    values["down"], values["up"] = _matrices(file, layer, values)
    if "magnitude" in values:
        values["magnitude"] = _magnitude(file, layer, values["magnitude"])
    rank = len(values["down"])
    alpha = strengths.alpha(keys["alpha"], values["alpha"]) if "alpha" in keys else None
    layer.values, layer.scale = values, strengths.of(layer.component, layer.name, keys["down"], rank, alpha)


def _matrices(file: Path, layer: _Layer, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The matrices down and up in the shapes of the layer; a 1x1 kernel may be stored as a matrix."""
    keys = layer.keys
    down, up = values["down"], values["up"]
    if "mid" in keys:  # Tucker decomposition: the kernel is between two matrices; fold the first into it
        middle = values["mid"]
        if middle.ndim != 4 or middle.shape[1] != down.shape[0] or down[0].numel() != down[0].shape[0]:
            raise ValueError(
                f"{file}: {keys['mid']} is {list(middle.shape)}, which does not fit its lora_down"
            )
        down = torch.einsum("ijkl,jc->ickl", middle.float(), down.flatten(1).float()).contiguous()
    outputs, inputs = layer.weight.shape[0], layer.weight.shape[1:]
    rank = down.shape[0] if down.ndim else 0
    wanted = {"down": (rank, *inputs), "up": (outputs, rank, *(1 for _ in inputs[1:]))}
    for part, value in (("down", down), ("up", up)):
        if rank == 0 or _bare(value.shape) != _bare(wanted[part]):
            raise ValueError(
                f"{file}: does not fit the {layer.component}: {keys[part]} is {list(value.shape)}, "
                f"but the layer takes {list(wanted[part])}"
            )
    return down.reshape(wanted["down"]), up.reshape(wanted["up"])


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def _magnitude(file: Path, layer: _Layer, value: Tensor) -> Tensor:
    """The norm of each output, in peft's shape."""
    key, outputs = layer.keys["magnitude"], layer.weight.shape[0]
    if value.numel() != outputs or ("dora_scale" in key and value.shape[:1] != (outputs,)):
        raise ValueError(
            f"{file}: {key} is {list(value.shape)}; DoRA must have a norm for each of {outputs} outputs"
        )
    return value.reshape((outputs,) if layer.weight.ndim == 2 else (1, outputs, 1, 1))


@torch.no_grad()
def _load(model: Any, layers: Sequence[_Layer]) -> None:
    """Add an adapter with a rank and a strength for each layer."""
    names = {f"{layer.name}.lora_A.weight": torch.empty(0) for layer in layers}
    with_magnitudes = any("magnitude" in layer.keys for layer in layers)
    targets = [layer.name for layer in layers]
    settings = LoraConfig(r=1, lora_alpha=1, target_modules=targets, use_dora=with_magnitudes)
    with torch.random.fork_rng(devices=[]):  # peft draws initial weights, which are replaced
        inject_adapter_in_model(use_merged_layers(settings), model, adapter_name=ADAPTER, state_dict=names)
    model._hf_peft_config_loaded = True
    for layer in layers:
        adapted, rank = model.get_submodule(layer.name), len(layer.values["down"])
        for part, place in (("down", "lora_A"), ("up", "lora_B"), ("magnitude", "lora_magnitude_vector")):
            if part in layer.values:
                parameter = getattr(adapted, place)[ADAPTER].weight
                parameter.data = layer.values[part].to(parameter, copy=True)
        adapted.r[ADAPTER], adapted.lora_alpha[ADAPTER] = rank, layer.scale * rank
        adapted.scaling[ADAPTER] = layer.scale
    model.eval().requires_grad_(False)
