"""`spo keep NAME`: keep a run's results in git, for the page of later runs to compare with."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spo.config import METHODS, Params
from spo.runtime.files import read_csv, read_json, write_json
from spo.runtime.messages import public
from spo.runtime.workspace import METRICS, TRAINING
from spo.tracking import dvc_lock
from spo.tracking.provenance import flatten


def run(params: Params, name: str) -> Path:
    """Write reports/runs/NAME.json: the parameters, comparisons and validations of the run in reports/.

    Raises:
        ValueError: a name that is no file name, or no report of these parameters.
    """
    from spo.evaluation import kept_runs, results

    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"keep: {name!r}: a name is of letters, digits, - and _")
    rows = results.read_comparisons()
    settings = params.model_dump(mode="json", exclude=set(kept_runs.WITHOUT_EFFECT))
    _check_report(settings)
    path = kept_runs.FOLDER / f"{name}.json"
    content = {
        "params": public(settings),
        "comparisons": [{key: row[key] for key in results.SHOWN} for row in rows],
        "courses": _courses({row["method"] for row in rows}),
    }
    write_json(path, content)
    return path


def _check_report(settings: dict[str, Any]) -> None:
    entry = dvc_lock.read().get("report")
    if entry is None:
        raise ValueError("keep: dvc.lock has no report; run `spo repro` first")
    made, now = (flatten(p) for p in (entry.params.get("params.yaml", {}), settings))
    for key in now:
        if key in made and made[key] != now[key]:
            raise ValueError(
                f"keep: the report is of a run with {key} = {json.dumps(made[key])}, params.yaml has "
                f"{json.dumps(now[key])}; run `spo repro` first"
            )


def _courses(methods: set[str]) -> dict[str, Any]:
    """The course of each method's quality over compute, where it was measured."""
    from spo.evaluation.efficiency import course
    from spo.methods import method_spec

    courses = {}
    for method in (m for m in METHODS if m in methods):
        curve, trained = TRAINING / f"{method}.csv", METRICS / f"align_{method}.json"
        first = [METRICS / f"{key}.json" for key in method_spec(method).trained_first]
        if not all(path.exists() for path in (curve, trained, *first)):
            continue
        facts = [read_json(path, "metrics") for path in (trained, *first)]
        measured = course(read_csv(curve, "training curve"), facts[0], facts[1:])
        if measured is not None:
            courses[method] = {"column": measured[0], **asdict(measured[1])}
    return courses
