"""Write a run's folder to an MLflow store. Writing it again has no effect."""

import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from spo.runtime.files import locked
from spo.runtime.messages import one_line, public, redact
from spo.runtime.workspace import home
from spo.tracking import dvc_lock, logged
from spo.tracking.records import Content, Run, folder, is_cached, read_curve, runs_here

WORSE = ("FINISHED", "KILLED", "FAILED")  # each than the one before
KIND = {"mlflow.experimentKind": "custom_model_development"}  # opens the UI in its model training view
SERVER_ARTIFACTS = "_MLFLOW_SERVER_ARTIFACT_ROOT"  # where MLflow's default experiment has its artifacts
HINTS = (  # patterns of error messages, with their meaning and remedy
    (
        "error code 401|401 Client|not authenticated",
        "not authorised (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
        "or MLFLOW_TRACKING_TOKEN",
    ),
    ("not in a valid JSON|JSONDecodeError", "not an answer of MLflow, but a page of a proxy or a login"),
    (
        r"The run (\w+) must be in the 'active' state",
        r"run \1 was deleted; `mlflow runs restore --run-id \1` brings it back",
    ),
    (
        r"'name' exceeds the maximum length of (\d+)",
        r"MLflow accepts no experiment name of more than \1 characters; give another `name` in params.yaml",
    ),
)


class Refused(RuntimeError):
    """MLflow, or a proxy before it, rejects some part of a run."""


@dataclass
class Sent:
    """The parts of a run that this process has sent."""

    run_id: str
    version: int = -1
    offset: int = 0  # of its curve, in bytes
    images: set[str] = field(default_factory=set)


