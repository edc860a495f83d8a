"""Stages of dvc.yaml that do not depend on each other, run by DVC at the same time.

`dvc repro` goes through the DAG in one process, which waits for the command of each stage; no setting of DVC
changes that. But DVC locks its repository only while it hashes and writes dvc.lock, and beside that the paths
that a stage reads and writes. So one `dvc repro --single-item STAGE` each can run at the same time.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from spo.runtime import cores, side_by_side
from spo.runtime.signals import stops_passed_on

COMMAND = (sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item")
OUTPUT = {"TQDM_MININTERVAL": "5", "PYTHONUNBUFFERED": "1"}  # a progress bar is a line every five seconds
NOISE = re.compile(
    r"\s*(?:|> .*|Use `dvc push` .*|To track the changes with git, run:|git add .*|.*auto staging.*)"
)


def at_once(jobs: int | None, processes: int) -> tuple[int, str]:
    """Return how many stages run at the same time, and why.

    One with a GPU, which they would share; else one for each core, or for each group of `processes` cores.
    """
    if jobs is not None:
        return jobs, "--jobs"
    if device := accelerator():
        return 1, f"they would share the {device}; --jobs N runs N at a time"
    number = cores.count()
    each = f", {processes} processes a stage" if processes > 1 else ""
    return max(1, number // processes), f"{number} cores{each}"


def accelerator() -> str | None:
    """Return the kind of this machine's GPU; None without one."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "1",
        "true",
        "t",
        "yes",
        "y",
        "on",
    ):  # as accelerate
        return None
    import torch

    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else None


def run(
    needs: side_by_side.Needs, jobs: int, processes: int, variables: Mapping[str, str]
) -> side_by_side.Outcome:
    """Run stages by DVC, `jobs` at the same time, each line of them after the stage's name.

    A stage gets the cores divided by the number of stages at that time, unless OMP_NUM_THREADS is set.

    Raises:
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM, after all stages have saved and ended.
    """
    width = max(map(len, needs))
    printing = threading.Lock()
    with stops_passed_on() as (running, received), ThreadPoolExecutor(jobs) as pool:

        def work(stage: str, share: int) -> bool:
            threads = {cores.THREADS: str(max(1, cores.count() // (share * processes)))}
            process = subprocess.Popen(
                [*COMMAND, stage],
                env={**threads, **os.environ, **OUTPUT, **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            running.append(process)
            if signal.SIGTERM in received:  # it came while this one was started
                process.terminate()
            assert process.stdout is not None
            for line in lines(process.stdout):
                with printing:
                    print(f"{stage:{width}} | {line}", flush=True)
            code = process.wait()
            running.remove(process)
            return code == 0

        def start(stage: str, share: int) -> Future[bool]:
            return pool.submit(work, stage, share)

        def is_success(future: Future[Any]) -> bool:
            return bool(future.result())

        return side_by_side.run(needs, jobs, start, is_success, lambda: bool(received))


def lines(stream: IO[bytes]) -> Iterator[str]:
    """Yield what a stage prints line by line, each state of a progress bar as one, without DVC's advice."""
    rest = b""
    while block := stream.read1(65536):  # type: ignore[attr-defined]
        *complete, rest = re.split(rb"[\r\n]", rest + block)
        yield from _wanted(complete)
    yield from _wanted([rest])


def _wanted(complete: list[bytes]) -> Iterator[str]:
    for line in complete:
        text = line.decode(errors="replace").rstrip()
        if not NOISE.fullmatch(text):
            yield text
