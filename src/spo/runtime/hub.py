"""Models and files on the Hugging Face hub, downloaded once to the hub's own cache.

    OWNER/NAME[@REVISION]                            a model, as its loader takes it
    hf://[datasets/]OWNER/NAME[@REVISION][/FILE]     a file; * selects several, a folder all below it

A revision is a commit, a branch, a tag, or `refs/...` as huggingface_hub reads it; a / in another one is
written %2F. Without a network they must be in the cache.
"""

import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from spo.runtime import hub_answers
from spo.runtime.messages import first_line

SCHEME = "hf://"
OURS = ("data", "outputs")  # folders of the workspace, which may not be there yet
FILES = (  # a name with such an ending names a file, not a repository
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet"),
    *(".zip", ".tar", ".png", ".yaml", ".yml"),
)
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")  # train-00000-of-00002.parquet


@dataclass(frozen=True)
class Place:
    """Where a name points to: a repository, its kind, a revision of it, and a pattern of its files."""

    repository: str
    kind: str  # model or dataset
    revision: str | None
    pattern: str  # of paths in the repository; empty for a model as a whole

    @property
    def patterns(self) -> list[str]:
        """What `pattern` selects: files, or all below a folder."""
        return [self.pattern, f"{self.pattern}/*"]

    def selects(self, path: str) -> bool:
        return any(fnmatchcase(path, pattern) for pattern in self.patterns)

    @property
    def page(self) -> str:
        """The repository in the hub's addresses."""
        return self.repository if self.kind == "model" else f"{self.kind}s/{self.repository}"


def is_hub_id(name: str) -> bool:
    """Whether a name is OWNER/NAME[@REVISION] of a model on the hub.

    It is a path if it exists, if its first folder exists, or if it has the ending of a file.
    """
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    if name.partition("@")[0].count("/") != 1 or Path(name).exists() or _as_path(name):
        return False
    try:
        return not parse_hf_uri(f"{SCHEME}{name}").path_in_repo
    except HfUriError:
        return False


def is_hub_url(name: object) -> bool:
    """Whether a name is a URL of files on the hub."""
    return str(name).startswith(SCHEME)


def check(name: str) -> None:
    """Check that a name is an existing path or a hub id."""
    if Path(name).exists() or is_hub_id(name):
        return
    why = _as_path(name) if name.count("/") == 1 else ""
    if "@" in name:
        why = "nor OWNER/NAME@REVISION of the hub, where a / of the revision is written %2F"
    raise ValueError(
        f"{name}: no such file or folder{f' ({why})' if why else ''}; "
        "run `make repro` or `dvc pull data.dvc`, or correct params.yaml"
    )


def split_revision(name: str) -> tuple[str, str | None]:
    """Split OWNER/NAME@REVISION; a path, and an id without a revision, have None."""
    if not is_hub_id(name):
        return name, None
    at = _parse(f"{SCHEME}{name}")
    return at.repository, at.revision


def place(name: str, revision: str | None = None) -> Place:
    """Parse a hub id or URL; a `revision` beside it takes precedence."""
    if is_hub_url(name):
        return _parse(name)
    repository, own = split_revision(name)
    return Place(repository, "model", revision or own, "")


def commit(name: str, revision: str | None = None) -> str:
    """Resolve the revision of a hub id or URL to its commit: the hub's, else that in the cache."""
    from huggingface_hub import HfApi

    at = place(name, revision)
    try:
        return str(HfApi().repo_info(at.repository, revision=at.revision, repo_type=at.kind).sha)
    except Exception as error:  # the hub's client raises many types
        return _cached(name, at, error).name


def files(name: str, revision: str | None = None) -> list[str]:
    """List the paths of a model's files: the hub's, else those in the cache."""
    from huggingface_hub import HfApi

    at = place(name, revision)
    try:
        return list(HfApi().list_repo_files(at.repository, revision=at.revision))
    except Exception as error:
        return list(_files(_cached(name, at, error)))


def download(url: str) -> dict[str, Path]:
    """Download the files of a URL that the cache lacks; return all, sorted by path in the repository."""
    from huggingface_hub import snapshot_download

    at = place(url)
    commit(url)  # snapshot_download falls back to the cache silently, whatever the hub answers
    try:
        root = Path(snapshot_download(at.repository, **_options(at), allow_patterns=at.patterns))
    except Exception as error:
        root = _cached(url, at, error)
    found = {name: path for name, path in _files(root).items() if at.selects(name)}
    _check_complete(url, at, root.name, found)
    return found


def local(name: str) -> Path:
    """Return the path of a file that is given as a path or as a URL of one file on the hub."""
    if not is_hub_url(name):
        return Path(name)
    paths = list(download(name).values())
    if len(paths) > 1:
        raise ValueError(f"{name}: {len(paths)} files; name one")
    return paths[0]


def content(path: Path) -> str:
    """Return the hub's hash of a cached file: its SHA-256, or git's hash of a small file."""
    blob = path.resolve()
    if blob.parent.name == "blobs":
        return blob.name
    from spo.runtime.files import digest

    return str(digest(path))  # a cache without symbolic links


