"""How many processor cores a process may use, and how torch's threads share them with other work.

By default the threads of OpenMP wait for each other in a loop. On cores with other work each such wait costs
a time slice of the scheduler, and a forward of the UNet has about a thousand (docs/running.md has the times).
So they sleep, unless the user says otherwise.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

THREADS = "OMP_NUM_THREADS"
POLICY = "OMP_WAIT_POLICY"
# how OpenMP's threads wait: the standard, libgomp's and Intel's own variable
WAITING = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container


def count() -> int:
    """Return the number of cores of this process: by its affinity and its container's quota, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        time, period = QUOTA.read_text(encoding="utf-8").split()
        return max(1, min(allowed, int(time) // int(period)))
    except (OSError, ValueError):  # no such file, or the word max
        return allowed


def set_threads(variables: MutableMapping[str, str], processes: int = 1) -> str:
    """Set OpenMP's variables that are not set, and return one line with the settings and their reason.

    Must come before torch is imported, which reads them. The cores are shared by `processes`.
    """
    cores = count()
    if THREADS in variables:
        threads = f"threads: {variables[THREADS]}, as {THREADS} says"
    else:
        variables[THREADS] = str(max(1, cores // processes))
        sharing = f" for {processes} processes" if processes > 1 else ""
        threads = f"threads: {variables[THREADS]} ({cores} core{'s' * (cores > 1)}{sharing})"
    if given := [name for name in WAITING if name in variables]:
        return f"{threads}; they wait as {given[0]} says"
    variables[POLICY] = "PASSIVE"
    if variables[THREADS] == "1":
        return threads
    return f"{threads}; they sleep while they wait, so that other work on these cores costs little ({POLICY})"
