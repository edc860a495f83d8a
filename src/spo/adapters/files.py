"""Recognise a released model by its files: a LoRA, a UNet or a complete pipeline."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spo.adapters import lora
from spo.backbones.weight_files import variants_of
from spo.data.weights import ENDINGS, Weights, read

UNET_STEM = "diffusion_pytorch_model"
LORA_STEMS = ("pytorch_lora_weights", "adapter_model")
SUPPORTED = (
    "a LoRA (file or folder), a UNet (file or folder) or a complete pipeline (diffusers folder, .safetensors)"
)

# (pattern of the base model that trainers write into the header, value of backbone.family or its name)
_FAMILIES = (
    (r"refiner", "the SDXL refiner"),
    (r"sd[ _-]?xl|stable[ _-]diffusion[ _-]xl", "sdxl"),
    (r"stable[ _-]diffusion[ _-]v?[12]|sd[ _-]?v?[12]([ ._-]|\d?$)", "sd"),
    (r"stable[ _-]diffusion[ _-]v?3|sd[ _-]?v?3", "sd3"),
    (r"flux", "flux"),
    (
        r"cascade|pixart|hunyuan|lumina|auraflow|chroma|kolors|qwen|wan2|ltx",
        "another architecture",
    ),
)
_PREDICTIONS = ((r"^(epsilon|false)$", "epsilon"), (r"^(v|v_prediction|true)$", "v_prediction"))


@dataclass(frozen=True)
class Source:
    """A model at a path: its kind, and its files, of which a pipeline's folder has none here."""

    kind: Literal["pipeline", "unet", "lora"]
    path: Path
    weights: Sequence[Weights] = ()


def find(path: Path) -> Source:
    """Recognise the model at a path; more than one candidate is refused."""
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; give {SUPPORTED}")
    if (path / "model_index.json").exists():
        return Source("pipeline", path)
    for folder in (path, path / "unet", path / "transformer"):
        if any(folder.glob(f"{UNET_STEM}*")):
            _check_alone(path, folder)
            return Source("unet", folder, [read(file) for file in _unet_files(folder)])
    return _lora_folder(path)


def _of_file(file: Path) -> Source:
    if file.suffix not in ENDINGS:
        raise ValueError(f"{file}: not a supported file ({', '.join(ENDINGS)}); save it as .safetensors")
    weights = read(file)
    keys = list(weights.tensors)
    if lora.is_adapter(keys):
        return Source("lora", file, [weights])
    original = any(key.startswith("model.diffusion_model.") for key in keys)
    if original and any(
        key.startswith(("first_stage_model.", "cond_stage_model.", "conditioner.")) for key in keys
    ):
        if file.suffix != ".safetensors":
            raise ValueError(f"{file}: a complete pipeline as a pickle; save it as .safetensors")
        return Source("pipeline", file, [weights])
    if original or any(re.search(r"(^|\.)(conv_in|input_blocks\.0\.0)\.weight$", key) for key in keys):
        return Source("unet", file, [weights])
    first = f"its first key is {keys[0]}" if keys else "it is empty"
    raise ValueError(f"{file}: neither a LoRA nor a UNet nor a complete pipeline ({first})")


def _check_alone(path: Path, unet: Path) -> None:
    """Refuse other components, and other weights than variants of the UNet, beside a UNet in `path`."""
    others = [
        p.name
        for p in sorted(path.iterdir())
        if (p.is_dir() and p != unet and (any(p.glob("*config.json")) or any(p.glob("*.safetensors"))))
        or (p.suffix == ".safetensors" and not p.name.startswith(UNET_STEM))
    ]
    if others:
        raise ValueError(
            f"{path}: contains {', '.join(others)} beside the UNet, but no model_index.json; give one of "
            "them (for the UNet, move it to a folder of its own)"
        )


def _unet_files(folder: Path) -> list[Path]:
    """The file or shards that diffusers loads, or else the only one: fp32 before fp16 before bf16."""
    files = _weights(folder, f"{UNET_STEM}*")
    for variant in (None, "fp16", "bf16"):
        if chosen := [file for file in files if variants_of([file.name]) == {variant}]:
            return chosen
    if len(files) != 1:
        raise ValueError(
            f"{folder}: must contain one weights file, not {_names(files) or 'none'}; give the file's path"
        )
    return files


def _lora_folder(path: Path) -> Source:
    everything = _weights(path, "*")
    files = [file for file in everything if file.stem in LORA_STEMS] or everything
    if len(files) > 1:
        raise ValueError(f"{path}: several weights files ({_names(files)}); give the path of one")
    if not files:
        inner = [
            str(folder) for folder in sorted(path.iterdir()) if folder.is_dir() and _weights(folder, "*")
        ]
        hint = f"weights lie in {', '.join(inner)}: give one" if inner else f"give {SUPPORTED}"
        raise ValueError(f"{path}: no LoRA weights, no UNet and no model_index.json; {hint}")
    return _of_file(files[0])


def _weights(folder: Path, pattern: str) -> list[Path]:
    """Weights files that match a pattern: .safetensors, or pickles if there are no others."""
    files = [p for p in sorted(folder.glob(pattern)) if p.is_file() and p.suffix in ENDINGS]
    return [p for p in files if p.suffix == ".safetensors"] or files


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)


def check_header(weights: Weights, family: str, prediction: str) -> None:
    """Refuse a file whose header announces another architecture or prediction type than the backbone's."""
    metadata = weights.metadata
    base, predicts = f"backbone.family is {family!r}", f"the backbone predicts {prediction}"
    for key, known, own, reason in (
        ("ss_base_model_version", _FAMILIES, family, base),
        ("modelspec.architecture", _FAMILIES, family, base),
        ("ss_v_parameterization", _PREDICTIONS, prediction, predicts),
        ("modelspec.prediction_type", _PREDICTIONS, prediction, predicts),
    ):
        text = metadata.get(key, "").lower()
        announced = next((name for pattern, name in known if re.search(pattern, text)), own)
        if announced != own:
            raise ValueError(f"{weights.file}: {key} is {metadata[key]!r}, but {reason}")
