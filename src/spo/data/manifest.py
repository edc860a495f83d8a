"""Content hashes of external inputs: local paths, hub ids and URLs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from spo.data import remote
from spo.runtime import hub
from spo.runtime.messages import redact


def manifest(name: str, revision: str | None = None) -> dict[str, Any]:
    """Pin an input by its content: SHA-256 of each local file, or the commit of a hub repository.

    Args:
        name: a path, a URL, or a hub id such as `owner/name`. Files of a hub URL are downloaded.
        revision: of a hub id; a branch is resolved to its commit.

    Raises:
        ValueError: neither an existing path, nor a hub id or URL that can be reached and is not refused.
    """
    if hub.is_hub_url(name):
        return _hub_manifest(name, None)
    if remote.is_remote(name):
        return _remote_manifest(name)
    path = Path(name)
    if path.exists():
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        return {"path": name, "files": {_relative(p, path): _sha256(p) for p in files}}
    hub.check(name)
    return _hub_manifest(name, revision)


def _remote_manifest(url: str) -> dict[str, Any]:
    """Pin the files of a URL (s3://...) by the content hashes of their store."""
    files, root, entries = remote.find(url)
    pins = {p.removeprefix(root).lstrip("/"): i.get("blob_id") or files.ukey(p) for p, i in entries.items()}
    if not pins:
        raise ValueError(f"{redact(url)}: no files; check pairs.source in params.yaml")
    return {"url": redact(url), "files": pins}


def _hub_manifest(name: str, revision: str | None) -> dict[str, Any]:
    """Pin a hub repository by its commit, and files of a URL by their hashes too."""
    pins: dict[str, Any] = {"hub": name, "revision": hub.commit(name, revision)}
    if hub.is_hub_url(name):
        pins["files"] = {path: hub.content(file) for path, file in hub.download(name).items()}
    return pins


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.name


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
