"""From the spool to an MLflow store: records become calls, in a thread of the stage or by `spo sync`.

A record keeps the time at which it was written, and a run is found again by its key, so a record that is
delivered twice (a stage was killed between the call and its mark) changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from spo.spool import Spool, digest, locked, one_line, redact, spools, warn

PERIOD, PAUSE = 5.0, 30.0  # seconds between deliveries, and after one that failed
PATIENCE = {"local": 120.0, "remote": 15.0}  # seconds that the end of a stage waits for the last delivery
BATCH = 1000  # the most metrics that MLflow takes in one call; params and tags: 100


class Refused(ValueError):
    """A record that can never be delivered."""


def is_refusal(error: BaseException) -> bool:
    """Whether MLflow answered, and will say no again; else it may be away."""
    codes = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")
    return isinstance(error, Refused) or getattr(error, "error_code", None) in codes


class Store:
    """An MLflow store, and how records become calls."""

    def __init__(self, uri: str) -> None:
        self.uri, self.name = uri, redact(uri)
        local = uri.startswith("sqlite:///")
        self._file = Path(uri.removeprefix("sqlite:///").split("?")[0]).absolute() if local else None
        self._client: Any = None
        self._experiments: dict[str, str] = {}

    def deliver(self, spool: Spool) -> int:
        """Send the records that this store has not had; their number.

        Raises:
            Exception: MLflow cannot be reached. What went before stays delivered.
        """
        if not spool.path.exists():
            return 0
        with spool.path.open("rb") as file:  # one process at a time delivers it
            fcntl.flock(file, fcntl.LOCK_EX)
            known = spool.state().get(self.name, {"run_id": None, "offset": 0})
            run_id, sent = known["run_id"], 0
            for offset, records in _batches(spool.read(known["offset"])):
                if records[0]["op"] == "create":
                    run_id = self._create(spool.key, records[0])
                elif records[0]["op"] == "adopt":
                    run_id = records[0]["run_id"]
                elif records[0]["op"] == "find":
                    run_id = self._find(self._experiment(records[0]["experiment"]), records[0]["key"])
                elif run_id is None:
                    for record in records:
                        spool.set_aside(record, "the store has not the run that it belongs to")
                else:
                    self._send(spool, run_id, records)
                spool.mark(self.name, run_id, offset)
                sent += len(records)
            # in this order: what is written while it is sent is not sent; after the end nothing is written
            if sent and spool.ended() and not spool.left(self.name):
                spool.remove()
        return sent

    def connect(self) -> Any:
        """The client. A new sqlite file is set up by one process: several at once break its migration."""
        if self._client is None:
            mlflow = load_mlflow()
            if self._file is None:
                self._client = mlflow.MlflowClient(self.uri)
                return self._client
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._file.with_name(f"{self._file.name}.lock")):
                with contextlib.closing(sqlite3.connect(self._file)) as connection:
                    connection.execute("PRAGMA schema_version")  # MLflow tries a broken file for minutes
                self._client = mlflow.MlflowClient(self.uri)
        return self._client

    def start_run(self, experiment: str, name: str, tags: dict[str, str], params: dict[str, str]) -> str:
        """A run without a spool; its id."""
        from mlflow.entities import Param

        client = self.connect()
        run = client.create_run(self._experiment(experiment), run_name=name, tags=tags)
        pairs = [Param(k, v) for k, v in redact(params).items()]
        for start in range(0, len(pairs), 100):
            client.log_batch(run.info.run_id, params=pairs[start : start + 100])
        return str(run.info.run_id)

    def _experiment(self, name: str) -> str:
        """Its id; made if it is new. Artifacts of a sqlite store lie in `mlartifacts` beside it."""
        if name not in self._experiments:
            client = self.connect()
            folder = (self._file.parent / "mlartifacts").as_uri() if self._file else None
            if client.get_experiment_by_name(name) is None:
                try:
                    client.create_experiment(name, artifact_location=folder)
                except Exception:
                    if client.get_experiment_by_name(name) is None:  # or another process was faster
                        raise
            self._experiments[name] = client.get_experiment_by_name(name).experiment_id
        return self._experiments[name]

    def _create(self, key: str, record: dict[str, Any]) -> str:
        experiment = self._experiment(record["experiment"])
        found = self._find(experiment, key)
        if found is not None:
            return found
        tags = {**record["tags"], "spo.key": key}
        if record["parent"]:
            parent = self._parent(experiment, record["parent"])
            tags |= {"mlflow.parentRunId": parent} if parent else {}
        run = self.connect().create_run(
            experiment, start_time=record["time"], run_name=record["name"], tags=tags
        )
        return str(run.info.run_id)

    def _parent(self, experiment: str, key: str) -> str | None:
        spool = Spool.find(key)
        if spool is None:
            return self._find(experiment, key)
        self.deliver(spool)
        return str(spool.state()[self.name]["run_id"])

    def _link(self, run_id: str, record: dict[str, Any]) -> None:
        """A skipped stage: the run that made what it gave, and its figures, here and in the parent.

        Of the origin only metrics of the whole run count, not curves: those that are at step 0.
        """
        from mlflow.entities import Metric, RunTag

        client = self.connect()
        experiment = client.get_run(run_id).info.experiment_id
        made = f"tags.`dvc.lock_hash` = '{record['hash']}' and tags.`dvc.cached` = 'false'"
        found = client.search_runs([experiment], made, order_by=["start_time DESC"], max_results=1)
        metrics = record["metrics"]
        if found:
            metrics = {m.key: m.value for m in found[0].data._metric_objs if m.step == 0} or metrics
        origin = found[0].info.run_id if found else "not in this store"
        now, title = record["time"], record["title"]
        client.log_batch(
            run_id,
            metrics=[Metric(k, v, now, 0) for k, v in metrics.items()],
            tags=[RunTag("origin_run_id", origin)],
        )
        parent = self._parent(experiment, record["parent"])
        if parent:
            client.log_batch(parent, metrics=[Metric(f"{title}/{k}", v, now, 0) for k, v in metrics.items()])

    def _find(self, experiment: str, key: str) -> str | None:
        found = self.connect().search_runs([experiment], f"tags.`spo.key` = '{key}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _send(self, spool: Spool, run_id: str, records: list[dict[str, Any]]) -> None:
        """What MLflow refuses for good is set aside, so that it does not block the rest."""
        try:
            if records[0]["op"] == "origin":
                self._link(run_id, records[0])
            else:
                _call(self.connect(), spool, run_id, records)
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(records) == 1:
                spool.set_aside(records[0], one_line(error))
            else:
                for record in records:
                    self._send(spool, run_id, [record])


def load_mlflow() -> Any:
    """MLflow, told to give up soon, to be quiet and to tell nobody. Its import takes 3 s."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def _batches(
    records: Iterable[tuple[int, dict[str, Any]]],
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Metrics that follow each other go together, up to BATCH points; all else one by one."""
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


def _call(client: Any, spool: Spool, run_id: str, records: list[dict[str, Any]]) -> None:
    from mlflow.entities import Metric, Param, RunTag

    record = records[0]
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
        case "inputs":
            client.log_inputs(run_id, datasets=[_dataset(**item) for item in record["data"]])
        case "artifact":
            if record["sha256"] is None or digest(Path(record["path"])) != record["sha256"]:
                raise Refused(f"{record['path']}: changed or gone since it was logged")
            client.log_artifact(run_id, record["path"], record["folder"])
        case "end":
            client.set_terminated(run_id, _status(spool, record), end_time=record["time"])


def _dataset(name: str, digest: str) -> Any:
    """What a stage read, as MLflow's dataset: the path, and DVC's hash, by which `dvc` finds it again."""
    from mlflow.entities import Dataset, DatasetInput

    source = json.dumps({"path": name, "md5": digest})
    return DatasetInput(Dataset(name=name, digest=digest[:36], source_type="dvc", source=source))


def _status(spool: Spool, record: dict[str, Any]) -> str:
    """Of a run that children share: the worst of what their last attempts came to."""
    if "child" not in record:
        return str(record["status"])
    ends = {r["child"]: r["status"] for _, r in spool.read() if r["op"] == "end" and "child" in r}
    return max(ends.values(), key=("FINISHED", "KILLED", "FAILED").index)


class Delivery:
    """Delivers spools in a thread, so that a slow or missing server costs the stage nothing.

    `watch` is called every PERIOD seconds, before a delivery.
    """

    def __init__(self, uri: str, which: list[Spool], watch: Callable[[], None] = lambda: None) -> None:
        self._store, self._spools, self._watch = Store(uri), which, watch
        self._stop, self._failed_at, self._why = threading.Event(), -PAUSE, ""
        load_mlflow()  # here: imports of two threads may get into each other's way
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """The last delivery, and one line of warning if something could not be delivered."""
        self._stop.set()
        self._thread.join(PATIENCE["local" if self._store.uri.startswith("sqlite") else "remote"])
        left = sum(spool.left() for spool in self._spools)
        if left:
            warn(
                f"{left} records not delivered to {self._store.name} ({self._why[:200] or 'no answer yet'}); "
                "they are kept in .spo/spool, `spo sync` delivers them"
            )

    def _work(self) -> None:
        while not self._stop.wait(PERIOD):
            with contextlib.suppress(Exception):  # a measurement that fails costs no delivery
                self._watch()
            self._try(self._spools)
        earlier = [s for s in spools() if s.header().get("uri") == self._store.name]
        self._try([*self._spools, *earlier])

    def _try(self, which: list[Spool]) -> None:
        if time.monotonic() - self._failed_at < PAUSE:
            return
        try:
            for spool in which:
                self._store.deliver(spool)
        except Exception as error:
            self._failed_at, self._why = time.monotonic(), one_line(error)
