"""Resume state on disk: written in one step, verified when read, the newest ones retained."""

import hashlib
import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from spo.runtime.files import atomic, remove_partials

DIGEST = 32  # bytes of a SHA-256


class CheckpointStore:
    """A folder of numbered states (tensors, numbers, strings and containers of them).

    A file is a SHA-256 (32 bytes) of its number and the rest, then torch's own format; neither writing nor
    reading holds the file in memory beside the tensors, which come back on the CPU. It is written beside its
    final name, flushed to disk and renamed, so that a kill at any moment leaves the older ones complete. One
    process at a time writes to a folder.
    """

    def __init__(self, folder: Path, keep: int | None = 2) -> None:
        """`keep`: how many of the newest stay; None: all."""
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a state; older ones are deleted only after it is safe on disk.

        Raises:
            OSError: it cannot be written (disk full, no permission); the older ones are as they were.
        """
        try:
            with atomic(self._path(step)) as partial, partial.open("wb") as file:
                _write(file, step, state)
                file.flush()
                os.fsync(file.fileno())
            self._flush_folder()
        except OSError as error:
            reason = f"checkpoint not written ({error.strerror}); the one before is complete"
            raise OSError(error.errno, reason, str(self.folder)) from None
        old = self._files()[: -self.keep] if self.keep else []
        for path in old:
            path.unlink()
        remove_partials(self.folder)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Return the newest complete state; torn or altered ones are named and skipped."""
        for path in reversed(self._files()):
            state = _read(path)
            if state is not None:
                return int(path.stem), state
            print(f"spo: {path}: damaged checkpoint, using the one before", file=sys.stderr)
        return None

    def read(self, step: int) -> dict[str, Any] | None:
        """Return the state of this number; None if it is not there or not complete."""
        path = self._path(step)
        return _read(path) if path.exists() else None

    def states(self) -> Iterator[dict[str, Any]]:
        """Yield the states 0, 1, 2, ... as far as they are there and complete."""
        for step in itertools.count():
            state = self.read(step)
            if state is None:
                return
            yield state

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.ckpt"

    def _files(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*.ckpt") if p.stem.isdecimal())

    def _flush_folder(self) -> None:
        """Make the rename survive a power cut."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Hashed:
    """A file for torch.save, which writes from the beginning to the end, and the hash of what it got."""

    def __init__(self, file: IO[bytes], step: int) -> None:
        self.file, self.hash = file, _hash(step)
        self.error: BaseException | None = None  # torch.save turns it into a RuntimeError of its own

    def write(self, data: bytes) -> int:
        try:
            self.hash.update(data)
            return self.file.write(data)
        except BaseException as error:  # a full disk, a second Ctrl-C
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(file: IO[bytes], step: int, state: dict[str, Any]) -> None:
    hashed: Any = _Hashed(file, step)
    file.write(bytes(DIGEST))  # replaced at the end
    try:
        torch.save(state, hashed)
    except RuntimeError:
        if hashed.error is not None:
            raise hashed.error from None
        raise
    file.seek(0)
    file.write(hashed.hash.digest())


def _read(path: Path) -> dict[str, Any] | None:
    """Read the state of a file; None if it is torn, altered or under another number."""
    with path.open("rb") as file:
        digest = file.read(DIGEST)
        if hashlib.file_digest(file, lambda: _hash(int(path.stem))).digest() != digest:
            return None
        file.seek(DIGEST)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return state


def _hash(step: int) -> Any:
    return hashlib.sha256(b"%08d" % step)
