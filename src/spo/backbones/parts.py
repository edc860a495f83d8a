"""Load the parts of a diffusers folder or hub id, and check that every tensor was loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from spo import config
from spo.runtime import hub

# the supported class of each part
PARTS = {
    "sd": {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"},
    "sdxl": {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    },
}
PIPELINES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
FILE = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([\w-]+?))?\.(safetensors|bin)")
SHARD = re.compile(r"-\d{5}-of-\d{5}")


def load(settings: config.Backbone, dtype: torch.dtype, where: str) -> dict[str, Any]:
    """Load UNet, VAE (unless `backbone.vae` replaces it) and text encoders of a folder or hub id.

    Raises:
        ValueError: no such checkpoint, no network, or tensors that are missing, unknown or of another shape.
    """
    name, revision = settings.checkpoint, settings.revision
    names = [part for part in PARTS[settings.family] if part != "vae" or settings.vae is None]
    files = reach(where, name, lambda: weight_files(name, revision))
    variants = choose_variants({part: files.get(part, []) for part in names}, settings.variant, where)
    return {
        part: load_part(PARTS[settings.family][part], name, part, revision, variants[part], dtype, where)
        for part in names
    }


def load_part(
    kind: str,
    name: str,
    subfolder: str | None,
    revision: str | None,
    variant: str | None,
    dtype: Any,
    where: str,
) -> Any:
    """Load one model and check that all of its tensors come from its files.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape, or an unreadable file.
    """
    import diffusers
    import transformers

    cls = getattr(diffusers, kind, None) or getattr(transformers, kind)
    place = f"{where}: {subfolder}" if subfolder else where
    options = {"subfolder": subfolder or "", "revision": revision, "variant": variant, "dtype": dtype}
    with quiet():
        model, report = reach(
            place, name, lambda: cls.from_pretrained(name, output_loading_info=True, **options)
        )
    for title, key in (("lacks", "missing_keys"), ("has unknown", "unexpected_keys")):
        names = sorted(n for n in report[key] if not n.endswith("position_ids"))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{place} {title} tensors: {names[0]}{more}; damaged, or of another model: get it again"
            )
    return model


def load_vae(name: str, dtype: torch.dtype) -> Any:
    """Load `backbone.vae`: a folder or hub id of an AutoencoderKL, or of a pipeline with one.

    Raises:
        ValueError: as `load_part`, and for an autoencoder of another class.
    """
    where = f"backbone.vae: {name}"
    path, (name, revision) = Path(name), hub.split_revision(name)
    if path.is_file():
        raise ValueError(
            f"{where} is a file; give a folder written by diffusers' AutoencoderKL.save_pretrained"
        )
    inner = (path / "vae" / "config.json").exists() and not (path / "config.json").exists()
    subfolder = "vae" if inner else None
    from diffusers import AutoencoderKL

    announced = reach(
        where, name, lambda: AutoencoderKL.load_config(name, subfolder=subfolder, revision=revision)
    )
    announced = settings_of(announced, f"{where}: config.json")
    check_class(announced.get("_class_name", "AutoencoderKL"), "AutoencoderKL", where)
    files = reach(where, name, lambda: weight_files(name, revision)).get(subfolder or "", [])
    variant = choose_variants({"vae": files}, None, where)["vae"]
    return load_part("AutoencoderKL", name, subfolder, revision, variant, dtype, where)


def index_of(settings: config.Backbone, where: str) -> Mapping[str, Any]:
    """Read model_index.json.

    Raises:
        ValueError: a file that cannot be reached or read.
    """
    import diffusers

    kind, name = getattr(diffusers, PIPELINES[settings.family]), settings.checkpoint
    index = reach(where, name, lambda: kind.load_config(name, revision=settings.revision))
    return settings_of(index, f"{where}: model_index.json")


def settings_of(content: Any, place: str) -> dict[str, Any]:
    """Check that the content of a config file is a JSON object, and return it.

    Raises:
        ValueError: JSON of another type.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{place} must be a JSON object, not a {type(content).__name__}")
    return content


