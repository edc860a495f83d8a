"""Seconds and FLOPs of a call, for estimates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

LONG = 3.0  # seconds of a call that is not repeated
Run = Callable[[int], Any]  # of a number of samples


def flops(run: Run) -> int:
    """FLOPs of one sample, of matrix products, convolutions and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run(1)
    return counter.get_total_flops()


def seconds(run: Run, samples: int, device: str) -> float:
    """Seconds of a sample: the shortest of two calls after one that warms up, or a call of LONG alone.

    In one thread on a CPU it is CPU time, in which other work on the machine does not count. Several threads
    sleep while they wait for each other, which CPU time leaves out: theirs is by the clock, of four calls.
    """
    cpu = torch.device(device).type == "cpu"
    alone = cpu and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    found = []
    for _ in range(5 if cpu and not alone else 3):
        started = clock()
        run(samples)
        if not cpu:
            torch.accelerator.synchronize()
        found.append(clock() - started)
        if found[-1] > LONG:
            break
    return min(found[1:] or found) / samples
