"""Run a command in a process group of its own, which ends as a whole with its caller."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spo.runtime.signals import FLOW_KILL

RUNNING: set[subprocess.Popen[str]] = set()


def execute(
    command: Sequence[str], variables: Mapping[str, str], log: Callable[[str], Any]
) -> tuple[int, list[str]]:
    """Run a command, each line of it to `log`: (exit status, lines).

    Whatever ends this call early (an error, Ctrl-C, a cancelled flow) ends the whole group: DVC alone
    would leave its stage behind, still writing.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "30", **variables}
    lines: list[str] = []
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    RUNNING.add(process)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                lines.append(line.rstrip())
                log(lines[-1])
        return process.wait(), lines
    except BaseException:
        end_group(process)
        raise
    finally:
        RUNNING.discard(process)


def end_all() -> None:
    """End the groups of all commands that run, in whichever thread."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(end_group, list(RUNNING)))


def end_group(process: subprocess.Popen[str]) -> None:
    """Send SIGTERM to the group, and SIGKILL to those left after FLOW_KILL seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        end = time.monotonic() + FLOW_KILL
        while time.monotonic() < end:
            process.poll()
            os.killpg(process.pid, 0)  # raises when no process is left
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
