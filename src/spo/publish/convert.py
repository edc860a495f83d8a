"""`spo convert`: an adapter in kohya's key names, or merged into a complete model."""

import tempfile
from pathlib import Path
from typing import Any

from spo import adapters, config
from spo.adapters import files
from spo.backbones import StableDiffusion
from spo.publish import kohya, original
from spo.runtime import hub

SUFFIX = ".safetensors"


def run(settings: config.Backbone, source: Path, target: Path, base: str | None = None) -> Path:
    """Convert a model to a new file or folder; returns `target`.

    Args:
        settings: of the base model, whose names and shapes an adapter must fit.
        source: a LoRA, a UNet (needs `base`), or a complete pipeline (without `base`).
        base: the model to merge into: a diffusers folder, a hub id or a single .safetensors file. None: a
            LoRA is written in kohya's key names.
    """
    if target.exists():
        raise ValueError(f"convert: {target} exists; remove it, or give another name by --to")
    found = files.find(source)
    if base is None and found.kind == "unet":
        raise ValueError(f"convert: {source} is a UNet; give the model that it belongs to by --merge-into")
    if base is not None and found.kind == "pipeline":
        raise ValueError(f"convert: {source} is a complete pipeline; leave out --merge-into")
    if found.kind == "lora" and base is None:
        if target.suffix != SUFFIX:
            raise ValueError(f"convert: {target} is no name of a LoRA's file; give NAME{SUFFIX} by --to")
        kohya.write(settings, found.weights[0], target)
        return target
    backbone = adapters.load(settings if base is None else _of(settings, base), source, "cpu")
    _merge(backbone)
    if target.suffix == SUFFIX:
        original.write(backbone, settings.family, target)
    else:
        _write_folder(backbone, target)
    return target


def _of(settings: config.Backbone, base: str) -> config.Backbone:
    """Settings of another base of the same family, as it is; a single file is described by the first one."""
    if base == settings.checkpoint:
        return settings
    if not hub.is_hub_id(base) and not Path(base).exists():
        raise ValueError(f"convert: --merge-into {base}: no such file, folder or hub id (OWNER/NAME)")
    name, revision = hub.split_revision(base)
    return config.Backbone(
        family=settings.family,
        checkpoint=name,
        revision=revision,
        config=settings.described_by if base.lower().endswith(SUFFIX) else None,
        dtype=settings.dtype,
    )


def _write_folder(backbone: StableDiffusion, folder: Path) -> None:
    """Write a pipeline, all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        content = Path(partial, "content")
        backbone.save_pipeline(content)
        content.replace(folder)


def _merge(backbone: StableDiffusion) -> None:
    """Add the update of every adapted layer to its weights, which are plain layers afterwards."""
    pipeline: Any = backbone.pipeline
    adapted = [name for name, part in pipeline.components.items() if getattr(part, "peft_config", None)]
    if adapted:
        pipeline.fuse_lora(components=adapted, safe_fusing=True)
        pipeline.unload_lora_weights()
