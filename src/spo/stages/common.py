"""What every stage does around its one library call: lock, time, track, write."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from spo.config import Params
from spo.runtime.watchdog import tied_to_starter
from spo.tracking import runs
from spo.tracking.dvc_lock import read_metrics

SCRATCH = Path(".spo")
METRICS = Path("reports/metrics")
TRAINING = Path("reports/training")


@contextmanager
def stage(name: str, params: Params, item: str | None = None) -> Iterator[Any]:
    """One writer at a time, and one MLflow run; yields the run.

    Raises:
        ValueError: another process runs this very stage.
    """
    full = f"{name}-{item}" if item else name
    lock = SCRATCH / "locks" / full
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            if first_process():  # the processes of one training hold it together
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"stage {full} already runs in this folder; wait for it or stop it") from None
        started = time.monotonic()
        began = time.time()
        with runs.stage_run(name, params.model_dump(), name=item) as run, tied_to_starter():
            yield run
            _log_written(run, full, began)
            run.log_metrics({"seconds": time.monotonic() - started}, step=0)


def _log_written(run: runs.Run, full: str, began: float) -> None:
    """What the stage wrote for `dvc metrics` goes to MLflow too, unless it was logged."""
    name = "comparisons" if full == "report" else full.replace("-", "_")
    path = METRICS / f"{name}.json"
    if path.exists() and path.stat().st_mtime >= began - 1:
        known = {"seconds", *run.summary()}
        run.log_metrics({k: v for k, v in read_metrics(path).items() if k not in known})


def first_process() -> bool:
    """Whether this is the only process or the first of several; asked before any of them is connected."""
    return os.environ.get("RANK", "0") == "0"


def fingerprint(sections: Sequence[BaseModel | str | int], inputs: Iterable[Path]) -> str:
    """Names the resume state of a stage: params, the files it reads, and the package's code.

    State made from anything else has another name, so it is never resumed.
    """
    digest = hashlib.sha256()
    for section in sections:
        text = section.model_dump_json() if isinstance(section, BaseModel) else str(section)
        digest.update(text.encode() + b"\0")
    code = Path(__file__).parents[1]
    for root in (*inputs, *(code / part for part in _CODE)):
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


_CODE = (
    *("backbones", "data", "diffusion", "methods", "preference", "rewards", "scenes/oracle.py", "stages"),
    *("optimizer.py", "processes.py", "train.py", "types.py"),
)


def write_json(path: Path, content: Any) -> None:
    """Atomically, so that an interrupted stage leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.rename(path)


def read_json(path: str | Path, what: str) -> Any:
    """
    Raises:
        ValueError: it is not there or not whole; with the command that makes it.
    """
    try:
        return json.loads(require(path, what).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not whole ({error}); run `make repro`") from None


class Curve:
    """Step metrics: to MLflow at once, to a CSV for DVC's plots at the end.

    Kept line by line in `scratch`, so that a resumed stage ends with the whole curve; steps that are
    run again after a resume give the same values and replace the earlier ones.
    """

    def __init__(self, run: Any, scratch: Path) -> None:
        self._run, self._file, self._mute = run, scratch / "curve.jsonl", not first_process()
        self.rows: dict[int, dict[str, float]] = {}
        scratch.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                if line.endswith("}"):  # the last line of a killed stage may be torn
                    row = json.loads(line)
                    self.rows.setdefault(int(row.pop("step")), {}).update(row)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._mute:
            return
        self.rows.setdefault(step, {}).update(metrics)
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._run.log_metrics(metrics, step=step)

    def write(self, path: Path) -> None:
        rows = sorted(self.rows.items())
        columns = list(dict.fromkeys(k for _, row in rows for k in row))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", *columns], lineterminator="\n")
            writer.writeheader()
            writer.writerows({"step": s, **{k: f"{v:.6g}" for k, v in r.items()}} for s, r in rows)


def require(path: str | Path, what: str) -> Path:
    """A path that must be there.

    Raises:
        ValueError: with the command that makes it.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no {what} there; run `make repro` or `dvc pull data.dvc`")
    return path
