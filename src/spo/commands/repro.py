"""`spo repro`: a `dvc repro` with one parent run, also if DVC finds nothing to do."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from spo.config import Params
from spo.tracking import dvc_lock, runs

DVC = (sys.executable, "-m", "dvc")


def run(params: Params, arguments: Sequence[str] = ()) -> int:
    """`dvc repro ARGUMENTS`; its exit status. All stages that it skipped are recorded in MLflow."""
    told = params.model_dump()
    parent = runs.open_parent(told)
    status = "KILLED"
    try:
        environment = {**os.environ, runs.PARENT_VARIABLE: parent.key} if parent.key else None
        code = subprocess.run([*DVC, "repro", *arguments], env=environment).returncode
        status = "FAILED" if code else "FINISHED"
    finally:
        # which stages a partial or failed repro came to, only the stages that ran know: they told
        whole = status == "FINISHED" and not arguments
        runs.close_parent(parent, told, status, dvc_lock.read() if whole else ())
        if whole:
            _remember()
        runs.sync(params.tracking)
    return code


def record_if_new(params: Params) -> bool:
    """Record a whole repro that ran nowhere here (pulled, or a bare `dvc repro` that did nothing).

    Not if params.yaml, code or data differ from dvc.lock, or it was recorded before.
    """
    if not Path("dvc.lock").exists() or _recorded() == _digest():
        return False
    if runs.last_covers():  # a bare `dvc repro`, in which stages ran
        _remember()
        return False
    if subprocess.run([*DVC, "status", "--quiet"], capture_output=True).returncode != 0:
        return False
    told = params.model_dump()
    runs.close_parent(runs.open_parent(told), told, "FINISHED", dvc_lock.read())
    _remember()
    return True


def _digest() -> str:
    return hashlib.sha256(Path("dvc.lock").read_bytes()).hexdigest()


def _memory() -> Path:
    return Path(".spo/parents/recorded")


def _recorded() -> str:
    return _memory().read_text() if _memory().exists() else ""


def _remember() -> None:
    """This dvc.lock is in MLflow."""
    if Path("dvc.lock").exists():
        _memory().parent.mkdir(parents=True, exist_ok=True)
        _memory().write_text(_digest())
