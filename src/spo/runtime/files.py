"""Files: written whole, read with the command that makes them, locked, hashed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Atomically, so that an interrupted stage leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.rename(path)


def read_json(path: str | Path, what: str) -> Any:
    """
    Raises:
        ValueError: it is not there or not whole; with the command that makes it.
    """
    try:
        return json.loads(require(path, what).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not whole ({error}); run `make repro`") from None


def require(path: str | Path, what: str) -> Path:
    """A path that must be there.

    Raises:
        ValueError: with the command that makes it.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no {what} there; run `make repro` or `dvc pull data.dvc`")
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(path: Path) -> str | None:
    """SHA-256 of a file's content; None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
