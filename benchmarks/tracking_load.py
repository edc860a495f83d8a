"""Requests of a training to the tracking server, and how many of them a server answers."""

from __future__ import annotations

import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from spo.api import load_params

CALLS = ("create_experiment", "get_experiment_by_name", "set_experiment_tag", "create_run", "get_run") + (
    *(
        "update_run_info",
        "log_batch",
        "log_metric",
        "log_param",
        "set_tag",
        "search_runs",
        "log_model_params",
    ),
    *("create_logged_model", "finalize_logged_model", "set_logged_model_tags", "record_logged_model"),
)
METRICS, SECONDS = 50, 10.0  # of a request: ten metrics of five iterations


def of_one_training() -> list[list[str]]:
    """Requests to the store, and rows in it, of trainings that log ten metrics an iteration."""
    return [_tracked(iterations) for iterations in (0, 200)]


def _tracked(iterations: int) -> list[str]:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    from spo.tracking import runs
    from spo.tracking.curve import Curve

    calls: list[str] = []
    params = load_params("smoke").model_dump()
    with tempfile.TemporaryDirectory() as folder, chdir(folder), _noted(SqlAlchemyStore, calls):
        began = time.monotonic()
        with runs.stage_run("align", params, "spo") as run:
            curve = Curve(run, Path("scratch"))
            curve.resume(0)
            for step in range(1, iterations + 1):
                curve.log({f"metric_{i}": math.sin(step + i) for i in range(10)}, step)
                time.sleep(0.1)
        seconds = time.monotonic() - began
        with sqlite3.connect("mlflow.db") as database:
            (rows,) = database.execute("select count(*) from metrics").fetchone()
    return [f"{iterations}", f"{len(calls)}", f"{calls.count('log_batch')}", f"{rows:,}", f"{seconds:.0f}"]


@contextmanager
def _noted(store: type, calls: list[str]) -> Iterator[None]:
    """Note the calls of a store's methods: each is a request to a server, except those within another."""
    inside: list[str] = []

    def note(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not inside:
                calls.append(name)
            inside.append(name)
            try:
                return method(*arguments, **named)
            finally:
                inside.pop()

        return call

    with ExitStack() as stack:
        for name in CALLS:
            if hasattr(store, name):
                stack.enter_context(patch.object(store, name, note(name, getattr(store, name))))
        yield


def of_a_server() -> list[list[str]]:
    """Log-batch requests a second that a server on this machine answers to one and to eight clients."""
    with tempfile.TemporaryDirectory() as folder, _server(folder) as uri:
        return [[str(METRICS), str(clients), f"{_rate(uri, clients):.0f}"] for clients in (1, 8)]


@contextmanager
def _server(folder: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(words, cwd=folder, **quiet)  # type: ignore[call-overload]
    try:
        uri = f"http://127.0.0.1:{port}"
        _wait_for(f"{uri}/health")
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _wait_for(address: str) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{address}: no answer within two minutes")


def _rate(uri: str, clients: int) -> float:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(uri)
    experiment = client.create_experiment(f"load of {clients}")
    runs = [client.create_run(experiment).info.run_id for _ in range(clients)]
    end = time.monotonic() + SECONDS

    def work(run: str) -> int:
        sent = 0
        while time.monotonic() < end:
            client.log_batch(run, [Metric(f"m{i}", 1.0, sent, sent) for i in range(METRICS)])
            sent += 1
        return sent

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(work, runs)) / SECONDS
