"""Content hashes of external inputs: local paths, hub ids and URLs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from spo.data import remote
from spo.runtime.hub import is_hub_id
from spo.runtime.messages import redact


def manifest(name: str, revision: str | None = None) -> dict[str, Any]:
    """Pin an input by its content: SHA-256 of each local file, or a hub repository's commit and file hashes.

    Args:
        name: a path, a URL, or a hub id such as `owner/name`.
        revision: of a hub id; a branch is resolved to its commit.

    Raises:
        ValueError: neither an existing path, nor a hub id or URL that can be reached.
    """
    if remote.is_remote(name):
        return _remote_manifest(name)
    path = Path(name)
    if path.exists():
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        return {"path": name, "files": {_relative(p, path): _sha256(p) for p in files}}
    if is_hub_id(name):
        return _hub_manifest(name, revision)
    raise ValueError(
        f"{name}: no such file or folder; run `make repro` or `dvc pull data.dvc`, or correct params.yaml"
    )


def _remote_manifest(url: str) -> dict[str, Any]:
    """Pin the files of a URL (hf://datasets/..., s3://...) by the content hashes of their store."""
    files, root, entries = remote.find(url)
    pins = {p.removeprefix(root).lstrip("/"): i.get("blob_id") or files.ukey(p) for p, i in entries.items()}
    if not pins:
        raise ValueError(f"{redact(url)}: no files; check pairs.source in params.yaml")
    return {"url": redact(url), "files": pins}


def _hub_manifest(name: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        files = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in info.siblings or ()}
        return {"hub": name, "revision": info.sha, "files": files}
    except Exception as online:  # the hub's client raises many types
        try:
            cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception:
            raise ValueError(
                f"{name}: not a local path, and the hub cannot be reached ({type(online).__name__}); "
                "download it on a machine with network access and give its folder in params.yaml"
            ) from None
        return {"hub": name, "revision": cached.name, "files": {}}


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.name


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
