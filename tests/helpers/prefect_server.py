"""A real Prefect server on the loopback interface, with a database of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_port


def wait_for(what: str, seconds: float, done: Callable[[], Any]) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := done():
            return found
        time.sleep(0.5)
    pytest.fail(f"{what}: not within {seconds:.0f} s")


@contextlib.contextmanager
def started(
    command: list[str], folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped in the end, and its group with it."""
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which Prefect finds it."""
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PREFECT_HOME": str(folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PATH": path}
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | own
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with started(command, folder, variables):
        variables["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        wait_for("the server", 600, lambda: _answers(variables))
        yield variables


def _answers(variables: dict[str, str]) -> bool:
    try:
        urllib.request.urlopen(f"{variables['PREFECT_API_URL']}/health", timeout=5).close()
    except OSError:
        return False
    return True


def ask(variables: dict[str, str], path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{variables['PREFECT_API_URL']}/{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
