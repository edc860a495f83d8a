"""A folder in the layout of the hub's cache: blobs by content, snapshots of links to them, refs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from spo.runtime.hub import place

COMMIT = "c0ffee" * 6 + "c0ff"  # of what is named by a branch


def folder(cache: Path, name: str) -> Path:
    at = place(name)
    return cache / f"{at.kind}s--{at.repository.replace('/', '--')}"


def add(cache: Path, name: str, files: Mapping[str, bytes], revision: str | None = None) -> str:
    """Put files of a hub id or URL into the cache, as of its revision; return the commit."""
    at, root = place(name, revision), folder(cache, name)
    commit = at.revision if at.revision and len(at.revision) == 40 else COMMIT
    if commit == COMMIT:
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / (at.revision or "main")).write_text(commit)
    for path, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        link = root / "snapshots" / commit / path
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        if not link.exists():
            link.symlink_to(blob)
    return commit


def of_folder(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
