"""The `dvc repro` that started a process, if any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


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

    for process in psutil.Process().parents():
        try:
            yield process.pid, process.create_time(), process.cmdline()
        except psutil.Error:
            continue
