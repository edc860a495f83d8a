"""The strength of a LoRA in each layer, as its file announces it: alpha / rank, or alpha / sqrt(rank)."""

import math
import re
from collections.abc import Mapping
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from spo.adapters.names import COMPONENTS, UNET
from spo.backbones.description import json_object
from spo.data.weights import Weights

PEFT_CONFIG = "adapter_config.json"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0


def _are_numbers(patterns: Any) -> bool:
    """Whether it maps regular expressions to numbers, or is missing."""
    try:
        return all(re.compile(pattern) and _is_number(value) for pattern, value in (patterns or {}).items())
    except (AttributeError, re.error):
        return False


_PATTERNS = "it must map valid patterns of layers to numbers other than 0"
# (peft's key, the supported values, the message for others)
_SETTINGS = (
    ("peft_type", lambda v: str(v or "LORA").rpartition(".")[2] == "LORA", "only LORA is supported"),
    ("r", _is_number, "it must be the adapter's rank, a number other than 0"),
    ("lora_alpha", _is_number, "it must be the adapter's alpha, a number other than 0"),
    ("rank_pattern", _are_numbers, _PATTERNS),
    ("alpha_pattern", _are_numbers, _PATTERNS),
    ("bias", lambda v: v in (None, "none"), "only adapters without biases ('none') are supported"),
    (
        "init_lora_weights",
        lambda v: str(v).lower() in ("none", "true", "false", "gaussian", "eva", "orthogonal"),
        "which changes the base's weights too; convert the adapter to plain LoRA (peft: "
        "path_initial_model_for_weight_conversion)",
    ),
)
_READ = {key for key, *_ in _SETTINGS} | {"use_rslora", "use_dora"}
# settings of peft without an effect on a trained adapter
_WITHOUT_EFFECT = {
    *("peft_version", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
    *("fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
}


class Strengths:
    """The strengths in a file (alpha tensors, diffusers' metadata or peft's adapter_config.json)."""

    def __init__(self, weights: Weights, has_alphas: bool) -> None:
        """Read the settings; peft's own format has its alpha in adapter_config.json."""
        file, metadata = weights.file, weights.metadata
        peft = any("base_model.model." in key for key in weights.tensors)
        self.file, self._trained_alpha = file, _number(metadata.get("ss_network_alpha"))
        self._settings: Mapping[str, Mapping[str, Any]] = {}
        self._source = f"{file}: lora_adapter_metadata"
        if "lora_adapter_metadata" in metadata:
            self._settings = _by_component(json_object(metadata["lora_adapter_metadata"], self._source))
        beside = file.parent / PEFT_CONFIG
        if not self._settings and beside.exists() and (peft or not has_alphas):
            self._source = str(beside)
            beside_it = json_object(beside.read_text(encoding="utf-8"), self._source)
            self._settings = dict.fromkeys(COMPONENTS, beside_it)
        if peft and not self._settings and not has_alphas:
            raise ValueError(
                f"{file}: peft writes lora_alpha to {PEFT_CONFIG}; put that file beside this one"
            )
        for settings in self._settings.values():
            _check(self._source, settings)

    def of(self, component: str, layer: str, key: str, rank: int, alpha: float | None) -> float:
        """The strength of a layer with the `key`, and with an `alpha` or None; 1 if none is announced."""
        by_tensor = None if alpha is None else alpha / rank
        by_settings = self._by_settings(component, layer, key, rank)
        if by_tensor is not None and by_settings is not None:
            if not math.isclose(by_tensor, by_settings, rel_tol=1e-3):
                raise ValueError(
                    f"{self._source} gives {key} the strength {by_settings:g}, its alpha tensor "
                    f"{by_tensor:g}; remove the wrong one"
                )
        if by_tensor is None and by_settings is None and self._trained_alpha not in (None, float(rank)):
            raise ValueError(
                f"{self.file}: ss_network_alpha is {self._trained_alpha:g}, but {key} has rank {rank} and no "
                "alpha tensor; add .alpha to each layer"
            )
        announced = (strength for strength in (by_settings, by_tensor) if strength is not None)
        return next(announced, 1.0)

    def announces_dora(self, component: str) -> bool:
        """Whether the settings of a component say use_dora."""
        return bool(self._settings.get(component, {}).get("use_dora"))

    def alpha(self, key: str, value: Tensor) -> float:
        """The number in an alpha tensor."""
        if value.numel() != 1 or float(value) == 0:
            shown = "0" if value.numel() == 1 else f"of shape {list(value.shape)}"
            raise ValueError(f"{self.file}: {key} is {shown}; alpha must be one number other than 0")
        return float(value)

    def _by_settings(self, component: str, layer: str, key: str, rank: int) -> float | None:
        settings = self._settings.get(component)
        if settings is None:
            return None
        r = _of_layer(settings.get("rank_pattern") or {}, layer, settings["r"])
        if r != rank:
            raise ValueError(f"{self._source}: r is {r}, but {key} in {self.file.name} has rank {rank}")
        alpha = _of_layer(settings.get("alpha_pattern") or {}, layer, settings["lora_alpha"])
        return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _of_layer(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of peft's patterns for a layer; in some versions `text_model.` precedes its name."""
    for name in (layer, f"text_model.{layer}"):
        if (pattern := get_pattern_key(list(patterns), name)) in patterns:
            return patterns[pattern]
    return default


def _by_component(settings: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Group diffusers' metadata (`unet.r`) by component; keys without a prefix belong to the UNet."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        key = key.removeprefix("transformer.")
        component, _, name = key.partition(".")
        known = component in COMPONENTS
        parts.setdefault(component if known else UNET, {})[name if known else key] = value
    return parts


def _check(source: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that are not supported, and those that a later version of peft may add."""
    for key, supports, reason in _SETTINGS:
        if not supports(settings.get(key)):
            raise ValueError(f"{source}: {key} is {settings.get(key)!r}; {reason}")
    for key, value in settings.items():
        if value and key not in _READ | _WITHOUT_EFFECT:
            raise ValueError(
                f"{source}: {key} is {value!r}, which is not supported; merge the adapter into the UNet"
            )


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:  # "None", "Dynamic": the alpha tensors decide
        return None
