"""`spo repro`: a `dvc repro` with one parent run, also if DVC finds nothing to do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from spo.config import Params
from spo.runtime.signals import run_in_foreground
from spo.tracking import cached_stages, dvc_lock, runs

DVC = (sys.executable, "-m", "dvc")


def run(params: Params, arguments: Sequence[str] = ()) -> int:
    """Run `dvc repro ARGUMENTS`, record the stages that it skipped, and return its exit status."""
    settings = params.model_dump()
    parent = runs.open_parent(settings)
    status = "KILLED"
    try:
        environment = {**os.environ, runs.PARENT_VARIABLE: parent.key} if parent.key else None
        code = run_in_foreground([*DVC, "repro", *arguments], environment)
        status = "FAILED" if code else "FINISHED"
    finally:
        # with arguments, or after an error, DVC has not come to every stage
        complete = status == "FINISHED" and not arguments
        runs.close_parent(parent, settings, status, dvc_lock.read() if complete else ())
        runs.sync(params.tracking)
    return code


def record_if_new(params: Params) -> bool:
    """Record a reproduction that has no parent run here: it was pulled, or `dvc repro` had nothing to do.

    Not if params.yaml, code or data differ from dvc.lock.
    """
    if cached_stages.is_recorded():
        return False
    if subprocess.run([*DVC, "status", "--quiet"], capture_output=True).returncode != 0:
        return False
    settings = params.model_dump()
    runs.close_parent(runs.open_parent(settings), settings, "FINISHED", dvc_lock.read())
    return True
