"""Local files that logs go to first: one file a run, one JSON record a line."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.runtime.files import atomic, digest, write_json
from spo.runtime.messages import public, redact
from spo.runtime.workspace import home


def warn(message: str) -> None:
    print(f"tracking: {redact(message)}", file=sys.stderr)


def folder() -> Path:
    return home() / ".spo/spool"


@dataclass(frozen=True)
class Spool:
    """The records of one run in `<key>.jsonl`; `<key>.state` says how much of it each store has.

    `<key>.files` holds copies of the files that may be gone before they are delivered.

    The first record is `create`; or, for a run that MLflow has already, `adopt` (by its id) or `find` (by its
    key).
    """

    path: Path

    @property
    def key(self) -> str:
        return self.path.stem

    @classmethod
    def create(cls, **record: Any) -> Spool:
        """Make a new spool; `record` has uri, experiment, name, parent (a key or None), shared, tags."""
        import psutil

        folder().mkdir(parents=True, exist_ok=True)
        key = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:12]}"
        spool = cls(folder() / f"{key}.jsonl")
        writer = {"node": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        spool.append("create", writer=writer, **record)
        return spool

    @classmethod
    def find(cls, key: str) -> Spool | None:
        """Return the spool of a key, or a new one for the id of an MLflow run."""
        spool = cls(folder() / f"{key}.jsonl")
        if not spool.path.exists():
            if not re.fullmatch("[0-9a-f]{32}", key):
                return None
            folder().mkdir(parents=True, exist_ok=True)
            spool.append("adopt", run_id=key, shared=True)
        return spool

    @classmethod
    def after(cls, key: str, where: Mapping[str, str], *records: dict[str, Any]) -> Spool:
        """Make a second spool for a run that has ended in `where` (uri, experiment), with all its records."""
        spool = cls(folder() / f"{key}.sealed.jsonl")  # sorts behind the first
        spool._write({"op": "find", "key": key, "shared": False, **where}, *records)
        return spool

    def append(self, op: str, **fields: Any) -> None:
        self._write({"op": op, **fields})

    def _write(self, *records: dict[str, Any]) -> None:
        """Append records in one write; each starts on a line of its own, even after a torn one."""
        now = int(time.time() * 1000)
        line = "".join(f"\n{json.dumps(_cleaned({'time': now, **record}))}\n" for record in records).encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if os.write(file, line) < len(line):
                raise OSError(f"{self.path}: disk full")
        finally:
            os.close(file)

    def keep(self, path: Path) -> Path:
        """Copy a file, named by its SHA-256, to where it stays until the run is delivered."""
        kept = self._files() / f"{digest(path)}{path.suffix}"
        with atomic(kept) as partial:
            shutil.copyfile(path, partial)
        return kept

    def _files(self) -> Path:
        return self.path.with_suffix(".files")

    def read(self, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (where it ends, record) of each complete line from `offset` on; torn lines are skipped."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("op"), str):
                    yield offset, record

    def header(self) -> dict[str, Any]:
        return next(self.read(), (0, {}))[1]

    def state(self) -> dict[str, dict[str, Any]]:
        """Return for each store the run's id there, and up to where it has the records."""
        path = self.path.with_suffix(".state")
        try:
            stores = json.loads(path.read_bytes())
            return {s: {"run_id": v["run_id"], "offset": max(0, int(v["offset"]))} for s, v in stores.items()}
        except (
            FileNotFoundError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ):
            return {}  # what is delivered twice changes nothing

    def mark(self, store: str, run_id: str | None, offset: int) -> None:
        """Note up to where a store has the records, and the run's id there."""
        state = self.state() | {store: {"run_id": run_id, "offset": offset}}
        write_json(self.path.with_suffix(".state"), state)

    def left(self, store: str | None = None) -> int:
        """Count the records that a store has not got; without a store, those that none has."""
        had = [state["offset"] for name, state in self.state().items() if store in (None, name)]
        return sum(1 for _ in self.read(max(had, default=0)))

    def ended(self) -> bool:
        """Whether nothing more comes."""
        head = self.header()
        over = head.get("op") == "find" or any(r["op"] == "end" for _, r in self.read())
        return over and not head.get("shared")

    def set_aside(self, record: dict[str, Any], why: str) -> None:
        path = self.path.with_suffix(".refused")
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "why": why}) + "\n")
        names = record.get("metrics") or record.get("params") or record.get("tags") or ()
        what = f"{record['op']} {record.get('path') or ', '.join(names)}".strip()
        warn(f"MLflow refused a record ({what[:200]}), kept in {path}: {why}")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".state").unlink(missing_ok=True)
        shutil.rmtree(self._files(), ignore_errors=True)


def spools() -> list[Spool]:
    """List all spools of this folder, oldest first, so that a parent comes before its children."""
    return [Spool(path) for path in sorted(folder().glob("*.jsonl"))]


def close_dead() -> None:
    """End the runs whose process is gone without a word (kill -9, power)."""
    for spool in spools():
        records = [record for _, record in spool.read()]
        writer = records[0].get("writer") if records else None
        ended = any(record["op"] == "end" for record in records)
        if not isinstance(writer, dict) or records[0].get("shared") or ended or _alive(writer):
            continue
        spool.append("end", status="KILLED", time=int(spool.path.stat().st_mtime * 1000))
        parent = Spool.find(records[0]["parent"]) if records[0].get("parent") else None
        if parent is not None:
            tags = records[0].get("tags") or {}
            named = {"child": records[0].get("name"), "stage": tags.get("dvc.stage")}
            parent.append("end", status="KILLED", **named)


def _alive(writer: dict[str, Any]) -> bool:
    """Whether the process lives; of another machine's it is assumed."""
    import psutil

    if writer.get("node") != platform.node():
        return True
    try:
        return abs(psutil.Process(writer["pid"]).create_time() - writer["started"]) < 5
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError, OverflowError):
        return False


def _cleaned(record: dict[str, Any]) -> dict[str, Any]:
    """A record without passwords; what MLflow shows of it, without paths of this machine either."""
    shown = {key: public(record[key]) for key in ("params", "tags", "data") if key in record}
    return redact(record) | shown
