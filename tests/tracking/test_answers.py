"""What a server answers: what is refused holds up nothing else, and all of it comes with `spo sync`."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spo import cli
from spo.tracking import delivery
from spo.tracking.curve import Curve
from spo.tracking.delivery import sync
from spo.tracking.records import runs_here
from spo.tracking.runs import stage_run

Answer = tuple[int, str, str]  # status, type of content, content
HTML = "<html><body>Please log in</body></html>"
PAGE: Answer = (200, "text/html", HTML)


@dataclass
class Server:
    """As much of MLflow's server as a run needs; `rule` may answer in its place."""

    uri: str = ""
    rule: Callable[[str, str, str], Answer | None] = lambda method, path, body: None
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)  # MLflow keeps where a run's artifacts are

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        self.requests.append(f"{method} {path}")
        text = body.decode(errors="replace")
        return self.rule(method, path, text) or (
            200,
            "application/json",
            json.dumps(self._own(method, path, body)),
        )

    def _own(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        name = path.partition("?")[0].rpartition("/")[2]
        if "mlflow-artifacts" in path:
            if method == "PUT":
                self.files[name] = body
            return {"files": [{"path": file, "is_dir": False} for file in self.files]}
        asked = json.loads(body) if body else {}
        if "experiments" in path:
            return {"experiment": {"experiment_id": "1", "name": "tiny", "lifecycle_stage": "active"}}
        run = self.runs.setdefault(self.run_id, {"status": "RUNNING", "metrics": {}})
        if name == "search":
            return {}
        run["status"] = asked.get("status", run["status"])
        run["metrics"] |= {m["key"]: m["value"] for m in asked.get("metrics", ())}
        info = {
            "run_id": self.run_id,
            "experiment_id": "1",
            "status": run["status"],
            "lifecycle_stage": "active",
            "artifact_uri": f"mlflow-artifacts:/1/{self.run_id}/artifacts",
        }
        return {"run": {"info": info, "data": {}}}


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server for the folder's runs, whose stages deliver at their end."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, kind, text = state.answer(self.command, self.path, body)
            self.send_response(status)
            for name, value in {"Content-Type": kind, **state.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PUT = do_PATCH = _answer  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    state.uri = f"http://127.0.0.1:{http.server_address[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", state.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    monkeypatch.setitem(delivery.DELIVERY, "remote", 60.0)
    yield state
    http.shutdown()
    http.server_close()


def run_stage(folder: Path) -> None:
    (folder / "curve.json").write_text('{"a": 1}', encoding="utf-8")
    with stage_run("pairs", {"name": "tiny", "seed": 3, "tracking": None}) as run:
        run.log_artifact(folder / "curve.json")
        run.log_metrics({"rows": 5.0})


def waiting() -> int:
    return sum(run.is_pending() for run in runs_here())


def of_artifacts(answer: Answer) -> Callable[[str, str, str], Answer | None]:
    return lambda method, path, body: answer if method == "PUT" and "curve.json" in path else None


@pytest.mark.parametrize("status", [400, 403, 413, 507])
@pytest.mark.parametrize("body", ["<html>No</html>", '{"detail": "no"}'])
def test_a_refused_artifact_is_named_and_the_run_ends_without_it(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str], status: int, body: str
) -> None:
    server.rule = of_artifacts((status, "text/html", body))
    run_stage(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert "artifact" in line and "curve.json" in line and str(status) in line and "spo sync" in line
    (run,) = server.runs.values()
    assert (run["status"], run["metrics"]["rows"]) == ("FINISHED", 5.0)
    server.rule = lambda method, path, body: None
    assert waiting() == 1 and sync() == (1, 0) and list(server.files) == ["curve.json"]


@pytest.mark.parametrize(
    ("status", "body"),
    [(413, "<html>too large</html>"), (422, '{"detail": "a number"}')],
)
def test_a_metric_refused_by_a_proxy_stays_and_the_others_arrive(
    folder: Path, server: Server, status: int, body: str
) -> None:
    """The proxy's body names no code of MLflow's."""
    answer = (status, "application/json", body)
    server.rule = lambda method, path, sent: answer if "log-batch" in path and '"loss"' in sent else None
    with stage_run("pairs", {"name": "tiny", "seed": 3, "tracking": None}) as run:
        curve = Curve(run, folder / "scratch")
        curve.resume(0)
        for step in range(8):
            curve.log({"loss" if step == 5 else f"m{step}": float(step)}, step)
    (found,) = server.runs.values()
    assert found["status"] == "FINISHED" and len([k for k in found["metrics"] if k[0] == "m"]) == 7
    server.rule = lambda method, path, body: None
    assert waiting() == 1 and sync() == (1, 0) and found["metrics"]["loss"] == 5.0


@pytest.mark.parametrize(
    "answer",
    [
        (401, "text/plain", "You are not authenticated"),
        (408, "text/plain", "late"),
        (425, "text/plain", "early"),
        (423, "application/json", "{}"),
        (429, "text/plain", "often"),
        (500, "application/json", '{"error_code": "INTERNAL_ERROR", "message": "no"}'),
        (502, "text/html", HTML),
        (503, "text/plain", "away"),
        PAGE,
    ],
)
def test_what_passes_by_itself_waits_and_sync_delivers_it_once(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str], answer: Answer
) -> None:
    server.rule = lambda method, path, body: answer
    run_stage(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert "the run stays in .spo/runs" in line and "spo sync" in line
    if answer[0] == 401:
        assert "not authorised (401): set MLFLOW_TRACKING_USERNAME" in line
    if answer is PAGE:
        assert "a page of a proxy or a login" in line

    server.rule = lambda method, path, body: None
    assert cli.main(["sync"]) == 0 and waiting() == 0
    (run,) = server.runs.values()
    assert (run["status"], run["metrics"]["rows"], list(server.files)) == ("FINISHED", 5.0, ["curve.json"])


def test_an_upload_that_a_login_page_took_is_sent_again(folder: Path, server: Server) -> None:
    """A redirect of an upload ends at a page, with 200."""
    server.rule = lambda method, path, body: PAGE if "mlflow-artifacts" in path else None
    run_stage(folder)
    assert server.files == {} and waiting() == 1
    server.rule = lambda method, path, body: None
    assert sync()[1] == 0 and list(server.files) == ["curve.json"]


@pytest.mark.parametrize("path", ["runs/create", "experiments/get-by-name"])
def test_a_run_that_may_not_be_made_waits_whole(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    server.rule = lambda method, at, body: (403, "text/plain", "Permission denied") if path in at else None
    run_stage(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert "403" in line and not any(run["metrics"] for run in server.runs.values())
    server.rule = lambda method, at, body: None
    assert sync()[1] == 0
    assert [run["status"] for run in server.runs.values()] == ["FINISHED"]


def test_a_server_that_asks_for_a_wait_of_a_day_is_not_waited_for(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time", SimpleNamespace(sleep=waits.append, time=time.time))
    server.headers = {"Retry-After": "86400"}
    server.rule = lambda method, path, body: (429, "text/plain", "often")
    with stage_run("pairs", {"name": "tiny", "tracking": None}):
        pass
    assert waiting() == 1 and set(waits) <= {0}
