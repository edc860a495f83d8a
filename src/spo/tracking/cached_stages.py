"""Cached stages as MLflow runs, found by comparing dvc.lock before and after one reproduction.

A parent run notes the hashes of dvc.lock when it opens. `settle` compares them with dvc.lock as it is then. A
stage with a run under the parent ran: the run gets its entry, the hashes of all that it read and wrote. A
stage that DVC came to without a run is cached: it gets a run, linked to the one that made its outputs.

`spo repro` and the flow settle when DVC has ended, and so know every stage. Under a plain `dvc repro` a stage
settles what it is made from when it starts, and nothing of ours runs after the last one. So, with that alone,

- the run of the last stage gets no hashes, and later cached runs of that stage are not linked to it;
- a cached stage that no stage which ran is made from has no run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from spo.runtime.messages import public
from spo.tracking import dvc_lock
from spo.tracking.provenance import section
from spo.tracking.spool import Spool, spools

Where = Mapping[str, str]  # uri and experiment of the runs
Record = dict[str, Any]
DATASETS = {  # of a stage: (key of its section of params.yaml, what pins it, MLflow's context)
    "pairs": [("source", "outputs/inputs/pairs.json", "training")],
    "prompts": [
        ("train", "outputs/inputs/prompts.json", "training"),
        ("evaluation", "outputs/inputs/prompts.json", "evaluation"),
    ],
}


def settle(
    parent: Spool, params: Mapping[str, Any], where: Where, reached: Collection[str] = ()
) -> list[str]:
    """Give stages that ran their entries of dvc.lock, and cached ones a run; return the names of these.

    Args:
        reached: stages that DVC came to and ended well, so that dvc.lock has them as they are. Of the others,
            those are settled that ran under this parent and whose entries were written since it opened.
    """
    before, ends = _read(parent)
    cached = []
    for name, entry in dvc_lock.read().items():
        if name in reached:
            _add_datasets(parent, params, entry)
        written = before is not None and before.get(name) != entry.hash
        end = ends.get(name)
        if end is not None and end["status"] == "FINISHED":
            if end["hash"] is None and end["key"] and (written or name in reached):
                _add_entry(parent, where, entry, end["key"])
        elif name in reached and (entry.is_tracked or not written):  # else it ran, but logs no run
            _create_run(parent, params, where, entry)
            cached.append(name)
    return cached


def has_run(parent: Spool, stage: str) -> bool:
    """Whether a stage ran to its end under this parent."""
    end = _read(parent)[1].get(stage)
    return end is not None and end["status"] == "FINISHED" and not end["cached"]


def is_recorded() -> bool:
    """Whether a parent in this folder has a run for every stage of dvc.lock, or there is no stage.

    The last stage of a plain `dvc repro` has a run, but no hash: any entry of it will do.
    """
    hashes = dvc_lock.hashes()
    return not hashes or any(_covers(spool, hashes) for spool in spools() if spool.header().get("shared"))


def _covers(parent: Spool, hashes: Mapping[str, str]) -> bool:
    before, ends = _read(parent)
    if before is None:
        return False
    ended = {name: end["hash"] for name, end in ends.items() if end["status"] == "FINISHED"}
    return all(name in ended and ended[name] in (None, value) for name, value in hashes.items())


def _read(parent: Spool) -> tuple[dict[str, str] | None, dict[str, Record]]:
    """Return the hashes of dvc.lock when the parent opened, if it was here, and each stage's last end."""
    before, ends, hashes = None, {}, {}
    for _, record in parent.read():
        if record["op"] == "lock":
            before = record.get("hashes")
        elif record["op"] == "entry":
            hashes[str(record.get("key"))] = record.get("hash")
        elif record["op"] == "end" and record.get("stage"):
            fields = ("status", "key", "hash", "cached")
            ends[str(record["stage"])] = {field: record.get(field) for field in fields}
    for end in ends.values():
        end["hash"] = end["hash"] or hashes.get(str(end["key"]))
    return before if isinstance(before, dict) else None, ends


def _add_datasets(parent: Spool, params: Mapping[str, Any], entry: dvc_lock.Entry) -> None:
    """Send the datasets of the experiment as inputs of the parent: each by its name in params.yaml and the
    hash of the file in outputs/inputs that pins it."""
    known = [
        item["name"] for _, record in parent.read() if record["op"] == "inputs" for item in record["data"]
    ]
    data = [
        {"name": name, "digest": entry.deps[pins], "context": context}
        for key, pins, context in DATASETS.get(entry.stage, ())
        if (name := public(params.get(entry.stage, {}).get(key))) and name not in known and pins in entry.deps
    ]
    if data:
        parent.append("inputs", data=data)


def _add_entry(parent: Spool, where: Where, entry: dvc_lock.Entry, key: str) -> None:
    """Send the entry after the run `key`, which ended before DVC wrote it."""
    tags, inputs = {"op": "tags", "tags": entry.tags()}, {"op": "inputs", "data": entry.data()}
    Spool.after(key, where, tags, inputs)
    parent.append("entry", key=key, hash=entry.hash)


def _create_run(parent: Spool, params: Mapping[str, Any], where: Where, entry: dvc_lock.Entry) -> None:
    tags = {"dvc.cached": "true", "dvc.stage": entry.stage, **entry.tags()}
    spool = Spool.create(name=entry.title, parent=parent.key, shared=False, tags=tags, **where)
    spool.append("params", params={k: str(v) for k, v in section(params, *entry.words).items()})
    spool.append("inputs", data=entry.data())
    spool.append("origin", hash=entry.hash, parent=parent.key, title=entry.title, metrics=entry.metrics())
    spool.append("end", status="FINISHED")
    child = {"child": entry.title, "stage": entry.stage, "key": spool.key}
    parent.append("end", status="FINISHED", hash=entry.hash, cached=True, **child)
