"""Released models on the base: LoRAs of any trainer, UNets and complete pipelines."""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from spo import backbones, config
from spo.adapters import files, lora, unet
from spo.adapters.names import TEXT, TEXT_2, UNET
from spo.adapters.strength import PEFT_CONFIG
from spo.backbones import StableDiffusion
from spo.backbones.lora import FILE
from spo.data.weights import Weights
from spo.training import distributed
from spo.types import Budget


def load(
    settings: config.Backbone,
    adapter: str | Path | None,
    device: torch.device | str,
    budget: Budget | None = None,
) -> StableDiffusion:
    """Load the base model with an adapter: a LoRA, a UNet, or a complete pipeline that replaces it."""
    if adapter is None:
        return backbones.load(settings, device, budget)
    source = files.find(Path(adapter))
    if source.kind == "pipeline":
        replaced = {"checkpoint": str(source.path), "revision": None, "config": settings.described_by}
        settings = settings.model_copy(update=replaced)
    description = backbones.describe(settings)
    for weights in source.weights:
        files.check_header(weights, settings.family, description.prediction)
    backbone = backbones.load_described(description, device, budget)
    if source.kind == "pipeline":
        return backbone
    if source.kind == "lora":
        summary = add_lora(backbone, source.weights[0])
    else:
        changed, total = unet.load(backbone.unet, source.weights)
        summary = f"{source.path}: UNet, {changed} of {total} tensors differ from the base's"
    if distributed.is_main_process():
        print(f"spo: {summary}", file=sys.stderr)
    return backbone


def adopt(settings: config.Backbone, source: Path, folder: Path, device: torch.device | str) -> str:
    """Check a released model against the base, and write it to a folder as training does; returns its kind.

    A LoRA's file stays as it is; a UNet or a pipeline becomes a pipeline in the base's precision.
    """
    backbone, found = load(settings, source, device), files.find(source)
    if found.kind != "lora":
        backbone.save_pipeline(folder)
        return "pipeline"
    (weights,) = found.weights
    folder.mkdir(parents=True)
    if weights.file.suffix == ".safetensors":
        shutil.copyfile(weights.file, folder / FILE)
    else:
        save_file({key: value.contiguous() for key, value in weights.tensors.items()}, folder / FILE)
    if (beside := weights.file.parent / PEFT_CONFIG).exists():  # the strength of a LoRA that peft wrote
        shutil.copyfile(beside, folder / PEFT_CONFIG)
    return "lora"


def add_lora(backbone: StableDiffusion, weights: Weights) -> str:
    """Load a LoRA into a base's UNet and text encoders; returns a summary of its changes."""
    parts = backbone.pipeline.components
    models = {name: parts[name] for name in (TEXT, TEXT_2) if parts.get(name) is not None}
    models[UNET] = backbone.unet
    changed = lora.load(models, weights)
    backbone.forget_prompts()
    layers = ", ".join(f"{n} layers of the {name}" for name, n in changed.items())
    return f"{weights.file}: LoRA, changes {layers}"