def check_index(index: Mapping[str, Any], family: str, where: str) -> None:
    """Refuse a model_index.json of another pipeline, or with parts of other classes.

    Raises:
        ValueError: the key, its value and the expected value.
    """
    pipeline = index.get("_class_name")
    if pipeline != PIPELINES[family]:
        raise ValueError(f"{where} is a {pipeline}, but backbone.family is {family!r} ({PIPELINES[family]})")
    if index.get("requires_aesthetics_score"):
        raise ValueError(
            f"{where}: model_index.json: requires_aesthetics_score announces a refiner; give a base model"
        )
    for part, supported in PARTS[family].items():
        entry = index.get(part) or [None, None]
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise ValueError(f"{where}: model_index.json: {part} is {entry!r}, not [library, class]")
        check_class(entry[1], supported, f"{where}: model_index.json: {part}")


def check_class(announced: Any, supported: str, where: str) -> None:
    """Refuse a part of another class than the supported one.

    Raises:
        ValueError: the announced class and the supported one.
    """
    if announced != supported:
        raise ValueError(f"{where} is {announced or 'missing'}; only {supported} is supported")


def weight_files(name: str, revision: str | None) -> dict[str, list[str]]:
    """List the files of a local folder or hub id as {subfolder: file names}; "" is the root."""
    path = Path(name)
    if path.is_dir():
        paths = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    else:
        paths = hub.files(name, revision)
    folders: dict[str, list[str]] = {}
    for file in paths:
        folder, _, base = file.rpartition("/")
        folders.setdefault(folder, []).append(base)
    return folders


def choose_variants(files: Mapping[str, list[str]], wanted: str | None, where: str) -> dict[str, str | None]:
    """Choose the variant of each part: the one named, else files without a variant, else the only variant.

    Raises:
        ValueError: a part without weights, several variants to choose from, or an unknown variant.
    """
    present = {part: variants_of(names) for part, names in files.items()}
    if wanted is not None and not any(wanted in variants for variants in present.values()):
        known = sorted({v or "none" for variants in present.values() for v in variants})
        raise ValueError(
            f"backbone.variant: {wanted!r} is not among the variants of {where}: {', '.join(known)}"
        )
    chosen: dict[str, str | None] = {}
    for part, variants in present.items():
        if wanted in variants:
            chosen[part] = wanted
        elif None in variants or len(variants) == 1:
            chosen[part] = None if None in variants else next(iter(variants))
        else:
            names = ", ".join(sorted(v or "" for v in variants))
            reason = f"has the variants {names}; name one in backbone.variant" if names else "has no weights"
            raise ValueError(f"{where}: {part} {reason}")
    return chosen


def variants_of(names: list[str]) -> set[str | None]:
    """The variants among weight files, of .safetensors files if there are any; None: a file without one."""
    matches = [m for n in names if (m := FILE.fullmatch(SHARD.sub("", n)))]
    safe = [m for m in matches if m[2] == "safetensors"]
    return {m[1] for m in safe or matches}


def reach(where: str, name: str, loader: Callable[[], Any]) -> Any:
    """Call a loader of diffusers or transformers for the path or hub id `name`.

    Raises:
        ValueError: one line for any error of the loader except a lack of memory.
    """
    try:
        hub.check(name)
        return loader()
    except MemoryError:
        raise
    except Exception as error:  # these loaders and the hub's client raise dozens of types
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise
        raise ValueError(f"{where}: cannot be loaded ({hub.reason(name, error)})") from None


class quiet:
    """Silences the reports of missing tensors of transformers and diffusers; `load_part` gives one line."""

    def __enter__(self) -> None:
        import diffusers.utils.logging as diffusers_logging
        import transformers.utils.logging as transformers_logging

        self._before = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
        for log, _ in self._before:
            log.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        for log, level in self._before:
            log.set_verbosity(level)
