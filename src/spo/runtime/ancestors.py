"""The processes above this one, and the `dvc repro` among them, if any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from spo.runtime import forks

if TYPE_CHECKING:
    import psutil


def above() -> list[psutil.Process]:
    """Return the processes above this one, nearest first.

    A fork has those of the command that asked for it. That lives as long as the fork, or the fork is killed.
    """
    import psutil

    chain = [psutil.Process(), *psutil.Process().parents()]
    fork, command = forks.fork_and_command()
    for place, process in enumerate(chain):
        if process.pid == fork:
            return [*chain[1 : place + 1], *psutil.Process(command).parents()]
    return chain[1:]


def dvc_ancestor(processes: Iterable[tuple[int, float, list[str]]]) -> tuple[int, float] | None:
    """Return (pid, start time) of the first process that is `dvc repro` or `dvc exp`; nearest first."""
    for pid, started, command in processes:
        for i, word in enumerate(command):
            program = word == "dvc" or word.endswith(("/dvc", "/dvc/__main__.py"))
            if program and {"repro", "exp"} & set(command[i + 1 :]):
                return pid, started
    return None


def of_this_process() -> Iterator[tuple[int, float, list[str]]]:
    """Yield (pid, start time, command) of the processes above this one."""
    import psutil

    for process in above():
        try:
            yield process.pid, process.create_time(), process.cmdline()
        except psutil.Error:
            continue
