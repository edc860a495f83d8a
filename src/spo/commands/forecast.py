"""About how long stages take here: the work of an earlier run, by the speed of this machine now.

Work is in GFLOP of matrix products of one thread that take as long as the stage. `work.json` has that of
known experiments; what ran in this folder counts instead.
"""

import time
from collections.abc import Collection, Mapping
from pathlib import Path

from spo.runtime.files import read_json, write_json
from spo.runtime.workspace import SCRATCH

SHIPPED = Path(__file__).with_name("work.json")
OWN = SCRATCH / SHIPPED.name
SIZE = 1024  # of the matrices
# the least and the most of the forecast: a perfect schedule ends a little before, other programs delay it
RANGE = (0.9, 1.6)


def known(experiment: str, stages: Collection[str]) -> dict[str, float] | None:
    """The work of each stage of an experiment; None if that of some stage is not known."""
    found = {**_read(SHIPPED).get(experiment, {}), **_read(OWN).get(experiment, {})}
    return {stage: found[stage] for stage in stages} if found.keys() >= set(stages) else None


def remember(experiment: str, work: Mapping[str, float]) -> None:
    """Note the work of stages that ran in this folder."""
    own = _read(OWN)
    kept = {stage: round(done) for stage, done in work.items()}
    write_json(OWN, own | {experiment: own.get(experiment, {}) | kept})


def _read(path: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = read_json(path, "work of stages") if path.exists() else {}
    return found


def rate() -> float:
    """GFLOP/s of a thread of this machine, by a second of matrix products.

    One thread: several would wait for each other beside another program, and show a tenth of the speed.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix, products, started = torch.ones(SIZE, SIZE), 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < 1:
        matrix @ matrix
        products += 1
    torch.set_num_threads(threads)
    return products * 2 * SIZE**3 / taken / 1e9


def speedup(threads: int) -> float:
    """Of a stage in several threads: 1.2 to 1.6 was measured for two (docs/running.md)."""
    return float(threads**0.5)


def text(seconds: float) -> str:
    """A range around a forecast, in seconds or minutes."""
    unit, size = ("min", 60) if seconds > 90 else ("s", 1)
    low, high = (max(1, round(factor * seconds / size)) for factor in RANGE)
    return f"{low} to {high} {unit}"
