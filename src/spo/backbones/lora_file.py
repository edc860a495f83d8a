"""Read LoRA files of any trainer as low-rank updates of layers, each with its own strength.

Supported are the keys of kohya (`lora_unet_..._to_q.lora_down.weight`), three formats of diffusers
(`unet....to_q.lora_A.weight`, `unet....to_q.lora.down.weight`, `...attn1.processor.to_q_lora.down.weight`)
and peft (`base_model.model....`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spo.backbones import weights
from spo.backbones.layer_names import LayerNames, split_component
from spo.backbones.lora_strength import Strengths

_PARTS = {
    "down": r"(\.lora_down|\.lora_A(\.\w+)?|\.lora\.down|\.lora_linear_layer\.down|_lora\.down)\.weight",
    "up": r"(\.lora_up|\.lora_B(\.\w+)?|\.lora\.up|\.lora_linear_layer\.up|_lora\.up)\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(_lora|\.lora)?\.alpha",
    "magnitude": r"(\.dora_scale|\.lora_magnitude_vector(\.\w+)?)",
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


@dataclass(frozen=True)
class _Layer:
    """A layer of the model, and its keys in the file by part."""

    component: str
    name: str
    weight: Tensor
    keys: dict[str, str]


@dataclass(frozen=True)
class Update:
    """The update of one layer: `scale * up @ down`; with DoRA, also the norms of the rows (`magnitude`)."""

    key: str  # a key of the file, for messages
    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def changes(self) -> bool:
        """Whether the update is not zero."""
        return self.magnitude is not None or bool(self.up.any() and self.down.any())


def is_adapter(keys: list[str]) -> bool:
    """Whether keys belong to a LoRA or a related adapter rather than to a complete model."""
    parts = [_PARTS[part] for part in ("down", "up", "mid", "magnitude")]
    kinds = [kind for kind, name in _OTHER_KINDS.items() if name != "a bias"]
    return any(re.search(f"({pattern})$", key) for key in keys for pattern in parts) or any(
        re.search(pattern, key) for key in keys for pattern in kinds
    )


def read(file: Path, models: Mapping[str, torch.nn.Module]) -> dict[str, dict[str, Update]]:
    """Read the updates by component (unet, text_encoder, text_encoder_2) and layer.

    Raises:
        ValueError: a key without a layer in `models`, or a layer of unknown strength.
    """
    state = weights.read(file)
    names = {component: LayerNames(component, model) for component, model in models.items()}
    layers = _by_layer(file, state, names)
    peft = any("base_model.model." in key for key in state)
    strengths = Strengths(
        file, weights.metadata(file), peft, has_alphas=any("alpha" in layer.keys for layer in layers)
    )
    updates: dict[str, dict[str, Update]] = {}
    for layer in layers:
        updates.setdefault(layer.component, {})[layer.name] = _update(file, layer, state, strengths)
    _check_magnitudes(file, updates, strengths)
    return updates


def _by_layer(file: Path, state: dict[str, Tensor], names: dict[str, LayerNames]) -> list[_Layer]:
    layers: dict[tuple[str, str], _Layer] = {}
    for key in state:
        part, stem = _part(file, key)
        component, alias = split_component(stem)
        if component not in names:
            raise ValueError(f"{file}: {key} is for {_title(component)}, which this backbone lacks")
        name = names[component].find(alias)
        if name is None:
            raise ValueError(f"{file}: does not fit {_title(component)}, which has no layer for {key}")
        weight: Tensor = names[component].modules[name].weight
        layer = layers.setdefault((component, name), _Layer(component, name, weight, {}))
        if other := layer.keys.get(part):
            raise ValueError(f"{file}: {key} and {other} are for the same layer; keep one adapter in a file")
        layer.keys[part] = key
    return list(layers.values())


def _part(file: Path, key: str) -> tuple[str, str]:
    """Split a key into (part, the key without it)."""
    for part, pattern in _PARTS.items():
        suffix = f"({pattern})(\\.weight)?$" if part == "magnitude" else f"({pattern})$"
        if match := re.search(suffix, key):
            return part, key[: match.start()]
    kind = next(
        (name for pattern, name in _OTHER_KINDS.items() if re.search(pattern, key)), "not part of a LoRA"
    )
    raise ValueError(
        f"{file}: {key} is {kind}; only LoRA, LoCon and DoRA are supported: merge other adapters into the "
        "UNet, and give the UNet"
    )


def _update(file: Path, layer: _Layer, state: dict[str, Tensor], strengths: Strengths) -> Update:
    keys = layer.keys
    missing = next((part for part in ("down", "up") if part not in keys), None)
    if missing:
        key = next(iter(keys.values()))
        raise ValueError(f"{file}: {key} has no {missing} matrix beside it; the file is incomplete")
    for key in keys.values():
        weights.check_numbers(file, key, state[key].float() if key.endswith("alpha") else state[key])
    down, up = _matrices(file, layer, state)
    alpha = strengths.alpha(keys["alpha"], state[keys["alpha"]]) if "alpha" in keys else None
    scale = strengths.scale(layer.component, layer.name, keys["down"], down.shape[0], alpha)
    magnitude = None
    if key := keys.get("magnitude", ""):
        magnitude = _magnitude(file, key, state[key], layer.weight)
    return Update(keys["down"], down, up, scale, magnitude)


def _matrices(file: Path, layer: _Layer, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The matrices down and up in the shapes of the layer; a 1x1 kernel may be stored as a matrix."""
    keys = layer.keys
    down, up = state[keys["down"]], state[keys["up"]]
    if "mid" in keys:  # Tucker decomposition: the kernel is between two matrices; fold the first into it
        middle = state[keys["mid"]]
        if middle.ndim != 4 or middle.shape[1] != down.shape[0] or down[0].numel() != down[0].shape[0]:
            raise ValueError(
                f"{file}: {keys['mid']} is {list(middle.shape)}, which does not fit its lora_down"
            )
        down = torch.einsum("ijkl,jc->ickl", middle.float(), down.flatten(1).float())
    outputs, inputs = layer.weight.shape[0], layer.weight.shape[1:]
    rank = down.shape[0] if down.ndim else 0
    wanted = {"down": (rank, *inputs), "up": (outputs, rank, *(1 for _ in inputs[1:]))}
    for part, value in (("down", down), ("up", up)):
        if rank == 0 or _bare(value.shape) != _bare(wanted[part]):
            raise ValueError(
                f"{file}: does not fit {_title(layer.component)}: {keys[part]} is {list(value.shape)}, "
                f"but the layer takes {list(wanted[part])}"
            )
    return down.reshape(wanted["down"]), up.reshape(wanted["up"])


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def _magnitude(file: Path, key: str, value: Tensor, weight: Tensor) -> Tensor:
    """The norm of each output, in peft's shape."""
    outputs, by_lycoris = weight.shape[0], key.endswith("dora_scale")
    if value.numel() != outputs or (by_lycoris and value.shape[:1] != (outputs,)):
        raise ValueError(
            f"{file}: {key} is {list(value.shape)}; DoRA must have a norm for each of {outputs} outputs"
        )
    return value.reshape((outputs,) if weight.ndim == 2 else (1, outputs, 1, 1))


def _check_magnitudes(file: Path, updates: dict[str, dict[str, Update]], strengths: Strengths) -> None:
    for component, layers in updates.items():
        with_magnitude = [u for u in layers.values() if u.magnitude is not None]
        without = next((u for u in layers.values() if u.magnitude is None), None)
        if without and (with_magnitude or strengths.announces_dora(component)):
            raise ValueError(f"{file}: {without.key} has no DoRA magnitude, though the file announces DoRA")


def _title(component: str) -> str:
    return {"unet": "this UNet"}.get(component, component)
