"""dvc.lock: what every stage was last made from and gave."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spo.tracking.provenance import flatten

METRICS = "reports/metrics/"


@dataclass(frozen=True)
class Entry:
    """One stage of dvc.lock; `deps` and `outs` are {path: DVC's hash}."""

    stage: str  # DVC's name, e.g. align@spo
    cmd: str
    deps: dict[str, str]
    outs: dict[str, str]
    params: dict[str, Any]

    @property
    def words(self) -> tuple[str, str | None]:
        """(stage, item) of an `spo STAGE [ITEM]` command; of another command (DVC's name, None)."""
        match self.cmd.split():
            case ["spo", stage]:
                return stage, None
            case ["spo", stage, item]:
                return stage, item
        return self.stage, None

    @property
    def title(self) -> str:
        """The name of the stage's run."""
        stage, item = self.words
        return f"{stage}-{item}" if item else stage

    @property
    def hash(self) -> str:
        """SHA-256 of command, parameters and the hashes of all that it read and wrote."""
        content = {"cmd": self.cmd, "deps": self.deps, "outs": self.outs, "params": self.params}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def tags(self) -> dict[str, str]:
        """For MLflow: the hash of the whole and of each path."""
        return {
            "dvc.lock_hash": self.hash,
            **{f"dvc.dep.{path}": value for path, value in self.deps.items()},
            **{f"dvc.out.{path}": value for path, value in self.outs.items()},
        }

    def data(self) -> list[dict[str, str]]:
        """The data among the deps (not code), for MLflow's dataset inputs."""
        found = ((path, value) for path, value in self.deps.items() if not path.startswith("src/"))
        return [{"name": path, "digest": value} for path, value in found]

    def metrics(self) -> dict[str, float]:
        """The numbers in the metrics files that the stage wrote, with / between nested keys."""
        found: dict[str, float] = {}
        for path in self.outs:
            if path.startswith(METRICS) and path.endswith(".json"):
                found |= read_metrics(Path(path))
        return found


def read_metrics(path: Path) -> dict[str, float]:
    """Numbers of a metrics file by nested key; none if it is not there or not readable."""
    try:
        flat = flatten(json.loads(path.read_text(encoding="utf-8")), separator="/")
    except (OSError, ValueError, AttributeError):
        return {}
    return {k: float(v) for k, v in flat.items() if isinstance(v, int | float)}


def read(path: Path = Path("dvc.lock")) -> dict[str, Entry]:
    """All stages by name, in the file's order; none if there is no readable file."""
    try:
        stages = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages", {})
        return {name: _entry(name, stage) for name, stage in stages.items()}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return {}


def _entry(name: str, stage: dict[str, Any]) -> Entry:
    hashes = {
        kind: {item["path"]: str(item.get("md5") or item.get("etag") or "") for item in stage.get(kind, [])}
        for kind in ("deps", "outs")
    }
    return Entry(name, str(stage["cmd"]), hashes["deps"], hashes["outs"], stage.get("params", {}))


def ancestors(entries: dict[str, Entry], stage: str) -> list[str]:
    """The stages whose outputs `stage` is made from, directly or not, in the file's order."""
    found: set[str] = set()
    waiting = [stage]
    while waiting:
        deps = entries[name].deps if (name := waiting.pop()) in entries else {}
        for other, entry in entries.items():
            if other not in found and any(_meets(out, dep) for out in entry.outs for dep in deps):
                found.add(other)
                waiting.append(other)
    return [name for name in entries if name in found - {stage}]


def _meets(out: str, dep: str) -> bool:
    """Whether one is the other, or lies in it."""
    return out == dep or dep.startswith(f"{out}/") or out.startswith(f"{dep}/")
