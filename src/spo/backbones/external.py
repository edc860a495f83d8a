"""Recognise a released model by its files: a LoRA, a UNet or a complete pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spo.backbones import lora_file, weights
from spo.runtime.messages import first_line

UNET_STEM = "diffusion_pytorch_model"
LORA_FILES = tuple(
    f"{name}{end}" for name in ("pytorch_lora_weights", "adapter_model") for end in (".safetensors", ".bin")
)
SUPPORTED = (
    "a LoRA (file or folder), a UNet (file or folder) or a complete pipeline (diffusers folder, .safetensors)"
)

# (pattern of the base model that trainers write into the header, value of backbone.family or its name)
_FAMILIES = (
    (r"refiner", "the SDXL refiner"),
    (r"sd[ _-]?xl|stable[ _-]diffusion[ _-]xl", "sdxl"),
    (r"stable[ _-]diffusion[ _-]v?[12]|sd[ _-]?v?[12]([ ._-]|\d?$)", "sd"),
    (r"stable[ _-]diffusion[ _-]v?3|sd[ _-]?v?3", "Stable Diffusion 3"),
    (
        r"flux|cascade|pixart|hunyuan|lumina|auraflow|chroma|kolors|qwen|wan2|ltx",
        "another architecture",
    ),
)

_PREDICTIONS = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "false": "epsilon",
    "v": "v_prediction",
    "true": "v_prediction",
}


@dataclass(frozen=True)
class Source:
    """A model at a path: its kind and its files."""

    kind: Literal["pipeline", "unet", "lora"]
    files: tuple[Path, ...]  # for a pipeline: its folder or single file
    config: Path | None = None  # config.json beside a UNet, if any


def find(path: Path) -> Source:
    """Recognise the model at a path.

    Raises:
        ValueError: no such path, no supported model, or more than one candidate.
    """
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; give {SUPPORTED}")
    if (path / "model_index.json").exists():
        return Source("pipeline", (path,))
    return _unet_folder(path) or _lora_folder(path)


def lora_file_of(path: Path) -> Path:
    """The weights file of the LoRA at a path.

    Raises:
        ValueError: as `find`, and for anything but a LoRA.
    """
    source = find(path)
    if source.kind != "lora":
        raise ValueError(f"{path}: contains a {source.kind}, not a LoRA")
    return source.files[0]


def _of_file(file: Path) -> Source:
    if file.suffix not in weights.ENDINGS:
        raise ValueError(
            f"{file}: not a supported file ({', '.join(weights.ENDINGS)}); save it as .safetensors"
        )
    keys = weights.keys(file)
    if lora_file.is_adapter(keys):
        return Source("lora", (file,))
    original = any(key.startswith("model.diffusion_model.") for key in keys)
    if original and any(
        key.startswith(("first_stage_model.", "cond_stage_model.", "conditioner.")) for key in keys
    ):
        if file.suffix != ".safetensors":
            raise ValueError(f"{file}: a complete pipeline as a pickle; save it as .safetensors")
        return Source("pipeline", (file,))
    if original or any(re.search(r"(^|\.)(conv_in|input_blocks\.0\.0)\.weight$", key) for key in keys):
        config = file.parent / "config.json"
        return Source("unet", (file,), config if config.exists() else None)
    first = f"its first key is {keys[0]}" if keys else "it is empty"
    raise ValueError(f"{file}: neither a LoRA nor a UNet nor a complete pipeline ({first})")


def _unet_folder(path: Path) -> Source | None:
    inner = next((folder for folder in (path, path / "unet") if any(folder.glob(f"{UNET_STEM}*"))), None)
    if inner is None:
        return None
    others = [p.name for p in sorted(path.iterdir()) if p != inner and _changes_images(p)]
    if others:
        raise ValueError(
            f"{path}: contains {', '.join(others)} beside the UNet, but no model_index.json; give one of "
            "them (for the UNet, move it to a folder of its own)"
        )
    config = inner / "config.json"
    return Source("unet", _unet_files(inner), config if config.exists() else None)


def _changes_images(path: Path) -> bool:
    """Whether a path beside a UNet is another component, or weights other than variants of the UNet."""
    if path.is_dir():
        return any(path.glob("*config.json")) or any(path.glob("*.safetensors"))
    return path.suffix == ".safetensors" and not path.name.startswith(UNET_STEM)


def _unet_files(folder: Path) -> tuple[Path, ...]:
    """The weights that diffusers loads: one file or shards, fp32 before fp16; else the only file."""
    for variant in ("", ".fp16", ".bf16"):
        single = folder / f"{UNET_STEM}{variant}.safetensors"
        index = folder / f"{UNET_STEM}.safetensors.index{variant}.json"
        if single.exists():
            return (single,)
        if index.exists():
            return tuple(folder / name for name in sorted(set(_of(index, "weight_map").values())))
    files = _weights(folder, f"{UNET_STEM}*")
    if len(files) != 1:
        raise ValueError(
            f"{folder}: must contain one weights file, not {_names(files) or 'none'}; give the file's path"
        )
    return tuple(files)


def _lora_folder(path: Path) -> Source:
    named = [path / name for name in LORA_FILES if (path / name).exists()]
    files = [file for file in named if file.suffix == ".safetensors"] or named or _weights(path, "*")
    if len(files) > 1:
        raise ValueError(f"{path}: several weights files ({_names(files)}); give the path of one")
    if not files:
        inner = [
            str(folder) for folder in sorted(path.iterdir()) if folder.is_dir() and _weights(folder, "*")
        ]
        hint = f"weights lie in {', '.join(inner)}: give one" if inner else f"give {SUPPORTED}"
        raise ValueError(f"{path}: no LoRA weights, no UNet and no model_index.json; {hint}")
    return _of_file(files[0])


def check_family(file: Path, family: str) -> None:
    """Compare the architecture in a file's header with the backbone's.

    Raises:
        ValueError: the header announces another architecture.
    """
    metadata = weights.metadata(file)
    for key in ("ss_base_model_version", "modelspec.architecture"):
        text = metadata.get(key, "").lower()
        announced = next((name for pattern, name in _FAMILIES if re.search(pattern, text)), family)
        if announced != family:
            raise ValueError(f"{file}: {key} is {metadata[key]!r}, but backbone.family is {family!r}")


def check_prediction(file: Path, prediction: str) -> None:
    """Compare the prediction type in a file's header with the backbone's.

    Raises:
        ValueError: the header announces training with another prediction type.
    """
    metadata = weights.metadata(file)
    for key in ("modelspec.prediction_type", "ss_v_parameterization"):
        announced = _PREDICTIONS.get(metadata.get(key, "").lower(), prediction)
        if announced != prediction:
            raise ValueError(f"{file}: {key} is {metadata[key]!r}, but the backbone predicts {prediction}")


def read_json(file: Path) -> Mapping[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: invalid JSON, or JSON of another type.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({first_line(error, 200)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must be a JSON object, not a {type(content).__name__}")
    return content


def _of(file: Path, key: str) -> Mapping[str, Any]:
    content = read_json(file).get(key)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: no {key}; the file is damaged")
    return content


def _weights(folder: Path, pattern: str) -> list[Path]:
    """Weights files that match a pattern: .safetensors, or pickles if there are no others."""
    files = [p for p in sorted(folder.glob(pattern)) if p.is_file()]
    safe = [p for p in files if p.suffix == ".safetensors"]
    return safe or [p for p in files if p.suffix in weights.PICKLED]


def _names(files: Iterable[Path]) -> str:
    return ", ".join(file.name for file in files)
