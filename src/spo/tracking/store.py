"""An MLflow store: how the records of a spool become runs in it.

A record keeps the time at which it was written, and a run is found again by its key, so a record that is
delivered twice (a stage was killed between the call and its mark) changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from spo.runtime.files import locked
from spo.runtime.messages import public, redact
from spo.tracking.answers import status
from spo.tracking.records import (
    DELETED,
    Gone,
    Waiting,
    batches,
    call,
    check_experiment,
    is_missing,
    is_refusal,
    literal,
    load_mlflow,
    reason,
)
from spo.tracking.spool import Spool, warn

AGAIN = "`spo sync` tries again"
SERVER_ARTIFACTS = "_MLFLOW_SERVER_ARTIFACT_ROOT"  # where MLflow's default experiment has its artifacts
KIND = ("mlflow.experimentKind", "custom_model_development")  # opens the UI in its model training view


def sqlite_uri(path: Path) -> str:
    """Return the URI of a sqlite file; a `?` is quoted, behind which SQLAlchemy reads options."""
    if "?" not in str(path):
        return f"sqlite:///{path}"
    return f"sqlite:///file:{quote(str(path), safe='')}?uri=true"  # with a `/` MLflow makes a folder `file:`


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite URI; None for another store."""
    name, _, options = uri.removeprefix("sqlite:///").partition("?")
    if not uri.startswith("sqlite:///"):
        return None
    if name.startswith("file:") and "uri=true" in options:
        name = unquote(name.removeprefix("file:"))
    return Path(name).absolute()


