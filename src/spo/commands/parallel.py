"""Run stages of dvc.yaml that do not depend on each other in parallel, by DVC.

`dvc repro` goes through the DAG in one process, which waits for the command of each stage; no setting of DVC
changes that. But DVC locks its repository only while it hashes and writes dvc.lock, and meanwhile the paths
that a stage reads and writes. So several `dvc repro --single-item STAGE` can run in parallel.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from typing import Any

from spo.commands.progress import Progress
from spo.runtime import cores
from spo.runtime.signals import children

COMMAND = (sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item")
OUTPUT = {"TQDM_MININTERVAL": "2", "PYTHONUNBUFFERED": "1"}  # a progress bar is a line every two seconds
TRUE = ("1", "true", "t", "yes", "y", "on")  # as accelerate reads its variables
Needs = Mapping[str, Collection[str]]
Work = Mapping[str, float]  # of each stage, in any unit


def jobs_for(given: int | None, processes: int, needs: Needs, work: Work | None = None) -> tuple[int, str]:
    """Return how many stages run in parallel, and why.

    One with a GPU, which they would share. Else one for each core (or for each group of `processes` cores),
    but no more than keep busy beside the longest chain: threads of the stages use the cores that are left.
    """
    if given is not None:
        return given, "--jobs"
    if len(needs) == 1:
        return 1, "there is one"
    if device := accelerator():
        return 1, f"they would share the {device}; --jobs N runs N at a time"
    number = cores.count()
    each = f", {processes} processes a stage" if processes > 1 else ""
    busy = max(2, round(sum((work or dict.fromkeys(needs, 1.0)).values()) / longest(needs, work)))
    return max(1, min(number // processes, busy)), f"{number} cores{each}"


def longest(needs: Needs, work: Work | None = None) -> float:
    """Return the work of the longest chain of stages; without `work` the number of its stages."""
    return max(_behind(needs, work).values(), default=0.0)


def threads_for(share: int, processes: int) -> int:
    """Return the threads of each process of a stage, where `share` stages run at a time."""
    return max(1, cores.count() // (share * processes))


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
    work: Work | None = None,
) -> tuple[list[str], list[str]]:
    """Run each stage once the stages it needs are done, at most `jobs` in parallel, the longest chain first.

    After a failure or a stop no stage is started; those that run are waited for.

    Args:
        needs: {stage: the stages that must be done before}; names that are no stage count as done.
        start: starts a stage, given how many may run in parallel at that time (itself included).
        is_success: whether a stage has ended successfully.
        work: of each stage; without it all count the same.

    Returns:
        The stages that failed, and those that were not started.
    """
    behind = _behind(needs, work)
    order = sorted(needs, key=behind.__getitem__, reverse=True)
    sorter = TopologicalSorter(_graph(needs))
    sorter.prepare()
    ready: list[str] = []
    running: dict[Future[Any], str] = {}
    failed: list[str] = []
    left = list(needs)
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


def _graph(needs: Needs) -> dict[str, list[str]]:
    return {stage: [need for need in needs[stage] if need in needs] for stage in needs}


def _behind(needs: Needs, work: Work | None) -> dict[str, float]:
    """The work of the longest chain of stages from each on, itself included."""
    graph, behind = _graph(needs), dict.fromkeys(needs, 0.0)
    for stage in reversed([*TopologicalSorter(graph).static_order()]):
        behind[stage] += work[stage] if work else 1.0
        for need in graph[stage]:
            behind[need] = max(behind[need], behind[stage])
    return behind


def run(
    needs: Needs,
    jobs: int,
    processes: int,
    variables: Mapping[str, str],
    progress: Progress,
    work: Work | None = None,
) -> tuple[list[str], list[str]]:
    """Run stages by DVC, `jobs` in parallel; returns as `schedule`.

    A stage gets the cores divided by the number of stages at that time, unless OMP_NUM_THREADS is set.

    Ctrl-C and SIGTERM are raised (see `children`) after all stages have saved and ended.
    """
    with children() as started, ThreadPoolExecutor(jobs) as pool:

        def follow(stage: str, share: int) -> int:
            process = started.start(
                [*COMMAND, stage],
                env={cores.THREADS: str(threads_for(share, processes)), **os.environ, **OUTPUT, **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            )
            return progress.follow(stage, process)

        return schedule(
            needs,
            jobs,
            lambda stage, share: pool.submit(follow, stage, share),
            lambda future: future.result() == 0,
            lambda: bool(started.received),
            work,
        )
