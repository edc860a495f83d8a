"""A folder in the layout of the hub's cache: blobs by content, snapshots of links to them, refs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
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
        ref = root / "refs" / (at.revision or "main")
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
    for path, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        link = root / "snapshots" / commit / path
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        if not link.exists():
            link.symlink_to(blob)
    return commit


def list_files(cache: Path, name: str, commit: str, paths: Iterable[str]) -> None:
    """Leave the hub's list of a commit's files, as its client does when it downloads some of them."""
    trees = folder(cache, name) / "trees"
    trees.mkdir(exist_ok=True)
    listed = {path: {"size": 1, "blob_id": "b"} for path in paths}
    (trees / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": listed}))


def of_folder(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
