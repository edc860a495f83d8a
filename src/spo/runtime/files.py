"""Files: written in one step, read with the command that makes them, locked, hashed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a file to write, which then replaces `path` in one step: no reader sees a partial file.

    The folder is made if it is not there. After an error `path` is as it was. A link is replaced,
    and its target, which may be in DVC's cache, stays. The last of several concurrent writers wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):  # nor can it be removed from a read-only folder
            partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove the partial files of a killed writer; only for the single process that writes to the folder."""
    for path in folder.glob(".*.partial"):
        path.unlink()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists; the target of a link stays.

    The message of an OSError has `path`, not a file in it.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: UTF-8, and the line breaks of `text`, on every machine."""
    with atomic(path) as partial:
        partial.write_bytes(text.encode())


def write_json(path: Path, content: Any, sort_keys: bool = False) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(content, indent=1, sort_keys=sort_keys) + "\n")


def read_json(
    path: str | Path,
    what: str,
    kind: type = dict,
    keys: Collection[str] = (),
    then: str = "run `make repro`",
) -> Any:
    """Read a JSON file whose content is of a kind, dict (with at least `keys`) or list.

    Args:
        what: its content, for the message if it is not there.
        then: what to do if it is truncated, invalid, of another kind or lacks a key.
    """
    text = read_text(path, what)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: truncated or invalid JSON ({error}); {then}") from None
    fits = isinstance(content, kind)
    if not fits:
        wanted = "a list" if kind is list else "an object"
        raise ValueError(f"{path}: must be {wanted}, not {type(content).__name__}; {then}")
    if lacking := [key for key in keys if key not in content]:
        raise ValueError(f"{path}: no key {lacking[0]!r}; {then}")
    return content


def read_text(path: str | Path, what: str) -> str:
    """Read a text file in UTF-8."""
    file = require(path, what)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def read_csv(path: str | Path, what: str, **options: Any) -> DataFrame:
    """Read a table; `options` as of `pandas.read_csv`."""
    from pandas import read_csv

    file = require(path, what)
    try:
        return read_csv(file, **options)
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: a damaged table ({reason}); run `make repro`") from None


def require(path: str | Path, what: str) -> Path:
    """Return a path that must be there; the message otherwise names the command that makes it."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no {what} there; run `make repro` or `dvc pull data.dvc`")
    return path


@contextmanager
def locked(path: Path, message: str = "") -> Iterator[None]:
    """Hold the lock of a file, as the only process; print a message before waiting for it."""
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if message:
                print(f"spo: {message}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(path: Path) -> str | None:
    """Return the SHA-256 of a file's content; None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
