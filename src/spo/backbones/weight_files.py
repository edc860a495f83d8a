"""Find the weight files of a diffusers folder or hub id, and choose among their variants."""

import re
from collections.abc import Mapping
from pathlib import Path

from spo.runtime import hub

FILE = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([\w-]+?))?\.(safetensors|bin)")
SHARD = re.compile(r"-\d{5}-of-\d{5}")


def by_folder(name: str, revision: str | None) -> dict[str, list[str]]:
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
    """Choose the variant of each part: the one named, else files without a variant, else the only variant."""
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
