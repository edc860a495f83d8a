"""A released model that a stage takes in place of training: fetched as the stage `inputs` pinned it.

`inputs` also writes there whether a section is needed, since that depends on other sections of params.yaml,
on which the stage of this one must not depend.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.runtime import hub, licence
from spo.runtime.files import read_json
from spo.runtime.messages import public

PINS, ROLE = Path("outputs/inputs"), "pretrained_"
UNUSED = "not used"  # key of an entry: why the section is not needed


@dataclass(frozen=True)
class Released:
    """Where a released model lies here, and where it is from."""

    path: Path  # a file or a folder
    origin: dict[str, Any]  # reference, commit, licence; files with their hashes

    def tags(self) -> dict[str, str]:
        """For MLflow; the hashes of the weights only."""
        said = {f"pretrained.{k}": v for k, v in self.origin.items() if k != "files" and v is not None}
        weights = {k: v for k, v in self.origin["files"].items() if not k.endswith((".json", ".md", ".txt"))}
        return said | {f"pretrained.sha256.{name}": value for name, value in weights.items()}


def role(section: str) -> str:
    """The name of the file of pins for the section of params.yaml with `pretrained`."""
    return ROLE + section.removeprefix("align.")


def address(name: str) -> str:
    """What `inputs` pins: a path, or a URL of files on the hub, of which a hub id means all."""
    return f"{hub.SCHEME}{name}" if hub.is_hub_id(name) else name


def unused(section: str) -> str | None:
    """Why a section is not needed; None if it is."""
    file = PINS / f"{role(section)}.json"
    entries = read_json(file, "pin", list) if file.exists() else []
    return next((entry[UNUSED] for entry in entries if UNUSED in entry), None)


def fetch(section: str) -> Released:
    """The model that SECTION.pretrained names, downloaded at the pinned commit."""
    file, key = PINS / f"{role(section)}.json", f"{section}.pretrained"
    entries = read_json(file, f"pin of {key}", list)
    if not entries:
        raise ValueError(f"{file}: pins nothing, but {key} is set; run `spo inputs`")
    pin = entries[0]
    if "path" in pin:
        path = Path(pin["path"])
        terms = licence.stated(path if path.is_dir() else path.parent)
    else:
        at = hub.place(pin["hub"])
        path, terms = _download(f"{hub.SCHEME}{at.page}@{pin['revision']}", at.pattern), pin["licence"]
    reference = public(pin.get("path", pin.get("hub")))
    said = {"reference": reference, "commit": pin.get("revision"), "licence": terms, "files": pin["files"]}
    return Released(path, said)


def _download(repository: str, pattern: str) -> Path:
    """The path in the hub's cache of a file, of a folder, or of a repository as a whole."""
    files = hub.download(f"{repository}/{pattern}")
    name, file = next(iter(files.items()))
    root = file.parents[len(Path(name).parts) - 1]
    found = root if pattern == "*" else root / pattern
    if not found.exists():
        raise ValueError(f"{repository}/{pattern}: {len(files)} files; name one file or a folder")
    return found