def reason(name: str, error: BaseException) -> str:
    """Say in one line why a loader could not read a path or hub id."""
    at, hint = place(name), "; without a network, give the folder of a local copy" if is_hub_id(name) else ""
    return hub_answers.refusal(at.page, at.revision, error) or f"{first_line(error, 200)}{hint}"


def reach(where: str, name: str, loader: Callable[[], Any]) -> Any:
    """Call a loader for the path or hub id `name`; any error but a lack of memory becomes one line."""
    try:
        check(name)
        return loader()
    except MemoryError:
        raise
    except Exception as error:  # these loaders and the hub's client raise dozens of types
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise
        raise ValueError(f"{where}: cannot be loaded ({reason(name, error)})") from None


def _as_path(name: str) -> str:
    """Why a name of the form OWNER/NAME is a path; empty if it is not."""
    first = name.partition("/")[0]
    if first in OURS or Path(first).is_dir():
        return f"{first}/ is a folder here, so it is not looked up on the hub"
    if name.lower().endswith(FILES):
        return f"a file, so not looked up on the hub, where files are {SCHEME}OWNER/NAME/FILE"
    return ""


def _parse(url: str) -> Place:
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    try:
        uri = parse_hf_uri(url)
    except HfUriError:
        uri = None
    if uri is None or uri.type not in ("model", "dataset"):
        raise ValueError(f"{url}: not of the form {SCHEME}[datasets/]OWNER/NAME[@REVISION][/FILE]")
    revision = re.sub("^~", "refs/convert/", uri.revision) if uri.revision else None  # ~parquet
    return Place(uri.id, uri.type, revision, uri.path_in_repo or "*")


def _options(at: Place) -> dict[str, Any]:
    return {"repo_type": at.kind, "revision": at.revision}


def _files(root: Path) -> dict[str, Path]:
    return {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}


def _cached(name: str, at: Place, error: Exception) -> Path:
    """Return the folder of a revision in the cache, complete or not, after an error of the hub's client."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if refused := hub_answers.refusal(at.page, at.revision, error):
        raise ValueError(f"{name}: {refused}") from None
    try:
        folder = Path(snapshot_download(at.repository, **_options(at), local_files_only=True))
    except IncompleteSnapshotError as incomplete:  # the requested files may be there
        folder = Path(incomplete.snapshot_path)
    except Exception:
        raise _missing(name, at, f"the hub {hub_answers.state(error)}") from error
    # those come from `download`, and `commit` has printed the line
    if not isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        say(f"{name}: the hub {hub_answers.state(error)}; commit {folder.name[:12]} of its cache is used")
    return folder


@cache
def say(line: str) -> None:
    """Print a line once."""
    print(f"spo: {line}", file=sys.stderr)


def _check_complete(url: str, at: Place, commit: str, found: dict[str, Path]) -> None:
    """Check that the cache has all files of a URL: by the hub's list in it, else by the names of shards."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(at.repository, repo_type=at.kind, revision=commit)
    except CachedRepoTreeNotFoundError:
        tree = None
    if tree is not None:
        listed = {file.path for file in tree if at.selects(file.path)}
        if not listed:
            raise ValueError(f"{url}: {at.repository} has no such file at {at.revision or 'main'}")
        if lost := listed - set(found):
            raise _missing(url, at, f"the cache lacks {len(lost)} of {len(listed)} files, e.g. {min(lost)}")
        return
    if not found:
        raise _missing(url, at, "no such file in the cache")
    if left := _missing_shards(found, at):
        raise _missing(url, at, f"{left} of its shards are not in the cache")
    if set(found) != {at.pattern} and not all(SHARD.fullmatch(name) for name in found):
        say(
            f"{url}: the {len(found)} files of the cache are used; without the hub's list of files in it "
            "it is not known whether there are more"
        )


def _missing_shards(found: Collection[str], at: Place) -> int:
    """Count the shards of a place that are not there, by the number and count in the names of the others."""
    shards = [shard for name in found if (shard := SHARD.fullmatch(name))]
    there = {(shard[1], shard[3], int(shard[2])) for shard in shards}
    every = {
        (shard[1], shard[3], number): f"{shard[1]}-{number:05}-of-{shard[3]}{shard[4]}"
        for shard in shards
        for number in range(int(shard[3]))
    }
    return sum(at.selects(name) for shard, name in every.items() if shard not in there)


def _missing(name: str, at: Place, why: str) -> ValueError:
    from huggingface_hub import constants

    revision = f" --revision {at.revision}" if at.revision else ""
    files = f" --include '{at.pattern}'" if at.pattern else ""
    kind = f" --repo-type {at.kind}" if at.kind != "model" else ""
    folder = f"{at.kind}s--{at.repository.replace('/', '--')}"
    return ValueError(
        f"{name}: not a local path, and {why}; with a network run "
        f"`hf download {at.repository}{kind}{revision}{files}` and copy {folder} from its cache to "
        f"{constants.HF_HUB_CACHE}, or give a local path in params.yaml"
    )
