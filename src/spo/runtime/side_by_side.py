"""Tasks that depend on each other, several at the same time: each starts when all that it needs is done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import cache
from typing import Any

Needs = Mapping[str, Collection[str]]


@dataclass(frozen=True)
class Outcome:
    """Names of tasks: those that ended well, those that failed, and those that were not started."""

    done: list[str]
    failed: list[str]
    left: list[str]


def run(
    needs: Needs,
    at_once: int,
    start: Callable[[str, int], Future[Any]],
    is_success: Callable[[Future[Any]], bool],
    is_stopped: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run all tasks, at most `at_once` at the same time; those with the longest chain behind them first.

    After a failure or a stop no task is started; those that run are waited for.

    Args:
        needs: {task: the tasks that must be done before}; names that are no task count as done.
        start: starts a task, given how many may run at the same time as things are (itself included).
        is_success: whether a task that has ended did what it should.
    """
    order = sorted(needs, key=_chain_lengths(needs).__getitem__, reverse=True)
    outcome, running = Outcome([], [], order), dict[Future[Any], str]()
    while True:
        if not outcome.failed and not is_stopped():
            ready = [task for task in outcome.left if not _open(needs, task, outcome.done)]
            share = min(at_once, len(running) + len(ready))
            for task in ready[: at_once - len(running)]:
                outcome.left.remove(task)
                running[start(task, share)] = task
        if not running:
            return outcome
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            (outcome.done if is_success(future) else outcome.failed).append(running.pop(future))


def _open(needs: Needs, task: str, done: Collection[str]) -> list[str]:
    """List the tasks that `task` still waits for."""
    return [need for need in needs[task] if need in needs and need not in done]


def _chain_lengths(needs: Needs) -> dict[str, int]:
    """Return for each task how many follow one another from it on."""

    @cache
    def length(task: str) -> int:
        return 1 + max((length(other) for other in needs if task in needs[other]), default=0)

    return {task: length(task) for task in needs}
