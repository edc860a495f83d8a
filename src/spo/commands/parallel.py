"""Run stages of dvc.yaml that do not depend on each other in parallel, by DVC.

`dvc repro` goes through the DAG in one process, which waits for the command of each stage; no setting of DVC
changes that. But DVC locks its repository only while it hashes and writes dvc.lock, and meanwhile the paths
that a stage reads and writes. So several `dvc repro --single-item STAGE` can run in parallel.
"""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from typing import Any

from spo.runtime import cores
from spo.runtime.signals import children

COMMAND = (sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item")
OUTPUT = {"TQDM_MININTERVAL": "5", "PYTHONUNBUFFERED": "1"}  # a progress bar is a line every five seconds
NOISE = re.compile(  # DVC's advice
    r"\s*(?:|> .*|Use `dvc push` .*|To track the changes with git, run:|git add .*|.*auto staging.*)"
)
TRUE = ("1", "true", "t", "yes", "y", "on")  # as accelerate reads its variables
Needs = Mapping[str, Collection[str]]


def jobs_for(given: int | None, processes: int) -> tuple[int, str]:
    """Return how many stages run in parallel, and why.

    One with a GPU, which they would share; else one for each core, or for each group of `processes` cores.
    """
    if given is not None:
        return given, "--jobs"
    if device := accelerator():
        return 1, f"they would share the {device}; --jobs N runs N at a time"
    number = cores.count()
    each = f", {processes} processes a stage" if processes > 1 else ""
    return max(1, number // processes), f"{number} cores{each}"


def accelerator() -> str | None:
    """Return the kind of this machine's GPU; None without one."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE:
        return None
    import torch

    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else None


def schedule(
    needs: Needs,
    jobs: int,
    start: Callable[[str, int], Future[Any]],
    is_success: Callable[[Future[Any]], bool],
    is_stopped: Callable[[], bool] = lambda: False,
) -> tuple[list[str], list[str]]:
    """Run each stage once the stages it needs are done, at most `jobs` in parallel, the longest chain first.

    After a failure or a stop no stage is started; those that run are waited for.

    Args:
        needs: {stage: the stages that must be done before}; names that are no stage count as done.
        start: starts a stage, given how many may run in parallel at that time (itself included).
        is_success: whether a stage has ended successfully.

    Returns:
        The stages that failed, and those that were not started.
    """
    graph = {stage: [need for need in needs[stage] if need in needs] for stage in needs}
    behind = dict.fromkeys(graph, 0)  # the length of the longest chain of stages from each on
    for stage in reversed([*TopologicalSorter(graph).static_order()]):
        for need in graph[stage]:
            behind[need] = max(behind[need], behind[stage] + 1)
    order = sorted(graph, key=behind.__getitem__, reverse=True)
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    ready: list[str] = []
    running: dict[Future[Any], str] = {}
    failed: list[str] = []
    left = list(graph)
    while True:
        ready = sorted([*ready, *sorter.get_ready()], key=order.index)
        share = min(jobs, len(running) + len(ready))
        while ready and len(running) < jobs and not failed and not is_stopped():
            running[start(ready[0], share)] = ready[0]
            left.remove(ready.pop(0))
        if not running:
            return failed, left
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            stage = running.pop(future)
            if is_success(future):
                sorter.done(stage)
            else:
                failed.append(stage)


def run(needs: Needs, jobs: int, processes: int, variables: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Run stages by DVC, `jobs` in parallel, each line of them after the stage's name; returns as `schedule`.

    A stage gets the cores divided by the number of stages at that time, unless OMP_NUM_THREADS is set.

    Ctrl-C and SIGTERM are raised (see `children`) after all stages have saved and ended.
    """
    width = max(map(len, needs))
    printing = threading.Lock()
    with children() as started, ThreadPoolExecutor(jobs) as pool:

        def work(stage: str, share: int) -> int:
            threads = {cores.THREADS: str(max(1, cores.count() // (share * processes)))}
            process = started.start(
                [*COMMAND, stage],
                env={**threads, **os.environ, **OUTPUT, **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            )
            assert process.stdout is not None
            for line in process.stdout:  # each state of a progress bar is one
                if not NOISE.fullmatch(line.rstrip()):
                    with printing:
                        print(f"{stage:{width}} | {line.rstrip()}", flush=True)
            return process.wait()

        return schedule(
            needs,
            jobs,
            lambda stage, share: pool.submit(work, stage, share),
            lambda future: future.result() == 0,
            lambda: bool(started.received),
        )
