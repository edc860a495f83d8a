"""The parts of a diffusers folder or hub id: which files are read, and that every tensor had its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from spo import config

# part: the only class of it that is supported
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
    """UNet, VAE and text encoders of a folder or hub id.

    Raises:
        ValueError: nothing there, no network, or tensors missing, unknown or misshapen.
    """
    name, revision = settings.checkpoint, settings.revision
    wanted = [part for part in PARTS[settings.family] if part != "vae" or settings.vae is None]
    files = reach(where, name, lambda: weight_files(name, revision))
    variants = choose_variants({part: files.get(part, []) for part in wanted}, settings.variant, where)
    return {
        part: load_part(PARTS[settings.family][part], name, part, revision, variants[part], dtype, where)
        for part in wanted
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
    """One model, whose tensors are all from its files.

    Raises:
        ValueError: tensors missing, unknown or of other shapes, or a file that cannot be read.
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
    for title, key in (("misses", "missing_keys"), ("holds unknown", "unexpected_keys")):
        names = sorted(n for n in report[key] if not n.endswith("position_ids"))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{place} {title} tensors: {names[0]}{more}; fetch it again, or it is of another model"
            )
    return model


def load_vae(name: str, dtype: torch.dtype) -> Any:
    """`backbone.vae`: a folder or hub id of an AutoencoderKL, or of a pipeline that has one.

    Raises:
        ValueError: as `load_part`, and for an autoencoder of another class.
    """
    where = f"backbone.vae: {name}"
    path = Path(name)
    if path.is_file():
        raise ValueError(
            f"{where} is a file; give the folder that diffusers' AutoencoderKL.save_pretrained writes"
        )
    inner = (path / "vae" / "config.json").exists() and not (path / "config.json").exists()
    subfolder = "vae" if inner else None
    from diffusers import AutoencoderKL

    announced = reach(where, name, lambda: AutoencoderKL.load_config(name, subfolder=subfolder))
    check_class(announced.get("_class_name", "AutoencoderKL"), "AutoencoderKL", where)
    files = reach(where, name, lambda: weight_files(name, None)).get(subfolder or "", [])
    variant = choose_variants({"vae": files}, None, where)["vae"]
    return load_part("AutoencoderKL", name, subfolder, None, variant, dtype, where)


def index_of(settings: config.Backbone, where: str) -> Mapping[str, Any]:
    """The content of model_index.json.

    Raises:
        ValueError: it cannot be reached.
    """
    import diffusers

    kind, name = getattr(diffusers, PIPELINES[settings.family]), settings.checkpoint
    return reach(where, name, lambda: kind.load_config(name, revision=settings.revision))


def check_index(index: Mapping[str, Any], family: str, where: str) -> None:
    """Refuse a model_index.json of another pipeline, or with parts of other classes.

    Raises:
        ValueError: with the key and what would serve.
    """
    found = index.get("_class_name")
    if found != PIPELINES[family]:
        raise ValueError(f"{where} holds a {found}, but backbone.family is {family!r} ({PIPELINES[family]})")
    if index.get("requires_aesthetics_score"):
        raise ValueError(
            f"{where}: model_index.json: requires_aesthetics_score announces a refiner; give a base model"
        )
    for part, wanted in PARTS[family].items():
        said = index.get(part) or [None, None]
        check_class(said[1], wanted, f"{where}: model_index.json: {part}")


def check_class(found: Any, wanted: str, where: str) -> None:
    if found != wanted:
        raise ValueError(f"{where} is {found or 'missing'}; only {wanted} is supported")


def weight_files(name: str, revision: str | None) -> dict[str, list[str]]:
    """{subfolder: names of its files} of a local folder or a hub id; "" is the root."""
    path = Path(name)
    if path.is_dir():
        paths = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    else:
        paths = _hub_files(name, revision)
    folders: dict[str, list[str]] = {}
    for file in paths:
        folder, _, base = file.rpartition("/")
        folders.setdefault(folder, []).append(base)
    return folders


def _hub_files(name: str, revision: str | None) -> list[str]:
    """Of the hub, or without a network of its cache on this machine."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        return list(HfApi().list_repo_files(name, revision=revision))
    except Exception:  # the hub's client raises a dozen kinds
        root = Path(snapshot_download(name, revision=revision, local_files_only=True))
        return [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]


def choose_variants(files: Mapping[str, list[str]], wanted: str | None, where: str) -> dict[str, str | None]:
    """The variant to load of each part: the one named, else the plain files, else the only one that is there.

    Raises:
        ValueError: a part without weights, several variants to choose from, or none of the name.
    """
    present = {part: variants_of(names) for part, names in files.items()}
    if wanted is not None and not any(wanted in variants for variants in present.values()):
        known = sorted({v or "none" for variants in present.values() for v in variants})
        raise ValueError(
            f"backbone.variant: {wanted!r} is not among the weights of {where}; there are: {', '.join(known)}"
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
    """Variants among weight files, those of safetensors if there is any; None is a file without one."""
    matches = [m for n in names if (m := FILE.fullmatch(SHARD.sub("", n)))]
    safe = [m for m in matches if m[2] == "safetensors"]
    return {m[1] for m in safe or matches}


def reach(where: str, name: str, loader: Callable[[], Any]) -> Any:
    """What a loader of diffusers or transformers gives for the path or hub id `name`.

    Raises:
        ValueError: in one line, for whatever it raises but lack of memory.
    """
    try:
        return loader()
    except MemoryError:
        raise
    except Exception as error:  # outside loaders and the hub's client raise dozens of kinds
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        hint = "" if Path(name).exists() else "; without a network, give the folder of a local copy"
        raise ValueError(f"{where}: cannot be loaded ({reason}){hint}") from None


class quiet:
    """Silences what transformers and diffusers report of missing tensors: `load_part` says it in one line."""

    def __enter__(self) -> None:
        import diffusers.utils.logging as of_diffusers
        import transformers.utils.logging as of_transformers

        self._before = [(log, log.get_verbosity()) for log in (of_diffusers, of_transformers)]
        for log, _ in self._before:
            log.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        for log, level in self._before:
            log.set_verbosity(level)
