"""The frame of every stage: lock, MLflow run, watchdog, time and metrics."""

import fcntl
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from spo.config import Params
from spo.runtime import processes
from spo.runtime.files import remove, write_json, write_text
from spo.runtime.messages import TransientError
from spo.runtime.workspace import METRICS, SCRATCH
from spo.tracking import runs
from spo.tracking.dvc_lock import read_metrics
from spo.tracking.records import Run

NOTHING = "nothing.json"  # in an output folder of a stage that had nothing to do
NO_CURVE, NO_METRICS, NO_SCORES = "step\n", "{}\n", "index,prompt,seed\n"
NO_ACCURACY = '{"accuracy": {}, "n": 0}\n'


@contextmanager
def stage(name: str, params: Params, variant: str | None = None) -> Iterator[Run]:
    """Run the body as the only process of a stage (and variant), within an MLflow run; yields the run."""
    full = f"{name}-{variant}" if variant else name
    lock = SCRATCH / "locks" / full
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w", encoding="utf-8") as file:
        try:
            if processes.is_main_process():  # one lock for all processes of a training
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TransientError(
                f"stage {full} already runs in this folder; wait for it or stop it"
            ) from None
        if processes.is_started_by_others():
            from spo.training import distributed

            distributed.any_rank(False)  # until the main process has the lock
        started, began = time.monotonic(), time.time()
        with runs.stage_run(name, params.model_dump(), name=variant) as run, processes.tied_to_starter():
            yield run
            # the seconds in the metrics file are those of all processes of a training that was resumed
            run.log_metrics({"seconds": time.monotonic() - started, **_written(full, began)})


def write_nothing(title: str, why: str, folders: Iterable[Path], files: Mapping[Path, str]) -> None:
    """Say that a stage has nothing to do, and write the outputs that DVC expects.

    Args:
        folders: outputs, then with NOTHING alone.
        files: outputs with a text that their readers take for no result, as NO_METRICS.
    """
    if processes.is_main_process():
        print(f"spo: {title}: nothing to do: {why}", file=sys.stderr)
        for folder in folders:
            remove(folder)
            write_json(folder / NOTHING, {"nothing to do": why})
        for path, text in files.items():
            write_text(path, text)


def of_suite(folder: Path, suite: str | None) -> Path:
    """The folder of a suite of prompts in a folder of results; without a suite, the folder itself."""
    return folder if suite is None else folder / "suites" / suite


def run_name(variant: str, suite: str | None) -> str:
    """The name of a variant's stage in locks, runs and metrics files."""
    return variant if suite is None else f"{variant}-suite-{suite}"


def _written(full: str, began: float) -> dict[str, float]:
    """Return what the stage wrote to its file in METRICS; nothing if it wrote none."""
    path = METRICS / f"{full.replace('-', '_')}.json"
    return read_metrics(path) if path.exists() and path.stat().st_mtime >= began - 1 else {}
