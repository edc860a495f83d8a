"""dvc.lock: the hashes of what every stage last read and wrote."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spo.config import yaml_text
from spo.runtime.files import read_json, read_text
from spo.runtime.workspace import METRICS
from spo.tracking.provenance import flatten

RESTORE = "resolve its conflict, or restore it by `git checkout dvc.lock`"
HASH = "dvc.lock_hash"  # tag of a run: the hash of the stage's entry
LOCK = Path(".dvc/tmp/lock")  # DVC holds it while it writes dvc.lock, not while a stage runs
PATIENCE = 60.0  # seconds; a `dvc push` holds the lock for as long as it takes


@dataclass(frozen=True)
class Entry:
    """One stage of dvc.lock; `deps` and `outs` are {path: DVC's hash}."""

    stage: str  # DVC's name, e.g. align@spo
    cmd: str
    deps: dict[str, str]
    outs: dict[str, str]
    params: dict[str, Any]

    @property
    def is_tracked(self) -> bool:
        """Whether its command is a stage of `spo`, which logs a run itself."""
        return self.cmd.split()[:1] == ["spo"]

    @property
    def title(self) -> str:
        """The name of the stage's run, such as align-spo or generate-spo-suite-drawbench."""
        return "-".join(word.lstrip("-") for word in self.cmd.split()[1:]) if self.is_tracked else self.stage

    @property
    def hash(self) -> str:
        """Return the SHA-256 of command, parameters and the hashes of all that it read and wrote."""
        content = {name: value for name, value in asdict(self).items() if name != "stage"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def tags(self) -> dict[str, str]:
        """Return tags for MLflow: the hash of the entry and of each path."""
        deps = {f"dvc.dep.{path}": value for path, value in self.deps.items()}
        return {HASH: self.hash, **deps, **{f"dvc.out.{path}": v for path, v in self.outs.items()}}

    def data(self) -> list[dict[str, str]]:
        """Return the data among the deps (not code), for MLflow's dataset inputs."""
        return [{"name": p, "digest": value} for p, value in self.deps.items() if not p.startswith("src/")]

    def metrics(self) -> dict[str, float]:
        """Return the numbers in the metrics files that the stage wrote, with / between nested keys."""
        files = [path for path in map(Path, self.outs) if path.parent == METRICS and path.suffix == ".json"]
        return {name: value for path in files for name, value in read_metrics(path).items()}


def read_metrics(path: Path) -> dict[str, float]:
    """Return the numbers of a metrics file by nested key; none if it is not there."""
    flat = flatten(read_json(path, "metrics"), separator="/") if path.exists() else {}
    return {k: float(v) for k, v in flat.items() if isinstance(v, int | float)}


def read(path: Path = Path("dvc.lock")) -> dict[str, Entry]:
    """Read all stages by name, in the file's order; none if there is no such file."""
    if not path.exists():
        return {}
    with _complete():
        text = read_text(path, "dvc.lock")
    try:
        stages = yaml_text.parse(text, str(path)).get("stages", {})
        return {name: _entry(name, stage) for name, stage in stages.items()}
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path}: not as DVC writes it; {RESTORE}") from None
    except ValueError as error:
        raise ValueError(f"{error}; {RESTORE}") from None


@contextmanager
def _complete() -> Iterator[None]:
    """Keep DVC from writing meanwhile: where stages run in parallel, dvc.lock could be half written."""
    if not os.access(LOCK, os.R_OK):  # no DVC here, or a lock that is not ours to read
        yield
        return
    with LOCK.open(encoding="utf-8") as file:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
        yield


def _entry(name: str, stage: dict[str, Any]) -> Entry:
    hashes = {
        kind: {item["path"]: str(item.get("md5") or item.get("etag") or "") for item in stage.get(kind, [])}
        for kind in ("deps", "outs")
    }
    return Entry(name, str(stage["cmd"]), params=stage.get("params", {}), **hashes)


def ancestors(entries: dict[str, Entry], stage: str) -> list[str]:
    """Return the stages whose outputs `stage` is made from, directly or not, in the file's order."""
    above, waiting = set(), [stage]
    while waiting:
        deps = [Path(dep) for dep in entries[name].deps] if (name := waiting.pop()) in entries else []
        for other, entry in entries.items():
            related = (
                dep.is_relative_to(out) or Path(out).is_relative_to(dep) for out in entry.outs for dep in deps
            )
            if other not in above and any(related):
                above.add(other)
                waiting.append(other)
    return [name for name in entries if name in above - {stage}]
