"""Record runs in folders of .spo/runs, from which they can be written to MLflow at any time.

`run.json` holds parameters, tags, metrics, status and the paths of the curve and images; these are copied to
the folder when the run ends. A child's folder is named PARENT.CHILD.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from spo.runtime.files import digest, locked, read_json, write_json
from spo.runtime.messages import one_line, public, redact
from spo.runtime.workspace import home

Content = dict[str, Any]
KEYS = ("name", "experiment", "start", "status", "version", "delivered", "owner", "stage", "params", "tags")
STORED = 30 * 24 * 3600  # seconds for which a delivered run stays here, so that later stages find it


def warn(message: str) -> None:
    print(f"tracking: {redact(message)}", file=sys.stderr)


_warn_once = functools.cache(warn)


def now() -> int:
    """Return the time in milliseconds, as MLflow stores it."""
    return int(time.time() * 1000)


def folder() -> Path:
    return home() / ".spo/runs"


class Run:
    """One run's folder. A run without a key (no place to write, or not the main process) logs nothing."""

    def __init__(self, key: str = "") -> None:
        self.key, self.path = key, folder() / key

    @classmethod
    def create(cls, content: Content, parent: str = "", is_owned: bool = True) -> Run:
        """Make a run's folder from its name, experiment, params, tags, and other fields.

        `parent` is a key, or the id of a run that MLflow has. If the process exits without ending a run that
        it owns, the run is KILLED.
        """
        import psutil

        key = f"{datetime.now():%Y%m%dT%H%M%S%f}-{secrets.token_hex(3)}"
        run = cls(f"{parent}.{key}" if parent else key)
        owner = [platform.node(), os.getpid(), psutil.Process().create_time()]
        known: Content = {"metrics": {}, "inputs": [], "artifacts": [], "models": [], "stage": None}
        known |= {"start": now(), "status": None, "version": 0, "delivered": -1}
        known["owner"] = owner if is_owned else []
        try:
            run.path.mkdir(parents=True)
            run._write(known | cleaned(content))
        except OSError as error:
            warn(f"the run {content['name']} logs nothing: {one_line(error)}")
            return cls()
        return run

    @property
    def parent(self) -> Run:
        return Run(self.key.rpartition(".")[0])

    def exists(self) -> bool:
        return bool(self.key) and (self.path / "run.json").is_file()

    def read(self) -> Content:
        content: Content = read_json(self.path / "run.json", "run", keys=KEYS, then="remove its folder")
        return content

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log numbers of the whole run (seconds, accuracy); those of each step are in the curve."""
        self.add(metrics={k: float(v) for k, v in metrics.items()})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self.add(tags={k: str(v) for k, v in tags.items()})

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Log a small file by reference; a tag says so if it changes before it is sent, and so is not."""
        path = Path(path).absolute()
        self.add(artifacts=[{"path": str(path), "folder": folder, "sha256": digest(path)}])

    def log_model(self, path: Path, kind: str, step: int, scores: str) -> None:
        """Log saved weights, a file or a folder, as MLflow's LoggedModel: by path and SHA-256.

        Its metrics are those of the whole run, and of the curve at `step`, whose names begin with `scores`.
        """
        tags = {"weights": str(path), **({"weights.sha256": sha} if (sha := digest(path)) else {})}
        self.add(models=[{"kind": kind, "step": int(step), "scores": scores, "tags": tags}])

    def follow(self, curve: Path, images: Path) -> None:
        """Log the rows of a curve, and the images STEP.png of a folder, as they come."""
        self.add(curve=str(curve.absolute()), images=str(images.absolute()))

    def collect(self) -> None:
        """Copy curve and images, so that the stage may remove them."""
        with self._guarded():
            content = self.read() if self.key else {}
            for name, source in ((k, Path(content[k])) for k in ("curve", "images") if k in content):
                copy = self.path / f"{name}{source.suffix}"
                if source.exists() and not copy.exists():
                    (shutil.copytree if source.is_dir() else shutil.copy2)(source, copy)
                    self.add(**{name: str(copy)})

    def end(self, status: str, time: int | None = None) -> None:
        self.collect()
        self.add(status=status, end=time or now())

    def add(self, **fields: Any) -> None:
        """Add to mappings and lists, and set other fields; the run is delivered again then."""
        if not self.key:
            return
        with self._guarded(), locked(self.path / "lock"):
            content = self.read()
            for name, new in cleaned(fields).items():
                old = content.get(name)
                merged = old | new if isinstance(old, dict) else new
                content[name] = old + new if isinstance(old, list) else merged
            self._write(content | {"version": content["version"] + 1})

    def mark(self, version: int) -> None:
        """Note that a store has this version of the run; after its end remove what only a delivery needs."""
        with locked(self.path / "lock"):
            content = self.read()
            self._write(content | {"delivered": version})
        if content["status"] and version == content["version"]:
            for path in (p for p in self.path.iterdir() if p.name not in ("run.json", "lock")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def is_live(self) -> bool:
        content = self.read()
        return content["status"] is None and bool(content["owner"])

    def is_pending(self) -> bool:
        """Whether a part of the run is in no store. A run that was delivered long ago is removed."""
        content = self.read()
        pending: bool = content["delivered"] != content["version"]
        if not pending and now() / 1000 - content["start"] / 1000 > STORED:
            shutil.rmtree(self.path, ignore_errors=True)
        return pending

    def close_if_dead(self) -> None:
        """End the run as KILLED if its process has died without ending it (kill -9, power cut)."""
        import psutil

        content = self.read()
        if content["status"] or content["owner"][:1] != [platform.node()]:
            return
        try:
            alive = abs(psutil.Process(content["owner"][1]).create_time() - content["owner"][2]) < 5
        except psutil.NoSuchProcess:
            alive = False
        if not alive and not self.read()["status"]:  # it may have ended the run since it was read
            files = [Path(content.get("curve", "")), self.path / "run.json"]
            last = max(file.stat().st_mtime for file in files if file.is_file())
            self.end("KILLED", int(1000 * last))

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Warn instead of failing the stage if its run cannot be written."""
        try:
            yield
        except (OSError, ValueError) as error:
            warn(f"{self.path} cannot be written, so the run logs nothing more: {one_line(error)}")
            self.key = ""

    def _write(self, content: Content) -> None:
        write_json(self.path / "run.json", content)


def is_cached(content: Content) -> bool:
    """Whether a run is of a stage that did not run, since its outputs were in DVC's cache."""
    return bool(content["tags"].get("dvc.cached") == "true")


def cleaned(fields: Content) -> Content:
    """Return fields without passwords; those that MLflow shows without paths of this machine either."""
    return {k: (public if k in ("params", "tags", "inputs") else redact)(v) for k, v in fields.items()}


def runs_here(parent: Run | None = None) -> list[Run]:
    """List the runs of this folder, or the children of one, oldest first; a damaged one is named once."""
    pattern = f"{parent.key}.*" if parent else "*"
    found = [Run(path.parent.name) for path in sorted(folder().glob(f"{pattern}/run.json"))]
    return [run for run in found if _is_readable(run)]


def _is_readable(run: Run) -> bool:
    try:
        run.read()
    except ValueError as error:  # torn by a power cut, or removed by another process meanwhile
        if run.exists():
            _warn_once(str(error))
        return False
    return True


def read_curve(path: Path, offset: int = 0) -> tuple[list[tuple[int, int, dict[str, float]]], int]:
    """Read a curve's rows (time, step, metrics) from an offset on, and the offset behind them.

    It is the file that `Curve` writes while it grows, whose last row may be torn, or the CSV in reports/.
    """
    rows: list[tuple[int, int, dict[str, float]]] = []
    if not path.is_file():
        return rows, offset
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as table:
            for line in csv.DictReader(table):
                step = int(line.pop("step"))
                rows.append((step, step, {k: float(v) for k, v in line.items() if v}))
        return rows, path.stat().st_size
    with path.open("rb") as file:
        file.seek(offset)
        complete = file.read().rpartition(b"\n")[0]
    for text in complete.split(b"\n"):
        try:
            row = json.loads(text)
            rows.append((row.pop("time"), row.pop("step"), row))
        except (ValueError, KeyError, AttributeError, RecursionError):
            continue
    return rows, offset + len(complete)
