"""`spo keep`: save a run's comparisons in git, so that the report of another seed shows both."""

import json
from pathlib import Path

from spo.config import Params
from spo.evaluation import results, seeds
from spo.evaluation.seeds import NOT_COMPARED
from spo.runtime.files import write_json
from spo.tracking import dvc_lock
from spo.tracking.provenance import flatten


def run(params: Params) -> Path:
    """Write reports/seeds/SEED.json from the report of these parameters."""
    _check_report(params)
    path = seeds.FOLDER / f"{params.seed}.json"
    rows = [{key: row[key] for key in results.COLUMNS} for row in results.read_comparisons()]
    content = {"seed": params.seed, "settings": seeds.settings(params), "comparisons": rows}
    write_json(path, content)
    return path


def _check_report(params: Params) -> None:
    """Refuse a report of other parameters than those of params.yaml."""
    entry = dvc_lock.read().get("report")
    if entry is None:
        raise ValueError("keep: dvc.lock has no report; run `spo repro` first")
    shown = params.model_dump(mode="json", exclude=set(NOT_COMPARED) - {"seed"})
    made, now = flatten(entry.params.get("params.yaml", {})), flatten(shown)
    for key in now:
        if key in made and made[key] != now[key]:
            raise ValueError(
                f"keep: the report is of a run with {key} = {json.dumps(made[key])}, params.yaml has "
                f"{json.dumps(now[key])}; run `spo repro` first"
            )
