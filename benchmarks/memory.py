"""Peak memory of SPO's iteration beyond the loaded models: `python -m benchmarks.memory PARAMS SIDE PROMPTS`.

A process for each measurement, since a process's peak never falls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

MB = 2**20


def measure(params: Path, side: str, prompts: int) -> dict[str, float]:
    """MB when the models are loaded, and at the peak of an iteration, in a process of its own.

    Args:
        params: a params.yaml.
        side: ours or official.
    """
    command = [sys.executable, "-m", "benchmarks.memory", str(params), side, str(prompts)]
    # without it glibc retains a random part of the freed memory
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8", env=environment)
    measured: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return measured


def _measure_here(params: str, side: str, prompts: int) -> dict[str, float]:
    from benchmarks import models, spo
    from spo import config

    loaded = models.load(config.load(params))
    how = spo.settings(loaded, prompts, **spo.SHORT)
    before = psutil.Process().memory_info().rss / MB
    if side == "ours":
        spo.Ours(loaded, how).iteration()
    else:
        theirs = spo.Theirs(loaded, how, [], copied=False)
        theirs.start = models.perturb(theirs.algorithm.parameters())
        theirs.iteration()
    peak = _peak()
    return {"loaded": before, "peak": peak, "beyond": peak - before}


def _peak() -> float:
    """The most MB since this program began; getrusage's also knows the process that started it."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
