"""Models and files on the Hugging Face hub, downloaded once to the hub's own cache.

    OWNER/NAME[@REVISION]                            a model, as its loader takes it
    hf://[datasets/]OWNER/NAME[@REVISION][/FILE]     a file; * selects several, a folder all below it

A revision is a commit, a branch or a tag. Without a network the cache has to have them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

SCHEME = "hf://"
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")  # of a data set: number and count in the file's name


@dataclass(frozen=True)
class Place:
    """Where a name points to: a repository, its kind, a revision of it, and a pattern of its files."""

    repository: str
    kind: str  # model or dataset
    revision: str | None
    pattern: str  # of paths in the repository; empty for a model as a whole


def is_hub_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME and is no path of this workspace."""
    return name.count("/") == 1 and not name.startswith((".", "/", "data/", "outputs/"))


def is_hub_url(name: object) -> bool:
    """Whether a name is a URL of files on the hub."""
    return str(name).startswith(SCHEME)


def split_revision(name: str) -> tuple[str, str | None]:
    """Split OWNER/NAME@REVISION; a path, and an id without a revision, have None."""
    if not is_hub_id(name) or Path(name).exists():
        return name, None
    repository, _, revision = name.partition("@")
    return repository, revision or None


def place(name: str, revision: str | None = None) -> Place:
    """Parse a hub id or URL.

    Raises:
        ValueError: a URL without owner and name.
    """
    if not is_hub_url(name):
        repository, own = split_revision(name)
        return Place(repository, "model", revision or own, "")
    rest = name.removeprefix(SCHEME)
    kind = "dataset" if rest.startswith("datasets/") else "model"
    words = rest.removeprefix("datasets/").split("/", 2)
    if len(words) < 2 or not all(words):
        raise ValueError(f"{name}: not of the form {SCHEME}[datasets/]OWNER/NAME[@REVISION][/FILE]")
    repository, _, own = words[1].partition("@")
    pattern = words[2].strip("/") if len(words) > 2 else "*"
    return Place(f"{words[0]}/{repository}", kind, own or None, pattern)


def commit(name: str, revision: str | None = None) -> str:
    """Resolve the revision of a hub id or URL to its commit: the hub's, else that in the cache.

    Raises:
        ValueError: neither the hub nor the cache has it; one line that says what to put where.
    """
    from huggingface_hub import HfApi, snapshot_download

    at = place(name, revision)
    try:
        return str(HfApi().repo_info(at.repository, revision=at.revision, repo_type=at.kind).sha)
    except Exception as online:  # the hub's client raises many types
        options: dict[str, Any] = {"repo_type": at.kind, "revision": at.revision, "local_files_only": True}
        try:
            return Path(snapshot_download(at.repository, **options)).name
        except Exception:
            raise _missing(name, at, type(online).__name__) from None


def download(url: str) -> dict[str, Path]:
    """Return the files of a URL in the cache by their path in the repository, sorted; download those missing.

    Raises:
        ValueError: no such file, or the hub cannot be reached and the cache has not all of them.
    """
    from huggingface_hub import snapshot_download

    at = place(url)
    wanted = [at.pattern, f"{at.pattern}/*"]
    options: dict[str, Any] = {"repo_type": at.kind, "revision": at.revision, "allow_patterns": wanted}
    try:
        root = Path(snapshot_download(at.repository, **options))
    except Exception as error:
        raise _missing(url, at, type(error).__name__) from None
    paths = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
    found = {n: p for n, p in paths.items() if any(fnmatchcase(n, pattern) for pattern in wanted)}
    if not found:
        raise _missing(url, at, "no such file in the cache")
    if left := _missing_shards(found, at.pattern):
        raise _missing(url, at, f"{left} of its shards are not in the cache")
    return found


def local(name: str) -> Path:
    """Return the path of a file that is given as a path or as a URL of one file on the hub.

    Raises:
        ValueError: as `download`; or the URL names several files.
    """
    if not is_hub_url(name):
        return Path(name)
    paths = list(download(name).values())
    if len(paths) > 1:
        raise ValueError(f"{name}: {len(paths)} files; name one")
    return paths[0]


def content(path: Path) -> str:
    """Return what the hub calls a cached file's content: its SHA-256, or git's hash of a small file."""
    blob = path.resolve()
    if blob.parent.name == "blobs":
        return blob.name
    from spo.runtime.files import digest

    return str(digest(path))  # a cache without symbolic links


def _missing_shards(found: dict[str, Path], pattern: str) -> int:
    """Count the shards that the pattern selects, by the count in their names, but that are not there."""
    families: dict[tuple[str, str], set[int]] = {}
    rest: dict[tuple[str, str], str] = {}
    for name in found:
        if parts := SHARD.fullmatch(name):
            family = (parts[1], parts[3])
            families.setdefault(family, set()).add(int(parts[2]))
            rest[family] = parts[4]
    missing = 0
    for (start, count), numbers in families.items():
        for number in set(range(int(count))) - numbers:
            name = f"{start}-{number:05}-of-{count}{rest[start, count]}"
            missing += fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*")
    return missing


def _missing(name: str, at: Place, why: str) -> ValueError:
    from huggingface_hub import constants

    revision = f" --revision {at.revision}" if at.revision else ""
    files = f" --include '{at.pattern}'" if at.pattern else ""
    kind = f" --repo-type {at.kind}" if at.kind != "model" else ""
    folder = f"{at.kind}s--{at.repository.replace('/', '--')}"
    return ValueError(
        f"{name}: not a local path, and the hub cannot be reached ({why}); with a network run "
        f"`hf download {at.repository}{kind}{revision}{files}` and copy {folder} from its cache to "
        f"{constants.HF_HUB_CACHE}, or give a local path in params.yaml"
    )