class Store:
    """An MLflow store, reached when it is first needed."""

    def __init__(self, uri: str) -> None:
        self.uri, self.name = uri, redact(uri)
        self._file = sqlite_file(uri)
        self._client: Any = None

    @staticmethod
    def _artifacts(file: Path) -> str:
        return (file.parent / "mlartifacts").as_uri()

    def deliver(self, spool: Spool) -> int:
        """Send the records that this store has not had; return their number.

        Raises:
            Waiting: experiment or run were deleted; the records stay.
            Exception: MLflow cannot be reached. What went before stays delivered.
        """
        if not spool.path.exists():
            return 0
        with spool.path.open("rb") as file:  # one process at a time delivers it
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                sent = self._deliver(spool)
            except Gone as error:  # the spool has all that was ever logged, so it can make the run anew
                warn(
                    f"{self.name}: {error}, e.g. deleted for good; what is in {spool.path} goes to a new one"
                )
                spool.mark(self.name, None, 0)
                sent = self._deliver(spool)
            # in this order: what is written while it is sent is not sent; after the end nothing is written
            if sent and spool.ended() and not spool.left(self.name):
                spool.remove()
        return sent

    def _deliver(self, spool: Spool) -> int:
        known = spool.state().get(self.name, {"run_id": None, "offset": 0})
        run_id, sent = known["run_id"], 0
        for offset, records in batches(spool.read(known["offset"])):
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
                run_id = self._send_or_lose(spool, run_id, records)
            spool.mark(self.name, run_id, offset)
            sent += len(records)
        return sent

    def _send_or_lose(self, spool: Spool, run_id: str, records: list[dict[str, Any]]) -> str | None:
        """Send records; return the run's id, or None if the store has lost a run that another spool made.

        Raises:
            Gone: the store has no such run, which this spool made.
        """
        try:
            self._send(spool, run_id, records)
        except Gone as error:
            if spool.header().get("op") == "create":
                raise
            for record in records:
                spool.set_aside(record, str(error))
            return None
        return run_id

    def connect(self) -> Any:
        """Return the client. One process sets up a new sqlite file: several at once break its migration."""
        if self._client is None:
            mlflow = load_mlflow()
            if self._file is None:
                self._client = mlflow.MlflowClient(self.uri)
                return self._client
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._file.with_name(f"{self._file.name}.lock")):
                with contextlib.closing(sqlite3.connect(self._file)) as connection:
                    connection.execute("PRAGMA schema_version")  # MLflow tries a broken file for minutes
                # else MLflow puts a folder's path as it is into SQL, and fails at its quotes
                os.environ[SERVER_ARTIFACTS] = self._artifacts(self._file)
                self._client = mlflow.MlflowClient(self.uri)
        return self._client

    def start_run(self, experiment: str, name: str, tags: dict[str, str], params: dict[str, str]) -> str:
        """Make a run without a spool; return its id."""
        from mlflow.entities import Param

        client = self.connect()
        run = client.create_run(self._experiment(experiment), run_name=name, tags=tags)
        pairs = [Param(k, v) for k, v in public(params).items()]
        for start in range(0, len(pairs), 100):
            client.log_batch(run.info.run_id, params=pairs[start : start + 100])
        return str(run.info.run_id)

    def _experiment(self, name: str) -> str:
        """Return an experiment's id; make it if it is new. A sqlite store has its artifacts beside it.

        Raises:
            Waiting: it was deleted, or MLflow takes no such name.
        """
        client = self.connect()
        folder = self._artifacts(self._file) if self._file else None
        try:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                try:
                    client.create_experiment(name, artifact_location=folder)
                except Exception:
                    if client.get_experiment_by_name(name) is None:  # or another process was faster
                        raise
                experiment = client.get_experiment_by_name(name)
        except Exception as error:
            if not is_refusal(error):
                raise
            if status(error) != 400:  # it is not the name
                raise Waiting(f"MLflow refuses the experiment {name!r} ({reason(error)})", AGAIN) from None
            why = f"MLflow takes no experiment of the name {name[:80]!r} ({reason(error)[:120]})"
            then = "but no store will take them under this name"
            raise Waiting(f"{why}; give another `name` in params.yaml", then) from None
        check_experiment(experiment)
        if KIND[0] not in experiment.tags:
            try:
                client.set_experiment_tag(experiment.experiment_id, *KIND)
            except Exception as error:
                if not is_refusal(error):  # without the right to change the experiment, runs are logged
                    raise
        return str(experiment.experiment_id)

    def _check_run(self, run_id: str) -> None:
        """Find out whether a run is the reason why the store refuses its records.

        Raises:
            Waiting: it, or its experiment, was deleted.
            Gone: it does not exist.
        """
        try:
            info = self.connect().get_run(run_id).info
        except Exception as error:
            if is_missing(error):
                raise Gone(f"there is no run {run_id}") from None
            raise
        if info.lifecycle_stage == DELETED:
            check_experiment(self.connect().get_experiment(info.experiment_id))
            raise Waiting(f"run {run_id} was deleted; `mlflow runs restore --run-id {run_id}` brings it back")

    def _create(self, key: str, record: dict[str, Any]) -> str:
        experiment = self._experiment(record["experiment"])
        existing = self._find(experiment, key)
        if existing is not None:
            return existing
        tags = {**record["tags"], "spo.key": key}
        if record["parent"]:
            parent = self._parent(experiment, record["parent"])
            tags |= {"mlflow.parentRunId": parent} if parent else {}
        named = {"start_time": record["time"], "run_name": record["name"], "tags": tags}
        try:
            return str(self.connect().create_run(experiment, **named).info.run_id)
        except Exception as error:
            if not is_refusal(error):
                raise
            raise Waiting(f"MLflow refuses the run {record['name']!r} ({reason(error)})", AGAIN) from None

    def _parent(self, experiment: str, key: str) -> str | None:
        """Return a parent's id by its key; a deleted run is still the parent."""
        spool = Spool.find(key)
        if spool is None:
            return self._find(experiment, key)
        waiting = None
        try:
            self.deliver(spool)
        except Waiting as error:
            waiting = error
        run_id = self._run_of(spool)
        if run_id is None and waiting is not None:
            raise waiting
        try:
            if run_id is not None and spool.header().get("op") == "create":
                self._check_run(run_id)
        except Waiting:
            pass
        except Gone:
            spool.mark(self.name, None, 0)
            self.deliver(spool)
        return self._run_of(spool)

    def _run_of(self, spool: Spool) -> str | None:
        run_id = spool.state().get(self.name, {}).get("run_id")
        return None if run_id is None else str(run_id)

    def _link(self, run_id: str, record: dict[str, Any]) -> None:
        """Link the run of a cached stage to the one that made its outputs, and copy its metrics.

        The parent gets them too. Only metrics of the whole run are copied (at step 0), not curves.
        """
        from mlflow.entities import Metric, RunTag

        client = self.connect()
        experiment = client.get_run(run_id).info.experiment_id
        made = f"tags.`dvc.lock_hash` = {literal(record['hash'])} and tags.`dvc.cached` = 'false'"
        origins = client.search_runs([experiment], made, order_by=["start_time DESC"], max_results=1)
        metrics = record["metrics"]
        if origins:
            metrics = {m.key: m.value for m in origins[0].data._metric_objs if m.step == 0} or metrics
        origin = origins[0].info.run_id if origins else "not in this store"
        now, title = record["time"], record["title"]
        client.log_batch(
            run_id,
            metrics=[Metric(k, v, now, 0) for k, v in metrics.items()],
            tags=[RunTag("origin_run_id", origin)],
        )
        parent = self._parent(experiment, record["parent"])
        if parent is None:
            return
        points = [Metric(f"{title}/{k}", v, now, 0) for k, v in metrics.items()]
        try:
            client.log_batch(parent, metrics=points)
        except Exception as error:
            if is_refusal(error):
                self._check_run(parent)
            raise

    def _find(self, experiment: str, key: str) -> str | None:
        """Return a run's id by its key, deleted or not: a second one would be made otherwise."""
        from mlflow.entities import ViewType

        wanted, every = f"tags.`spo.key` = {literal(key)}", ViewType.ALL
        matching = self.connect().search_runs([experiment], wanted, run_view_type=every, max_results=1)
        return str(matching[0].info.run_id) if matching else None

    def _send(self, spool: Spool, run_id: str, records: list[dict[str, Any]]) -> None:
        """Send records; what MLflow refuses for good is stored apart, so that it does not block the rest.

        Raises:
            Waiting, Gone: see `_check_run`.
        """
        try:
            if records[0]["op"] == "origin":
                self._link(run_id, records[0])
            else:
                call(self.connect(), spool, run_id, records)
        except Exception as error:
            if not is_refusal(error):
                raise
            self._check_run(run_id)
            if len(records) == 1:
                spool.set_aside(records[0], reason(error))
            else:
                half = len(records) // 2
                self._send(spool, run_id, records[:half])
                self._send(spool, run_id, records[half:])
