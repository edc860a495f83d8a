"""The strength of a LoRA in each layer, as its file announces: alpha / rank, or alpha / sqrt(rank)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spo.backbones.layer_names import COMPONENTS, UNET

PEFT_CONFIG = "adapter_config.json"

# settings of peft without an effect on a trained adapter
_WITHOUT_EFFECT = {
    *(
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "peft_type",
        "peft_version",
    ),
    *(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "task_type",
    ),
    *("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "init_lora_weights", "bias"),
    *("fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
_BASE_UNCHANGED = {
    "none",
    "true",
    "false",
    "gaussian",
    "eva",
    "orthogonal",
}  # other inits change the base too


class Strengths:
    """The strengths in a file (alpha tensors, diffusers' metadata or peft's adapter_config.json)."""

    def __init__(self, file: Path, metadata: Mapping[str, str], peft: bool, has_alphas: bool) -> None:
        """
        Args:
            peft: whether the keys are in peft's own format, which writes alpha to adapter_config.json.
            has_alphas: whether the file has alpha tensors.

        Raises:
            ValueError: unsupported settings, or peft's keys without settings.
        """
        self.file, self._trained_alpha = file, _number(metadata.get("ss_network_alpha"))
        self._settings: Mapping[str, Mapping[str, Any]] = {}
        self._source = f"{file}: lora_adapter_metadata"
        if "lora_adapter_metadata" in metadata:
            self._settings = _by_component(_json(self._source, metadata["lora_adapter_metadata"]))
        beside = file.parent / PEFT_CONFIG
        if not self._settings and beside.exists() and (peft or not has_alphas):
            self._source = str(beside)
            beside_settings = _json(self._source, beside.read_text(encoding="utf-8"))
            self._settings = {component: beside_settings for component in COMPONENTS}
        if peft and not self._settings and not has_alphas:
            raise ValueError(
                f"{file}: peft writes lora_alpha to {PEFT_CONFIG}; put that file beside this one"
            )
        for settings in self._settings.values():
            _check(self._source, settings)

    def alpha(self, key: str, value: Tensor) -> float:
        """The number in an alpha tensor.

        Raises:
            ValueError: 0, or not one number.
        """
        if value.numel() != 1 or float(value) == 0:
            shown = "0" if value.numel() == 1 else f"of shape {list(value.shape)}"
            raise ValueError(f"{self.file}: {key} is {shown}; alpha must be one number other than 0")
        return float(value)

    def scale(self, component: str, layer: str, key: str, rank: int, alpha: float | None) -> float:
        """The strength of one layer; 1 if the file announces none.

        Args:
            alpha: the layer's alpha tensor, if any.

        Raises:
            ValueError: two announcements that contradict each other.
        """
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
        strength = by_tensor if by_settings is None else by_settings
        return 1.0 if strength is None else strength

    def announces_dora(self, component: str) -> bool:
        """Whether the settings of a component say use_dora."""
        return bool(self._settings.get(component, {}).get("use_dora"))

    def _by_settings(self, component: str, layer: str, key: str, rank: int) -> float | None:
        settings = self._settings.get(component)
        if settings is None:
            return None
        r = _of_layer(settings.get("rank_pattern"), layer, settings["r"])
        if r != rank:
            raise ValueError(f"{self._source}: r is {r}, but {key} in {self.file.name} has rank {rank}")
        alpha = _of_layer(settings.get("alpha_pattern"), layer, settings["lora_alpha"])
        return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _of_layer(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of the first pattern that matches a layer's name or its end, as in peft."""
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (layer, f"text_model.{layer}")):
            return value
    return default


def _by_component(settings: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Group diffusers' metadata (`unet.r`) by component; keys without a prefix belong to the UNet."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        component, _, name = key.partition(".")
        known = component in COMPONENTS
        parts.setdefault(component if known else UNET, {})[name if known else key] = value
    return parts


def _check(source: str, settings: Mapping[str, Any]) -> None:
    method = str(settings.get("peft_type") or "LORA").rpartition(".")[2]
    if method != "LORA":
        raise ValueError(f"{source}: peft_type is {method}; only LORA is supported")
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value == 0:
            raise ValueError(
                f"{source}: {key} is {value!r}; it must be the adapter's {key}, a number other than 0"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(source, key, settings.get(key) or {})
    if settings.get("bias", "none") != "none":
        raise ValueError(
            f"{source}: bias is {settings['bias']!r}; only adapters without biases ('none') are supported"
        )
    start = settings.get("init_lora_weights")
    if str(start).lower() not in _BASE_UNCHANGED:
        raise ValueError(
            f"{source}: init_lora_weights is {start!r}, which changes the base's weights too; "
            "convert the adapter to plain LoRA (peft: path_initial_model_for_weight_conversion)"
        )
    for key, value in settings.items():
        if key not in _WITHOUT_EFFECT and value:
            raise ValueError(
                f"{source}: {key} is {value!r}, which is not supported; merge the adapter into the UNet"
            )


def _check_pattern(source: str, key: str, patterns: Any) -> None:
    if not isinstance(patterns, dict):
        raise ValueError(f"{source}: {key} is {patterns!r}; it must map layers to numbers")
    for pattern, value in patterns.items():
        if not isinstance(value, int | float) or value == 0:
            raise ValueError(f"{source}: {key} of {pattern} is {value!r}; it must be a number other than 0")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{source}: {key}: {pattern!r} is not a valid pattern ({error})") from None


def _json(source: str, text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not valid JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{source}: must be a JSON object, not a {type(settings).__name__}")
    return settings


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:  # "None", "Dynamic": the alpha tensors decide
        return None
