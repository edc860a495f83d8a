"""Content hashes of external inputs: local paths, hub ids and URLs."""

from pathlib import Path
from typing import Any

from spo.ingest import remote
from spo.runtime import files, hub
from spo.runtime.messages import redact


def manifest(name: str, revision: str | None = None) -> dict[str, Any]:
    """Pin an input by its content: SHA-256 of each local file, or the commit of a hub repository.

    Args:
        name: a path, a URL, or a hub id such as `owner/name`. Files of a hub URL are downloaded.
        revision: of a hub id; a branch is resolved to its commit.
    """
    if hub.is_hub_url(name):
        pins = {"hub": name, "revision": hub.commit(name, None)}
        return {**pins, "files": {path: hub.content(file) for path, file in hub.download(name).items()}}
    if remote.is_remote(name):
        return _of_store(name)
    path = Path(name)
    if path.exists():
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        names = [p.relative_to(path).as_posix() if p != path else p.name for p in found]
        return {"path": name, "files": dict(zip(names, map(files.digest, found), strict=True))}
    hub.check(name)
    return {"hub": name, "revision": hub.commit(name, revision)}


def _of_store(url: str) -> dict[str, Any]:
    """Pin the files of a URL (s3://...) by the content hashes of their store."""
    store, root, entries = remote.find(url)
    pins = {p.removeprefix(root).lstrip("/"): i.get("blob_id") or store.ukey(p) for p, i in entries.items()}
    if not pins:
        raise ValueError(f"{redact(url)}: no files; check pairs.source in params.yaml")
    return {"url": redact(url), "files": pins}
