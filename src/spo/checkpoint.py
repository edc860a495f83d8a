"""Resume state on disk: atomic, verified when read, the last good ones kept."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch


class CheckpointStore:
    """A folder of numbered states (tensors, numbers, strings and containers of them).

    A file is a SHA-256 of the rest (32 bytes), then torch's own format. It is written beside its
    final name, flushed to disk and renamed, so that a kill at any moment leaves the older ones whole.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        partial = self.folder / f".partial-{os.getpid()}"
        with partial.open("wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.folder / f"{step:08d}.ckpt")
        for old in self._files()[: -self.keep]:
            old.unlink()

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest state that is whole; torn or altered ones are named and passed over."""
        for path in reversed(self._files()):
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                return int(path.stem), torch.load(io.BytesIO(data[32:]), weights_only=True)
            warnings.warn(f"{path}: damaged checkpoint, using the one before", stacklevel=2)
        return None

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.ckpt"))
