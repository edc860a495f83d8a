"""Link runs and dvc.lock: stages that ran get their entry, cached stages a run linked to an earlier one.

`spo repro` and the flow settle after DVC has ended, and so know every stage. Under a plain `dvc repro` each
stage settles its inputs when it starts, and no code of `spo` runs after the last stage: the last run gets no
hashes, and a cached stage that is no input of a stage that ran has no run.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from spo.runtime.files import locked
from spo.runtime.messages import one_line, public
from spo.tracking import dvc_lock
from spo.tracking.provenance import section, texts
from spo.tracking.records import Content, Run, is_cached, now, runs_here, warn

DATA = {  # of a stage: keys of its section of params.yaml that name data, and MLflow's context of that
    "pairs": {"source": "training"},
    "prompts": {"train": "training", "evaluation": "evaluation"},
}


def settle(parent: Run, params: Mapping[str, Any], reached: Collection[str]) -> list[str]:
    """Give stages that ran their entries of dvc.lock, and cached ones a run; return the names of these.

    DVC has finished the `reached` stages without error, so their entries in dvc.lock are current. Others are
    settled if they ran under this parent and their entries were written since it opened.
    """
    if not parent.exists():
        return []
    try:
        with locked(parent.path / "settle"):  # two stages at once would record the same cached stage
            return _settle(parent, params, reached)
    except (OSError, ValueError) as error:
        warn(f"cached stages are not recorded: {one_line(error)}")
        return []


def _settle(parent: Run, params: Mapping[str, Any], reached: Collection[str]) -> list[str]:
    before, ran, cached = parent.read()["lock"], last_runs(parent), []
    for name, entry in dvc_lock.read().items():
        if name in reached and name in DATA:
            known = parent.read()["inputs"]
            parent.add(inputs=[data for data in _data(params, entry) if data not in known])
        is_written = before.get(name) != entry.hash
        if name in ran and ran[name]["status"] == "FINISHED":
            if dvc_lock.HASH not in ran[name]["tags"] and (is_written or name in reached):
                Run(ran[name]["key"]).add(tags=entry.tags(), inputs=entry.data())
        elif name in reached and (entry.is_tracked or not is_written):  # else it ran, but logs no run
            _create_run(parent, params, entry)
            cached.append(name)
    return cached


def last_runs(parent: Run | None = None) -> dict[str, Content]:
    """Return the record of the last run of each stage of DVC, with its key."""
    found = [run.read() | {"key": run.key} for run in runs_here(parent)]
    return {run["stage"]: run for run in found if run["stage"]}


def has_run(parent: str, stage: str) -> bool:
    """Whether a stage ran to its end under the parent of this key."""
    last = last_runs(Run(parent)).get(stage, {})
    return last.get("status") == "FINISHED" and not is_cached(last)


def _data(params: Mapping[str, Any], entry: dvc_lock.Entry) -> list[dict[str, str]]:
    """The experiment's data: the name in params.yaml, and the hash of what pins it."""
    own, pin = params.get(entry.stage, {}), entry.deps.get(f"outputs/inputs/{entry.stage}.json")
    named = {public(own[key]): context for key, context in DATA[entry.stage].items() if own.get(key) and pin}
    return [{"name": name, "digest": str(pin), "context": context} for name, context in named.items()]


def _create_run(parent: Run, params: Mapping[str, Any], entry: dvc_lock.Entry) -> None:
    """Record a cached stage, with the numbers of the run that made it, else those of its metrics file."""
    made = [run for run in map(Run.read, runs_here()) if run["tags"].get(dvc_lock.HASH) == entry.hash]
    content = {
        "name": entry.title,
        "experiment": parent.read()["experiment"],
        "stage": entry.stage,
        "params": texts(section(params, *entry.title.split("-", 1))),
        "tags": {"dvc.cached": "true", "dvc.stage": entry.stage, **entry.tags()},
        "inputs": entry.data(),
        "metrics": made[-1]["metrics"] if made else entry.metrics(),
        "status": "FINISHED",
        "end": now(),
    }
    for path in map(Path, entry.outs):  # for a store that does not have the run that made them
        if path.parts[:2] == ("reports", "training"):
            content["curve"] = str(path.absolute())
        if (path / "samples").is_dir():
            content["images"] = str((path / "samples").absolute())
    Run.create(content, parent.key)
    if entry.stage == "report":
        parent.log_metrics(entry.metrics())