def load_mlflow() -> Any:
    """Import MLflow with short timeouts, no logs and no telemetry. The import takes 3 s."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # a server may ask for hours of waiting
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we print their errors, in one line
    return mlflow


def reason(error: BaseException) -> str:
    """Return an error in one line, with a remedy."""
    text = str(redact(str(error))) if isinstance(error, Refused) else one_line(error)
    for pattern, hint in HINTS:
        if found := re.search(pattern, text):
            return found.expand(hint)
    return text


def tracking_uri(configured: str | None = None) -> str:
    """Return params.yaml's URI, else the environment's, else that of a SQLite file in this folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(home() / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """Return the URI of a SQLite file; a `?` is quoted, behind which SQLAlchemy reads options."""
    if "?" not in str(path):
        return f"sqlite:///{path}"
    return f"sqlite:///file:{quote(str(path), safe='')}?uri=true"  # with a `/` MLflow makes a folder `file:`


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite URI; None for another store."""
    name, _, options = uri.removeprefix("sqlite:///").partition("?")
    if not uri.startswith("sqlite:///"):
        return None
    if name.startswith("file:") and "uri=true" in options:
        name = unquote(name.removeprefix("file:"))
    return Path(name).absolute()


class Store:
    """An MLflow store, reached when it is first needed."""

    def __init__(self, uri: str) -> None:
        self.uri, self.name, self._file = uri, redact(uri), sqlite_file(uri)
        self._artifacts = (self._file.parent / "mlartifacts").as_uri() if self._file else None
        self._client: Any = None
        self._sent: dict[str, Sent] = {}

    def connect(self) -> Any:
        """Return the client. One process sets up a new SQLite file: several at once break its migration."""
        if self._client is None:
            mlflow = load_mlflow()
            if self._file is None or self._artifacts is None:
                self._client = mlflow.MlflowClient(self.uri)
                return self._client
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._file.with_name(f"{self._file.name}.lock")):
                with contextlib.closing(sqlite3.connect(self._file)) as connection:
                    connection.execute("PRAGMA schema_version")  # MLflow tries a broken file for minutes
                # else MLflow puts a folder's path unquoted into SQL, and fails at quotes in it
                os.environ[SERVER_ARTIFACTS] = self._artifacts
                self._client = mlflow.MlflowClient(self.uri)
        return self._client

    def experiment(self, name: str) -> str:
        """Return an experiment's id; make it if it is new. A SQLite store has its artifacts beside it."""
        client = self.connect()
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name, artifact_location=self._artifacts, tags=KIND))
            except Exception:
                found = client.get_experiment_by_name(name)  # another process may have been faster
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            raise Refused(f"the experiment {name!r} was deleted; `{restore}` brings it back")
        return str(found.experiment_id)

    def start_run(self, experiment: str, name: str, tags: dict[str, str], params: dict[str, str]) -> str:
        """Make a run without a folder of its own; return its id."""
        run = self.connect().create_run(self.experiment(experiment), run_name=name, tags=tags)
        logged.description(self.connect(), run.info.run_id, {}, public(params))
        return str(run.info.run_id)

    def find(self, experiment: str, **tags: str) -> str | None:
        """Return the id of the newest run with these tags, deleted or not."""
        from mlflow.entities import ViewType

        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        among = {"run_view_type": ViewType.ALL, "max_results": 1, "order_by": ["start_time DESC"]}
        found = self.connect().search_runs([self.experiment(experiment)], query, **among)
        return str(found[0].info.run_id) if found else None

    def deliver(self, run: Run) -> str:
        """Write all of a run that this store lacks, with its end the parent too; return its id.

        Raises:
            Refused: a part of it; the others are there.
        """
        with locked(folder() / "delivery"):  # two processes at once would make a run twice
            content = self._deliver(run)
            parent = run.parent
            if parent.exists() and (content["status"] or parent.key not in self._sent):
                parent.mark(self._deliver(parent)["version"])
            run.mark(content["version"])
            return self._sent[run.key].run_id

    def _deliver(self, run: Run) -> Content:
        content, refused = self._linked(run.read()), []
        if run.key not in self._sent:
            self._sent[run.key] = Sent(self._run(run, content))
        sent = self._sent[run.key]
        for what, send in self._parts(content, [child.read() for child in runs_here(run)], sent):
            try:
                send()
            except Exception as error:
                if logged.is_away(error):
                    raise
                refused.append(f"{what} of {content['name']}: {reason(error)[:300]}")
        if refused:
            del self._sent[run.key]
            if self._run(run, content) != sent.run_id:  # it has been deleted permanently
                return self._deliver(run)
            raise Refused(refused[0])
        sent.version = content["version"]
        return content

    def _parts(
        self, content: Content, below: list[Content], sent: Sent
    ) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield each part to be sent: its name, and the call that sends it."""
        call = partial(partial, client=self.connect(), run_id=sent.run_id)
        ended = {child["name"]: child for child in below if child["status"]}  # the last attempt of each
        worst = max((child["status"] for child in ended.values()), key=WORSE.index, default=None)
        status = content["status"] or worst
        end = content.get("end") or max((child["end"] for child in ended.values()), default=0)
        points = [(end, 0, content["metrics"])] if status else []
        curve = Path(content.get("curve", ""))
        rows, offset = read_curve(curve, sent.offset)
        yield "metrics", call(logged.metrics, rows=[*rows, *points])
        sent.offset = offset
        yield "images", call(logged.images, folder=Path(content.get("images", "none")), sent=sent.images)
        if content["version"] != sent.version:
            yield "description", call(logged.description, tags=content["tags"], params=content["params"])
            yield "data", call(logged.inputs, data=content["inputs"])
            for file in content["artifacts"]:
                yield f"artifact {file['path']}", call(logged.artifact, file=file)
            for model in content["models"]:
                at = [row for row in read_curve(curve)[0] if row[1] == model["step"]]
                yield f"model {model['step']}", call(logged.model, item=model, rows=[*at, *points])
        if status:
            yield "status", partial(self.connect().set_terminated, sent.run_id, status, end_time=end)

    def _run(self, run: Run, content: Content) -> str:
        """Return the id of a run by its key; make it if it is new. A parent is made before its children."""
        found = self.find(content["experiment"], **{"spo.key": run.key})
        if found:
            return found
        tags, parent = {**content["tags"], "spo.key": run.key}, run.parent
        if parent.key:  # a run here, or the id of one that MLflow has
            tags["mlflow.parentRunId"] = self._run(parent, parent.read()) if parent.exists() else parent.key
        named = {"start_time": content["start"], "run_name": content["name"], "tags": tags}
        made = self.connect().create_run(self.experiment(content["experiment"]), **named)
        return str(made.info.run_id)

    def _linked(self, content: Content) -> Content:
        """Link a cached stage's run to the one that made its outputs, which has its curve and images."""
        if not is_cached(content):
            return content
        made = {dvc_lock.HASH: content["tags"][dvc_lock.HASH], "dvc.cached": "false"}
        origin = self.find(content["experiment"], **made)
        known = {k: v for k, v in content.items() if not origin or k not in ("curve", "images")}
        return known | {"tags": content["tags"] | {"origin_run_id": origin or "not in this store"}}
