"""The stages that a repro took from DVC's cache: runs too, linked to the run that made what they give.

DVC says nothing when it skips a stage. But whatever a starting stage is made from and has not run in the
same repro was skipped, and the last stage is made from all others. DVC writes a stage's hashes to dvc.lock
when its command has ended, so its run gets them from the next stage, or from `spo sync`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spo.tracking import dvc_lock
from spo.tracking.provenance import section
from spo.tracking.spool import Spool

Where = Mapping[str, str]  # uri and experiment of the runs
LATE = 600.0  # seconds after a stage's end in which DVC writes its entry; a later one may be a checkout


def record(parent: Spool, params: Mapping[str, Any], where: Where, stages: Iterable[str]) -> list[str]:
    """Runs under `parent` for those of `stages` that have none; their names."""
    entries = dvc_lock.read()
    known = {end["stage"] for end in _ended(parent)}
    new = [entries[name] for name in stages if name in entries and name not in known]
    for entry in new:
        _record(parent, params, where, entry)
    return [entry.stage for entry in new]


def seal(parent: Spool, where: Where) -> None:
    """Give the runs of the stages that ran under `parent` what dvc.lock says of them by now."""
    entries, path = dvc_lock.read(), Path("dvc.lock")
    records = [r for _, r in parent.read()]
    done = {r["key"] for r in records if r["op"] == "sealed"}
    written = path.stat().st_mtime if path.exists() else 0.0
    for end in _ended(parent):
        entry = entries.get(end["stage"])
        late = written - end["time"] / 1000
        ran = end["status"] == "FINISHED" and not end.get("cached") and end["key"] not in done
        if entry is None or not ran or not -1 < late < LATE:
            continue
        tags, inputs = {"op": "tags", "tags": entry.tags()}, {"op": "inputs", "data": entry.data()}
        Spool.after(end["key"], where, tags, inputs)
        parent.append("sealed", key=end["key"])


def covers(parent: Spool) -> bool:
    """Whether every stage of dvc.lock is under `parent`, which the lock has changed with, not since."""
    ended, path = _ended(parent), Path("dvc.lock")
    if not ended or not path.exists():
        return False
    last = max(end["time"] for end in ended) / 1000
    return set(dvc_lock.read()) <= {end["stage"] for end in ended} and path.stat().st_mtime - last < LATE


def _ended(parent: Spool) -> list[dict[str, Any]]:
    """The records of the stages of DVC that have ended under it."""
    return [r for _, r in parent.read() if r["op"] == "end" and r.get("stage")]


def _record(parent: Spool, params: Mapping[str, Any], where: Where, entry: dvc_lock.Entry) -> None:
    tags = {"dvc.cached": "true", "dvc.stage": entry.stage, **entry.tags()}
    spool = Spool.create(name=entry.title, parent=parent.key, shared=False, tags=tags, **where)
    spool.append("params", params={k: str(v) for k, v in section(params, *entry.words).items()})
    spool.append("inputs", data=entry.data())
    figures = {"title": entry.title, "metrics": entry.metrics()}
    spool.append("origin", hash=entry.hash, parent=parent.key, **figures)
    spool.append("end", status="FINISHED")
    parent.append("end", status="FINISHED", child=entry.title, stage=entry.stage, key=spool.key, cached=True)
