"""Name resume states and caches by a fingerprint of their inputs."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel

from spo.runtime import files
from spo.runtime.workspace import SCRATCH

PACKAGE = Path(__file__).parents[1]


def fingerprint(
    sections: Sequence[BaseModel | str | int], inputs: Iterable[Path], code: Sequence[str]
) -> str:
    """Return a name for the result of parameters, files and code; other inputs give another name.

    Args:
        inputs: files and folders without hidden files; each file is read a block at a time. One that is
            not there counts for nothing.
        code: modules and folders of the package that make it, as `data/images.py` and `diffusion`.
    """
    digest = hashlib.sha256()
    for section in sections:
        text = section.model_dump_json() if isinstance(section, BaseModel) else str(section)
        digest.update(text.encode() + b"\0")
    modules = [path for part in code for path in _files(PACKAGE / part) if path.suffix == ".py"]
    for path in (*(path for root in inputs for path in _files(root)), *modules):
        digest.update(path.name.encode() + bytes.fromhex(str(files.digest(path))))
    return digest.hexdigest()[:16]


def resume_folder(
    name: str, sections: Sequence[BaseModel | str | int], inputs: Iterable[Path], code: Sequence[str]
) -> Path:
    """The folder of the resume state with this `fingerprint`."""
    return SCRATCH / "resume" / f"{name}-{fingerprint(sections, inputs, code)}"


def _files(root: Path) -> list[Path]:
    """A file, or those of a folder in order, without the hidden files that killed writers leave."""
    if not root.is_dir():
        return [root] if root.is_file() else []
    found = [path for path in root.rglob("*") if path.is_file()]
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))
