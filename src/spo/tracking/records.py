"""Records of a spool as calls of MLflow, and the meaning of its answers."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spo.runtime.files import digest
from spo.runtime.messages import one_line, redact
from spo.tracking import answers, logged_models
from spo.tracking.spool import Spool

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"  # environment: seconds
BATCH = 1000  # the most metrics that MLflow takes in one call; params and tags: 100
LONGEST_WAIT = 30  # seconds that a server may ask to wait before another attempt (Retry-After)
DELETED = "deleted"  # MLflow's lifecycle stage


class Refused(ValueError):
    """A record that can never be delivered."""


class Waiting(RuntimeError):
    """MLflow takes the records only when somebody has done what the message says; until then they stay.

    `then` says what becomes of them.
    """

    def __init__(self, message: str, then: str = "`spo sync` then delivers them") -> None:
        super().__init__(message)
        self.then = then


class Gone(LookupError):
    """The store has no such run any more."""


def is_missing(error: BaseException) -> bool:
    """Whether MLflow says that there is no such thing."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def is_refusal(error: BaseException) -> bool:
    """Whether MLflow answered, and will say no again; else it may be away, or its file damaged."""
    damaged = "sqlite3.DatabaseError" in str(error)
    return isinstance(error, Refused) or (answers.is_final(error) and not damaged)


def reason(error: BaseException) -> str:
    """Return the error in one line; without the name of its type where the message is ours."""
    if isinstance(error, Waiting | Gone):
        return str(redact(str(error)))
    return answers.meaning(error) or one_line(error)


def check_experiment(experiment: Any) -> None:
    """Check that an experiment is not deleted; whoever deleted it restores it, not we.

    Raises:
        Waiting: it was deleted.
    """
    if experiment.lifecycle_stage == DELETED:
        restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        raise Waiting(f"the experiment {experiment.name!r} was deleted; `{restore}` brings it back")


def load_mlflow() -> Any:
    """Import MLflow with short timeouts, no logs and no telemetry. The import takes 3 s."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault(TIMEOUT, "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.utils import request_utils
    from urllib3 import Retry

    # MLflow waits as long as a server asks for, be it hours, and has no setting for that
    request_utils.Retry = functools.partial(Retry, retry_after_max=LONGEST_WAIT)  # type: ignore[misc, assignment]

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we say their errors, in one line
    return mlflow


def literal(text: str) -> str:
    """Quote `text` for MLflow's filter language, which knows no escapes.

    Raises:
        Refused: it would end the string.
    """
    if "'" in text or "\\" in text:
        raise Refused(f"{text[:80]!r} cannot be searched for in MLflow: it has a quote or a backslash")
    return f"'{text}'"


def batches(
    records: Iterable[tuple[int, dict[str, Any]]],
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Group metrics that follow each other, up to BATCH points; all else comes one by one."""
    batch: list[dict[str, Any]] = []
    points, end = 0, 0
    for offset, record in records:
        size = max(1, len(record["metrics"])) if record["op"] == "metrics" else BATCH
        if batch and points + size > BATCH:
            yield end, batch
            batch, points = [], 0
        batch.append(record)
        points, end = points + size, offset
    if batch:
        yield end, batch


def call(client: Any, spool: Spool, run_id: str, records: list[dict[str, Any]]) -> None:
    """Send records of one kind by one of MLflow's calls."""
    from mlflow.entities import Metric, Param, RunTag

    record = records[0]
    if record["op"] in FURTHER:
        FURTHER[record["op"]](client, run_id, record)
        return
    match record["op"]:
        case "metrics":
            points = [Metric(k, v, r["time"], r["step"]) for r in records for k, v in r["metrics"].items()]
            client.log_batch(run_id, metrics=points)
        case "params":
            params = [Param(k, v) for k, v in record["params"].items()]
            for start in range(0, len(params), 100):
                client.log_batch(run_id, params=params[start : start + 100])
        case "tags":
            client.log_batch(run_id, tags=[RunTag(k, v) for k, v in record["tags"].items()])
        case "artifact":
            if record["sha256"] is None or digest(Path(record["path"])) != record["sha256"]:
                raise Refused(f"{record['path']}: changed or gone since it was logged")
            _log_artifact(client, run_id, Path(record["path"]), record["folder"])
        case "end":
            client.set_terminated(run_id, _status(spool, record), end_time=record["time"])


def _log_artifact(client: Any, run_id: str, path: Path, folder: str | None) -> None:
    """Log a file, and ask for the list of files: a login page in the server's place takes any upload."""
    with _time_for(path):
        client.log_artifact(run_id, str(path), folder)
        try:
            client.list_artifacts(run_id, folder)
        except Exception as error:
            if answers.is_page(error):
                raise


@contextlib.contextmanager
def _time_for(path: Path) -> Iterator[None]:
    """Let MLflow's requests take as long as an upload of the file may."""
    before = os.environ[TIMEOUT]
    os.environ[TIMEOUT] = str(max(int(before), answers.seconds_for(path)))
    try:
        yield
    finally:
        os.environ[TIMEOUT] = before


def _log_image(client: Any, run_id: str, record: dict[str, Any]) -> None:
    """Log an image by key and step, once: MLflow gives each call files of its own."""
    from PIL import Image

    path, key, step = Path(record["path"]), str(record["key"]), int(record["step"])
    name = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{record['time']}+"
    paths = [file.path for file in client.list_artifacts(run_id, "images")]
    if any(p.startswith(name) and p.endswith("+compressed.webp") for p in paths):  # the last file of a call
        return
    if not path.is_file():
        raise Refused(f"{path}: gone since it was logged")
    with _time_for(path), Image.open(path) as image:
        image.load()
        client.log_image(run_id, image, key=key, step=step, timestamp=record["time"], synchronous=True)


def _dataset(name: str, digest: str, context: str | None = None) -> Any:
    """Return what a stage read as MLflow's dataset: path and DVC's hash, by which `dvc` finds it again."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"path": name, "md5": digest})
    tags = [InputTag("mlflow.data.context", context)] if context else []
    return DatasetInput(Dataset(name=name, digest=digest[:36], source_type="dvc", source=source), tags)


def _log_inputs(client: Any, run_id: str, record: dict[str, Any]) -> None:
    client.log_inputs(run_id, datasets=[_dataset(**item) for item in record["data"]])


def _status(spool: Spool, record: dict[str, Any]) -> str:
    """Return a run's status; of one that children share, the worst of their last attempts."""
    if "child" not in record:
        return str(record["status"])
    ends = {r["child"]: r["status"] for _, r in spool.read() if r["op"] == "end" and "child" in r}
    return max(ends.values(), key=("FINISHED", "KILLED", "FAILED").index)


FURTHER = {"inputs": _log_inputs, "image": _log_image, "model": logged_models.log}
